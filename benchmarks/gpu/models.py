"""The models and requests that the parts measure: true shapes with random weights, or tiny ones of the same family.

The shapes get the reference model's tokenizer and chat template, so that a request goes its whole way, messages
included; the vocabulary and with it the cost stay those of the shape. Knows shapes and processors. Must not know what
is measured.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image

from adaptive_fusion.bench.cost import Workload, build_random
from adaptive_fusion.bench.shapes import IDS, Shape, ShapeProcessor, Vision, shape
from adaptive_fusion.cost.estimate import analytic_profile, device_rates, model_shape
from adaptive_fusion.cost.model import CostModel, Work
from adaptive_fusion.cost.profiles import profile_key
from adaptive_fusion.media.clips import Video
from adaptive_fusion.models import Adapter, Size, adapter_for
from adaptive_fusion.point import OperatingPoint
from adaptive_fusion.reference import model_path
from adaptive_fusion.runner import AdaptiveRunner

T = TypeVar("T")
QUESTION = "Describe the screen."
TINY = Shape(64, 2, 4, 2, 96, Vision(32, 6, 48, (0, 1, 3), heads=2))


@dataclass(frozen=True)
class Scale:
    """What is measured how large: the true shapes on a device, or tiny ones.

    Attributes:
        device: Where.
        tiny: A model of next to no weights under every name, small images, few repeats.
    """

    device: torch.device
    tiny: bool = False

    @property
    def repeats(self) -> int:
        """Times that everything is measured."""
        return 2 if self.tiny else 10

    def side(self, pixels: int) -> int:
        """Of a square image; at a tiny scale a sixteenth of it."""
        return max(64, pixels // 16) if self.tiny else pixels

    def few(self, items: Sequence[T], most: int = 1) -> Sequence[T]:
        """All of them; at a tiny scale the first, where the others would run the same code again."""
        return items[:most] if self.tiny else items

    def adapter(self, size: str) -> Adapter:
        """The model of that size; built once."""
        return _built(size, self.device, self.tiny)

    def runner(self, size: str, policy: str = "balanced") -> AdaptiveRunner:
        """A runner of that size, or of the reference model."""
        if size == "reference":
            return AdaptiveRunner.from_pretrained("reference", policy="auto", device=self.device)
        adapter = self.adapter(size)
        return AdaptiveRunner(adapter.model, adapter.processor, policy=policy)


@cache
def _built(size: str, device: torch.device, tiny: bool) -> Adapter:
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    return talking(build_random(TINY if tiny else shape(size), str(device), dtype))


def forget() -> None:
    """Let go of all models."""
    _built.cache_clear()


def talking(model: Any) -> Adapter:
    """An adapter of a model of a released shape that can be asked in words."""
    from transformers import AutoProcessor, Qwen3VLProcessor

    spoken, seen = AutoProcessor.from_pretrained(model_path()), ShapeProcessor()
    processor = Qwen3VLProcessor(
        image_processor=seen.image_processor,
        video_processor=seen.video_processor,
        tokenizer=spoken.tokenizer,
        chat_template=spoken.chat_template,
    )
    for name in IDS:
        setattr(model.config, name, getattr(processor, name))
    return adapter_for(model, processor)


@dataclass(frozen=True)
class Request(Workload):
    """One square image, or a clip of `frames`, and a question; of an image with `ground` the left half is white. Its
    tensors are made once for each point."""

    frames: int = 1
    ground: bool = False
    kept: dict[OperatingPoint, dict[str, Any]] = field(default_factory=dict, compare=False, repr=False)

    def size(self) -> Size:
        return Size(self.frames, self.side, self.side, clip=self.frames > 1)

    def inputs(self, adapter: Adapter, point: OperatingPoint) -> dict[str, Any]:
        """See `Adapter.prepare`."""
        key = OperatingPoint(max_pixels=point.max_pixels)
        if key not in self.kept:
            self.kept[key] = adapter.prepare([self.message()], point)
        return self.kept[key]

    def message(self, seed: int = 0) -> dict[str, Any]:
        """The request as a chat message."""
        medium = noise(self.side, seed, self.frames)
        if self.ground:
            medium.paste("white", (0, 0, self.side // 2, self.side))
        part = {"type": "image", "image": medium} if self.frames == 1 else {"type": "video", "video": medium}
        return {"role": "user", "content": [part, {"type": "text", "text": QUESTION}]}

    def work(self, adapter: Adapter, point: OperatingPoint, batch: int = 1) -> Work:
        """What the cost model is told of it, for `batch` of them together."""
        plan = adapter.plan([self.size()], point)
        said = self.inputs(adapter, point)["input_ids"].shape[1] - adapter.plan([self.size()], _before(point)).tokens
        segments = plan.segments
        if self.ground and point.blanks is not None:  # but for the border of the half that has something to show
            segments = tuple(round(count * (1 + 1 / point.blanks**2) / 2) for count in segments)
        return Work(segments * batch, batch * (said + plan.tokens), self.new_tokens, batch=batch)


def _before(point: OperatingPoint) -> OperatingPoint:
    """The point with the knobs before the encoder alone: what the prompt is written for."""
    return OperatingPoint(max_pixels=point.max_pixels)


def noise(side: int, seed: int, frames: int = 1) -> Any:
    """An image of random pixels, or a clip of them at two frames a second."""
    rng = np.random.default_rng(seed)
    if frames == 1:
        return Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8))
    pixels = rng.integers(0, 256, (frames, side, side, 3), dtype=np.uint8)
    return Video(pixels, tuple(i / 2 for i in range(frames)), frames / 2, frames)


def several(adapter: Adapter, sides: Sequence[int]) -> dict[str, Any]:
    """One request with an image of each side."""
    images = [{"type": "image", "image": noise(side, seed)} for seed, side in enumerate(sides)]
    message = {"role": "user", "content": [*images, {"type": "text", "text": QUESTION}]}
    return adapter.prepare([message], OperatingPoint())


def analytic(adapter: Adapter) -> CostModel:
    """What is predicted from the shape and the guessed rates of a device alone, before anything is measured."""
    profile = analytic_profile(
        model_shape(adapter),
        profile_key(adapter),
        dtype_bytes=adapter.dtype.itemsize,
        rates=device_rates(str(adapter.device)),
    )
    return CostModel(profile)


def exactly(tokens: int) -> dict[str, Any]:
    """Options of ``generate`` for an answer of that many tokens."""
    return {"min_new_tokens": tokens, "max_new_tokens": tokens, "do_sample": False}
