"""What the controller chooses from, and what it chose.

Knows points, predictions and budgets. Knows nothing of how points are weighed or of what is learned: that is for
`weighing` and `learned`.
"""

from dataclasses import dataclass

from adaptive_fusion.budget import Budget
from adaptive_fusion.decisions import Prediction, Rejected
from adaptive_fusion.point import OperatingPoint


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
