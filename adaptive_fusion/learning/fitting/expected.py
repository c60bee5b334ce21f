"""What quality to expect of each rung: per lane, per bin of complexity, and per request by a fitted model.

Knows policies and labelled data. Must not know how the router was fitted, nor logs.

The quality expected of a rung is what it *keeps*: one less the quality it loses against the native point on
the same request; its mean is clipped to 0 to 1.
"""

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
from sklearn.ensemble import HistGradientBoostingRegressor
from sklearn.impute import SimpleImputer
from sklearn.linear_model import Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from adaptive_fusion.evaluation.statistics import bootstrap_mean
from adaptive_fusion.learning.data.dataset import BoolArray, Dataset, FloatArray, IntArray, fill_empty
from adaptive_fusion.learning.fitting.export import export_model
from adaptive_fusion.learning.judging.arms import lanes_of, scores
from adaptive_fusion.policy.policy import Policy
from adaptive_fusion.policy.predictors import Model
from adaptive_fusion.policy.router import Inputs, QualityModel
from adaptive_fusion.policy.rungs import Rung

MIN_LABELS = 20
"""Fewest labels of a rung in a lane; with fewer its expected quality stays what it was."""
MIN_MODEL_ROWS = 200
"""Fewest labels of a rung to fit a model of its quality."""


def kept(data: Dataset) -> FloatArray:
    """What each rung keeps on each row, ``[n, rungs]``; NaN where not labelled.

    Above 1 where a rung's answer happened to be better: clipping here would count every change of an answer as
    a loss, and none as a gain. Means and predictions are clipped instead.
    """
    return 1.0 - (data.reference[:, None] - data.quality)


def lane_qualities(policy: Policy, data: Dataset) -> dict[str, tuple[Rung, ...]]:
    """The policy's lanes with the mean that each rung keeps on the lane's rows as its expected quality.

    The order of a ladder stays; a rung that measured better than the one before it gets that one's figure.
    """
    table = kept(data)
    out = {}
    for lane, rows in lanes_of(policy, data).items():
        limit, ladder = 1.0, []
        for rung in policy.lanes[lane]:
            found = _mean(table, data, rung.name, rows, MIN_LABELS)
            limit = min(limit, rung.quality if found is None else found)
            ladder.append(replace(rung, quality=limit))
        out[lane] = tuple(ladder)
    return out


def quality_bins(policy: Policy, data: Dataset, bins: int = 4) -> dict[str, Any]:
    """What each rung keeps by quantile bin of P(complex), stills only: JSON-able, with the bins' edges and
    rows."""
    stills = data.take(~data.video)
    p, table = scores(policy, stills), kept(stills)
    edges = np.unique(np.quantile(p, np.linspace(0, 1, bins + 1)[1:-1]))
    place = np.searchsorted(edges, p, side="right")
    inside = [place == k for k in range(len(edges) + 1)]
    return {
        "edges": edges.tolist(),
        "rows": [int(rows.sum()) for rows in inside],
        "rungs": {name: [_mean(table, stills, name, rows, 1) for rows in inside] for name in stills.rungs},
    }


def _mean(table: FloatArray, data: Dataset, name: str, rows: BoolArray, least: int) -> float | None:
    if name not in data.rungs:
        return None
    column = table[:, data.rungs.index(name)]
    rows = rows & np.isfinite(column) & (data.weight > 0)
    if rows.sum() < least:
        return None
    return float(np.clip(np.average(column[rows], weights=data.weight[rows]), 0.0, 1.0))


