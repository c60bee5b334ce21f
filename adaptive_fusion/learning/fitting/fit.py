"""From a training matrix to a policy: router, threshold, expected qualities, and the report that says why.

Knows labelled data and what a policy is made of. Must not know logs, models or estimators.

Contents are split 60 / 20 / 20 by hash. On the first part candidates are fitted; the second chooses among
them, calibrates, and sets the threshold; of few rows the first two do both, in folds. The third is not looked
at until the figures are made.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from joblib import Parallel, delayed
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from adaptive_fusion.errors import ConfigError
from adaptive_fusion.evaluation.statistics import intervals
from adaptive_fusion.learning.data.dataset import BoolArray, Dataset, FloatArray, IntArray
from adaptive_fusion.learning.fitting.calibration import log_losses
from adaptive_fusion.learning.fitting.expected import fit_quality_model, lane_qualities, quality_bins
from adaptive_fusion.learning.fitting.search import CROSS_FIT_ROWS, Candidate, Classifier, Jury, all_candidates
from adaptive_fusion.learning.fitting.threshold import Threshold, choose_threshold
from adaptive_fusion.learning.judging.arms import MIN_ROWS, arm_names, judges, scores, two_arms
from adaptive_fusion.learning.judging.curve import Router as CurveRouter
from adaptive_fusion.learning.judging.evaluate import evaluate_policy
from adaptive_fusion.policy.policy import Policy
from adaptive_fusion.policy.router import Router

TASK = "task"
"""The slicing whose slices say what was asked, such as describe and read."""

_SEEN_ROWS = 40_000


@dataclass(frozen=True)
class FittedPolicy:
    """A policy and how it was found.

    Attributes:
        policy: Ready to be saved.
        report: JSON-able: data, candidates, threshold, expected qualities, what the prompt's features add,
            and ``test``: the figures on the part that nothing was chosen on.
    """

    policy: Policy
    report: Mapping[str, Any]


def fit_policy(
    data: Dataset,
    base: Policy,
    *,
    name: str = "trained",
    objective: str = "quality",
    estimators: Sequence[str | Classifier] = ("logistic", "hgb"),
    seed: int = 0,
    leave_out: Sequence[str] = (),
    jobs: int = 2,
    n: int = 500,
) -> FittedPolicy:
    """Fit the router, the threshold and the expected qualities of a policy; the points of its lanes stay
    `base`'s.

    The same data, base and seed give the same policy, to the last bit.

    Args:
        data: Labelled inputs, read for the rungs of `base`.
        base: Policy whose ladders, budget and fusion weights are kept.
        name: Of the new policy.
        objective: See `choose_threshold`.
        estimators: Names from `ESTIMATORS`, or estimators of one's own (copied before they are fitted). One
            that cannot be exported to plain parameters is saved as ``.joblib``.
        seed: Of splits, fits and bootstraps.
        leave_out: Features that the router must not read, such as sizes that the labelled inputs do not cover.
        jobs: Threads of the search.
        n: Resamples of the bootstraps.

    Raises:
        ConfigError: For an unknown estimator, too few rows, or labels of one class only.
    """
    usable = np.isfinite(data.y) & (data.weight > 0) & ~data.video
    train, valid = (usable & data.split(part, seed) for part in ("train", "valid"))
    few = int(judges(data, train | valid).sum()) <= CROSS_FIT_ROWS
    if few:
        train = valid = train | valid
    jury = Jury.of(data, valid, folds=few, seed=seed)
    test = data.take(judges(data, (usable | data.video) & data.split("test", seed)))
    held = test.take(~test.video) if test.video.any() else test
    rows = np.flatnonzero(train)
    _check(data.y[rows], len(jury.data), len(held))
    options = {"objective": objective, "tolerance": data.tolerance, "seed": seed, "n": n}
    seen = {part: data.take(_some(data.split(part, seed))) for part in ("train", "valid")}
    measured = data.take(_some(data.split("train", seed) | (data.split("valid", seed) & few)))
    with threadpool_limits(1, user_api="blas"):  # the order of sums must not depend on the machine's cores
        candidates = all_candidates(data, rows, estimators, leave_out, seed)
        losses = Parallel(n_jobs=jobs, prefer="threads")(delayed(jury.losses)(data, each) for each in candidates)
        best = jury.choose(candidates, losses)
        routers = {best.order: jury.router(data, best)}
        router, p = routers[best.order]
        threshold = _threshold(p, jury.data, base, options)
        policy = replace(base, name=name, router=router, threshold=threshold.value.mean, quality_model=None)
        policy = replace(policy, lanes=lane_qualities(policy, measured))
        model, versus = fit_quality_model(policy, seen["train"], seen["valid"], seed=seed, n=n)
        policy = replace(policy, quality_model=model)
        tried = list(zip(candidates, losses, strict=True))
        asked = _prompt_gain(data, tried, routers, jury, held, base, options)
        judged = evaluate_policy(policy, test, seed=seed, n=n)
    report = {
        "data": {"sha256": data.digest(), **data.report},
        "objective": objective,
        "tolerance": data.tolerance,
        "seed": seed,
        "rows": {"train": len(rows), "valid": len(jury.data), "test": len(held)},
        "folds": few,
        "complex_share": float(np.average(data.y[rows], weights=data.weight[rows])),
        "chosen": best.name,
        "candidates": {c.name: jury.mean(loss) for c, loss in zip(candidates, losses, strict=True)},
        "features": list(router.inputs.names),
        "threshold": asdict(threshold),
        "expected_quality": quality_bins(policy, measured),
        "quality_model": versus,
        "prompt_features": asked,
        "test": judged.to_dict(),
    }
    return FittedPolicy(policy, report)


def _some(rows: BoolArray) -> IntArray:
    """Those rows, evenly thinned out where there are more than means and small models need."""
    found: IntArray = np.flatnonzero(rows)
    return found[:: -(-len(found) // _SEEN_ROWS) or 1]


def _check(y: FloatArray, valid: int, test: int) -> None:
    ones = int(y.sum())
    if min(ones, len(y) - ones, valid, test) < MIN_ROWS:
        raise ConfigError(
            f"to fit on: {len(y) - ones} simple and {ones} complex, to choose: {valid}, to judge: {test};"
            f" expected at least {MIN_ROWS} of each"
        )


def _threshold(p: FloatArray, judged: Dataset, base: Policy, options: dict[str, Any]) -> Threshold:
    """The threshold that the judging rows choose, whose P(complex) is `p`."""
    arms, _, rows = two_arms(judged, *arm_names(base))
    return choose_threshold(p[rows], arms, **options)


def _prompt_gain(
    data: Dataset,
    candidates: list[tuple[Candidate, FloatArray]],
    routers: dict[int, tuple[Router, FloatArray]],
    jury: Jury,
    test: Dataset,
    base: Policy,
    options: dict[str, Any],
) -> dict[str, Any]:
    """What the best candidate with the prompt's features and the best without are worth on the last part.

    Each has a threshold of its own. Per side: log loss, APGR, quality and cost, of all and of each slice of
    slicings that name the task; ``gain`` holds the differences, with less without, with their intervals.
    """
    sides: dict[str, dict[str, FloatArray]] = {}
    out: dict[str, Any] = {}
    arms, y, rows = two_arms(test, *arm_names(base))
    judged = test.take(rows)
    for reads in (False, True):
        some = [pair for pair in candidates if pair[0].inputs.reads_prompt == reads]
        if not some:
            return {}
        best = jury.choose([c for c, _ in some], [x for _, x in some])
        router, seen = routers.get(best.order) or jury.router(data, best)
        threshold = _threshold(seen, jury.data, base, options).value.mean
        p = scores(replace(base, router=router), judged)
        goes = p >= threshold
        side = {
            "log_loss": log_losses(p, y),
            "quality": np.where(goes, arms.strong, arms.cheap),
            "cost": np.where(goes, arms.strong_cost, arms.cheap_cost),
        }
        sides["with" if reads else "without"] = side
        means = {name: float(values.mean()) for name, values in side.items()}
        out["with" if reads else "without"] = {**means, "apgr": CurveRouter(p, arms).curve().apgr}

    def differences(weight: FloatArray) -> dict[str, float]:
        return {
            name: float(np.average(values - sides["without"][name], weights=weight))
            for name, values in sides["with"].items()
        }

    found = intervals(differences, judged.group, seed=options["seed"], n=options["n"])
    out["gain"] = {name: asdict(value) for name, value in found.items()}
    codes, names = judged.slices.get(TASK, (np.zeros(len(judged), np.int64), ()))
    out["tasks"] = {
        name: {
            side: {figure: float(values[codes == code].mean()) for figure, values in sides[side].items()}
            for side in ("without", "with")
        }
        for code, name in enumerate(names)
        if name and (codes == code).any()
    }
    return out
