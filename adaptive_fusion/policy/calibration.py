"""Maps from a model's raw score to a probability, as plain parameters.

Knows scores and probabilities. Must not know of features, models or how a calibration is fitted.
"""

import bisect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from adaptive_fusion.checks import check_keys, number, numbers
from adaptive_fusion.errors import PolicyError
from adaptive_fusion.policy.predictors import Matrix


def sigmoid(z: float) -> float:
    """1 / (1 + exp(-z)), without overflow."""
    if z >= 0:
        return 1.0 / (1.0 + math.exp(-z))
    e = math.exp(z)
    return e / (1.0 + e)


@dataclass(frozen=True)
class Platt:
    """``sigmoid(slope * raw + intercept)`` (Platt 1999); as it starts, the plain logistic function."""

    slope: float = 1.0
    intercept: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "slope", number(self.slope, "slope", error=PolicyError))
        object.__setattr__(self, "intercept", number(self.intercept, "intercept", error=PolicyError))

    def __call__(self, raw: float) -> float:
        return sigmoid(self.slope * raw + self.intercept)

    def batch(self, raw: Matrix) -> Matrix:
        """Probabilities ``[n]`` of scores ``[n]``."""
        z = self.slope * raw + self.intercept
        e = np.exp(-np.abs(z))
        p: Matrix = np.where(z >= 0, 1.0 / (1.0 + e), e / (1.0 + e))
        return p

    def to_dict(self) -> dict[str, Any]:
        """JSON-able parameters, exact."""
        return {"kind": "platt", "slope": self.slope, "intercept": self.intercept}


@dataclass(frozen=True)
class Isotonic:
    """Straight lines between knots (x ascending, y from 0 to 1 and never falling), flat beyond the ends."""

    x: tuple[float, ...]
    y: tuple[float, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "x", numbers(self.x, "x of the knots", error=PolicyError))
        object.__setattr__(self, "y", numbers(self.y, "y of the knots", error=PolicyError))
        rising = all(a < b for a, b in zip(self.x, self.x[1:], strict=False))
        never_falling = all(a <= b for a, b in zip((0.0, *self.y), (*self.y, 1.0), strict=True))
        if not self.x or len(self.x) != len(self.y) or not rising or not never_falling:
            raise PolicyError(
                f"isotonic calibration has {len(self.x)} x and {len(self.y)} y knots; expected as many of "
                "both, at least one, x rising and y within 0 to 1 and never falling"
            )

    def __call__(self, raw: float) -> float:
        x, y = self.x, self.y
        if raw <= x[0]:
            return y[0]
        if raw >= x[-1]:
            return y[-1]
        i = bisect.bisect_right(x, raw)
        return y[i - 1] + (y[i] - y[i - 1]) * ((raw - x[i - 1]) / (x[i] - x[i - 1]))

    def batch(self, raw: Matrix) -> Matrix:
        """Probabilities ``[n]`` of scores ``[n]``."""
        p: Matrix = np.interp(raw, self.x, self.y)
        return p

    def to_dict(self) -> dict[str, Any]:
        """JSON-able parameters, exact."""
        return {"kind": "isotonic", "x": [*self.x], "y": [*self.y]}


Calibration = Platt | Isotonic


def calibration_from_dict(values: Any) -> Calibration:
    """Read either calibration's `to_dict` form; raises PolicyError for any other."""
    kind = values.get("kind") if isinstance(values, Mapping) else None
    if kind == "platt":
        table = check_keys(values, "calibration", ("kind", "slope", "intercept"))
        return Platt(table["slope"], table["intercept"])
    if kind == "isotonic":
        table = check_keys(values, "calibration", ("kind", "x", "y"))
        return Isotonic(table["x"], table["y"])
    raise PolicyError(f"calibration kind is {kind!r}; expected isotonic or platt")
