"""What the controller chooses from and what it chose, and the risk of a point to be late.

Knows predictions, limits and drifts. Knows nothing of how points are weighed or of what is learned: that is the law of
`controller`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from adaptive_fusion.budget import Budget
from adaptive_fusion.control.estimators import Drift, exceeds
from adaptive_fusion.decisions import Prediction, Rejected
from adaptive_fusion.point import OperatingPoint

Found = tuple[float, Drift | None, str, tuple[Any, ...]]
"""P(late), the drift it comes from, and why in words and numbers: put together only for the log."""
_LATE = "{} {:.0f} of {:.0f} ms, late with {:.0f} %"
NO_LIMIT: Found = (0.0, None, "best quality, no time limit set", ())


@dataclass(frozen=True, slots=True)
class Candidate:
    """An operating point on offer for one request, with its expected quality in [0, 1] and predicted cost.

    `key` is the name under which its own drift is kept: the same for every request, also where the point's
    pixel budget follows the size of the image. Empty, it becomes the point's name.
    """

    point: OperatingPoint
    quality: float
    predicted: Prediction
    key: str = ""

    def __post_init__(self) -> None:
        if not self.key:
            object.__setattr__(self, "key", self.point.name)


@dataclass(frozen=True, slots=True)
class Choice:
    """What was chosen and why.

    `p_late` is the risk that it misses a limit, 0 without one. `margin` is the factor on its predicted time, of the
    limit with the highest risk, that it stays below with the probability that the budget asks for (`attainment`).
    `rejected` holds the points of at least its quality that were not taken, with reasons. `feasible` is the
    controller's own opinion.
    """

    candidate: Candidate
    feasible: bool
    margin: float
    reason: str
    rejected: tuple[Rejected, ...]
    budget: Budget
    elapsed_ms: float
    decided_s: float
    p_late: float = 0.0

    @property
    def point(self) -> OperatingPoint:
        """The operating point to run."""
        return self.candidate.point


def risk_of(key: str, ttft_ms: float, latency_ms: float, limits: Sequence[tuple[str, float, Drift]]) -> Found:
    """P(late) of a point at the limit where it is highest.

    Args:
        key: The name under which the point's own drift is kept.
        ttft_ms: Predicted time to the first token.
        latency_ms: Predicted time to the last.
        limits: Of each limit set its name (``ttft`` or ``latency``), the milliseconds left and the drift of that time.
    """
    worst, found = -1.0, NO_LIMIT
    for name, left_ms, drift in limits:
        predicted_ms = latency_ms if name == "latency" else ttft_ms
        middle, scale = drift.expect(key)
        if left_ms <= 0.0:
            risk = 1.0
        elif predicted_ms <= 0.0:
            risk = 0.0
        else:
            risk = exceeds(math.log(left_ms) - math.log(predicted_ms), middle, scale)
        if risk > worst:
            worst = risk
            found = (risk, drift, _LATE, (name, predicted_ms * math.exp(middle), left_ms, 100.0 * risk))
    return found
