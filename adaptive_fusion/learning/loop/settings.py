"""How a loop learns: what its user may choose.

Knows names and numbers. Must not know the steps.
"""

from dataclasses import dataclass

from adaptive_fusion.learning.fitting.train import ESTIMATOR_NAMES
from adaptive_fusion.policy.files import AUTO
from adaptive_fusion.policy.fitted import Fingerprint
from adaptive_fusion.policy.policy import Policy


@dataclass(frozen=True)
class Settings:
    """How a loop learns.

    Attributes:
        policy: The policy in service: a name or a path; ``auto`` takes the candidate that the last round released, else
            `served`, else the shipped one that the labels are for.
        served: What the model gets while nothing was released; None where no model was named.
        model: Whose labels are wanted; None takes those of any one model.
        tolerance, objective, estimators, seed: See `train`.
        jobs: Threads.
        n: Resamples of the bootstraps.
    """

    policy: str = AUTO
    served: Policy | None = None
    model: Fingerprint | None = None
    tolerance: float = 0.02
    objective: str = "quality"
    estimators: tuple[str, ...] = ESTIMATOR_NAMES
    seed: int = 0
    jobs: int = 2
    n: int = 500


DEFAULT = Settings()
