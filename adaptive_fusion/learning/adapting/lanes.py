"""Which step each lane takes first for each kind of question, and above which entropy it is given up.

Pure functions over arrays: knows no files, models or planners.

Where the image does not say how many pixels it needs, one share for all that the router calls simple may be cheaper
than any need by image (`asking`), as may every detail without the blank parts. A cell is a lane with a kind of
question. Its requests take full compute, or all of them one step, with a look at the first tokens or without: that
costs ``c1 + wait + P(entropy > threshold) c2`` and loses what those below the threshold lose. Of all combinations of a
plan a cell, at several thresholds of the router's score, the one is taken that costs least and of which the mean loss
of requests is within `KEPT` of the tolerance, with what its steps generally lose as a prior (`ROWS_BESIDE`). Looks
whose entropy does not surely tell which answers lose (`tells`) are not tried: the best of their thresholds is luck.

The router's scores are those of fits on other folds, so that rows judge lanes that they have not taught.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from adaptive_fusion.learning.adapting.answers import Answers
from adaptive_fusion.learning.adapting.asking import KEPT
from adaptive_fusion.learning.adapting.choosing import Plan, cheapest, front
from adaptive_fusion.learning.data.dataset import BoolArray, FloatArray, mean_of_first
from adaptive_fusion.learning.fitting.escalation import auc
from adaptive_fusion.learning.labelling.scoring import NATIVE_RUNG
from adaptive_fusion.policy.escalation import MOST_TOKENS, UNFITTED, Escalation, Threshold, spares_blanks
from adaptive_fusion.policy.policy import COMPLEX, SIMPLE
from adaptive_fusion.policy.rungs import Rung

QUANTILES = np.linspace(0.05, 0.95, 13)
"""Of a step's entropies: thresholds that are tried, beside no look."""
CUTS = np.linspace(0.1, 0.9, 17)
"""Quantiles of the router's scores: thresholds that are tried, beside its own."""
ROWS_BESIDE = 20.0
"""Rows of a cell that what a step generally loses counts as beside those that were seen: the best of many plans looks
better than it is on the images that chose it, and few images choose one that happened to lose little on them."""
BLANK_ROWS = 1.0
"""The same where only blank parts are spared: that loses often and little, where fewer pixels lose seldom and much, so
that few rows tell what it loses."""
LOOKS = (1, MOST_TOKENS)
"""First tokens that may be looked at."""
DEVIATIONS = 2.0
"""Standard deviations by which the entropy must tell more than luck."""
TINY = 1e-9


class Step(NamedTuple):
    """What the requests of a cell do: the rung that they take first, empty for full compute; and above which entropy
    they go on, None for no look."""

    rung: str
    threshold: float | None


@dataclass(frozen=True)
class Laned:
    """What was chosen: the threshold of the router's score, and the first steps with their thresholds; beside what that
    costs, of full compute's."""

    cut: float
    rules: Escalation
    cost: float


