"""From a raw score to a probability: the calibration that fits best, as plain parameters.

Knows scores, labels and scikit-learn. Must not know of features, thresholds or policies.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression

from adaptive_fusion.learning.data.dataset import Dataset, FloatArray
from adaptive_fusion.policy.calibration import Calibration, Isotonic, Platt

ISOTONIC_ROWS = 1000
"""Fewest rows at which isotonic calibration is tried: it needs more than the two numbers of Platt's."""
_EPS = 1e-6


@dataclass(frozen=True)
class CalibratedEstimator:
    """An estimator that cannot be exported, calibrated; a module-level class, so that joblib can store it."""

    estimator: Any
    calibration: Calibration

    def predict_proba(self, rows: FloatArray) -> FloatArray:
        """Probabilities ``[n, 2]``."""
        p = self.calibration.batch(log_odds(self.estimator, rows))
        return np.stack([1 - p, p], axis=1)


def log_odds(model: Any, rows: FloatArray) -> FloatArray:
    """Raw scores ``[n]``: of a plain model, or the log-odds of an estimator's probabilities."""
    if hasattr(model, "raw_batch"):
        raw: FloatArray = model.raw_batch(rows)
        return raw
    p = np.clip(np.asarray(model.predict_proba(rows), np.float64)[:, 1], _EPS, 1 - _EPS)
    return np.log(p / (1 - p))


def log_losses(p: FloatArray, y: FloatArray) -> FloatArray:
    """Log loss of each row, ``[n]``."""
    p = np.clip(p, _EPS, 1 - _EPS)
    return -np.where(y > 0.5, np.log(p), np.log1p(-p))


def fit_calibration(raw: FloatArray, data: Dataset, shapes: Sequence[str] = ("platt", "isotonic")) -> Calibration:
    """Calibrate scores ``[n]`` on the labels of `data`: Platt's line, or isotonic where there are enough rows
    and it is better, by more than one standard error, on the half of the contents that it was not fitted
    on."""
    y, weight = data.y, data.weight
    if "isotonic" not in shapes or len(y) < ISOTONIC_ROWS:
        return _platt(raw, y, weight)
    half = data.group % 2 == 0
    if half.all() or not half.any():  # so few contents that one half has them all
        return _platt(raw, y, weight)
    gain = np.empty(len(y))
    for fit, judge in ((half, ~half), (~half, half)):
        line, steps = (shape(raw[fit], y[fit], weight[fit]) for shape in (_platt, _isotonic))
        gain[judge] = log_losses(line.batch(raw[judge]), y[judge]) - log_losses(steps.batch(raw[judge]), y[judge])
    better = gain.mean() > gain.std() / np.sqrt(len(gain))
    return (_isotonic if better else _platt)(raw, y, weight)


def _platt(raw: FloatArray, y: FloatArray, weight: FloatArray) -> Calibration:
    if len(np.unique(y)) < 2:
        return Platt()
    scale = float(raw.std()) or 1.0
    line = LogisticRegression(C=1e4, max_iter=200).fit(raw[:, None] / scale, y > 0.5, weight / weight.mean())
    slope = float(line.coef_[0, 0]) / scale
    # A score that ranks the wrong way round is worth nothing; turned round, it would hide that.
    return Platt(max(slope, 1e-9), float(line.intercept_[0]))


def _isotonic(raw: FloatArray, y: FloatArray, weight: FloatArray) -> Calibration:
    steps = IsotonicRegression(y_min=0.0, y_max=1.0, out_of_bounds="clip").fit(raw, y, weight)
    return Isotonic(tuple(steps.X_thresholds_.tolist()), tuple(steps.y_thresholds_.tolist()))
