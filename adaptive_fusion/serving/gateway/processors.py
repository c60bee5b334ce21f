"""How the model upstream resizes an image and how many tokens it makes of it, known without the model.

The engine behind a gateway resizes by its model's image processor. Its rule is that of transformers; its numbers come
from a preset, or from the processor's configuration in a folder, in the cache of the hub, or on the hub. No weights are
loaded and no remote code is executed. Must not know of requests, engines or plans.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from adaptive_fusion.checks import integer
from adaptive_fusion.errors import ConfigError, UnsupportedModelError
from adaptive_fusion.models.base import Size
from adaptive_fusion.models.resize import counts_frames, own_rule, resized
from adaptive_fusion.reference import model_path

PRESETS: dict[str, tuple[int, int, int, int, int]] = {
    "qwen2-vl": (14, 2, 2, 56 * 56, 28 * 28 * 16384),
    "qwen2.5-vl": (14, 2, 2, 56 * 56, 28 * 28 * 16384),
    "qwen3-vl": (16, 2, 2, 256 * 256, 4096 * 4096),
}
"""Patch, merge, temporal patch, least and most pixels by name, as the models' published ``preprocessor_config.json``
has them."""
_EDGES = ("shortest_edge", "longest_edge")
MAX_ASPECT = 200


@dataclass(frozen=True)
class ImageGrid:
    """The patch grid of a model's images and the limits of its processor.

    Args:
        patch: Side of a patch, in pixels.
        merge: Patches along each side that make one token.
        temporal: Frames of a clip that make one token in time.
        min_pixels: Below this an image is enlarged upstream.
        max_pixels: Above this it is shrunk upstream.
        processor: transformers' image processor whose rule holds; None takes that of Qwen2-VL, which Qwen3-VL shares.
    """

    patch: int
    merge: int
    temporal: int
    min_pixels: int
    max_pixels: int
    processor: Any = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("patch", "merge", "temporal", "min_pixels"):
            integer(getattr(self, name), f"ImageGrid.{name}", 1)
        integer(self.max_pixels, "ImageGrid.max_pixels", self.min_pixels)
        if self.processor is None:
            object.__setattr__(self, "processor", _qwen(self))

    @property
    def side(self) -> int:
        """Sides of what the model sees are multiples of this, in pixels; its square makes one token."""
        return self.patch * self.merge

    def size(self, width: int, height: int, max_pixels: int | None = None) -> tuple[int, int]:
        """(width, height) at which the model sees an upright image that is first brought to `max_pixels`.

        An image of exactly this size is left alone upstream. A budget below the processor's least is raised to it, as
        the image would be enlarged again. None gives what the processor does by itself.
        """
        native = self._sides(width, height, None)
        if max_pixels is None:
            return native
        within = self._sides(width, height, max(max_pixels, self.min_pixels, self.side**2))
        if max(within) > MAX_ASPECT * min(within):  # rounded to a strip that would be refused upstream
            return native
        seen = self._sides(*within, None)  # sides are rounded down: that may have been below the least
        return seen if seen[0] * seen[1] < native[0] * native[1] else native

    def tokens(self, width: int, height: int, max_pixels: int | None = None) -> int:
        """Tokens that the language model gets of an image at `size`."""
        wide, high = self.size(width, height, max_pixels)
        return (wide // self.side) * (high // self.side)

    def _sides(self, width: int, height: int, max_pixels: int | None) -> tuple[int, int]:
        high, wide = resized(self.processor, Size(1, height, width), max_pixels)
        return wide, high


@cache
def find(spec: str) -> ImageGrid:
    """The grid of a preset, of the processor in a folder, or of one of the hub, which is looked for offline first.

    Args:
        spec: A name in `PRESETS`, ``reference``, a path or a hub id.

    Raises:
        ConfigError: If no image processor is found there.
        UnsupportedModelError: If its rule is not one of patches that follow the image's size.
    """
    if spec.lower() in PRESETS:
        return ImageGrid(*PRESETS[spec.lower()])
    return _of_processor(spec, _loaded(str(model_path()) if spec == "reference" else spec))


def _qwen(grid: ImageGrid) -> Any:
    from transformers import Qwen2VLImageProcessor

    limits = {"shortest_edge": grid.min_pixels, "longest_edge": grid.max_pixels}
    return Qwen2VLImageProcessor(
        patch_size=grid.patch, merge_size=grid.merge, temporal_patch_size=grid.temporal, size=limits
    )


def _loaded(spec: str) -> Any:
    """The image processor of a folder or hub id."""
    from transformers import AutoImageProcessor

    try:
        try:
            return AutoImageProcessor.from_pretrained(spec, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError):
            if Path(spec).exists():
                raise
            return AutoImageProcessor.from_pretrained(spec, trust_remote_code=False)
    except Exception as error:  # whatever a hub or a configuration can raise
        raise ConfigError(
            f"no image processor is found for {Path(spec).name!r} ({type(error).__name__}); expected "
            f"{', '.join((*PRESETS, 'reference'))}, a folder with preprocessor_config.json or a hub id"
        ) from error


def _of_processor(spec: str, processor: Any) -> ImageGrid:
    """The grid of a loaded processor whose rule is known."""
    rule = own_rule(processor)
    try:
        if rule is None:
            raise TypeError("it has no rule by patches")
        edges = processor.size
        limits = [int(edges[k] if isinstance(edges, Mapping) else getattr(edges, k)) for k in _EDGES]
        numbers = (int(processor.patch_size), int(processor.merge_size), int(processor.temporal_patch_size))
        stills = numbers[2] if counts_frames(rule) else 1  # a still counts as often as it is repeated
        grid = ImageGrid(*numbers, max(1, limits[0] // stills), max(1, limits[1] // stills), processor)
        if any(side % grid.side for side in grid.size(640, 480)):
            raise ValueError("its sides are not multiples of a token's")
    except (AttributeError, TypeError, ValueError, KeyError) as error:
        raise UnsupportedModelError(
            f"{Path(spec).name}: what {type(processor).__name__} makes of an image is not known ({error}); expected "
            f"one of {', '.join(PRESETS)}, or a processor that resizes to multiples of its patches as theirs do"
        ) from error
    return grid
