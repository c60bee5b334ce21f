"""What a policy did with some requests beside what routers of other kinds would have done, with intervals.

Knows arrays: both arms of each request, the policy's score and choice, the entropy, the full-compute reference.
Must not know policies, features or files.

The baselines: a random router; entropy as the score, at any threshold and at its median; one point for all; and
the oracle, which knows what the strong arm adds to each request.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from adaptive_fusion.evaluation.statistics import Interval, intervals
from adaptive_fusion.learning.data.dataset import BoolArray, Dataset, FloatArray
from adaptive_fusion.learning.judging.curve import Arms, Curve, Router


@dataclass(frozen=True)
class Requests:
    """Arrays ``[n]``, one entry a request.

    Attributes:
        arms: What both arms are worth and cost.
        score: The policy's; in its order requests go to the strong arm.
        goes: Which ones the policy sends there.
        entropy: The baseline's score.
        whole: Quality at full compute, of which the policy keeps a share.
        whole_cost: Its cost; NaN where unknown.
        static: Quality of the best single point within the policy's cost; NaN if there is none.
    """

    arms: Arms
    score: FloatArray
    goes: BoolArray
    entropy: FloatArray
    whole: FloatArray
    whole_cost: FloatArray
    static: FloatArray

    @property
    def quality(self) -> FloatArray:
        """What the policy gives each request."""
        return np.where(self.goes, self.arms.strong, self.arms.cheap)

    @property
    def cost(self) -> FloatArray:
        """What that costs."""
        return np.where(self.goes, self.arms.strong_cost, self.arms.cheap_cost)


Statistics = Callable[[FloatArray], Mapping[str, float]]


def compare(requests: Requests, more: Statistics, *, seed: int, n: int) -> tuple[dict[str, Interval], dict[str, Curve]]:
    """The figures with their bootstrap intervals over groups, and the curves of policy and baselines.

    ``quality`` and ``cost`` are means at the policy's threshold, ``kept`` and ``cost_share`` their shares of the
    whole's; ``over_X`` is the quality above baseline X at the policy's own cost, ``over_entropy_median`` that of
    the policy's curve above entropy-median routing at the latter's cost, and ``saved_to_entropy_median`` the share
    of the latter's cost that the policy's curve saves at its quality.

    Args:
        requests: See `Requests`.
        more: Gives further figures of row weights.
        seed: Of the bootstrap.
        n: Resamples.
    """
    arms = requests.arms
    routers = {
        "policy": Router(requests.score, arms),
        "entropy": Router(requests.entropy, arms),
        "oracle": Router(arms.gain, arms),
        "random": Router(np.zeros(len(requests.score)), arms),
    }
    quality, cost = requests.quality, requests.cost
    median = requests.entropy > np.median(requests.entropy)
    by_median = np.where(median, arms.strong, arms.cheap), np.where(median, arms.strong_cost, arms.cheap_cost)

    def statistics(weight: FloatArray) -> dict[str, float]:
        def mean(values: FloatArray) -> float:
            return float(np.average(values, weights=weight))

        curves = {name: router.curve(weight) for name, router in routers.items()}
        own, oracle = curves["policy"], curves["oracle"].apgr
        kept, spent, whole = mean(quality), mean(cost), mean(requests.whole)
        spent_whole = mean(requests.whole_cost)
        median_quality, median_cost = map(mean, by_median)
        return {
            "quality": kept,
            "kept": kept / whole if whole else np.nan,
            "cost": spent,
            "cost_share": spent / spent_whole if spent_whole else np.nan,
            "strong_share": mean(requests.goes.astype(float)),
            "apgr": own.apgr,
            "cpt_50": own.cpt(0.5),
            "cpt_80": own.cpt(0.8),
            "gap_closed": (own.apgr - 0.5) / (oracle - 0.5) if oracle != 0.5 else np.nan,
            "random_apgr": curves["random"].apgr,
            "entropy_apgr": curves["entropy"].apgr,
            "oracle_apgr": oracle,
            "entropy_quality": median_quality,
            "entropy_cost": median_cost,
            "static_quality": mean(requests.static),
            "oracle_quality": curves["oracle"].at_cost(spent),
            "over_random": kept - curves["random"].at_cost(spent),
            "over_entropy": kept - curves["entropy"].at_cost(spent),
            "over_entropy_median": own.at_cost(median_cost) - median_quality,
            "saved_to_entropy_median": 1 - own.to_reach(median_quality) / median_cost if median_cost else np.nan,
            "over_static": kept - mean(requests.static),
            **more(weight),
        }

    figures = intervals(statistics, arms.group, seed=seed, n=n)
    return figures, {name: router.curve() for name, router in routers.items()}


def best_static(
    data: Dataset, offers: Mapping[str, tuple[FloatArray, FloatArray]], limit: float
) -> tuple[str, FloatArray]:
    """The rung of the best mean quality whose mean cost is within `limit`, and its quality per row.

    Args:
        data: The requests; every rung that is labelled on all of them is on offer.
        offers: Quality and cost of rungs by name, where other figures stand for their labels.
        limit: Mean cost.
    """
    known = dict(offers)
    for i, name in enumerate(data.rungs):
        known.setdefault(name, (data.quality[:, i], data.cost[:, i]))
    fits = {
        name: quality
        for name, (quality, cost) in known.items()
        if np.isfinite(quality).all() and np.isfinite(cost).all() and cost.mean() <= limit * (1 + 1e-9)
    }
    if not fits:
        return "", np.full(len(data), np.nan)
    best = max(sorted(fits), key=lambda name: float(fits[name].mean()))
    return best, fits[best]
