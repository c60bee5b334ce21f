"""Which rungs a policy's lanes should offer, from what labelled inputs say the rungs keep and cost.

Knows labelled data, candidate rungs and policies. Must not know models or files.

The strong lane begins with the last rung that is worth, within the tolerance, as much as the best on the stills that
the cheapest rung loses on. The cheap
lane begins with the rung at which routing costs least while the whole keeps the tolerance: a cheaper rung saves
more on each simple input and finds fewer of them. The video lane begins with the last rung before the first that
loses more than the tolerance on clips. Below its beginning a lane keeps what is worth stepping down to: cheaper,
and better than anything cheaper still.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from adaptive_fusion.errors import ConfigError
from adaptive_fusion.evaluation.statistics import Interval, intervals
from adaptive_fusion.learning.data.dataset import Dataset, FloatArray, IntArray
from adaptive_fusion.learning.fitting.search import Validation, all_variants
from adaptive_fusion.learning.fitting.threshold import choose_threshold
from adaptive_fusion.learning.judging.arms import MIN_ROWS, two_arms
from adaptive_fusion.policy.policy import COMPLEX, SIMPLE, VIDEO, Policy
from adaptive_fusion.policy.rungs import Rung


def labelled(ladder: Sequence[Rung], data: Dataset) -> tuple[Rung, ...]:
    """The rungs of a ladder that some input has a quality of.

    Raises:
        ConfigError: If there is none.
    """
    known = {name for name, column in zip(data.rungs, data.quality.T, strict=True) if np.isfinite(column).any()}
    found = tuple(rung for rung in ladder if rung.name in known)
    if not found:
        raise ConfigError(f"the labels have {', '.join(sorted(known))}; expected some of {[r.name for r in ladder]}")
    return found


def choose_lanes(
    lanes: Mapping[str, Sequence[Rung]],
    data: Dataset,
    *,
    tolerance: float,
    slack: bool = False,
    leave_out: Sequence[str] = (),
    seed: int = 0,
    n: int = 200,
) -> tuple[dict[str, tuple[Rung, ...]], dict[str, Any]]:
    """Where each lane begins; nothing is measured on inputs outside `data`.

    Args:
        lanes: Candidate rungs by lane, dearest first.
        data: Labelled inputs to choose by, none of those that will judge.
        tolerance: Loss of quality against the strong arm, or of clips against native, that is accepted.
        slack: Whether clips, and the strong lane, may miss the tolerance by one standard error.
        leave_out: Features that the trial routers must not read.
        seed: Of folds, fits and bootstraps.
        n: Resamples.

    Returns:
        The lanes, and a JSON-able report of what was tried.

    Raises:
        ConfigError: If a lane has no labelled rung.
    """
    ladders = {lane: labelled(ladder, data) for lane, ladder in lanes.items()}
    begin = _strong(ladders[COMPLEX], data, ladders[SIMPLE][-1].name, tolerance, slack)
    ladders[COMPLEX] = ladders[COMPLEX][begin:]
    strong = ladders[COMPLEX][0].name
    tried: dict[str, Any] = {SIMPLE: {}, VIDEO: {}}
    best: tuple[bool, float] | None = None
    begin = 0
    for place, rung in enumerate(ladders[SIMPLE]):
        found = _routed(data, rung.name, strong, tolerance, leave_out, seed, n)
        tried[SIMPLE][rung.name] = found
        # A rung that cannot keep the tolerance even so costs what the strong arm costs.
        order = (not found["met"], found["cost"]["mean"])
        if best is None or order < best:
            best, begin = order, place
    ladders[SIMPLE] = ladders[SIMPLE][begin:]
    begin = 0
    for place, rung in enumerate(ladders[VIDEO]):
        column = data.quality[:, data.rungs.index(rung.name)]
        rows = data.video & np.isfinite(column) & np.isfinite(data.reference)
        if rows.sum() < MIN_ROWS:
            break
        kept = _kept(column[rows], data.reference[rows], data.group[rows], seed, n)
        tried[VIDEO][rung.name] = {"kept": asdict(kept)}
        error = (kept.high - kept.low) / 4  # about one standard error: a few clips flip either way by chance
        if not kept.mean + (error if slack else 0.0) >= 1 - tolerance:
            break
        begin = place
    ladders[VIDEO] = ladders[VIDEO][begin:]
    return ladders, tried


def _strong(ladder: Sequence[Rung], data: Dataset, cheap: str, tolerance: float, slack: bool) -> int:
    """Place of the last rung before the first that loses more than the tolerance to the one that is worth most, on the
    stills that `cheap` loses on."""
    hard = ~data.video & (data.loses(cheap) == 1)
    table = data.quality[np.ix_(hard, [data.rungs.index(rung.name) for rung in ladder])]
    table = table[np.isfinite(table).all(axis=1)]
    if len(table) < MIN_ROWS:
        return 0
    begin = best = int(np.argmax(table.mean(axis=0)))  # the dearest of equals
    for place in range(best + 1, len(ladder)):
        lost = table[:, best] - table[:, place]
        error = float(lost.std()) / len(lost) ** 0.5 if slack else 0.0
        if lost.mean() - error > tolerance * table[:, best].mean():
            break
        begin = place
    return begin


def _kept(quality: FloatArray, reference: FloatArray, group: IntArray, seed: int, n: int) -> Interval:
    """Mean quality as a share of the reference's; NaN where that is 0."""

    def statistics(weight: FloatArray) -> dict[str, float]:
        native = float(weight @ reference)
        return {"kept": float(weight @ quality) / native if native else float("nan")}

    return intervals(statistics, group, seed=seed, n=n)["kept"]


def _routed(
    data: Dataset, cheap: str, strong: str, tolerance: float, leave_out: Sequence[str], seed: int, n: int
) -> dict[str, Any]:
    """Quality kept and cost, as shares of the strong arm's, of routing between two rungs by a plain router."""
    y = data.loses(cheap)
    rows = np.isfinite(y) & ~data.video & np.isfinite(data.quality[:, data.rungs.index(cheap)])
    some = replace(data, y=y).take(rows)
    if len(np.unique(some.y)) < 2:  # nothing to learn: all of one kind
        p = some.y
        judged = some
    else:
        index = np.arange(len(some))
        validation = Validation.of(some, np.ones(len(some), dtype=bool), folds=True, seed=seed)
        variants = [v for v in all_variants(some, index, ("logistic",), leave_out, seed) if "(0.1)" in v.name]
        variant = max(variants, key=lambda v: (len(v.inputs.names), len(v.rows)))
        p, judged = validation.router(some, variant)[1], validation.data
    arms, _, known = two_arms(judged, cheap, strong)
    found = choose_threshold(p[known], arms, objective="cost", tolerance=tolerance, seed=seed, n=n)
    return {"met": found.met, "kept": asdict(found.quality), "cost": asdict(found.cost), "share": asdict(found.share)}


def prune(policy: Policy) -> Policy:
    """The policy without the rungs that a cheaper one of the lane is as good as; each lane's first stays."""
    lanes = {}
    for lane, (first, *rest) in policy.lanes.items():
        steps: list[Rung] = []
        for rung in reversed(rest):
            if first.quality > rung.quality > (steps[-1].quality if steps else -1.0):
                steps.append(rung)
        lanes[lane] = (first, *reversed(steps))
    return replace(policy, lanes=lanes)
