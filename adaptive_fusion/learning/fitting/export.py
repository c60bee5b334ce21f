"""Fitted scikit-learn estimators to plain parameters that predict the same, to 1e-9.

Knows scikit-learn's fitted attributes and the runtime's plain models. Must not know of features, logs or
policies.
"""

import math
from typing import Any

import numpy as np
from sklearn.calibration import CalibratedClassifierCV
from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor
from sklearn.frozen import FrozenEstimator
from sklearn.impute import SimpleImputer
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LinearRegression, LogisticRegression, Ridge
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler

from adaptive_fusion.errors import ConfigError
from adaptive_fusion.policy.calibration import Calibration, Isotonic, Platt
from adaptive_fusion.policy.predictors import LinearModel, Model, Tree, TreeModel

_LINEAR = (LinearRegression, LogisticRegression, Ridge)
_BOOSTED = (HistGradientBoostingClassifier, HistGradientBoostingRegressor)
_CHOICES = ", ".join(kind.__name__ for kind in (*_LINEAR, *_BOOSTED))


def export_classifier(estimator: Any) -> tuple[Model, Calibration]:
    """A fitted binary classifier as a model of its log-odds and the calibration that turns them into P(class
    1).

    Takes logistic regression, alone or after `SimpleImputer` and `StandardScaler` in a pipeline, histogram
    gradient boosting, and either within a `CalibratedClassifierCV` of one fitted classifier (sigmoid or
    isotonic).

    Raises:
        ConfigError: For another estimator, other classes than 0 and 1, or one with parts that are not
            exported.
    """
    classes = np.asarray(getattr(estimator, "classes_", ())).tolist()
    if classes != [0, 1]:
        raise ConfigError(f"{type(estimator).__name__} has classes {classes}; expected [0, 1]")
    if not isinstance(estimator, CalibratedClassifierCV):
        return export_model(estimator), Platt()
    fitted = estimator.calibrated_classifiers_
    if len(fitted) != 1:
        raise ConfigError(f"the calibration holds {len(fitted)} classifiers; expected 1: pass it a FrozenEstimator")
    return export_model(fitted[0].estimator), _calibration(fitted[0].calibrators[0])


def export_model(estimator: Any) -> Model:
    """A fitted regressor, or a classifier's log-odds, as plain parameters; see `export_classifier`."""
    estimator = _thaw(estimator)
    steps = [_thaw(step) for _, step in estimator.steps] if isinstance(estimator, Pipeline) else [estimator]
    last = steps.pop()
    if isinstance(last, _BOOSTED) and not steps:
        return _boosted(last)
    if isinstance(last, _LINEAR):
        return _linear(last, steps)
    found = " after ".join(type(step).__name__ for step in (last, *reversed(steps)))
    raise ConfigError(f"cannot export {found}; expected one of {_CHOICES} (the linear ones also in a pipeline)")


def _thaw(estimator: Any) -> Any:
    return estimator.estimator if isinstance(estimator, FrozenEstimator) else estimator


def _linear(last: Any, steps: list[Any]) -> LinearModel:
    """Fold the pipeline into the weights, from its last step back to its input."""
    weights = np.asarray(last.coef_, np.float64).reshape(-1)
    bias = float(np.asarray(last.intercept_).reshape(-1)[0])
    fill = np.zeros_like(weights)
    spread: tuple[float, ...] = ()
    for step in reversed(steps):
        if isinstance(step, StandardScaler):
            mean = step.mean_ if step.with_mean else np.zeros_like(weights)
            scale = step.scale_ if step.with_std else np.ones_like(weights)
            weights = weights / scale
            spread = tuple(np.sqrt(step.var_).tolist()) if step.with_std else ()
            bias -= float(weights @ mean)
            fill = fill * scale + mean
        elif isinstance(step, SimpleImputer) and not step.add_indicator:
            fill = np.asarray(step.statistics_, np.float64)
            if fill.shape != weights.shape or not np.isfinite(fill).all():
                raise ConfigError("the imputer met a feature without a single value; leave that feature out")
        else:
            raise ConfigError(f"cannot export {type(step).__name__}; expected SimpleImputer or StandardScaler")
    return LinearModel(tuple(weights.tolist()), tuple(fill.tolist()), bias, spread)


def _boosted(estimator: Any) -> TreeModel:
    if estimator._baseline_prediction.size != 1 or (
        isinstance(estimator, HistGradientBoostingRegressor)
        and estimator.loss not in ("squared_error", "absolute_error")
    ):
        raise ConfigError("cannot export a boosted model of several outputs or with a link function")
    trees = []
    for (predictor,) in estimator._predictors:
        nodes = predictor.nodes
        if nodes["is_categorical"].any():
            raise ConfigError("cannot export splits on categorical features; pass them as numbers")
        leaf = nodes["is_leaf"].astype(bool)
        trees.append(
            Tree(
                feature=tuple(np.where(leaf, 0, nodes["feature_idx"]).tolist()),
                threshold=tuple(np.where(leaf, 0.0, nodes["num_threshold"]).tolist()),
                left=tuple(np.where(leaf, -1, nodes["left"].astype(np.int64)).tolist()),
                right=tuple(np.where(leaf, -1, nodes["right"].astype(np.int64)).tolist()),
                missing_left=tuple((nodes["missing_go_to_left"].astype(bool) & ~leaf).tolist()),
                value=tuple(np.where(leaf, nodes["value"], 0.0).tolist()),
            )
        )
    return TreeModel(tuple(trees), float(estimator._baseline_prediction.reshape(-1)[0]))


def _calibration(calibrator: Any) -> Calibration:
    if isinstance(calibrator, IsotonicRegression):
        x, y = np.asarray(calibrator.X_thresholds_), np.asarray(calibrator.y_thresholds_)
        return Isotonic(tuple(x.tolist()), tuple(np.clip(y, 0.0, 1.0).tolist()))
    slope, intercept = getattr(calibrator, "a_", math.nan), getattr(calibrator, "b_", math.nan)
    if not (math.isfinite(slope) and math.isfinite(intercept)):
        raise ConfigError(f"cannot export {type(calibrator).__name__}; expected method='sigmoid' or 'isotonic'")
    return Platt(-float(slope), -float(intercept))