@dataclass(frozen=True)
class Cells:
    """Rows by lane and kind of question, and what each step costs and loses there.

    Attributes:
        answers: The model's own, with predicted costs.
        ladders: By lane, with all shares that were run and their general qualities.
        rows: By lane and kind, masks ``[n]``.
        weight: What a row counts: all rows together count as much as there are images, since few of them are few images
            whatever is asked of each.
    """

    answers: Answers
    ladders: Mapping[str, tuple[Rung, ...]]
    rows: Mapping[tuple[str, str], BoolArray]
    weight: float

    @classmethod
    def of(cls, answers: Answers, ladders: Mapping[str, tuple[Rung, ...]], simple: BoolArray) -> "Cells":
        """With the rows that the router calls simple, ``[n]``."""
        rows = dict[tuple[str, str], BoolArray]()
        for kind in sorted(set(answers.kinds)):
            asked = np.array([each == kind for each in answers.kinds])
            for lane, mask in ((SIMPLE, asked & simple), (COMPLEX, asked & ~simple)):
                if mask.any():
                    rows[lane, kind] = mask
        return cls(answers, ladders, rows, answers.images / len(answers))

    def column(self, rung: str) -> int:
        """Of a rung among those that were run."""
        return [each.name for each in self.answers.rungs].index(rung)

    def taken(self, rows: BoolArray, step: Step, k: int) -> tuple[FloatArray, FloatArray]:
        """Cost and loss of each of the rows by a step that looks at k tokens."""
        answers = self.answers
        full = answers.cost[rows, self.column(NATIVE_RUNG.name)]
        if not step.rung:
            return full, np.zeros(len(full))
        column = self.column(step.rung)
        cost, lost = answers.cost[rows, column], 1.0 - answers.quality[rows, column]
        if step.threshold is None:
            return cost, lost
        up = mean_of_first(answers.entropy[rows, column], k) > step.threshold
        return cost + (k - 1) * answers.wait[rows] + up * full, np.where(up, 0.0, lost)

    def plans(self, lane: str, kind: str, k: int) -> list[Plan]:
        """All that a cell may do."""
        rows = self.rows[lane, kind]
        weight, full = self.weight, self.answers.cost[rows, self.column(NATIVE_RUNG.name)]
        wait = (k - 1) * float(self.answers.wait[rows].sum())
        found, run = [Plan(float(full.sum()), 0.0, Step("", None))], {rung.name for rung in self.answers.rungs}
        for rung in self.ladders[lane]:
            if rung.is_full or rung.name not in run:
                continue
            column = self.column(rung.name)
            cost = float(self.answers.cost[rows, column].sum())
            lost = (1.0 - self.answers.quality[rows, column]) * weight
            beside = BLANK_ROWS if spares_blanks(rung.name) else ROWS_BESIDE
            general = beside * (1.0 - rung.quality) * weight
            found.append(Plan(cost, float(lost.sum()) + general, Step(rung.name, None)))
            entropy = mean_of_first(self.answers.entropy[rows, column], k)
            known = entropy[np.isfinite(entropy)]
            if len(known) < len(entropy) or not tells(entropy, lost > self.answers.tolerance * weight):
                continue
            tried = np.unique(np.quantile(known, QUANTILES))
            up = entropy[:, None] > tried[None, :]
            costs, losses = cost + wait + full @ up, lost @ ~up + general * (~up).mean(axis=0)
            for threshold, each, loss in zip(tried, costs, losses, strict=True):
                found.append(Plan(float(each), float(loss), Step(rung.name, float(threshold))))
        return found

    def rules(self, chosen: Mapping[tuple[str, str], Plan], k: int) -> Escalation:
        """What a policy keeps of the plans."""
        first: dict[str, dict[str, str]] = {SIMPLE: {}, COMPLEX: {}}
        thresholds: dict[str, dict[str, Threshold]] = {}
        for (lane, kind), plan in chosen.items():
            step = step_of(plan)
            first[lane][kind] = step.rung
            if step.rung:
                thresholds.setdefault(step.rung, {})[kind] = self._threshold(self.rows[lane, kind], step, k)
        return Escalation(k, self.answers.tolerance, {**UNFITTED.thresholds, **thresholds}, always=True, first=first)

    def _threshold(self, rows: BoolArray, step: Step, k: int) -> Threshold:
        answers, column = self.answers, self.column(step.rung)
        entropy = mean_of_first(answers.entropy[rows, column], k)
        lost = 1.0 - answers.quality[rows, column]
        told = auc(entropy, lost > answers.tolerance) if np.isfinite(entropy).all() else None
        _, loss = self.taken(rows, step, k)
        share = 0.0 if step.threshold is None else float((entropy > step.threshold).mean())
        left = min(float(loss.mean()), answers.tolerance)  # it was weighed, so it counts as no more
        return Threshold(step.threshold, told, len(lost), float(lost.mean()), left, share)


def choose_lanes(
    answers: Answers, score: FloatArray, cut: float, ladders: Mapping[str, tuple[Rung, ...]]
) -> Laned | None:
    """The cheapest lanes and plans that keep to the bound; None where that is full compute for all.

    Args:
        answers: The model's own, with predicted costs.
        score: P(complex) of each row by fits on other images, ``[n]``.
        cut: The threshold so far.
        ladders: By lane, with all shares that were run and their general qualities.
    """
    limit = KEPT * answers.tolerance * answers.images
    best, found = math.inf, None
    for value in map(float, np.unique([cut, *np.quantile(score, CUTS)])):
        cells = Cells.of(answers, ladders, score < value)
        for k in LOOKS if answers.tells else LOOKS[:1]:
            offered = {cell: front(cells.plans(*cell, k)) for cell in cells.rows}
            chosen = cheapest(offered, limit)
            cost = sum(plan.cost for plan in chosen.values())
            if cost < best * (1 - TINY):
                best, found = cost, (cells, chosen, k, value)
    if found is None or not any(step_of(plan).rung for plan in found[1].values()):
        return None
    cells, chosen, k, value = found
    full = answers.cost[:, cells.column(NATIVE_RUNG.name)].sum()
    return Laned(value, cells.rules(chosen, k), best / float(full))


def tells(entropy: FloatArray, loses: BoolArray) -> bool:
    """Whether the entropy surely tells which rows lose: the area under the ROC curve is above one half by `DEVIATIONS`
    of what it is off by where there is nothing to tell (Mann and Whitney 1947)."""
    told, ones = auc(entropy, loses), int(loses.sum())
    if told is None:
        return False
    zeros = len(loses) - ones
    return told - 0.5 >= DEVIATIONS * math.sqrt((len(loses) + 1) / (12.0 * ones * zeros))


def step_of(plan: Plan) -> Step:
    """What a plan of a cell does."""
    assert isinstance(plan.what, Step)
    return plan.what
