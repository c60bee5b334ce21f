"""What a policy did with some requests beside what routers of other kinds would have done, with intervals.

Knows arrays: both arms of each request, the policy's score and choice, the entropy, the reference.
Must not know policies, features or files.

The baselines: a random router; entropy as the score, at any threshold and at its median; one point for all; and
the oracle, which knows what the strong arm adds to each request.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from adaptive_fusion.evaluation.statistics import Interval, intervals
from adaptive_fusion.learning.data.dataset import BoolArray, Dataset, FloatArray
from adaptive_fusion.learning.judging.curve import Arms, Curve, RoutingCurve


@dataclass(frozen=True)
class Requests:
    """Arrays ``[n]``, one entry a request.

    Attributes:
        arms: What both arms are worth and cost.
        score: The policy's; in its order requests go to the strong arm.
        to_strong: Which ones the policy sends there.
        entropy: The baseline's score.
        reference: Quality of what the policy is measured against: the strong arm, or the native point.
        reference_cost: Its cost; NaN where unknown.
        static: Quality of the best single point within the policy's cost; NaN if there is none.
    """

    arms: Arms
    score: FloatArray
    to_strong: BoolArray
    entropy: FloatArray
    reference: FloatArray
    reference_cost: FloatArray
    static: FloatArray

    @property
    def quality(self) -> FloatArray:
        """What the policy gives each request."""
        return self.arms.routed(self.to_strong)[0]

    @property
    def cost(self) -> FloatArray:
        """What that costs."""
        return self.arms.routed(self.to_strong)[1]


Statistics = Callable[[FloatArray], Mapping[str, float]]
"""Gives figures of the requests weighted by ``[n]``."""


def compare(requests: Requests, more: Statistics, *, seed: int, n: int) -> tuple[dict[str, Interval], dict[str, Curve]]:
    """The figures with their bootstrap intervals over groups, and the curves of policy and baselines.

    ``quality`` and ``cost`` are means at the policy's threshold, ``kept`` and ``cost_share`` their shares of the
    reference's; ``over_X`` is the quality above baseline X at the policy's own cost, ``over_entropy_median`` that of
    the policy's curve above entropy-median routing at the latter's cost, and ``saved_to_entropy_median`` the share
    of the latter's cost that the policy's curve saves at its quality.

    Args:
        requests: See `Requests`.
        more: Gives further figures.
        seed: Of the bootstrap.
        n: Resamples.
    """
    beside = _Comparison(requests)
    figures = intervals(lambda weight: {**beside.figures(weight), **more(weight)}, requests.arms.group, seed=seed, n=n)
    return figures, {name: routing.curve() for name, routing in beside.routing.items()}


class _Comparison:
    """The policy's routing beside that of the baselines, for any weighting of the requests."""

    def __init__(self, requests: Requests) -> None:
        arms = requests.arms
        self.requests = requests
        self.routing = {
            "policy": RoutingCurve(requests.score, arms),
            "entropy": RoutingCurve(requests.entropy, arms),
            "oracle": RoutingCurve(arms.gain, arms),
            "random": RoutingCurve(np.zeros(len(requests.score)), arms),
        }
        self._quality, self._cost = requests.quality, requests.cost
        above = requests.entropy > np.median(requests.entropy)
        self._median_quality, self._median_cost = arms.routed(above)

    def figures(self, weight: FloatArray) -> dict[str, float]:
        """Means at the threshold, figures of the policy's curve, and what it is worth above each baseline."""

        def mean(values: FloatArray) -> float:
            return float(np.average(values, weights=weight))

        curves = {name: routing.curve(weight) for name, routing in self.routing.items()}
        return {**self._at_threshold(mean), **self._of_curves(curves), **self._above_baselines(curves, mean)}

    def _at_threshold(self, mean: Callable[[FloatArray], float]) -> dict[str, float]:
        quality, cost = mean(self._quality), mean(self._cost)
        reference, reference_cost = mean(self.requests.reference), mean(self.requests.reference_cost)
        return {
            "quality": quality,
            "kept": quality / reference if reference else np.nan,
            "cost": cost,
            "cost_share": cost / reference_cost if reference_cost else np.nan,
            "strong_share": mean(self.requests.to_strong.astype(float)),
        }

    def _of_curves(self, curves: Mapping[str, Curve]) -> dict[str, float]:
        own, oracle = curves["policy"], curves["oracle"].apgr
        return {
            "apgr": own.apgr,
            "cpt_50": own.cpt(0.5),
            "cpt_80": own.cpt(0.8),
            "gap_closed": (own.apgr - 0.5) / (oracle - 0.5) if oracle != 0.5 else np.nan,
            "random_apgr": curves["random"].apgr,
            "entropy_apgr": curves["entropy"].apgr,
            "oracle_apgr": oracle,
        }

    def _above_baselines(self, curves: Mapping[str, Curve], mean: Callable[[FloatArray], float]) -> dict[str, float]:
        own, quality, cost = curves["policy"], mean(self._quality), mean(self._cost)
        median_quality, median_cost = mean(self._median_quality), mean(self._median_cost)
        static = mean(self.requests.static)
        return {
            "entropy_quality": median_quality,
            "entropy_cost": median_cost,
            "static_quality": static,
            "oracle_quality": curves["oracle"].at_cost(cost),
            "over_random": quality - curves["random"].at_cost(cost),
            "over_entropy": quality - curves["entropy"].at_cost(cost),
            "over_entropy_median": own.at_cost(median_cost) - median_quality,
            "saved_to_entropy_median": 1 - own.to_reach(median_quality) / median_cost if median_cost else np.nan,
            "over_static": quality - static,
        }


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
