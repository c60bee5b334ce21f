"""What the controller chooses from, and what it chose.

Knows points, predictions and budgets. Knows nothing of how points are weighed or of what is learned: that is for
`weighing` and `learned`.
"""

from dataclasses import dataclass

from adaptive_fusion.budget import Budget
from adaptive_fusion.control.estimators import ENCODED
from adaptive_fusion.decisions import Prediction, Rejected
from adaptive_fusion.point import OperatingPoint


@dataclass(frozen=True, slots=True)
class Candidate:
    """An operating point on offer for one request, with its expected quality in [0, 1] and predicted cost.

    `key` is the name under which its own drift is kept: the same for every request, also where the point's
    pixel budget follows the size of the image. Empty, it becomes the point's name. With a `second` this is a plan of
    two passes: the better plan runs where the model is not sure of this one's answer, and `quality` is what both are
    worth together; `predicted` stays that of the first pass. `encoded` says that the encoder need not run for it, since
    what it made of the media is there.
    """

    point: OperatingPoint
    quality: float
    predicted: Prediction
    key: str = ""
    second: "Second | None" = None
    encoded: bool = False

    def __post_init__(self) -> None:
        if not self.key:
            object.__setattr__(self, "key", self.point.name)

    @property
    def drift_key(self) -> str:
        """The name under which its times are learned: apart from the point's own where no encoder runs."""
        return f"{self.key}{ENCODED}" if self.encoded else self.key

    @property
    def mean_ms(self) -> float:
        """Expected time to the last token, whichever pass it comes from."""
        own, second = self.predicted, self.second
        if second is None:
            return own.latency_ms
        both = own.ttft_ms + second.wait_ms + second.candidate.predicted.latency_ms
        return (1.0 - second.share) * own.latency_ms + second.share * both

    @property
    def most_ms(self) -> float:
        """Time to the last token if all passes run."""
        own, second = self.predicted, self.second
        if second is None:
            return own.latency_ms
        return own.ttft_ms + second.wait_ms + second.candidate.predicted.latency_ms

    @property
    def peak_memory_gb(self) -> float:
        """Of the pass that needs most, GiB above the resting set."""
        own, second = self.predicted.peak_memory_gb, self.second
        return own if second is None else max(own, second.candidate.predicted.peak_memory_gb)


@dataclass(frozen=True, slots=True)
class Second:
    """The better plan that a request may go on to.

    Attributes:
        candidate: What runs then.
        share: P(it runs).
        threshold: Entropy in nats above which it does.
        k: First tokens whose entropy is looked at.
        wait_ms: What looking at more than the first one is predicted to take, on top of the first pass's own time to
            the first token.
        key: The name under which that share is learned: the first pass's rung and the kind of question.
    """

    candidate: Candidate
    share: float
    threshold: float
    k: int = 1
    wait_ms: float = 0.0
    key: str = ""


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