def fit_quality_model(
    policy: Policy, train: Dataset, valid: Dataset, *, seed: int = 0, n: int = 500
) -> tuple[QualityModel | None, dict[str, Any]]:
    """A model of what each rung keeps on a request, if choosing by it beats choosing by the lanes' static
    figures.

    Each rung gets ridge regression or a small boosted ensemble, whichever errs less on `valid`. Both ways of
    choosing are then tried there at every cost that a ladder's rungs name as a limit: the best rung within
    the limit by the static figures against the best by the model. The model is kept if the mean of what it
    gains is above 0 with its whole interval.

    Returns:
        The model or None, and a JSON-able report that says why.
    """
    names = sorted({rung.name for ladder in policy.lanes.values() for rung in ladder if len(ladder) > 1})
    models: dict[str, Model] = {}
    errors: dict[str, dict[str, float]] = {}
    columns = tuple(_useful(train))
    x, x_valid = train.columns(columns), valid.columns(columns)
    goal, goal_valid = kept(train), kept(valid)
    for name in (name for name in names if name in train.rungs):
        k = train.rungs.index(name)
        rows, judge = np.flatnonzero(np.isfinite(goal[:, k])), np.isfinite(goal_valid[:, k])
        if len(rows) < MIN_MODEL_ROWS or judge.sum() < MIN_LABELS:
            continue
        errors[name], models[name] = _best_model(
            x[rows], goal[rows, k], train.weight[rows], x_valid[judge], goal_valid[judge, k], seed
        )
    if not models:
        return None, {"used": False, "reason": "too few labels of the rungs between which a lane can choose"}
    model = QualityModel(Inputs(columns), models)
    gains, groups = _gains(policy, model, valid)
    if not len(gains):
        return None, {
            "used": False,
            "reason": "no request has labels of all rungs of its lane",
            "errors": errors,
        }
    gain = bootstrap_mean(gains, seed=seed, n=n, groups=groups)
    report = {"used": gain.low > 0, "gain": asdict(gain), "requests": len(gains), "errors": errors}
    return (model if gain.low > 0 else None), report


def _useful(data: Dataset) -> list[str]:
    return [
        name
        for i, name in enumerate(data.names)
        if np.isfinite(data.x[:, i]).any() and np.nanmin(data.x[:, i]) < np.nanmax(data.x[:, i])
    ]


def _best_model(
    x: FloatArray, y: FloatArray, weight: FloatArray, x_valid: FloatArray, y_valid: FloatArray, seed: int
) -> tuple[dict[str, float], Model]:
    ridge = make_pipeline(SimpleImputer(), StandardScaler(), Ridge(10.0))
    boosted = HistGradientBoostingRegressor(
        max_bins=63,
        max_leaf_nodes=8,
        max_iter=60,
        min_samples_leaf=30,
        early_stopping=False,
        random_state=seed,
    )
    fill_empty(x)
    even = bool((weight == weight[0]).all())
    fitted = {
        "constant": None,
        "ridge": export_model(ridge.fit(x, y, ridge__sample_weight=weight)),
        "hgb": export_model(boosted.fit(x, y, sample_weight=None if even else weight)),
    }
    error = {
        name: float(np.mean((y_valid - (y.mean() if model is None else np.clip(model.raw_batch(x_valid), 0, 1))) ** 2))
        for name, model in fitted.items()
    }
    best = "ridge" if error["ridge"] <= error["hgb"] else "hgb"
    chosen = fitted[best]
    if chosen is None:  # not reached: only for the type
        raise AssertionError
    return error, chosen


def _gains(policy: Policy, model: QualityModel, data: Dataset) -> tuple[FloatArray, IntArray]:
    """Mean over the limits of what choosing by the model adds on each request, and the requests' groups."""
    table = kept(data)
    x = data.columns(model.inputs.names)
    gains, groups = [np.zeros(0)], [np.zeros(0, np.int64)]
    for lane, in_lane in lanes_of(policy, data).items():
        ladder = [rung for rung in policy.lanes[lane] if rung.name in data.rungs]
        places = [data.rungs.index(rung.name) for rung in ladder]
        rows = in_lane & np.isfinite(table[:, places]).all(axis=1)
        if len(ladder) < 2 or not rows.any():
            continue
        truth, cost = table[rows][:, places], _costs(data, places, rows)
        said = np.stack([_expected(model, rung, x[rows]) for rung in ladder], axis=1)
        gain = np.zeros(len(truth))
        for limit in cost:
            fits = np.flatnonzero(cost <= limit)
            by_model = fits[np.argmax(said[:, fits], axis=1)]
            gain += truth[np.arange(len(truth)), by_model] - truth[:, fits[0]]
        gains.append(gain / len(cost))
        groups.append(data.group[rows])
    return np.concatenate(gains), np.concatenate(groups)


def _costs(data: Dataset, places: Sequence[int], rows: BoolArray) -> FloatArray:
    """Mean cost of the ladder's rungs; without costs, one that falls down the ladder."""
    cost = data.cost[rows][:, list(places)]
    return cost.mean(axis=0) if np.isfinite(cost).all() else np.arange(len(places), 0, -1.0)


def _expected(model: QualityModel, rung: Rung, rows: FloatArray) -> FloatArray:
    if rung.name not in model.models:
        return np.full(len(rows), rung.quality)
    return np.clip(model.models[rung.name].raw_batch(rows), 0.0, 1.0)
