"""The operating point: the knobs of visual compute, validated where it is built, and what each says of itself.

A knob is declared once, with `knob`: where it acts, which values it may have, how it stands in a point's name. Names,
files, the keys of recordings and what an adapter sets aside follow from that. Knows what the knobs may be, not what
they do: `fusion` combines levels, `models` applies a point to a model.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, Self, get_args

from adaptive_fusion.checks import is_integer, is_number
from adaptive_fusion.errors import ConfigError

Fusion = Literal["gated", "native", "sum", "top", "weighted"]
Layers = Literal[3, 6, 9, 12]
Rank = Literal[0, 4, 8, 16]
FUSIONS: tuple[str, ...] = get_args(Fusion)
LAYERS: tuple[int, ...] = get_args(Layers)
RANKS: tuple[int, ...] = get_args(Rank)
DOWNSAMPLES = (1.0, 0.5, 0.25)
"""Not a type: there are no literal types of floats."""
MIN_PIXELS = 1024
MAX_PIXELS = 1 << 28
MAX_SIDE = 8

_NUMBER = r"\d+(?:\.\d+)?(?:e[+-]?\d+)?"
_HEAD = re.compile(
    rf"(?P<fusion>[A-Za-z_-]+)(?:(?P<layers>\d+)(?:r(?P<adapter_rank>\d+))?)?(?:@(?P<downsample>{_NUMBER})?)?"
)
_KNOBS: dict[type, dict[str, tuple["Knob", Any]]] = {}
_PART = re.compile(rf"/(?P<value>{_NUMBER})(?P<unit>[a-z]+)")


Acts = Literal["before", "inside", "after"]


@dataclass(frozen=True)
class Knob:
    """What a knob says of itself.

    Attributes:
        acts: ``before`` the encoder (on pixels and frames), ``inside`` it (on what its blocks compute) or ``after`` it
            (on what they gave: levels and tokens).
        valid: Whether it may have a value.
        expected: The values it may have, in words.
        reduces: Whether any value but its default takes something away from what the model would see.
        unit: Ends its part of a point's name, ``/65536px``; empty for those that the name begins with.
        kind: Of its values.
    """

    acts: Acts
    valid: Callable[[Any], bool]
    expected: str
    reduces: bool = True
    unit: str = ""
    kind: type = float


def knob(default: Any, acts: Acts, valid: Callable[[Any], bool], expected: str, **more: Any) -> Any:
    """A field of `OperatingPoint`; see `Knob` for the arguments."""
    return field(default=default, metadata={"knob": Knob(acts, valid, expected, **more)})


def _one_of(default: Any, choices: tuple[Any, ...], *, reduces: bool, kind: type) -> Any:
    def valid(value: Any) -> bool:
        return (kind is str or is_number(value)) and value in choices

    return knob(default, "after", valid, f"one of {', '.join(map(str, choices))}", reduces=reduces, kind=kind)


def _some_pixels(value: Any) -> bool:
    return value is None or (is_integer(value) and MIN_PIXELS <= value <= MAX_PIXELS)


def _some_side(value: Any) -> bool:
    return value is None or (is_integer(value) and 2 <= value <= MAX_SIDE)


def _some_fps(value: Any) -> bool:
    return value is None or (is_number(value) and 0 < value <= 120)


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
        blanks: Of the blank parts of an image one is encoded for all in a window of so many merged tokens a side;
            None encodes every one.

    Raises:
        ConfigError: If a value is not one of the choices above.
    """

    fusion: Fusion = _one_of("native", FUSIONS, reduces=False, kind=str)
    layers: Layers = _one_of(3, LAYERS, reduces=False, kind=int)
    downsample: float = _one_of(1.0, DOWNSAMPLES, reduces=True, kind=float)
    max_pixels: int | None = knob(
        None, "before", _some_pixels, f"None or an integer from {MIN_PIXELS} to {MAX_PIXELS}", unit="px", kind=int
    )
    adapter_rank: Rank = _one_of(0, RANKS, reduces=False, kind=int)
    max_fps: float | None = knob(None, "before", _some_fps, "None or a number above 0, at most 120", unit="fps")
    blanks: int | None = knob(
        None, "inside", _some_side, f"None or an integer from 2 to {MAX_SIDE}", unit="blank", kind=int
    )

    def __post_init__(self) -> None:
        for name, (said, default) in self.knobs().items():
            value = getattr(self, name)
            if not said.valid(value):
                raise ConfigError(f"{name} is {value!r}; expected {said.expected}")
            if default is not None:
                object.__setattr__(self, name, said.kind(value))

    @classmethod
    def knobs(cls) -> dict[str, tuple[Knob, Any]]:
        """By name what each knob says of itself, and the value at which it does nothing."""
        found = _KNOBS.get(cls)
        if found is None:
            found = _KNOBS[cls] = {each.name: (each.metadata["knob"], each.default) for each in fields(cls)}
        return found

    @property
    def fuses(self) -> bool:
        """Whether levels are put together: not in ``native`` (the model's own taps) and ``top`` (none)."""
        return self.fusion not in ("native", "top")

    @property
    def is_full(self) -> bool:
        """Whether the model sees all that it would natively: every pixel, frame and token."""
        return all(getattr(self, name) == default for name, (said, default) in self.knobs().items() if said.reduces)

    @property
    def spares_blanks_only(self) -> bool:
        """Whether all that the model does not see natively is blank: every detail is there, at its own resolution."""
        return self.blanks is not None and replace(self, blanks=None).is_full

    @property
    def before_encoder(self) -> dict[str, Any]:
        """The knobs in use that act before the encoder, and their values."""
        return {
            name: getattr(self, name)
            for name, (said, default) in self.knobs().items()
            if said.acts == "before" and getattr(self, name) != default
        }

    def without(self, knobs: Iterable[str]) -> Self:
        """The same point with these knobs at rest."""
        return replace(self, **{name: self.knobs()[name][1] for name in knobs})

    @property
    def encoder_key(self) -> tuple[Any, ...]:
        """What the encoder's blocks compute depends on: points that share it can follow from one recording of them."""
        return tuple(getattr(self, name) for name, (said, _) in self.knobs().items() if said.acts != "after")

    @property
    def name(self) -> str:
        """Short readable form, such as ``weighted6r4@0.5/65536px``; `parse` reads it back."""
        head: str = self.fusion
        if self.fuses:
            head += f"{self.layers}r{self.adapter_rank}" if self.adapter_rank else f"{self.layers}"
        parts = [f"{head}@{self.downsample:g}"]
        for name, (said, default) in self.knobs().items():
            value = getattr(self, name)
            if said.unit and value != default:
                parts.append(f"{value if said.kind is int else format(value, 'g')}{said.unit}")
        return "/".join(parts)

    @classmethod
    def parse(cls, name: str) -> Self:
        """The point that `name` writes as this text; what the text leaves out is at its default.

        Raises:
            ConfigError: For a text of another form or a knob that is not one of its choices.
        """
        knobs = cls.knobs()
        units = {said.unit: name for name, (said, _) in knobs.items() if said.unit}
        head = _HEAD.match(name)
        values = {key: text for key, text in head.groupdict().items() if text is not None} if head else {}
        rest = name[head.end() :] if head else name
        while (part := _PART.match(rest)) and part["unit"] in units and units[part["unit"]] not in values:
            values[units[part["unit"]]] = part["value"]
            rest = rest[part.end() :]
        try:
            read = {key: knobs[key][0].kind(text) for key, text in values.items()}
        except ValueError:
            read = {}
        if rest or not read:
            raise ConfigError(
                f"point is {name!r}; expected a name such as native, top@0.5, weighted6r4@0.5 or gated12r8@1/65536px"
            )
        return cls(**read)

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON and TOML can hold; knobs that are None are left out."""
        return {name: value for name in (f.name for f in fields(self)) if (value := getattr(self, name)) is not None}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Read `to_dict`'s form.

        Raises:
            ConfigError: For an unknown knob or a value that is not one of its choices.
        """
        known = list(cls.knobs())
        if not isinstance(values, Mapping):
            raise ConfigError(f"operating point is {values!r}; expected a table of {', '.join(known)}")
        unknown = sorted(str(name) for name in values if name not in known)
        if unknown:
            raise ConfigError(f"operating point has unknown knobs {unknown}; expected {', '.join(known)}")
        return cls(**values)


NATIVE = OperatingPoint()
"""The model untouched."""
