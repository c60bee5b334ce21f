"""The operating point: the five knobs of visual compute (and the frame rate of clips), validated where it is built.

Knows what the knobs may be, not what they do: `fusion` combines levels, `models` applies a point to a model.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from adaptive_fusion.errors import ConfigError

FUSIONS = ("gated", "native", "sum", "top", "weighted")
LAYERS = (3, 6, 9, 12)
DOWNSAMPLES = (1.0, 0.5, 0.25)
RANKS = (0, 4, 8, 16)
MIN_PIXELS = 1024
MAX_PIXELS = 1 << 28


@dataclass(frozen=True, slots=True)
class OperatingPoint:
    """How much visual compute one request gets.

    Attributes:
        fusion: How multi-level ViT features are combined: ``native``, ``top``, ``sum``, ``weighted`` or ``gated``.
        layers: How many ViT levels take part: 3, 6, 9 or 12, clipped to what the model has.
        downsample: Linear ratio of the visual grid after the encoder: 1.0, 0.5 (1/4 of the tokens) or 0.25.
        max_pixels: Pixel budget before the encoder, per image or frame; None leaves the processor's own.
        adapter_rank: Rank of the per-level adapters: 0, 4, 8 or 16.
        max_fps: Frames a second taken from a clip; None leaves the processor's own.

    Raises:
        ConfigError: If a value is not one of the choices above.
    """

    fusion: str = "native"
    layers: int = 3
    downsample: float = 1.0
    max_pixels: int | None = None
    adapter_rank: int = 0
    max_fps: float | None = None

    def __post_init__(self) -> None:
        for name, choices in (
            ("fusion", FUSIONS),
            ("layers", LAYERS),
            ("downsample", DOWNSAMPLES),
            ("adapter_rank", RANKS),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or value not in choices:
                raise ConfigError(f"{name} is {value!r}; expected one of {', '.join(map(str, choices))}")
        pixels = self.max_pixels
        if pixels is not None and (
            isinstance(pixels, bool) or not isinstance(pixels, int) or not MIN_PIXELS <= pixels <= MAX_PIXELS
        ):
            raise ConfigError(
                f"max_pixels is {pixels!r}; expected None or an integer from {MIN_PIXELS} to {MAX_PIXELS}"
            )
        fps = self.max_fps
        if fps is not None and (isinstance(fps, bool) or not isinstance(fps, int | float) or not 0 < fps <= 120):
            raise ConfigError(f"max_fps is {fps!r}; expected None or a number above 0, at most 120")
        object.__setattr__(self, "downsample", float(self.downsample))
        for name in ("layers", "adapter_rank"):
            object.__setattr__(self, name, int(getattr(self, name)))

    @property
    def name(self) -> str:
        """Short readable form, such as ``weighted6r4@0.5/65536px``."""
        parts = [self.fusion]
        if self.fusion not in ("native", "top"):
            parts.append(f"{self.layers}r{self.adapter_rank}" if self.adapter_rank else f"{self.layers}")
        parts.append(f"@{self.downsample:g}")
        if self.max_pixels is not None:
            parts.append(f"/{self.max_pixels}px")
        if self.max_fps is not None:
            parts.append(f"/{self.max_fps:g}fps")
        return "".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON and TOML can hold; knobs that are None are left out."""
        return {key: value for key, value in asdict(self).items() if value is not None}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "OperatingPoint":
        """Read `to_dict`'s form.

        Raises:
            ConfigError: For an unknown knob or a value that is not one of its choices.
        """
        known = [field.name for field in fields(cls)]
        if not isinstance(values, Mapping):
            raise ConfigError(f"operating point is {values!r}; expected a table of {', '.join(known)}")
        unknown = sorted(str(name) for name in values if name not in known)
        if unknown:
            raise ConfigError(f"operating point has unknown knobs {unknown}; expected {', '.join(known)}")
        return cls(**values)


NATIVE = OperatingPoint()
"""The model untouched."""
