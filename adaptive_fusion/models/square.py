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
    ) -> dict[str, Any]:
        """See `Adapter.prepare`."""
        parts = media_parts(messages)
        self._refuse_other([size_of(part) for part in parts])
        media = {"images": [part["image"] for part in parts]} if parts else {}
        return dict(self._template.tensors(messages, tools, continues, **media).to(self.device))

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
        pixels = reduced.pop("pixel_values", None)
        if recorded is not None and recorded.outputs:
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
        return Encoded({**reduced, "mm_encoder_outputs": {"image": out}}, images * h * w, images * self._patches)
