"""The gate before a policy goes into service: a candidate against the incumbent on a trusted hold-out.

Knows policies and labelled data. Must not know how either was fitted.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from adaptive_fusion.errors import AdaptiveFusionError, ConfigError
from adaptive_fusion.evaluation.statistics import Interval, intervals
from adaptive_fusion.learning.data.dataset import Dataset, FloatArray
from adaptive_fusion.learning.data.labels import TRUSTED
from adaptive_fusion.learning.judging.arms import MIN_ROWS, arm_names, judges, scores, two_arms
from adaptive_fusion.learning.judging.curve import Arms, Router
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


class GateRefused(AdaptiveFusionError):
    """A candidate that is worse than the incumbent; the message holds the figures, `verdict` all of them."""

    def __init__(self, message: str, verdict: Verdict) -> None:
        super().__init__(message)
        self.verdict = verdict


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
    data = holdout.take(holdout.trusted(trusted))
    data = data.take(judges(data))
    sides = [policy for policy in (candidate, incumbent) if policy is not None]
    rows = np.ones(len(data), dtype=bool)
    if len(data):
        rows = np.logical_and.reduce([two_arms(data, *arm_names(policy))[2] for policy in sides])
    if rows.sum() < MIN_ROWS:
        raise ConfigError(
            f"the hold-out has {int(rows.sum())} rows of {', '.join(trusted)}; expected at least {MIN_ROWS}"
        )
    data = data.take(rows)
    tried = [_Side(policy, data) for policy in sides]
    new, old = tried[0], tried[-1]

    def statistics(weight: FloatArray) -> dict[str, float]:
        here, there = new.curve.curve(weight), old.curve.curve(weight)
        quality, cost = (float(np.average(v, weights=weight)) for v in (new.quality, new.cost))
        old_quality = float(np.average(old.quality, weights=weight))
        found = {"quality": quality, "cost": cost, "apgr": here.apgr, "accuracy": new.accuracy(weight)}
        if incumbent is None:
            random = float(np.interp(cost, here.cost[[0, -1]], here.quality[[0, -1]]))
            return found | {"apgr_difference": here.apgr - 0.5, "quality_at_equal_cost": quality - random}
        return found | {
            "incumbent_quality": old_quality,
            "incumbent_cost": float(np.average(old.cost, weights=weight)),
            "incumbent_apgr": there.apgr,
            "incumbent_accuracy": old.accuracy(weight),
            "apgr_difference": here.apgr - there.apgr,
            "accuracy_difference": new.accuracy(weight) - old.accuracy(weight),
            "quality_at_equal_cost": quality - there.at_cost(cost),
            "quality_difference": quality - old_quality,
        }

    figures = intervals(statistics, data.group, seed=seed, n=n)
    bounds = {"apgr_difference": 0.0, "quality_at_equal_cost": 0.0, "quality_difference": -data.tolerance}
    reasons = tuple(
        f"{name} is {found.mean:.4f} (95 % interval {found.low:.4f} to {found.high:.4f}); expected {bound:g} or more"
        for name, bound in bounds.items()
        if (found := figures.get(name)) is not None and found.high < bound
    )
    return Verdict(not reasons, reasons, figures, int(rows.sum()))


class _Side:
    """One policy on the hold-out: its curve, and what it takes at its threshold."""

    def __init__(self, policy: Policy, data: Dataset) -> None:
        arms: Arms
        arms, y, _ = two_arms(data, *arm_names(policy))
        p = scores(policy, data)
        goes = p >= policy.threshold
        self.curve = Router(p, arms)
        self.quality = np.where(goes, arms.strong, arms.cheap)
        self.cost = np.where(goes, arms.strong_cost, arms.cheap_cost)
        self._right = (goes == (y > 0.5)).astype(float)

    def accuracy(self, weight: FloatArray) -> float:
        """Share of stills sent to the right lane."""
        return float(np.average(self._right, weights=weight))
