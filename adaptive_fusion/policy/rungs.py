"""A rung: an operating point with the quality expected of it and its share of the native pixels.

Knows one step of a ladder. Must not know of lanes, policies, models or costs.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from adaptive_fusion.checks import integer, number
from adaptive_fusion.errors import PolicyError
from adaptive_fusion.point import MAX_PIXELS, MIN_PIXELS, OperatingPoint

_SHARE = re.compile(r"(?P<point>.*)/(?P<percent>\d+(?:\.\d+)?)%")


@dataclass(frozen=True, slots=True)
class Rung:
    """One step of a ladder: an operating point and the quality expected of it.

    Attributes:
        point: The knobs, as they hold for every model and input.
        quality: Expected quality, 0 to 1, native's own being the measure.
        pixel_share: Share of the pixels that the request would have natively (after the processor's own
            limit), in (0, 1]. A share means the same on a model that takes 0.15 megapixels and on one that
            takes 16, where a number of pixels does not; `point.max_pixels` still caps it.

    Raises:
        PolicyError: For a quality or a share out of range.
    """

    point: OperatingPoint
    quality: float = 1.0
    pixel_share: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.point, OperatingPoint):
            raise PolicyError(f"point is {self.point!r}; expected an OperatingPoint")
        quality = number(self.quality, "quality", 0, 1, error=PolicyError)
        share = number(self.pixel_share, "pixel_share", above=0, high=1, error=PolicyError)
        object.__setattr__(self, "quality", quality)
        object.__setattr__(self, "pixel_share", share)

    @property
    def name(self) -> str:
        """The point's name with the share, such as ``weighted6r4@0.5/25%``: the same for every request."""
        return self.point.name if self.pixel_share == 1 else f"{self.point.name}/{100 * self.pixel_share:g}%"

    @classmethod
    def parse(cls, name: str) -> "Rung":
        """The rung that `name` writes as this text: a point, with an optional share of the native pixels (``/25%``).

        Raises:
            ConfigError: As `OperatingPoint.parse`.
            PolicyError: For a share that is not above 0 and at most 100 %.
        """
        found = _SHARE.fullmatch(name)
        point = OperatingPoint.parse(found["point"] if found else name)
        return cls(point, pixel_share=float(found["percent"]) / 100 if found else 1.0)

    @property
    def is_full(self) -> bool:
        """Whether the model sees all that it would natively."""
        return self.pixel_share == 1 and self.point.is_full

    def resolve(self, native_pixels: int) -> OperatingPoint:
        """The point for an image or frame of `native_pixels`, counted after the processor's own limit.

        Fewer frames are no larger: the processor limits the whole clip, so that each of fewer would be given more
        pixels than each of all.

        Raises:
            ConfigError: If `native_pixels` is not a positive integer.
        """
        integer(native_pixels, "native_pixels", 1)
        if self.pixel_share == 1 and self.point.max_fps is None:
            return self.point
        pixels = min(MAX_PIXELS, max(MIN_PIXELS, round(native_pixels * self.pixel_share)))
        return _within(self.point, min(pixels, self.point.max_pixels or pixels))

    def to_dict(self) -> dict[str, Any]:
        """TOML-able values."""
        share = {} if self.pixel_share == 1 else {"pixel_share": self.pixel_share}
        return {**self.point.to_dict(), **share, "quality": self.quality}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Rung":
        """Read `to_dict`'s form; raises ConfigError for unknown knobs and values out of range."""
        if not isinstance(values, Mapping):
            raise PolicyError(f"rung is {values!r}; expected a table of knobs and quality")
        if "quality" not in values:
            raise PolicyError(f"a rung has {sorted(values)} and no quality; expected its expected quality, 0 to 1")
        point = {key: value for key, value in values.items() if key not in ("quality", "pixel_share")}
        return cls(OperatingPoint.from_dict(point), values["quality"], values.get("pixel_share", 1.0))


@lru_cache(maxsize=4096)
def _within(point: OperatingPoint, pixels: int) -> OperatingPoint:
    """A point with a pixel budget; kept, as images come in few sizes and to check a point takes longer than to look."""
    return replace(point, max_pixels=pixels)
