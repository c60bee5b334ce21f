"""From a training matrix to a policy: router, threshold, expected qualities, and the report that says why.

Knows labelled data and what a policy is made of. Must not know logs, models or estimators.

Contents are split 60 / 20 / 20 by hash. On the first part variants of a router are fitted; the second chooses among
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
from adaptive_fusion.features.prompts import PROMPT_FEATURE_NAMES
from adaptive_fusion.learning.data.dataset import BoolArray, Dataset, FloatArray, IntArray
from adaptive_fusion.learning.fitting.calibration import log_losses
from adaptive_fusion.learning.fitting.escalation import cheap_rungs, fit_escalation, images_seen
from adaptive_fusion.learning.fitting.expected import fit_quality_model, lane_qualities, quality_bins
from adaptive_fusion.learning.fitting.search import CROSS_FIT_ROWS, Classifier, Validation, Variant, all_variants
from adaptive_fusion.learning.fitting.threshold import Threshold, choose_threshold
from adaptive_fusion.learning.judging.arms import MIN_ROWS, arm_names, judges, scores, two_arms
from adaptive_fusion.learning.judging.curve import RoutingCurve
from adaptive_fusion.learning.judging.evaluate import evaluate_policy
from adaptive_fusion.policy.fitted import Fitted
from adaptive_fusion.policy.policy import COMPLEX, SIMPLE, VIDEO, Policy
from adaptive_fusion.policy.router import Router

TASK = "task"
"""The slicing whose slices say what was asked, such as describe and read."""

SCENE = "scene"
"""The slicing whose slices say what kind of image it is."""
UNSAID = "The labels do not say of which model they are: the base policy's stands."
_SEEN_ROWS = 40_000

VOUCHED = 0.5
"""P(complex) above which a router does not vouch for the cheap plan, even where it takes it."""


@dataclass(frozen=True)
class FittedPolicy:
    """A policy and how it was found.

    Attributes:
        policy: Ready to be saved.
        report: JSON-able: data, candidates, threshold, expected qualities, what the prompt's features add, thresholds
            on the model's uncertainty, and ``test``: the figures on the part that nothing was chosen on.
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
    parts = _split(data, seed)
    options = {"objective": objective, "tolerance": data.tolerance, "seed": seed, "n": n}
    with threadpool_limits(1, user_api="blas"):  # the order of sums must not depend on the machine's cores
        search = _Search(data, parts, all_variants(data, parts.rows, estimators, leave_out, seed), jobs)
        best = search.best()
        router, p = search.router(best)
        threshold = _threshold(p, parts.validation.data, base, options)
        policy = replace(base, name=name, router=router, threshold=threshold.value.mean, quality_model=None)
        policy = replace(policy, lanes=lane_qualities(policy, parts.measured))
        model, why = fit_quality_model(policy, parts.train, parts.valid, seed=seed, n=n)
        policy = replace(policy, quality_model=model)
        unseen = data.take(~data.split("test", seed))
        escalation = fit_escalation(unseen, cheap_rungs(policy), seed=seed)
        if escalation is not None:
            escalation = replace(escalation, sure=_sure(policy, threshold, unseen))
            policy = replace(policy, escalation=escalation)
        if data.model is not None:
            policy = replace(policy, fitted=fitted_to(data))
        report = {
            **_data_report(data, parts),
            "objective": objective,
            "tolerance": data.tolerance,
            "seed": seed,
            "chosen": best.name,
            "candidates": search.mean_losses(),
            "features": list(router.inputs.names),
            "threshold": asdict(threshold),
            "expected_quality": quality_bins(policy, parts.measured),
            "quality_model": why,
            "escalation": {**escalation.to_dict(), "images": images_seen(unseen)} if escalation is not None else {},
            "prompt_features": _prompt_gain(search, parts, base, options),
            "test": evaluate_policy(policy, parts.test, seed=seed, n=n).to_dict(),
        }
    return FittedPolicy(policy, report)


