"""Models and inputs shared by the tests: the embedded reference model and tiny random ones of the same family."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["ADAPTIVE_FUSION_NO_USER_POLICY"] = "1"  # whoever runs the tests may have policies of their own

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

from adaptive_fusion.media.clips import Video
from adaptive_fusion.reference import model_path
from adaptive_fusion.reference.screens import make_scene

torch.set_num_threads(1)
# How long an example takes says something of the machine, nothing of what is tested. The same code is tested by the
# same examples; HYPOTHESIS_PROFILE=explore draws others each time.
for name, fixed in (("suite", True), ("explore", False)):
    settings.register_profile(
        name, deadline=None, derandomize=fixed, suppress_health_check=[HealthCheck.too_slow], database=None
    )
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "suite"))


@pytest.fixture(scope="session")
def load_benchmark() -> Callable[[str], ModuleType]:
    """A script of benchmarks/ as a module, by its name without ending."""

    def load(name: str) -> ModuleType:
        path = Path(__file__).parents[1] / "benchmarks" / f"{name}.py"
        spec = importlib.util.spec_from_file_location(f"{name}_benchmark", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="session")
def processor() -> Any:
    return AutoProcessor.from_pretrained(model_path())


@pytest.fixture(scope="session")
def reference_model() -> Any:
    return AutoModelForImageTextToText.from_pretrained(model_path()).eval()


def tiny_text(tokenizer: Any) -> dict[str, Any]:
    """A language model of two layers that shares the reference tokenizer."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "mrope_section": [4, 2, 2],
            "mrope_interleaved": True,
        },
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def tiny_vision() -> dict[str, Any]:
    """A ViT of eight blocks with taps 1, 3, 5 and levels above the last tap."""
    return {
        "depth": 8,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "patch_size": 8,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": 32,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [1, 3, 5],
    }


def token_ids(processor: Any) -> dict[str, int]:
    return {
        "image_token_id": processor.image_token_id,
        "video_token_id": processor.video_token_id,
        "vision_start_token_id": processor.vision_start_token_id,
        "vision_end_token_id": processor.vision_end_token_id,
    }


def _random(model: Any, seed: int = 0) -> Any:
    """Weights large enough that outputs depend visibly on the image."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.12)
    return model.eval()


@pytest.fixture(scope="session")
def tiny_dense(processor: Any) -> Any:
    config = Qwen3VLConfig(
        text_config=tiny_text(processor.tokenizer), vision_config=tiny_vision(), **token_ids(processor)
    )
    return _random(Qwen3VLForConditionalGeneration(config))


@pytest.fixture(scope="session")
def tiny_moe(processor: Any) -> Any:
    text = {
        **tiny_text(processor.tokenizer),
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
    }
    config = Qwen3VLMoeConfig(text_config=text, vision_config=tiny_vision(), **token_ids(processor))
    return _random(Qwen3VLMoeForConditionalGeneration(config))


@pytest.fixture(scope="session", params=["dense", "moe", "reference"])
def any_model(request: pytest.FixtureRequest) -> Any:
    """Each Qwen3-VL that the contracts are checked on."""
    name = {"dense": "tiny_dense", "moe": "tiny_moe", "reference": "reference_model"}[request.param]
    return request.getfixturevalue(name)


@pytest.fixture(scope="session")
def noise_image() -> Callable[[int, int, int], Image.Image]:
    def make(width: int, height: int, seed: int = 0) -> Image.Image:
        rng = np.random.default_rng(seed)
        return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))

    return make


@pytest.fixture(scope="session")
def clip() -> Video:
    frames = np.stack([np.asarray(frame) for frame in make_scene("clip", 0, "eval", (160, 160)).frames])
    return Video(frames, tuple(i / 2 for i in range(len(frames))), len(frames) / 2, len(frames))
