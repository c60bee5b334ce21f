"""The ways to fit a router that are tried, and which of them wins on rows that it has not seen.

Knows scikit-learn, labelled data and calibration. Must not know policies, thresholds or reports.

Every variant is an estimator with a setting, fitted with or without the prompt's features, on all rows, on
the trusted ones only, or on those whose quality was measured. They are judged by their log loss on other
contents: on a part set aside, or, of few rows, on each fold of the same rows by a fit on the others. Features
are clipped to a robust range for the fit, so that no single row has leverage.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.validation import has_fit_parameter

from adaptive_fusion.errors import ConfigError
from adaptive_fusion.features.prompts import PROMPT_FEATURE_NAMES
from adaptive_fusion.learning.data.dataset import BoolArray, Dataset, FloatArray, IntArray, fill_empty
from adaptive_fusion.learning.fitting.calibration import CalibratedEstimator, fit_calibration, log_losses, log_odds
from adaptive_fusion.learning.fitting.export import export_classifier
from adaptive_fusion.learning.judging.arms import MIN_ROWS, judges
from adaptive_fusion.policy.router import EstimatorRouter, Inputs, PlainRouter, Router

MAX_BINS = 63
"""Of the boosted ensembles; scikit-learn finds each bin of weighted rows with a sort of its own."""

FOLDS = 5
CROSS_FIT_ROWS = 1000
"""Up to this many rows to fit on and to judge by, all do both, in `FOLDS` folds; a fifth of them set aside
would judge too roughly."""

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
class Variant:
    """One way to fit a router.

    Attributes:
        name: Estimator with its setting, features and rows, for reports.
        make: Builds the estimator.
        inputs: The features that it reads.
        rows: What it is fitted on: indices into the data.
        order: Its place among all variants, which rises with complexity.
    """

    name: str
    make: Callable[[], Any]
    inputs: Inputs
    rows: IntArray
    order: int


@dataclass(frozen=True)
class Validation:
    """The rows that variants are judged by, none of which a variant has seen when it is judged.

    Attributes:
        data: The rows themselves.
        fold: Fold of every row of the whole data set, ``[n]``: each fold is judged by a fit on the others. None where
            the rows that variants are fitted on have no content in common with `data`.
        own: Fold of each row of `data`.
    """

    data: Dataset
    fold: IntArray | None = None
    own: IntArray | None = None

    @classmethod
    def of(cls, data: Dataset, among: BoolArray, *, folds: bool, seed: int) -> "Validation":
        """The rows `among` these that may judge (see `judges`), in folds by content or not."""
        chosen = np.flatnonzero(judges(data, among))
        if not folds:
            return cls(data.take(chosen))
        fold = data.folds(FOLDS, seed)
        return cls(data.take(chosen), fold, fold[chosen])

    def raw(self, data: Dataset, variant: Variant, *, limit: int | None = None) -> FloatArray:
        """The variant's scores of the judging rows, ``[rows]``; fitted on at most about `limit` rows."""
        rows = variant.rows if limit is None else variant.rows[:: max(1, len(variant.rows) // limit)]
        x = self.data.columns(variant.inputs.names)
        if self.fold is None or self.own is None:
            return log_odds(fit_variant(data, variant, rows), x)
        raw = np.empty(len(x))
        for k in np.unique(self.own):
            seen, judged = rows[self.fold[rows] != k], self.own == k
            if len(np.unique(data.y[seen])) < 2:
                raise ConfigError(f"all labels of one class lie in a fifth of the contents; {len(seen)} others remain")
            raw[judged] = log_odds(fit_variant(data, variant, seen), x[judged])
        return raw

    def losses(self, data: Dataset, variant: Variant) -> FloatArray:
        """Log loss of each judging row, ``[rows]``."""
        raw = self.raw(data, variant, limit=_SEARCH_ROWS)
        return log_losses(fit_calibration(raw, self.data, shapes=("platt",)).batch(raw), self.data.y)

    def mean(self, loss: FloatArray) -> float:
        """Weighted mean of losses."""
        return float(np.average(loss, weights=self.data.weight))

    def choose(self, variants: Sequence[Variant], losses: Sequence[FloatArray]) -> Variant:
        """The simplest variant whose loss is within one standard error of the least."""
        weight = self.data.weight
        least = losses[int(np.argmin([self.mean(loss) for loss in losses]))]
        for variant, loss in zip(variants, losses, strict=True):
            worse = (loss - least) * weight / weight.mean()
            sums = np.bincount(np.unique(self.data.group, return_inverse=True)[1], weights=worse)
            if worse.mean() <= np.sqrt(np.sum((sums - sums.mean()) ** 2)) / len(worse):
                return variant
        raise ConfigError("no candidate gives finite probabilities")

    def router(self, data: Dataset, variant: Variant) -> tuple[Router, FloatArray]:
        """The variant fitted on all its rows and calibrated here, and P(complex) of the judging rows as a
        router that has not seen them gives it."""
        model = fit_variant(data, variant, variant.rows)
        x = self.data.columns(variant.inputs.names)
        raw = log_odds(model, x) if self.fold is None else self.raw(data, variant)
        calibration = fit_calibration(raw, self.data)
        p = calibration.batch(raw)
        if hasattr(model, "raw_batch"):
            return PlainRouter(variant.inputs, model, calibration), p
        return EstimatorRouter(variant.inputs, CalibratedEstimator(model, calibration)), p


def all_variants(
    data: Dataset,
    train: IntArray,
    estimators: Sequence[str | Classifier],
    leave_out: Sequence[str],
    seed: int,
) -> list[Variant]:
    """Every way to fit on the rows `train`, the simpler first.

    Raises:
        ConfigError: For an estimator or a feature of unknown name, or none that can be used.
    """
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
    sources = {"all": train}
    measured = data.trusted() & np.isfinite(data.quality).any(axis=1)
    for source, rows in (("trusted", train[data.trusted()[train]]), ("measured", train[measured[train]])):
        fewer = len(rows) < min(map(len, sources.values()))
        if fewer and len(rows) >= MIN_ROWS and len(np.unique(data.y[rows])) == 2:
            sources[source] = rows
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
    return [Variant(*parts, order=i) for i, parts in enumerate(found)]


def fit_variant(data: Dataset, variant: Variant, rows: IntArray) -> Any:
    """The variant fitted on rows; a plain model where it can be exported, else the estimator."""
    places = np.array([data.names.index(name) for name in variant.inputs.names])
    x = data.x[np.ix_(rows, places)]
    fill_empty(x)
    _clip(x)
    estimator = variant.make()
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
