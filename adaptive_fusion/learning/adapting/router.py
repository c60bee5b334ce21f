"""P(complex) for one model, with the general router's log odds as the offset.

Pure functions over arrays and plain routers. Must not know files, models or lanes.

Logistic regression of "the cheap plan loses more than the tolerance": log odds = general + b + sum of w[i] z[i], with
b ~ N(0, `OFFSET`^2) and w ~ N(0, `WEIGHT`^2). The fit is the mode of the posterior: few images leave the general router
as it is, many make it the model's own.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from scipy.optimize import minimize

from adaptive_fusion.errors import ConfigError
from adaptive_fusion.learning.data.dataset import FloatArray, IntArray
from adaptive_fusion.policy.calibration import Platt
from adaptive_fusion.policy.predictors import LargestModel, LinearModel
from adaptive_fusion.policy.router import PlainRouter, Router

OFFSET, WEIGHT = 2.0, 0.5


def widened(general: Router, names: Sequence[str], x: FloatArray) -> Router:
    """The same router reading more features, which say nothing yet: what tells a user's images apart need not be what
    tells images apart in general.

    Args:
        general: A plain linear one, or the largest of several; any other is given back as it is.
        names: All features that there are.
        x: Their values, ``[n, names]``, whose means stand for what was not measured.
    """
    if not isinstance(general, PlainRouter) or not isinstance(general.model, LinearModel | LargestModel):
        return general
    more = [name for name in names if name not in general.inputs.names]
    columns = [x[:, list(names).index(name)] for name in more]
    fill = tuple(float(column[np.isfinite(column)].mean()) if np.isfinite(column).any() else 0.0 for column in columns)
    none = (0.0,) * len(more)
    models = [
        replace(model, weights=model.weights + none, fill=model.fill + fill, spread=())
        for model in _parts(general.model)
    ]
    model = models[0] if isinstance(general.model, LinearModel) else LargestModel(tuple(models))
    return PlainRouter(replace(general.inputs, names=(*general.inputs.names, *more)), model, general.calibration)


def fit_router(general: Router, x: FloatArray, y: FloatArray) -> PlainRouter:
    """The model's own router, which reads what `general` reads.

    Args:
        general: A linear model or the largest of several, calibrated by Platt's method.
        x: Its features, ``[n, features]``; NaN where one was not measured.
        y: 1 where the cheap plan loses, else 0, ``[n]``.

    Raises:
        ConfigError: For a general router of another form.
    """
    if not isinstance(general, PlainRouter) or not isinstance(general.calibration, Platt):
        raise ConfigError("the base policy's router is no linear one calibrated by Platt's method; expected balanced")
    if not isinstance(general.model, LinearModel | LargestModel):
        raise ConfigError(f"the base policy's router is a {type(general.model).__name__}; expected a linear one")
    line, models = general.calibration, _parts(general.model)
    fill = np.asarray(models[0].fill)
    filled = np.where(np.isnan(x), fill, x)
    scale = filled.std(axis=0) if len(x) else np.ones(x.shape[1])
    use = scale > 1e-6
    scale = np.where(use, scale, 1.0)
    middle = filled.mean(axis=0) if len(x) else fill
    z = (filled - middle) / scale * use
    offset = line.slope * general.model.raw_batch(x) + line.intercept
    prior = np.append(np.full(x.shape[1], WEIGHT), OFFSET)
    design = np.column_stack([z, np.ones(len(x))])

    def loss(values: FloatArray) -> tuple[float, FloatArray]:
        logit = offset + design @ values
        p = 1.0 / (1.0 + np.exp(-np.clip(logit, -500, 500)))
        total = float((np.logaddexp(0.0, logit) - y * logit).sum() + 0.5 * ((values / prior) ** 2).sum())
        return total, design.T @ (p - y) + values / prior**2

    start = np.zeros(len(prior))
    found = minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 500, "ftol": 1e-12}).x
    weights = found[:-1] / scale * use
    bias = float(found[-1] - weights @ middle)
    own = [_plus(model, line, weights, bias) for model in models]
    return replace(general, model=own[0] if len(own) == 1 else LargestModel(tuple(own)), calibration=Platt())


def scores_out_of_fold(general: Router, x: FloatArray, y: FloatArray, folds: IntArray) -> FloatArray:
    """P(complex) of each row by a fit on the rows of other folds, ``[n]``."""
    found = np.empty(len(x))
    for fold in np.unique(folds):
        held = folds == fold
        found[held] = fit_router(general, x[~held], y[~held]).p_complex_batch(x[held])
    return found


def _parts(model: LinearModel | LargestModel) -> tuple[LinearModel, ...]:
    return (model,) if isinstance(model, LinearModel) else model.models


def _plus(model: LinearModel, line: Platt, weights: FloatArray, bias: float) -> LinearModel:
    """The model's calibrated log odds and a linear one, as one; the largest of several stays the largest."""
    total = line.slope * np.asarray(model.weights) + weights
    bias += line.slope * model.bias + line.intercept
    return replace(model, weights=tuple(map(float, total)), bias=float(bias))