@dataclass(frozen=True)
class _Parts:
    """The labelled inputs, as each step takes them.

    Attributes:
        rows: Those to fit on, as indices.
        validation: Those that choose, calibrate and set the threshold.
        folds: Whether these are the same rows, in folds.
        train: Those of the first part, clips included, for a model of quality.
        valid: Those of the second part, for the same.
        measured: Those that say what each rung keeps.
        test: Those that judge at the end, clips included.
        held: The stills among them.
    """

    rows: IntArray
    validation: Validation
    folds: bool
    train: Dataset
    valid: Dataset
    measured: Dataset
    test: Dataset
    held: Dataset


def _split(data: Dataset, seed: int) -> _Parts:
    """Three parts by content; of few rows the first two are one.

    Raises:
        ConfigError: For too few rows, or labels of one class only.
    """
    usable = np.isfinite(data.y) & (data.weight > 0) & ~data.video
    train, valid = (usable & data.split(part, seed) for part in ("train", "valid"))
    few = int(judges(data, train | valid).sum()) <= CROSS_FIT_ROWS
    if few:
        train = valid = train | valid
    validation = Validation.of(data, valid, folds=few, seed=seed)
    test = data.take(judges(data, (usable | data.video) & data.split("test", seed)))
    held = test.take(~test.video) if test.video.any() else test
    rows = np.flatnonzero(train)
    _check(data.y[rows], len(validation.data), len(held))
    return _Parts(
        rows=rows,
        validation=validation,
        folds=few,
        train=data.take(_some(data.split("train", seed))),
        valid=data.take(_some(data.split("valid", seed))),
        measured=data.take(_some(data.split("train", seed) | (data.split("valid", seed) & few))),
        test=test,
        held=held,
    )


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


def fitted_to(data: Dataset) -> Fitted:
    """What a policy is fitted to by these data: their model, kinds of scenes as far as labels name them, and the range
    of every feature of images."""
    known = [name for name in data.names if name not in PROMPT_FEATURE_NAMES]
    ranges = {}
    for name, column in zip(known, data.columns(known).T, strict=True):
        if np.isfinite(column).any():
            ranges[name] = (round(float(np.nanmin(column)), 4), round(float(np.nanmax(column)), 4))
    codes, names = data.slices.get(SCENE, (np.zeros(0, np.int64), ()))
    return Fitted(data.model, tuple(names[code] for code in np.unique(codes) if names[code]), ranges)


class _Search:
    """All variants with their losses on the validation rows; the routers of those that were asked for."""

    def __init__(self, data: Dataset, parts: _Parts, variants: Sequence[Variant], jobs: int) -> None:
        self.data, self.variants, self.validation = data, variants, parts.validation
        self.losses: list[FloatArray] = Parallel(n_jobs=jobs, prefer="threads")(
            delayed(parts.validation.losses)(data, variant) for variant in variants
        )
        self._routers: dict[int, tuple[Router, FloatArray]] = {}

    def best(self, *, reads_prompt: bool | None = None) -> Variant:
        """The variant that validation chooses, of all or of those that read the prompt's features or do not.

        Raises:
            ConfigError: If there is none.
        """
        some = [
            (variant, loss)
            for variant, loss in zip(self.variants, self.losses, strict=True)
            if reads_prompt in (None, variant.inputs.reads_prompt)
        ]
        return self.validation.choose([variant for variant, _ in some], [loss for _, loss in some])

    def router(self, variant: Variant) -> tuple[Router, FloatArray]:
        """The variant as a router, and P(complex) of the validation rows, unseen; fitted once."""
        if variant.order not in self._routers:
            self._routers[variant.order] = self.validation.router(self.data, variant)
        return self._routers[variant.order]

    def mean_losses(self) -> dict[str, float]:
        """Mean loss by the variant's name."""
        pairs = zip(self.variants, self.losses, strict=True)
        return {variant.name: self.validation.mean(loss) for variant, loss in pairs}


