"""How far a model's own needs are trusted: with which margin a plan is made, and above which entropy it is given up.

Pure functions over arrays: knows no files, models or planners.

A margin alone must be wide where a few images lose much; where the first tokens tell which these are, a narrow one with
a second pass is cheaper. For each kind of question a plan at m + margin is asked about with a threshold, both from a
grid, which costs ``c1 + P(entropy > threshold) c2`` and loses what answers below the threshold lose. Of every kind the
pair is taken that minimises cost + price x loss, for the smallest price on a falling grid for which, from the highest
down to it, the mean loss of images is within `KEPT` of the tolerance and (n R + 1) / (n + 1) within `BOUND`. The needs
are those of fits on other folds, so that rows judge needs that they have not taught.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from adaptive_fusion.learning.adapting.answers import Answers
from adaptive_fusion.learning.adapting.needs import BOUND, by_image, planned
from adaptive_fusion.learning.data.dataset import BoolArray, FloatArray, mean_of_first
from adaptive_fusion.learning.fitting.escalation import auc
from adaptive_fusion.policy.escalation import ANY, MOST_TOKENS, UNFITTED, Escalation, Threshold

MANY = 80
"""Images from which a margin and a threshold are chosen together; fewer choose what happens to lose nothing on them.
With the fold that judges them, 100."""
KEPT = 0.5
"""Share of the tolerance that may be lost on average: the other half is for what the choice owes to chance."""
MARGINS = np.arange(-2.0, 4.01, 0.25)
"""Octaves that are tried."""
QUANTILES = np.linspace(0.1, 0.95, 12)
"""Of a plan's entropies: thresholds that are tried, beside giving up none."""
PRICES = np.geomspace(100.0, 0.1, 61)
"""Of a lost answer, in native passes."""
_TINY = 1e-12


@dataclass(frozen=True)
class Asked:
    """What was chosen: octaves on top of the needs by kind, and the thresholds; beside what that costs, of full
    compute's."""

    margins: Mapping[str, float]
    rules: Escalation
    cost: float


@dataclass(frozen=True)
class _Plan:
    """One pair, on the rows of a kind: `cost` and `loss` of each, and which go on."""

    margin: float
    threshold: float | None
    cost: FloatArray
    loss: FloatArray
    goes_on: BoolArray
    below: BoolArray
    lost: FloatArray
    entropy: FloatArray


def choose_asking(answers: Answers, octaves: FloatArray) -> Asked | None:
    """The pairs for each kind of question, looking at one token or at `MOST_TOKENS`, whichever costs less; None where
    no pair is known to be good enough, and with fewer than `MANY` images.

    Args:
        answers: The model's own.
        octaves: m of each row, by fits on other images, ``[n]``.
    """
    if answers.images < MANY:
        return None
    found = [each for k in (1, MOST_TOKENS) if (each := _chosen(answers, octaves, k)) is not None]
    return min(found, key=lambda each: each.cost) if found else None


def _chosen(answers: Answers, octaves: FloatArray, k: int) -> Asked | None:
    kinds = {kind: np.array([each == kind for each in answers.kinds]) for kind in sorted(set(answers.kinds))}
    offered = {kind: _plans(answers, octaves, rows, k) for kind, rows in kinds.items()}
    best: tuple[float, dict[str, _Plan]] | None = None
    n = answers.images
    for price in PRICES:
        taken = {kind: min(plans, key=lambda p: p.cost.sum() + price * p.loss.sum()) for kind, plans in offered.items()}
        loss = np.zeros(len(answers))
        for kind, plan in taken.items():
            loss[kinds[kind]] = plan.loss
        mean = float(by_image(loss, answers.group).mean())
        if mean > KEPT * answers.tolerance or (n * mean + 1) / (n + 1) > BOUND + _TINY:
            break
        best = sum(float(plan.cost.sum()) for plan in taken.values()), taken
    if best is None:
        return None
    rules = {kind: _rule(plan, answers.tolerance) for kind, plan in best[1].items()}
    others = {kind: rule for kind, rule in UNFITTED.thresholds[ANY].items() if kind not in rules}
    table = Escalation(k, BOUND, {ANY: {**others, **rules}}, always=True)
    return Asked({kind: plan.margin for kind, plan in best[1].items()}, table, best[0] / len(answers))


def _plans(answers: Answers, octaves: FloatArray, rows: BoolArray, k: int) -> list[_Plan]:
    """All pairs on some rows; the first takes all pixels."""
    of_pixels = [rung.pixel_share if rung.point.blanks is None else None for rung in answers.rungs]
    columns = [of_pixels.index(share) for share in (1.0, *answers.shares)]
    quality = np.column_stack([np.ones(len(answers)), answers.kept])[rows]
    full = answers.cost[rows][:, columns[:1]]
    costs, wait = answers.cost[rows][:, columns] / full, (k - 1) * answers.wait[rows] / full[:, 0]
    unsure = np.column_stack([mean_of_first(answers.entropy[:, column], k) for column in columns])[rows]
    line, found = np.arange(len(quality)), list[_Plan]()
    for margin in MARGINS[::-1]:
        place = planned(answers.shares, octaves[rows] + margin)
        below, lost, entropy = place > 0, 1.0 - quality[line, place], unsure[line, place]
        known = entropy[below & np.isfinite(entropy)]
        thresholds = [None, *np.unique(np.quantile(known, QUANTILES))] if len(known) else [None]
        for threshold in thresholds:
            up = below & (entropy > threshold) if threshold is not None else np.zeros(len(line), dtype=bool)
            cost = costs[line, place] + up + (0.0 if threshold is None else wait * below)
            value = None if threshold is None else float(threshold)
            found.append(_Plan(float(margin), value, cost, np.where(up, 0.0, lost), up, below, lost, entropy))
    return found


def _rule(plan: _Plan, tolerance: float) -> Threshold:
    """What a policy keeps of a pair. What is still lost was weighed: it counts as no more than the tolerance."""
    below = plan.below
    if not below.any():
        return Threshold(plan.threshold, None, len(below), 0.0, 0.0, 0.0)
    left = float(plan.loss[below].mean())
    told = auc(plan.entropy[below], plan.lost[below] > tolerance) if np.isfinite(plan.entropy[below]).all() else None
    share = float(plan.goes_on[below].mean())
    return Threshold(
        plan.threshold, told, int(below.sum()), float(plan.lost[below].mean()), min(left, tolerance), share
    )
