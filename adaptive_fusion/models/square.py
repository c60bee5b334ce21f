"""The encoder-output seam of models with a fixed square of tokens per image, such as Gemma 3.

``get_image_features`` gives ``pooler_output`` ``[images, k * k, width]``; downsampling pools that square. The encoder
takes one fixed resolution, so a pixel budget has nothing to save.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from adaptive_fusion.errors import UnsupportedModelError
from adaptive_fusion.fusion import downsample, pooled_grid
from adaptive_fusion.models.base import Adapter, Encoded, Size, VisualPlan, size_of, takes_outputs
from adaptive_fusion.models.chat_template import media_parts
from adaptive_fusion.models.placeholders import Segment, shrink
from adaptive_fusion.models.recorded import Recorded
from adaptive_fusion.models.resize import with_own_options
from adaptive_fusion.models.reuse import REUSE, Medium, Reuse, taken
from adaptive_fusion.point import OperatingPoint


class SquareAdapter(Adapter):
    """Drives Gemma 3: images only, `downsample` only."""

    knobs = frozenset({"downsample"})
    refusals: Mapping[str, str] = {
        **dict.fromkeys(("fusion", "layers", "adapter_rank"), "the model has no DeepStack taps"),
        "max_pixels": "the encoder resizes every image to one fixed square, so fewer pixels save nothing",
        "max_fps": "the model takes images only",
    }

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        config = getattr(model, "config", None)
        return hasattr(config, "mm_tokens_per_image") and takes_outputs(model)

    @property
    def _side(self) -> int:
        return math.isqrt(int(self.model.config.mm_tokens_per_image))

    @property
    def _patches(self) -> int:
        """Patches of every image."""
        vision = self.model.config.vision_config
        return int((vision.image_size // vision.patch_size) ** 2)

    def native_pixels(self, size: Size) -> int:
        return int(self.model.config.vision_config.image_size) ** 2

    def plan(self, sizes: Sequence[Size], point: OperatingPoint) -> VisualPlan:
        self._refuse_other(sizes)
        _, h, w = pooled_grid(1, self._side, self._side, point.downsample)
        return VisualPlan((self._patches,) * len(sizes), h * w * len(sizes))

    def prepare(
        self,
        messages: Sequence[Mapping[str, Any]],
        point: OperatingPoint,
        *,
        tools: Sequence[Any] = (),
        continues: bool | None = None,
        reuse: Reuse | None = None,
    ) -> dict[str, Any]:
        """See `Adapter.prepare`."""
        parts = media_parts(messages)
        self._refuse_other([size_of(part) for part in parts])
        media = {"images": [part["image"] for part in parts]} if parts else {}
        processor = self.processor
        if reuse is not None:
            # Nothing but the pixels is said of an image that is one square.
            square = {"pixel_values": torch.empty(0), "num_crops": torch.zeros(1, dtype=torch.long)}
            known = [square if one is not None else None for one in reuse.of("image")]
            processor = with_own_options(processor, "image_processor", [{}] * len(known), known)
        found = self._template.tensors(messages, tools, continues, processor, **media)
        return {**found.to(self.device), **({REUSE: reuse} if reuse is not None else {})}

    @property
    def encoder(self) -> tuple[nn.Module, ...]:
        inner = self.model.model
        return inner.vision_tower, inner.multi_modal_projector

    def encoded_sides(self, size: Size, point: OperatingPoint) -> tuple[int, int] | None:
        if getattr(self.processor.image_processor, "do_pan_and_scan", False):
            return None  # an image is several squares then
        side = int(self.model.config.vision_config.image_size)
        return side, side

    def _refuse_other(self, sizes: Sequence[Size]) -> None:
        """Refuse clips, and sizes that a caller asked for.

        Raises:
            UnsupportedModelError: With the reason.
        """
        name = type(self.model).__name__
        if any(size.clip for size in sizes):
            raise UnsupportedModelError(f"{name} takes images only; got a clip")
        if any(size.asked for size in sizes):
            raise UnsupportedModelError(
                f"{name} cannot take a size for one image (min_pixels, max_pixels, resized_height and resized_width, "
                f"detail low): {self.refusals['max_pixels']}"
            )

    def sizes(self, inputs: Mapping[str, Any]) -> list[Size]:
        pixels = inputs.get("pixel_values")
        return [] if pixels is None else [Size(1, pixels.shape[-2], pixels.shape[-1], exact=True)] * pixels.shape[0]

    def thumbnails(self, inputs: Mapping[str, Any]) -> list[npt.NDArray[np.uint8]]:
        pixels = inputs.get("pixel_values")
        if pixels is None:
            return []
        mean, std = (
            torch.tensor(getattr(self.processor.image_processor, k)) * 255 for k in ("image_mean", "image_std")
        )
        images = (pixels.float().cpu().permute(0, 2, 3, 1) * std + mean).round().clamp(0, 255).to(torch.uint8)
        return [cast(npt.NDArray[np.uint8], image.numpy()) for image in images]

    @torch.no_grad()
    def record(self, inputs: Mapping[str, Any], point: OperatingPoint, levels: Sequence[int]) -> Recorded:
        """See `Adapter.record`."""
        pixels = inputs.get("pixel_values")
        if pixels is None:
            return Recorded({}, {})
        out = self.model.model.get_image_features(pixels, return_dict=True)
        return Recorded({"image": type(out)(pooler_output=out.pooler_output)}, {"image": {}})

    def encode(self, inputs: Mapping[str, Any], point: OperatingPoint, recorded: Recorded | None = None) -> Encoded:
        """See `Adapter.encode`."""
        reduced: dict[str, Any] = dict(inputs)
        pixels, reuse = reduced.pop("pixel_values", None), taken(reduced)
        if reuse is not None and reuse.of("image"):
            out = self._reused(reuse, pixels)
        elif recorded is not None and recorded.outputs:
            source = recorded.outputs["image"]
            out = type(source)(pooler_output=source.pooler_output)
        elif pixels is not None:
            out = self.model.model.get_image_features(pixels, return_dict=True)
        else:
            return Encoded(reduced, 0, 0)
        images, count, width = out.pooler_output.shape
        side = self._side
        _, h, w = pooled_grid(1, side, side, point.downsample)
        if point.downsample != 1.0:
            pooled = downsample(out.pooler_output.reshape(-1, width), [(1, side, side)] * images, point.downsample)
            out.pooler_output = pooled.view(images, h * w, width)
        segments = {self.model.config.image_token_id: [Segment(count, h * w)] * images}
        reduced = shrink(reduced, segments, self.pad_token_id)
        hits = reuse.hits if reuse is not None else 0
        patches = (images - hits) * self._patches
        return Encoded({**reduced, "mm_encoder_outputs": {"image": out}}, images * h * w, patches, hits)

    def _reused(self, reuse: Reuse, pixels: Any) -> Any:
        """The encoder's output, made only for the images that are not there."""
        reuse.count()
        made: list[Medium] = []
        if any(one is None for one in reuse.of("image")):
            out, side = self.model.model.get_image_features(pixels, return_dict=True), self._side
            made = [Medium(type(out), (1, side, side), merged, ()) for merged in out.pooler_output]
        whole = reuse.keep("image", made)
        return whole[0].form(pooler_output=torch.stack([one.merged for one in whole]))
