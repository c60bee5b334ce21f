"""From a training matrix to a policy: estimator, calibration, threshold, expected qualities.

Knows scikit-learn, labelled data and what a policy is made of. Must not know of logs or models.

Contents are split 60 / 20 / 20 by hash. On the first part every candidate is fitted: each estimator and
setting, with and without the prompt's features, on all rows and on the trusted ones only. The second part,
its trusted rows, chooses among them by log loss (the simplest within one standard error of the best),
calibrates, and sets the threshold. The third is not looked at until the figures are made. Features are
clipped to a robust range for the fit, so that no single row has leverage.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Protocol

import numpy as np
from joblib import Parallel, delayed
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.validation import has_fit_parameter
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from adaptive_fusion.errors import ConfigError
from adaptive_fusion.learning.calibrate import CalibratedEstimator, fit_calibration, log_losses, log_odds
from adaptive_fusion.learning.curve import Router as CurveRouter
from adaptive_fusion.learning.curve import Threshold, choose_threshold
from adaptive_fusion.learning.dataset import BoolArray, Dataset, FloatArray, IntArray
from adaptive_fusion.learning.evaluate import arm_names, evaluate_policy, scores, two_arms
from adaptive_fusion.learning.expected import fit_quality_model, lane_qualities, quality_bins
from adaptive_fusion.learning.export import export_classifier
from adaptive_fusion.policy import Policy
from adaptive_fusion.prompts import PROMPT_FEATURE_NAMES
from adaptive_fusion.router import EstimatorRouter, Inputs, PlainRouter, Router

MIN_ROWS = 20
"""Fewest rows of either class to fit on, and of rows in each of the other parts."""

MAX_BINS = 63
"""Of the boosted ensembles; scikit-learn finds each bin of weighted rows with a sort of its own."""

_SEARCH_ROWS = 40_000
_CLIP_ROWS = 50_000
_CLIP_SCALES = 8.0


class Classifier(Protocol):
    """What an estimator of one's own must offer; it sees NaN for missing features."""

    def fit(self, X: Any, y: Any, /) -> Any:
        """Fit on rows ``[n, features]`` and labels 0 and 1; takes ``sample_weight`` if it can."""
        ...

    def predict_proba(self, X: Any, /) -> Any:
        """Probabilities ``[n, 2]``; the second column is P(complex)."""
        ...


def _logistic(c: float, seed: int) -> Any:
    steps = [
        ("fill", SimpleImputer(copy=False)),
        ("scale", StandardScaler(copy=False)),
        ("model", LogisticRegression(C=c, max_iter=200, random_state=seed)),
    ]
    return Pipeline(steps)


def _boosted(leaves: int, seed: int) -> Any:
    return HistGradientBoostingClassifier(
        max_bins=MAX_BINS,
        max_leaf_nodes=leaves,
        learning_rate=0.08,
        max_iter=80,
        min_samples_leaf=30,
        l2_regularization=1.0,
        early_stopping=False,
        random_state=seed,
    )


ESTIMATORS: dict[str, tuple[Callable[[float, int], Any], tuple[float, ...]]] = {
    "logistic": (_logistic, (0.01, 0.1, 1.0, 10.0)),
    "hgb": (lambda leaves, seed: _boosted(int(leaves), seed), (8, 16)),
}
"""How each named estimator is made, and the settings that are tried of it, the simpler first."""


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


