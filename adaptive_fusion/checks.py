"""Checks of values from files and callers: tables with the right keys, numbers in range.

Knows plain values and the errors to raise for them. Must not know what the values mean.
"""

import sys
from collections.abc import Collection, Mapping
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


def number(value: Any, what: str) -> float:
    """`value` as a finite float; PolicyError if it is anything else."""
    # Compared, not asked isfinite: that raises for an integer beyond the largest float.
    if isinstance(value, bool) or not isinstance(value, int | float) or not -_LARGEST <= value <= _LARGEST:
        raise PolicyError(f"{what} is {value!r}; expected a finite number")
    return float(value)


def numbers(values: Any, what: str) -> tuple[float, ...]:
    """`values` as finite floats; PolicyError if it is not a list of numbers."""
    if not isinstance(values, list | tuple):
        raise PolicyError(f"{what} is {type(values).__name__}; expected a list of numbers")
    return tuple(number(value, what) for value in values)


def amount(name: str, value: Any, low: float, high: float) -> float:
    """A number in range, or ConfigError."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ConfigError(f"{name} has {value!r}; expected a number from {low:g} to {high:g}")
    return float(value)
