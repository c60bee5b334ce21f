"""The gate before a policy goes into service: a candidate against the incumbent on a trusted hold-out.

Knows policies and labelled data. Must not know how either was fitted.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from adaptive_fusion.errors import ConfigError
from adaptive_fusion.evaluation.statistics import Interval, intervals
from adaptive_fusion.learning.data.dataset import Dataset, FloatArray
from adaptive_fusion.learning.data.labels import TRUSTED
from adaptive_fusion.learning.judging.arms import MIN_ROWS, judges, policy_arms, scores
from adaptive_fusion.learning.judging.curve import Curve, RoutingCurve
from adaptive_fusion.policy.policy import Policy


@dataclass(frozen=True)
class Verdict:
    """What the gate found.

    Attributes:
        accepted: Whether the candidate may replace the incumbent.
        reasons: In what it is worse, each with its figures; empty if accepted.
        figures: Intervals of both sides and of the differences, candidate less incumbent.
        rows: How many trusted stills judged.
    """

    accepted: bool
    reasons: tuple[str, ...]
    figures: Mapping[str, Interval]
    rows: int


def gate(
    candidate: Policy,
    incumbent: Policy | None,
    holdout: Dataset,
    *,
    trusted: Sequence[str] = TRUSTED,
    seed: int = 0,
    n: int = 500,
) -> Verdict:
    """Compare on the trusted stills of `holdout`, which neither side should have been fitted on.

    Refused is a candidate whose whole 95 % bootstrap interval (over contents, both sides on the same
    resample) shows that it ranks worse (APGR), that it gives less quality than the incumbent would at the
    candidate's cost, or that it keeps less quality by more than the tolerance. Without an incumbent it must
    not be worse than random routing.

    Args:
        candidate: The new policy.
        incumbent: The policy in service, if any.
        holdout: Labelled inputs, read for the rungs of both.
        trusted: Sources whose labels may judge.
        seed: Of the bootstrap.
        n: Resamples.

    Raises:
        ConfigError: With fewer than 20 trusted rows to judge by.
    """
    sides = [policy for policy in (candidate, incumbent) if policy is not None]
    data = _judging_rows(sides, holdout, trusted)
    new = _Side(candidate, data)
    old = None if incumbent is None else _Side(incumbent, data)

    def statistics(weight: FloatArray) -> dict[str, float]:
        return _beside_random(new, weight) if old is None else _beside(new, old, weight)

    figures = intervals(statistics, data.group, seed=seed, n=n)
    reasons = _reasons(figures, data.tolerance)
    return Verdict(not reasons, reasons, figures, len(data))


def _judging_rows(policies: Sequence[Policy], holdout: Dataset, trusted: Sequence[str]) -> Dataset:
    """The trusted stills that judge all of the policies."""
    data = holdout.take(holdout.trusted(trusted))
    data = data.take(judges(data))
    rows = np.ones(len(data), dtype=bool)
    if len(data):
        rows = np.logical_and.reduce([policy_arms(policy, data)[2] for policy in policies])
    if rows.sum() < MIN_ROWS:
        raise ConfigError(
            f"the hold-out has {int(rows.sum())} rows of {', '.join(trusted)}; expected at least {MIN_ROWS}"
        )
    return data.take(rows)


class _Side:
    """One policy on the hold-out: its curve, and what it takes at its threshold."""

    def __init__(self, policy: Policy, data: Dataset) -> None:
        arms, y, _ = policy_arms(policy, data)
        p = scores(policy, data)
        to_strong = p >= policy.threshold
        self.routing = RoutingCurve(p, arms)
        self._quality, self._cost = arms.routed(to_strong)
        self._right = (to_strong == (y > 0.5)).astype(float)

    def figures(self, weight: FloatArray) -> tuple[dict[str, float], Curve]:
        """Mean quality and cost, APGR, and the share of stills sent to the right lane; and the curve."""
        curve = self.routing.curve(weight)
        quality, cost, right = (float(np.average(v, weights=weight)) for v in (self._quality, self._cost, self._right))
        return {"quality": quality, "cost": cost, "apgr": curve.apgr, "accuracy": right}, curve


def _beside_random(new: _Side, weight: FloatArray) -> dict[str, float]:
    """The candidate's figures, and what it is worth above random routing at its cost."""
    found, curve = new.figures(weight)
    random = float(np.interp(found["cost"], curve.cost[[0, -1]], curve.quality[[0, -1]]))
    return found | {"apgr_difference": found["apgr"] - 0.5, "quality_at_equal_cost": found["quality"] - random}


def _beside(new: _Side, old: _Side, weight: FloatArray) -> dict[str, float]:
    """The figures of candidate and incumbent, and the differences between them."""
    found, _ = new.figures(weight)
    others, curve = old.figures(weight)
    return {
        **found,
        **{f"incumbent_{name}": value for name, value in others.items()},
        "apgr_difference": found["apgr"] - others["apgr"],
        "accuracy_difference": found["accuracy"] - others["accuracy"],
        "quality_at_equal_cost": found["quality"] - curve.at_cost(found["cost"]),
        "quality_difference": found["quality"] - others["quality"],
    }


def _reasons(figures: Mapping[str, Interval], tolerance: float) -> tuple[str, ...]:
    """In what the candidate is worse with its whole interval, each with its figures."""
    bounds = {"apgr_difference": 0.0, "quality_at_equal_cost": 0.0, "quality_difference": -tolerance}
    return tuple(
        f"{name} is {found.mean:.4f} (95 % interval {found.low:.4f} to {found.high:.4f}); expected {bound:g} or more"
        for name, bound in bounds.items()
        if (found := figures.get(name)) is not None and found.high < bound
    )