@dataclass(frozen=True)
class _Candidate:
    """One way to fit a router; `order` rises with complexity."""

    name: str
    make: Callable[[], Any]
    inputs: Inputs
    rows: IntArray
    order: int


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
    usable = ~data.video & np.isfinite(data.y) & (data.weight > 0)
    train = np.flatnonzero(usable & data.split("train", seed))
    valid, test = (data.take(_judging(data, usable & data.split(part, seed))) for part in ("valid", "test"))
    _check(data.y[train], len(valid), len(test))
    with threadpool_limits(1, user_api="blas"):  # the order of sums must not depend on the machine's cores
        candidates = _candidates(data, train, estimators, leave_out, seed)
        losses = Parallel(n_jobs=jobs, prefer="threads")(
            delayed(_losses)(data, candidate, valid) for candidate in candidates
        )
        best = _choose(candidates, losses, valid)
        router = _fit_router(data, best, valid)
        threshold = _threshold(router, valid, base, objective, seed, n)
        policy = replace(base, name=name, router=router, threshold=threshold.value.mean, quality_model=None)
        seen = {part: data.take(_some(data.split(part, seed))) for part in ("train", "valid")}
        policy = replace(policy, lanes=lane_qualities(policy, seen["train"]))
        model, versus = fit_quality_model(policy, seen["train"], seen["valid"], seed=seed, n=n)
        policy = replace(policy, quality_model=model)
        asked = _prompt_gain(data, candidates, losses, valid, test, base)
        judged = evaluate_policy(policy, test, seed=seed, n=n)
    report = {
        "data": {"sha256": data.digest(), **data.report},
        "objective": objective,
        "tolerance": data.tolerance,
        "seed": seed,
        "rows": {"train": len(train), "valid": len(valid), "test": len(test)},
        "complex_share": float(np.average(data.y[train], weights=data.weight[train])),
        "chosen": best.name,
        "candidates": {c.name: _mean_loss(loss, valid) for c, loss in zip(candidates, losses, strict=True)},
        "features": list(router.inputs.names),
        "threshold": asdict(threshold),
        "expected_quality": quality_bins(policy, seen["train"]),
        "quality_model": versus,
        "prompt_features": asked,
        "test": judged.to_dict(),
    }
    return FittedPolicy(policy, report)


