"""What every way of reaching a model offers, and the records that pass between it and the runner.

An adapter turns messages into tensors at a pixel budget, encodes them at an operating point, and says what that costs
before any work is done. It decides nothing.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from adaptive_fusion.errors import UnsupportedModelError
from adaptive_fusion.fusion import STRATEGIES, DeepStackFusion, FusionSpec, cut, select_levels
from adaptive_fusion.media.clips import Video
from adaptive_fusion.models.chat_template import ChatTemplate
from adaptive_fusion.models.recorded import Recorded
from adaptive_fusion.models.reuse import Reuse
from adaptive_fusion.models.unwrap import execution_device, unwrap
from adaptive_fusion.point import OperatingPoint
from adaptive_fusion.policy.rungs import Rung


@dataclass(frozen=True, slots=True)
class Size:
    """One image (`frames` 1) or clip: frames, height and width in pixels.

    `exact` says that the processor is already through with it, so that it is not resized any more. `min_pixels`,
    `max_pixels` and `resized` (height and width) are what the caller asked for in place of the processor's own limits;
    `most_pixels` is a limit beside these.
    """

    frames: int
    height: int
    width: int
    clip: bool = False
    exact: bool = False
    min_pixels: int | None = None
    max_pixels: int | None = None
    most_pixels: int | None = None
    resized: tuple[int, int] | None = None

    @property
    def asked(self) -> bool:
        """Whether the caller asked for a size."""
        return any(one is not None for one in (self.min_pixels, self.max_pixels, self.most_pixels, self.resized))


def size_of(part: Mapping[str, Any]) -> Size:
    """The size of the loaded medium in a message's part, with the pixels asked for beside it."""
    medium, frames, clip = part[part["type"]], 1, isinstance(part[part["type"]], Video)
    if clip:
        frames, height, width = medium.frames.shape[:3]
    elif isinstance(medium, np.ndarray):  # an image that is measured only
        height, width = medium.shape[:2]
    else:
        height, width = medium.height, medium.width
    resized = (part["resized_height"], part["resized_width"]) if "resized_height" in part else None
    least, most, beside = (part.get(key) for key in ("min_pixels", "max_pixels", "most_pixels"))
    return Size(frames, height, width, clip, False, least, most, beside, resized)


@dataclass(frozen=True, slots=True)
class VisualPlan:
    """What one operating point means for given media, computed from shapes alone.

    `segments` are patches per attention segment of the encoder (image or frame), `tokens` what the language model
    sees.
    """

    segments: tuple[int, ...]
    tokens: int

    @property
    def patches(self) -> int:
        """All patches the encoder sees."""
        return sum(self.segments)


@dataclass(frozen=True)
class Encoded:
    """Inputs for ``generate`` at an operating point: encoder outputs in place of pixels, placeholders to match.

    `patches` are those that the encoder ran for; `reused` media were there already.
    """

    inputs: dict[str, Any]
    visual_tokens: int
    patches: int
    reused: int = 0


class Planned(ABC):
    """What a planner needs of a model, wherever it runs: which knobs apply, and what a point means for given media."""

    #: Knobs of `OperatingPoint` that this model honours.
    knobs: frozenset[str] = frozenset()
    #: For knobs that are not honoured, the reason, in words for the user.
    refusals: Mapping[str, str] = {}

    @property
    def name(self) -> str:
        """Of the model, for messages."""
        return type(self).__name__

    @abstractmethod
    def plan(self, sizes: Sequence[Size], point: OperatingPoint) -> VisualPlan:
        """Patches and tokens of `sizes` at `point`, from shapes alone."""

    @abstractmethod
    def native_pixels(self, size: Size) -> int:
        """Pixels (per frame) that the processor itself would give this input."""

    def restrict(self, point: OperatingPoint) -> tuple[OperatingPoint, tuple[str, ...]]:
        """The nearest point this model can run, and the reason for every knob that was set aside."""
        reasons = []
        for knob, (_, neutral) in point.knobs().items():
            if knob not in self.knobs and getattr(point, knob) != neutral:
                point = replace(point, **{knob: neutral})
                reasons.append(f"{knob}: {self.refusals.get(knob, 'the model has no such knob')}")
        return point, tuple(reasons)

    def most_native_pixels(self, sizes: Sequence[Size]) -> int:
        """Pixels (per frame) that the processor itself would give the largest of these inputs; 1 without any."""
        return max((self.native_pixels(size) for size in sizes), default=1)

    def resolve(self, rung: Rung, sizes: Sequence[Size], native: int | None = None) -> OperatingPoint:
        """The rung's point for media of these sizes, with the knobs that this model has.

        A share of the native pixels is taken of the largest medium: one budget holds for all of a request. `native` are
        `most_native_pixels`, where they are known already.
        """
        return self.restrict(rung.resolve(self.most_native_pixels(sizes) if native is None else native))[0]

    def require(self, point: OperatingPoint) -> None:
        """Refuse a point that the user asked for by name but this model cannot run.

        Raises:
            UnsupportedModelError: With the knob, its value and the documented reason.
        """
        _, reasons = self.restrict(point)
        if reasons:
            raise UnsupportedModelError(
                f"{self.name} cannot run {point.name}: {'; '.join(reasons)}; "
                f"knobs that apply: {', '.join(sorted(self.knobs))}"
            )

    def untrained(self, point: OperatingPoint) -> bool:
        """Whether `point` fuses by a module that nobody trained for this model."""
        return False

    @property
    def blanks_save_time(self) -> bool:
        """Whether sparing blank parts is known to take less time where the model computes."""
        return True

    def computed(self, point: OperatingPoint) -> OperatingPoint:
        """What is run, and what a prediction is for, at `point`."""
        return point


