"""Checks of values from files and callers: tables with the right keys, numbers in range.

Knows plain values and the errors to raise for them. Must not know what the values mean.
"""

import sys
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from adaptive_fusion.errors import ConfigError, PolicyError

_LARGEST = sys.float_info.max


def check_keys(values: Any, what: str, required: Collection[str], optional: Collection[str] = ()) -> Mapping[str, Any]:
    """`values` if it is a table with all required and no unknown keys; else a PolicyError."""
    if not isinstance(values, Mapping):
        raise PolicyError(f"{what} is {type(values).__name__}; expected a table of {', '.join(sorted(required))}")
    unknown = sorted(str(key) for key in set(values) - set(required) - set(optional))
    missing = sorted(set(required) - set(values))
    if unknown or missing:
        found = " and ".join(f"{word} {keys}" for word, keys in (("unknown", unknown), ("missing", missing)) if keys)
        raise PolicyError(f"{what} has {found} keys; expected {', '.join(sorted({*required, *optional}))}")
    return values


def whole_characters(text: str, what: str) -> str:
    """`text` if each of its characters is a whole one; half of a pair (a lone surrogate) stands for nothing.

    Raises:
        ConfigError: With the half and where it is.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"U+{ord(text[error.start]):04X}"
        raise ConfigError(
            f"{what} has half a character ({half}) at position {error.start}; expected whole Unicode characters"
        ) from error
    return text


def is_integer(value: Any) -> bool:
    """Whether it is a whole number; true and false are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether it is a number that a float can hold; true, false, NaN and infinities are none."""
    # Compared, not asked isfinite: that raises for an integer beyond the largest float.
    return (is_integer(value) or isinstance(value, float)) and -_LARGEST <= value <= _LARGEST


def number(
    value: Any,
    what: str,
    low: float | None = None,
    high: float | None = None,
    *,
    above: float | None = None,
    below: float | None = None,
    error: type[ConfigError] = ConfigError,
) -> float:
    """`value` as a finite float within bounds.

    Args:
        value: Anything.
        what: Its name, for the message.
        low: The least it may be.
        high: The most it may be.
        above: What it must be above.
        below: What it must be below.
        error: Raised for anything else.
    """
    if (
        not is_number(value)
        or (low is not None and value < low)
        or (high is not None and value > high)
        or (above is not None and value <= above)
        or (below is not None and value >= below)
    ):
        raise error(f"{what} is {value!r}; expected a {_range('number', low, high, above, below)}")
    return float(value)


def integer(
    value: Any, what: str, low: int | None = None, high: int | None = None, *, error: type[ConfigError] = ConfigError
) -> int:
    """`value` if it is a whole number within bounds; see `number` for the arguments."""
    if not is_integer(value) or (low is not None and value < low) or (high is not None and value > high):
        raise error(f"{what} is {value!r}; expected an {_range('integer', low, high)}")
    return int(value)


def numbers(values: Any, what: str, *, error: type[ConfigError] = ConfigError) -> tuple[float, ...]:
    """`values` as finite floats; an error if it is not a list of numbers."""
    if not isinstance(values, list | tuple):
        raise error(f"{what} is {type(values).__name__}; expected a list of numbers")
    return tuple(number(value, what, error=error) for value in values)


def _range(
    noun: str, low: float | None, high: float | None, above: float | None = None, below: float | None = None
) -> str:
    """The bounds in words."""
    if low is not None and high is not None:
        return f"{noun} from {_plain(low)} to {_plain(high)}"
    parts = [
        f"{word} {_plain(bound)}"
        for word, bound in (("of at least", low), ("above", above), ("at most", high), ("below", below))
        if bound is not None
    ]
    return f"{noun} {', '.join(parts)}" if parts else f"finite {noun}" if noun == "number" else noun


def _plain(bound: float) -> str:
    return str(bound) if isinstance(bound, int) else f"{bound:g}"


def strings(value: Any) -> Iterator[str]:
    """Every string within mappings and lists, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, entry in value.items():
            yield from strings(key)
            yield from strings(entry)
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from strings(entry)
