"""A model's measured costs on this machine: the key they hold for, the profile in use, and how it is measured.

Sits above the models (it reads their shapes) and beside the runner (which it drives to measure). The fit and the cache
files are `profiles`'s.
"""

import hashlib
import os
import platform
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from adaptive_fusion.cost import Profile
from adaptive_fusion.models.base import Adapter
from adaptive_fusion.point import MIN_PIXELS, NATIVE, OperatingPoint
from adaptive_fusion.profiles import (
    ModelShape,
    Sample,
    analytic_profile,
    fit_profile,
    load_profile,
    save_profile,
    user_cache_dir,
)

if TYPE_CHECKING:
    from adaptive_fusion.runner import AdaptiveRunner

PIXEL_SHARES = (1.0, 0.5, 0.25, 0.12)
ANSWERS = (4, 24)
RATES = {"cuda": (1e14, 1e12), "cpu": (4e10, 1e10)}
"""Guessed operations and bytes per second of a device, until the first requests correct them."""


def profile_key(adapter: Adapter) -> dict[str, str]:
    """What a profile depends on: model configuration, device, dtype, attention backend and versions."""
    import torch

    model = adapter.model
    config = model.config
    device = torch.device(model.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    shape = config.to_json_string(use_diff=False) if hasattr(config, "to_json_string") else repr(config)
    return {
        "model": f"{type(model).__name__}-{hashlib.sha256(shape.encode()).hexdigest()[:16]}",
        "device": f"{device.type}:{name}:{torch.get_num_threads() if device.type == 'cpu' else ''}",
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": str(getattr(config, "_attn_implementation", None)),
        "torch": torch.__version__,
        "transformers": _version("transformers"),
        "adaptive_fusion": _version("adaptive-fusion"),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def model_shape(adapter: Adapter) -> ModelShape:
    """The numbers that an estimate from shapes alone needs."""
    vision, text = adapter.model.config.vision_config, adapter.model.config.get_text_config()
    patch = int(vision.patch_size) ** 2 * int(getattr(vision, "temporal_patch_size", 1))
    experts = int(getattr(text, "num_experts_per_tok", 0) or 0)
    mlp = int(getattr(text, "moe_intermediate_size", 0) or 0) * experts or int(text.intermediate_size)
    return ModelShape(
        vision_depth=int(getattr(vision, "depth", 0) or vision.num_hidden_layers),
        vision_width=int(vision.hidden_size),
        vision_mlp=int(vision.intermediate_size),
        patch_dim=3 * patch,
        text_layers=int(text.num_hidden_layers),
        text_width=int(text.hidden_size),
        text_mlp=mlp,
        heads=int(text.num_attention_heads),
        kv_heads=int(getattr(text, "num_key_value_heads", None) or text.num_attention_heads),
        head_dim=int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads),
        vocab=int(text.vocab_size),
    )


def find_profile(adapter: Adapter) -> tuple[Profile, str]:
    """The measured profile in the user's cache if it holds here, else an estimate; and a sentence that says which."""
    key = profile_key(adapter)
    profile, note = load_profile(user_cache_dir(os.environ), key)
    if profile is not None:
        return profile, note
    flops, rate = RATES["cuda" if key["device"].startswith("cuda") else "cpu"]
    estimate = analytic_profile(
        model_shape(adapter),
        key,
        dtype_bytes=int(adapter.model.dtype.itemsize),
        flops_per_s=flops,
        bytes_per_s=rate,
    )
    return estimate, f"estimated from the model's shape: {note}"


def calibrate(
    runner: "AdaptiveRunner",
    *,
    repeats: int = 2,
    save: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> Profile:
    """Measure requests over sizes, downsampling, fusion and answer lengths; fit, save and use the profile.

    Args:
        runner: The model to measure; its controller starts anew afterwards.
        repeats: Times each request is measured, after one to warm up.
        save: Keep the profile in the user's cache directory, where `find_profile` looks.
        progress: Called with (done, all) after each request.
    """
    from adaptive_fusion.reference.screens import make_scene

    image = make_scene("dense", 0, "train", (384, 384)).image
    plan = _requests(runner.adapter, image.width * image.height)
    samples: list[Sample] = []
    total, done = len(plan) * (repeats + 1), 0
    for point, tokens in plan:
        for turn in range(repeats + 1):
            reply = runner.chat(image, "Describe.", point=point, max_new_tokens=tokens, min_new_tokens=tokens)
            if turn:
                measured = reply.measurement
                samples.append((point, runner.work(image, "Describe.", point, measured.new_tokens), measured))
            done += 1
            if progress is not None:
                progress(done, total)
    profile = fit_profile(samples, profile_key(runner.adapter))
    if save:
        save_profile(user_cache_dir(os.environ), profile)
    runner.use_profile(profile)
    return profile


def _requests(adapter: Adapter, pixels: int) -> list[tuple[OperatingPoint, int]]:
    shapes: list[OperatingPoint] = []
    for share in PIXEL_SHARES:
        for ratio in (1.0, 0.5, 0.25):
            limit = None if share == 1.0 else max(MIN_PIXELS, int(pixels * share))
            shapes.append(replace(NATIVE, downsample=ratio, max_pixels=limit))
    shapes += [
        OperatingPoint("weighted", 6, adapter_rank=4),
        OperatingPoint("gated", 12, adapter_rank=8),
        OperatingPoint("gated", 12, 0.5, max(MIN_PIXELS, pixels // 4), 8),
    ]
    points = dict.fromkeys(adapter.restrict(point)[0] for point in shapes)
    return [(point, tokens) for point in points for tokens in ANSWERS]
