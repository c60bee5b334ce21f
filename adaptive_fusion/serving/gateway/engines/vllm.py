"""vLLM: ``mm_processor_kwargs`` and ``media_io_kwargs``, for all of a request."""

from collections.abc import Mapping
from typing import Any

from adaptive_fusion.serving.gateway.engines.engine import Agreed, Engine, Fields, kinds, without_taken


def fields(body: Mapping[str, Any], agreed: Agreed) -> Fields:
    """The pixels of images, unless there are clips, which would get them too; the frames of clips."""
    found: Fields = {}
    shown = kinds(body)
    if agreed.max_pixels is not None and "image_url" in shown and "video_url" not in shown:
        # transformers' processor takes the two together only.
        least = min(agreed.min_pixels or agreed.max_pixels, agreed.max_pixels)
        found["mm_processor_kwargs"] = {"min_pixels": least, "max_pixels": agreed.max_pixels}
    if agreed.max_frames is not None and "video_url" in shown:
        found["media_io_kwargs"] = {"video": {"num_frames": agreed.max_frames}}
    return without_taken(body, found)


ENGINE = Engine(
    "vllm",
    fields,
    logprobs=True,
    notes=(
        "pixels are limited for all images of a request, not for one",
        "usage counts text and images together",
    ),
    source="vllm/entrypoints/openai/chat_completion/protocol.py",
)