def _data_report(data: Dataset, parts: _Parts) -> dict[str, Any]:
    rows = parts.rows
    return {
        "data": {"sha256": data.digest(), **data.report},
        "model": UNSAID if data.model is None else f"Labelled by {data.model.in_words()}.",
        "rows": {"train": len(rows), "valid": len(parts.validation.data), "test": len(parts.held)},
        "folds": parts.folds,
        "complex_share": float(np.average(data.y[rows], weights=data.weight[rows])),
    }


def _threshold(p: FloatArray, judged: Dataset, base: Policy, options: dict[str, Any]) -> Threshold:
    """The threshold that the judging rows choose, whose P(complex) is `p`."""
    arms, _, rows = two_arms(judged, *arm_names(base))
    return choose_threshold(p[rows], arms, **options)


def _sure(policy: Policy, threshold: Threshold, data: Dataset) -> dict[str, float]:
    """By lane, up to which P(complex) its first rung needs no second pass: where the threshold keeps to the tolerance,
    the stills below it that more likely lose nothing than something, and those above it; and clips, where they keep
    to it as a whole, within a standard error. What lies between is for the model to say.
    """
    found = {SIMPLE: min(VOUCHED, threshold.value.mean), COMPLEX: 1.0} if threshold.met else {}
    clip = policy.lanes[VIDEO][0].name
    if clip in data.rungs:
        lost = (data.reference - data.quality[:, data.rungs.index(clip)])[data.video]
        lost = lost[np.isfinite(lost)]
        if len(lost) >= MIN_ROWS and lost.mean() - lost.std(ddof=1) / len(lost) ** 0.5 <= data.tolerance:
            found[VIDEO] = 1.0
    return found


def _prompt_gain(search: _Search, parts: _Parts, base: Policy, options: dict[str, Any]) -> dict[str, Any]:
    """What the best variant with the prompt's features and the best without are worth on the last part.

    Each has a threshold of its own. Per side: log loss, APGR, quality and cost, of all and of each slice of
    slicings that name the task; ``gain`` holds the differences, with less without, with their intervals. Empty where
    all variants are on one side.
    """
    if len({variant.inputs.reads_prompt for variant in search.variants}) < 2:
        return {}
    arms, y, rows = two_arms(parts.held, *arm_names(base))
    judged = parts.held.take(rows)
    sides: dict[str, dict[str, FloatArray]] = {}
    out: dict[str, Any] = {}
    for name, reads in (("without", False), ("with", True)):
        router, seen = search.router(search.best(reads_prompt=reads))
        p = scores(replace(base, router=router), judged)
        to_strong = p >= _threshold(seen, parts.validation.data, base, options).value.mean
        quality, cost = arms.routed(to_strong)
        sides[name] = {"log_loss": log_losses(p, y), "quality": quality, "cost": cost}
        means = {figure: float(values.mean()) for figure, values in sides[name].items()}
        out[name] = {**means, "apgr": RoutingCurve(p, arms).curve().apgr}

    def differences(weight: FloatArray) -> dict[str, float]:
        return {
            figure: float(np.average(values - sides["without"][figure], weights=weight))
            for figure, values in sides["with"].items()
        }

    found = intervals(differences, judged.group, seed=options["seed"], n=options["n"])
    out["gain"] = {figure: asdict(value) for figure, value in found.items()}
    out["tasks"] = _by_task(judged, sides)
    return out


def _by_task(judged: Dataset, sides: Mapping[str, Mapping[str, FloatArray]]) -> dict[str, Any]:
    """Mean figures of both sides for each slice that names a task."""
    codes, names = judged.slices.get(TASK, (np.zeros(len(judged), np.int64), ()))
    return {
        name: {
            side: {figure: float(values[codes == code].mean()) for figure, values in figures.items()}
            for side, figures in sides.items()
        }
        for code, name in enumerate(names)
        if name and (codes == code).any()
    }