class Adapter(Planned):
    """One way of reaching a model; subclasses say which knobs apply and why the others do not.

    Attributes:
        outer: The model as it was given, with the wrappers around it: what ``generate`` and forward are called on.
        model: The transformers model in it, which holds configuration and vision encoder; the same object without
            wrappers.
    """

    #: Whether encoder outputs are packed per medium, so that several encoded requests can become one batch.
    packed: bool = False

    def __init__(self, model: nn.Module, processor: Any) -> None:
        self.outer: Any = model
        self.model: Any = unwrap(model)
        self.processor = processor
        self._fusions: dict[FusionSpec, DeepStackFusion] = {}
        self._specs: dict[tuple[str, int, int], FusionSpec] = {}
        self._template = ChatTemplate(processor)

    @property
    def name(self) -> str:
        return type(self.model).__name__

    @classmethod
    @abstractmethod
    def matches(cls, model: nn.Module) -> bool:
        """Whether this adapter can drive `model`."""

    @property
    def encoder(self) -> tuple[nn.Module, ...]:
        """The modules that media go through before the language model."""
        return (self.model,)

    def encoded_sides(self, size: Size, point: OperatingPoint) -> tuple[int, int] | None:
        """Height and width, per frame, at which the encoder sees a medium of this size; None where the outputs of media
        cannot be kept."""
        return None

    @property
    def device(self) -> torch.device:
        """Where the model computes: inputs and fusion modules go there, whatever device its weights wait on."""
        return execution_device(self.model)

    @property
    def blanks_save_time(self) -> bool:
        """Measured on CPUs. On a GPU it took longer, and how it is done there since has not been measured."""
        return self.device.type == "cpu"

    @property
    def dtype(self) -> torch.dtype:
        """Of the model's features and weights, now."""
        found: torch.dtype = self.model.dtype
        return found

    @property
    def depth(self) -> int:
        """Blocks of the vision encoder; 0 if it has no levels to fuse."""
        return 0

    @property
    def taps(self) -> tuple[int, ...]:
        """Native DeepStack taps as block indices, ascending; empty for a model without DeepStack."""
        return ()

    @property
    def end_tokens(self) -> frozenset[int]:
        """Tokens that end an answer, by the model's generation configuration."""
        found = self.outer.generation_config.eos_token_id
        return frozenset(found if isinstance(found, list | tuple) else [] if found is None else [found])

    @property
    def pad_token_id(self) -> int:
        """The token that fills a row up: the tokenizer's, else the one of the generation configuration, else 0."""
        found = getattr(getattr(self.processor, "tokenizer", None), "pad_token_id", None)
        return int(found if found is not None else (self.outer.generation_config.pad_token_id or 0))

    @abstractmethod
    def prepare(
        self,
        messages: Sequence[Mapping[str, Any]],
        point: OperatingPoint,
        *,
        tools: Sequence[Any] = (),
        continues: bool | None = None,
        reuse: Reuse | None = None,
    ) -> dict[str, Any]:
        """The processor's tensors for chat `messages` (media already loaded) within the point's pixel budget, on the
        model's device.

        Args:
            messages: As in `ChatRequest.messages`.
            point: Its knobs before the encoder count.
            tools: Descriptions for the chat template.
            continues: Whether the answer goes on with the last message; None does so if it is the assistant's.
            reuse: What the encoder made of these media before: they are not preprocessed again, and the tensors carry
                it to `encode`.

        Raises:
            ConfigError: If the chat template does not show all that is in the messages.
        """

    @abstractmethod
    def record(self, inputs: Mapping[str, Any], point: OperatingPoint, levels: Sequence[int]) -> Recorded:
        """Run the encoder once, as far as all points with the `encoder_key` of `point` have it in common, and keep the
        outputs of the blocks `levels`, of which a model without taps has none."""

    @abstractmethod
    def encode(self, inputs: Mapping[str, Any], point: OperatingPoint, recorded: Recorded | None = None) -> Encoded:
        """Encode the processor's tensors, fuse and downsample. `inputs` are left as they are.

        With `recorded`, which has to hold the point's levels, the encoder's blocks are not run, and the pixels may be
        missing.
        """

    @abstractmethod
    def sizes(self, inputs: Mapping[str, Any]) -> list[Size]:
        """Sizes of the media in the processor's tensors."""

    @abstractmethod
    def thumbnails(self, inputs: Mapping[str, Any]) -> list[npt.NDArray[np.uint8]]:
        """Media put back together from the processor's tensors, subsampled: ``[H, W, 3]`` or ``[T, H, W, 3]``."""

    def spec(self, point: OperatingPoint) -> FusionSpec | None:
        """What a fusion module for `point` is built for; None where nothing is fused: ``native``, ``top`` and models
        without taps."""
        if not point.fuses or not self.taps:
            return None
        key = point.fusion, point.layers, point.adapter_rank
        if key not in self._specs:
            vision = self.model.config.vision_config
            levels = select_levels(self.depth, self.taps, point.layers)
            self._specs[key] = FusionSpec(
                point.fusion, self.taps, levels, vision.hidden_size, point.adapter_rank, vision.out_hidden_size
            )
        return self._specs[key]

    def untrained(self, point: OperatingPoint) -> bool:
        """Whether `point` fuses by a module that was never added, and that starts as the model's own taps."""
        spec = self.spec(point)
        return spec is not None and spec not in self._fusions and STRATEGIES.get(spec.strategy).starts_native

    def computed(self, point: OperatingPoint) -> OperatingPoint:
        """What is run, and what a prediction is for, at `point`: an untrained fusion is the native computation."""
        return _as_native(point) if self.untrained(point) else point

    def levels(self, point: OperatingPoint) -> tuple[int, ...]:
        """ViT blocks whose outputs take part at `point`."""
        point = self.computed(point)
        spec = self.spec(point)
        if spec is not None:
            return spec.levels
        return self.taps if point.fusion == "native" else ()

    def fusion(self, point: OperatingPoint) -> DeepStackFusion | None:
        """The module that a point runs: one that was added, or one that nothing has to be learned for.

        None where none runs: ``native``, ``top``, models without taps, and what is `untrained`.
        """
        return None if self.untrained(point) else self.build(point)

    def build(self, point: OperatingPoint) -> DeepStackFusion | None:
        """As `fusion`, but an untrained module is added, and run from then on: to train it, or to see what it takes."""
        spec = self.spec(point)
        if spec is None:
            return None
        if spec not in self._fusions:
            # A module that is made within a request must not change what the request samples.
            with torch.random.fork_rng(devices=[]):
                self.add_fusion(DeepStackFusion(spec))
        return self._fusions[spec]

    @contextmanager
    def built(self, points: Iterable[OperatingPoint]) -> Iterator[None]:
        """Inside this context the modules of `points` run even if they are untrained, as trained ones would."""
        before = dict(self._fusions)
        try:
            for point in points:
                self.build(point)
            yield
        finally:
            self._fusions = before

    def follow(self) -> None:
        """Bring the fusion modules to where the model computes now. Their parameters stay float32."""
        for fusion in [fusion for fusion in self._fusions.values() if any(True for _ in fusion.parameters())]:
            self.add_fusion(fusion)  # its parts are cut again: they own nothing that could be moved

    def add_fusion(self, fusion: DeepStackFusion) -> None:
        """Use `fusion` for every point with its spec, and for those with a count of levels that it was trained to serve
        as well, on the model's device; the model itself is not touched."""
        self._fusions[fusion.spec] = fusion.to(self.device).eval()
        fusion.use_device_kernels()
        for count in fusion.spec.elastic:
            levels = select_levels(self.depth, self.taps, count)
            if set(levels) <= set(fusion.spec.levels):
                with torch.no_grad():
                    part = cut(fusion, levels)
                self._fusions[part.spec] = part


@lru_cache(maxsize=4096)
def _as_native(point: OperatingPoint) -> OperatingPoint:
    """A point with the model's own fusion; kept, as every step of a ladder is asked for it in every request."""
    return point.without(("fusion", "layers", "adapter_rank"))


def takes_outputs(model: nn.Module) -> bool:
    """Whether the model's forward takes ``mm_encoder_outputs``, as it says itself."""
    supports = getattr(model, "_supports_mm_encoder_outputs", None)
    return bool(supports and supports())
