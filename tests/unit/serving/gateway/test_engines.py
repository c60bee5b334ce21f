"""Extra fields as the engines' own sources have them; what is recorded here is what they read.

vLLM: ``mm_processor_kwargs`` ("Additional kwargs to pass to the HF processor.") and ``media_io_kwargs`` ("keyed by
modality") of ChatCompletionRequest, vllm/entrypoints/openai/chat_completion/protocol.py; ``num_frames`` of video in
docs/features/multimodal_inputs.md. LMDeploy: ``mm_processor_kwargs`` and ``media_io_kwargs`` of ChatCompletionRequest,
lmdeploy/serve/openai/protocol.py, both by modality. SGLang: ``image_tokens`` of ``prompt_tokens_details``,
python/sglang/srt/entrypoints/openai/usage_processor.py.
"""

import json
from typing import Any

import pytest

from adaptive_fusion.errors import ConfigError
from adaptive_fusion.serving.gateway.engines import ENGINES, Agreed, find

IMAGE = {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}
CLIP = {"type": "video_url", "video_url": {"url": "https://example.org/a.mp4"}}
AGREED = Agreed(min_pixels=65536, max_pixels=262144, max_frames=16)

RECORDED = {
    "vllm": {
        "image": {"mm_processor_kwargs": {"min_pixels": 65536, "max_pixels": 262144}},
        "video": {"media_io_kwargs": {"video": {"num_frames": 16}}},
        "both": {"media_io_kwargs": {"video": {"num_frames": 16}}},
    },
    "lmdeploy": {
        "image": {"mm_processor_kwargs": {"image": {"min_pixels": 65536, "max_pixels": 262144}}},
        "video": {"media_io_kwargs": {"video": {"num_frames": 16}}},
        "both": {
            "mm_processor_kwargs": {"image": {"min_pixels": 65536, "max_pixels": 262144}},
            "media_io_kwargs": {"video": {"num_frames": 16}},
        },
    },
}
SHOWN = {"image": [IMAGE], "video": [CLIP], "both": [IMAGE, CLIP], "text": []}


def body(parts: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": [*parts, {"type": "text", "text": "?"}]}], **more}


@pytest.mark.parametrize("name", sorted(ENGINES))
@pytest.mark.parametrize("shown", sorted(SHOWN))
def test_fields_are_those_that_the_engine_reads(name: str, shown: str) -> None:
    engine, request = find(name.upper()), body(SHOWN[shown])
    before = json.dumps(request)
    assert engine.fields(request, AGREED) == RECORDED.get(name, {}).get(shown, {})
    assert engine.fields(request, Agreed()) == {} and json.dumps(request) == before


@pytest.mark.parametrize("name", sorted(ENGINES))
def test_what_the_client_says_goes_before(name: str) -> None:
    own = {"mm_processor_kwargs": {"max_pixels": 1}, "media_io_kwargs": {}}
    assert find(name).fields(body([IMAGE, CLIP], **own), AGREED) == {}


def test_least_never_stands_above_most() -> None:
    for name in RECORDED:
        said = find(name).fields(body([IMAGE]), Agreed(65536, 4096))["mm_processor_kwargs"]
        assert {"min_pixels": 4096, "max_pixels": 4096} in (said, said.get("image"))


@pytest.mark.parametrize("name", sorted(ENGINES))
def test_image_tokens_are_read_where_they_are_counted(name: str) -> None:
    usage = {"prompt_tokens": 300, "prompt_tokens_details": {"cached_tokens": 0, "image_tokens": 240}}
    counts = name in ("sglang", "openai", "dashscope")
    assert find(name).image_tokens(usage) == (240 if counts else None)
    for other in ({}, {"prompt_tokens_details": None}, {"prompt_tokens_details": {"image_tokens": True}}):
        assert find(name).image_tokens(other) is None


def test_an_unknown_engine_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"tgi.*vllm.*ollama"):
        find("tgi")