def _some(rows: BoolArray) -> IntArray:
    """Those rows, evenly thinned out where there are more than means and small models need."""
    found: IntArray = np.flatnonzero(rows)
    return found[:: -(-len(found) // _SEARCH_ROWS) or 1]


def _judging(data: Dataset, rows: BoolArray) -> BoolArray:
    """The trusted ones of these rows if there are enough of them to judge by, else all."""
    trusted = rows & data.trusted()
    return trusted if trusted.sum() >= MIN_ROWS else rows


def _check(y: FloatArray, valid: int, test: int) -> None:
    ones = int(y.sum())
    if min(ones, len(y) - ones, valid, test) < MIN_ROWS:
        raise ConfigError(
            f"to fit on: {len(y) - ones} simple and {ones} complex, to choose: {valid}, to judge: {test};"
            f" expected at least {MIN_ROWS} of each"
        )


def _candidates(
    data: Dataset,
    train: IntArray,
    estimators: Sequence[str | Classifier],
    leave_out: Sequence[str],
    seed: int,
) -> list[_Candidate]:
    x = data.x[train[:: max(1, len(train) // _CLIP_ROWS)]]
    useful = [
        name
        for name, column in zip(data.names, x.T, strict=True)
        if name not in leave_out and np.isfinite(column).any() and np.nanmin(column) < np.nanmax(column)
    ]
    if unknown := sorted(set(leave_out) - set(data.names)):
        raise ConfigError(f"cannot leave out {unknown}; expected some of {', '.join(data.names)}")
    if not useful:
        raise ConfigError("no feature varies in the labelled logs; expected complexity or prompt features")
    image = [name for name in useful if name not in PROMPT_FEATURE_NAMES]
    views = {"image": Inputs(tuple(image)), "image+prompt": Inputs(tuple(useful))}
    if not image or len(image) == len(useful):
        views = {"image" if image else "prompt": Inputs(tuple(useful))}
    sources = {"all": train, "trusted": train[data.trusted()[train]]}
    if not MIN_ROWS <= len(sources["trusted"]) < len(train) or len(np.unique(data.y[sources["trusted"]])) < 2:
        del sources["trusted"]
    makers: list[tuple[str, Callable[[], Any]]] = []
    for estimator in estimators:
        if not isinstance(estimator, str):
            makers.append((type(estimator).__name__, partial(copy.deepcopy, estimator)))
            continue
        if estimator not in ESTIMATORS:
            raise ConfigError(f"estimator is {estimator!r}; expected one of {', '.join(sorted(ESTIMATORS))}")
        make, settings = ESTIMATORS[estimator]
        makers += [(f"{estimator}({value:g})", partial(make, value, seed)) for value in settings]
    found = [
        (f"{name}, {view}, {source} rows", make, inputs, rows)
        for name, make in makers
        for view, inputs in views.items()
        for source, rows in sources.items()
    ]
    if not found:
        raise ConfigError("no estimator was named; expected at least one")
    return [_Candidate(*parts, order=i) for i, parts in enumerate(found)]


def _fit(data: Dataset, candidate: _Candidate, rows: IntArray) -> Any:
    """The candidate fitted on rows; a plain model where it can be exported, else the estimator."""
    places = np.array([data.names.index(name) for name in candidate.inputs.names])
    x = data.x[np.ix_(rows, places)]
    _clip(x)
    estimator = candidate.make()
    y = data.y[rows].astype(np.int64)
    weight = data.weight[rows]
    if (weight == weight[0]).all():
        estimator.fit(x, y)
    elif isinstance(estimator, Pipeline):
        estimator.fit(x, y, **{f"{estimator.steps[-1][0]}__sample_weight": weight / weight.mean()})
    elif has_fit_parameter(estimator, "sample_weight"):
        estimator.fit(x, y, sample_weight=weight / weight.mean())
    else:
        estimator.fit(x, y)
    try:
        return export_classifier(estimator)[0]
    except ConfigError:
        return estimator


def _clip(x: FloatArray) -> None:
    """Clip each column in place to its median plus or minus 8 robust standard deviations (from the 10 and 90
    % quantiles); a column that hardly varies is left alone."""
    some = x[:: max(1, len(x) // _CLIP_ROWS)]
    low, middle, high = np.nanquantile(some, [0.1, 0.5, 0.9], axis=0)
    reach = _CLIP_SCALES * (high - low) / 2.563
    reach[~(reach > 0)] = np.inf
    np.clip(x, middle - reach, middle + reach, out=x)


def _losses(data: Dataset, candidate: _Candidate, valid: Dataset) -> FloatArray:
    """Log loss of each row of `valid` after fitting on a sample of the candidate's rows."""
    rows = candidate.rows[:: max(1, len(candidate.rows) // _SEARCH_ROWS)]
    raw = log_odds(_fit(data, candidate, rows), valid.columns(candidate.inputs.names))
    return log_losses(fit_calibration(raw, valid, shapes=("platt",)).batch(raw), valid.y)


def _mean_loss(loss: FloatArray, valid: Dataset) -> float:
    return float(np.average(loss, weights=valid.weight))


def _choose(candidates: list[_Candidate], losses: list[FloatArray], valid: Dataset) -> _Candidate:
    """The simplest candidate whose loss is within one standard error of the least."""
    means = [_mean_loss(loss, valid) for loss in losses]
    least = losses[int(np.argmin(means))]
    for candidate, loss in zip(candidates, losses, strict=True):
        worse = (loss - least) * valid.weight / valid.weight.mean()
        sums = np.bincount(np.unique(valid.group, return_inverse=True)[1], weights=worse)
        if worse.mean() <= np.sqrt(np.sum((sums - sums.mean()) ** 2)) / len(worse):
            return candidate
    raise ConfigError("no candidate gives finite probabilities")


def _fit_router(data: Dataset, candidate: _Candidate, valid: Dataset) -> Router:
    model = _fit(data, candidate, candidate.rows)
    raw = log_odds(model, valid.columns(candidate.inputs.names))
    calibration = fit_calibration(raw, valid)
    if hasattr(model, "raw_batch"):
        return PlainRouter(candidate.inputs, model, calibration)
    return EstimatorRouter(candidate.inputs, CalibratedEstimator(model, calibration))


def _threshold(router: Router, valid: Dataset, base: Policy, objective: str, seed: int, n: int) -> Threshold:
    arms, _, rows = two_arms(valid, *arm_names(base))
    p = router.p_complex_batch(valid.take(rows).columns(router.inputs.names))
    return choose_threshold(p, arms, objective=objective, tolerance=valid.tolerance, seed=seed, n=n)


def _prompt_gain(
    data: Dataset,
    candidates: list[_Candidate],
    losses: list[FloatArray],
    valid: Dataset,
    test: Dataset,
    base: Policy,
) -> dict[str, Any]:
    """Log loss and APGR on the last part of the best candidate with and without the prompt's features."""
    out: dict[str, Any] = {}
    for reads in (False, True):
        some = [(c, x) for c, x in zip(candidates, losses, strict=True) if c.inputs.reads_prompt == reads]
        if not some:
            return {}
        router = _fit_router(data, _choose([c for c, _ in some], [x for _, x in some], valid), valid)
        policy = replace(base, router=router, quality_model=None)
        arms, y, rows = two_arms(test, *arm_names(base))
        p = scores(policy, test.take(rows))
        out["with" if reads else "without"] = {
            "log_loss": float(log_losses(p, y).mean()),
            "apgr": CurveRouter(p, arms).curve().apgr,
        }
    return out
