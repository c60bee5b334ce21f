"""LMDeploy: ``mm_processor_kwargs`` and ``media_io_kwargs``, each by modality."""

from collections.abc import Mapping
from typing import Any

from adaptive_fusion.serving.gateway.engines.engine import Agreed, Engine, Fields, kinds, without_taken


def fields(body: Mapping[str, Any], agreed: Agreed) -> Fields:
    """The pixels of images and the frames of clips."""
    found: Fields = {}
    shown = kinds(body)
    if agreed.max_pixels is not None and "image_url" in shown:
        least = min(agreed.min_pixels or agreed.max_pixels, agreed.max_pixels)
        found["mm_processor_kwargs"] = {"image": {"min_pixels": least, "max_pixels": agreed.max_pixels}}
    if agreed.max_frames is not None and "video_url" in shown:
        found["media_io_kwargs"] = {"video": {"num_frames": agreed.max_frames}}
    return without_taken(body, found)


ENGINE = Engine(
    "lmdeploy",
    fields,
    logprobs=True,
    notes=("usage counts text and images together",),
    source="lmdeploy/serve/openai/protocol.py",
)
