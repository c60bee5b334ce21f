"""Routers: equal to scikit-learn, exact through JSON, and strict about what they are given."""

import copy
import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.calibration import CalibratedClassifierCV
from sklearn.ensemble import (
    HistGradientBoostingClassifier,
    HistGradientBoostingRegressor,
    RandomForestClassifier,
)
from sklearn.frozen import FrozenEstimator
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from adaptive_fusion.errors import ConfigError, PolicyError
from adaptive_fusion.features.complexity import FEATURE_NAMES, VERSION, Complexity
from adaptive_fusion.features.prompts import PROMPT_FEATURE_NAMES, prompt_features
from adaptive_fusion.learning.fitting.export import export_classifier, export_model
from adaptive_fusion.policy.calibration import Isotonic, Platt
from adaptive_fusion.policy.predictors import LargestModel, LinearModel, Tree, TreeModel, model_from_dict
from adaptive_fusion.policy.router import EstimatorRouter, Inputs, PlainRouter, QualityModel, constant_router

IMAGE = FEATURE_NAMES[:5]
NAMES = (*IMAGE, *PROMPT_FEATURE_NAMES[:7])
ROWS = 10_000
SCALES, OFFSETS = np.logspace(-2, 3, len(NAMES)), np.linspace(-50, 50, len(NAMES))


def complexity(**features: float) -> Complexity:
    return Complexity(score=0.5, features=features, version=VERSION, kind="image")


def data(seed: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Features on scales from 0.01 to 1,000, a tenth missing, one constant or missing, labels that follow."""
    rng = np.random.default_rng(seed)
    width = len(NAMES)
    z = rng.normal(size=(rows, width))
    y = (z[:, 0] - z[:, 1] * z[:, 2] + 0.5 * z[:, 5] + rng.logistic(size=rows) > 0).astype(int)
    x = z * SCALES + OFFSETS
    x[rng.random(x.shape) < 0.1] = np.nan
    x[:, 3] = np.where(rng.random(rows) < 0.5, np.nan, 1.0)  # what parts is whether it is missing
    return x, y


def estimators() -> dict[str, Any]:
    x, y = data(0, 4000)
    logistic = LogisticRegression(C=0.3)
    fitted = {
        "logistic": make_pipeline(SimpleImputer(), StandardScaler(), logistic).fit(x, y),
        "scaled-first": make_pipeline(StandardScaler(), SimpleImputer(strategy="median"), logistic).fit(x, y),
        "bare": LogisticRegression().fit(np.nan_to_num((x - OFFSETS) / SCALES), y),
        "boosted": HistGradientBoostingClassifier(max_iter=20, max_leaf_nodes=8, random_state=0).fit(x, y),
    }
    held, labels = data(1, 2000)
    for base in ("logistic", "boosted"):
        for method in ("sigmoid", "isotonic"):
            calibrated = CalibratedClassifierCV(FrozenEstimator(fitted[base]), method=method)
            fitted[f"{base}-{method}"] = calibrated.fit(held, labels)
    return fitted


ESTIMATORS = estimators()


@pytest.mark.parametrize("name", sorted(ESTIMATORS))
def test_exported_predictions_equal_scikit_learn_on_10_000_rows(name: str) -> None:
    estimator = ESTIMATORS[name]
    router = PlainRouter(Inputs(NAMES), *export_classifier(estimator))
    again = PlainRouter.from_dict(json.loads(json.dumps(router.to_dict(), allow_nan=False)))
    assert again == router

    rows, _ = data(2, ROWS)
    if name == "bare":  # takes no missing values
        rows = np.nan_to_num((rows - OFFSETS) / SCALES)
    expected = estimator.predict_proba(rows)[:, 1]
    assert expected.std() > 0.05  # a constant would agree with anything
    np.testing.assert_allclose(again.p_complex_batch(rows), expected, rtol=0, atol=1e-9)
    one_by_one = [again.calibration(again.model.raw(row)) for row in rows.tolist()]
    np.testing.assert_allclose(one_by_one, expected, rtol=0, atol=1e-9)

    # The same by name, from a measured image and a question; what is absent counts as missing.
    for row, p in zip(rows[:20], expected[:20], strict=True):
        image = {k: v for k, v in zip(IMAGE, row, strict=False) if not math.isnan(v)}
        asked = {k: v for k, v in zip(NAMES[len(IMAGE) :], row[len(IMAGE) :], strict=True) if not math.isnan(v)}
        assert again.p_complex(complexity(**image), asked) == pytest.approx(p, abs=1e-9)


def test_any_fitted_classifier_can_be_a_router() -> None:
    rows, _ = data(5, 3)
    router = EstimatorRouter(Inputs(NAMES), ESTIMATORS["logistic"])
    plain = PlainRouter(Inputs(NAMES), *export_classifier(ESTIMATORS["logistic"]))
    np.testing.assert_allclose(router.p_complex_batch(rows), plain.p_complex_batch(rows), rtol=0, atol=1e-9)
    image, asked = complexity(**{IMAGE[0]: 0.3}), {NAMES[-1]: 20.0}
    assert router.p_complex(image, asked) == pytest.approx(plain.p_complex(image, asked), abs=1e-9)


def test_regressors_export_too() -> None:
    x, y = data(3, 3000)
    rows, _ = data(4, ROWS)
    for estimator in (
        make_pipeline(SimpleImputer(), StandardScaler(), Ridge()),
        HistGradientBoostingRegressor(max_iter=30, max_leaf_nodes=8),
    ):
        estimator.fit(x, y * 0.5 + 0.2)
        model = export_model(estimator)
        np.testing.assert_allclose(model.raw_batch(rows), estimator.predict(rows), rtol=0, atol=1e-9)
        assert model_from_dict(json.loads(json.dumps(model.to_dict()))) == model
        if isinstance(model, LinearModel):
            np.testing.assert_allclose(model.spread, SimpleImputer().fit_transform(x).std(axis=0))
    with pytest.raises(PolicyError, match="2 weights and 1 spreads"):
        LinearModel((1.0, 2.0), (0.0, 0.0), 0.0, (1.0,))


def test_what_cannot_be_exported_is_refused_by_name() -> None:
    x, y = np.random.default_rng(0).normal(size=(200, 3)), np.arange(200) % 2
    with pytest.raises(ConfigError, match=r"RandomForestClassifier; expected one of .*LogisticRegression"):
        export_classifier(RandomForestClassifier(3).fit(x, y))
    with pytest.raises(ConfigError, match=r"classes \[0, 1, 2\]"):
        export_classifier(LogisticRegression().fit(x, np.arange(200) % 3))
    with pytest.raises(ConfigError, match="categorical"):
        categories = np.column_stack([np.random.default_rng(1).integers(0, 5, 200), x])
        labels = (categories[:, 0] % 2 == 1).astype(int)
        export_classifier(HistGradientBoostingClassifier(categorical_features=[0]).fit(categories, labels))
    with pytest.raises(ConfigError, match="holds 5 classifiers"):
        export_classifier(CalibratedClassifierCV(LogisticRegression(), cv=5).fit(x, y))
    with pytest.raises(ConfigError, match="SimpleImputer or StandardScaler"):
        from sklearn.preprocessing import PolynomialFeatures

        export_classifier(make_pipeline(PolynomialFeatures(1), LogisticRegression()).fit(x, y))


def test_missing_and_infinite_values_count_as_the_training_mean() -> None:
    router = PlainRouter(Inputs(IMAGE[:2]), LinearModel((2.0, -1.0), (0.25, 10.0), 0.5))
    expected = 1 / (1 + math.exp(-(0.5 + 2 * 0.25 - 3.0)))
    for absent in ({}, {IMAGE[0]: math.nan}, {IMAGE[0]: math.inf}):
        assert router.p_complex(complexity(**{IMAGE[1]: 3.0}, **absent)) == pytest.approx(expected, abs=1e-15)


def test_the_question_moves_the_score() -> None:
    names = (IMAGE[0], "prompt_read")
    router = PlainRouter(Inputs(names), LinearModel((0.0, 3.0), (0.0, 0.5), -1.5))
    image = complexity(**{IMAGE[0]: 0.3})
    read, describe, unknown = (
        router.p_complex(image, prompt_features(prompt) if prompt else None)
        for prompt in ("Read the text.", "Describe the screen.", None)
    )
    assert describe < unknown < read


def test_versions_and_names_are_checked() -> None:
    with pytest.raises(PolicyError, match=r"unknown features \['edge_of_reason'\]; expected some of"):
        Inputs((*IMAGE, "edge_of_reason"))
    with pytest.raises(PolicyError, match="named more than once"):
        Inputs((IMAGE[0], IMAGE[0]))
    with pytest.raises(PolicyError, match=r"complexity features of version 'older'; expected"):
        Inputs(IMAGE, complexity="older")
    with pytest.raises(PolicyError, match=r"prompt features of version 'older'"):
        Inputs(NAMES, prompt="older")
    Inputs(IMAGE, prompt="older")  # reads none of them
    router = PlainRouter(Inputs(IMAGE), LinearModel((0.0,) * 5, (0.0,) * 5))
    stale = Complexity(score=0.5, features={}, version="older", kind="image")
    with pytest.raises(PolicyError, match="version 'older'"):
        router.p_complex(stale)
    assert constant_router(0.25).p_complex(stale) == pytest.approx(0.25)
    with pytest.raises(PolicyError, match=r"reads 2 features and 5 are named"):
        PlainRouter(Inputs(IMAGE), LinearModel((1.0, 1.0), (0.0, 0.0)))
    with pytest.raises(PolicyError, match=r"reads 9 features and 5 are named"):
        QualityModel(Inputs(IMAGE), {"native@1": TreeModel((stump(feature=8),))})


def stump(feature: int = 0, threshold: float = 0.5) -> Tree:
    return Tree(
        (feature, 0, 0),
        (threshold, 0.0, 0.0),
        (1, -1, -1),
        (2, -1, -1),
        (True, False, False),
        (0.0, -1.0, 1.0),
    )


def tree_router() -> dict[str, Any]:
    """JSON of a router whose tree parts missing values (threshold infinity) from all others."""
    router = PlainRouter(Inputs(IMAGE), TreeModel((stump(), stump(2, math.inf))), Isotonic((-2.0, 2.0), (0.1, 0.9)))
    values: dict[str, Any] = json.loads(json.dumps(router.to_dict(), allow_nan=False))
    assert PlainRouter.from_dict(values) == router
    return values


def largest_router() -> dict[str, Any]:
    """JSON of a router for which either of two reasons is enough."""
    first, second = (
        LinearModel((1.0, 0.0, 0.0, 0.0, 2.0), (0.5,) * 5, -1.0),
        LinearModel((0.0, 3.0, 0, 0, 0), (0.2,) * 5),
    )
    values: dict[str, Any] = json.loads(json.dumps(PlainRouter(Inputs(IMAGE), LargestModel((first, second))).to_dict()))
    return values


def test_the_largest_of_linear_models_counts_alone_and_in_batches_and_after_a_round_trip() -> None:
    router = PlainRouter.from_dict(largest_router())
    assert router.to_dict() == largest_router()
    rows = np.array([[0.0, 1.0, 0.0, 0.0, 0.0], [3.0, 0.0, 9.0, 9.0, 1.0], [math.nan, math.nan, 0.0, 0.0, 0.0]])
    assert router.model.raw_batch(rows).tolist() == pytest.approx([3.0, 4.0, 3 * 0.2])
    assert [router.model.raw(row) for row in rows.tolist()] == pytest.approx([3.0, 4.0, 3 * 0.2])
    for models in ((), (LinearModel((1.0,), (0.0,)), LinearModel((), ()))):
        with pytest.raises(PolicyError, match="expected at least one, all of as many"):
            LargestModel(models)
    with pytest.raises(PolicyError, match="reads 1 features and 5 are named"):
        PlainRouter(Inputs(IMAGE), LargestModel((LinearModel((1.0,), (0.0,)),)))
    with pytest.raises(PolicyError, match="kind is 'trees'; expected linear"):
        model_from_dict({"kind": "largest", "models": [{"kind": "trees", "weights": [], "fill": [], "bias": 0.0}]})


def test_a_threshold_of_infinity_parts_missing_values() -> None:
    tree = Tree((0, 0, 0), (math.inf, 0.0, 0.0), (1, -1, -1), (2, -1, -1), (False, False, False), (0.0, -1.0, 1.0))
    model = TreeModel((tree,))
    assert [model.raw([x]) for x in (1e308, math.nan)] == [-1.0, 1.0]
    assert model.raw_batch(np.array([[1e308], [math.nan]])).tolist() == [-1.0, 1.0]


def paths(values: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    return [at] * bool(at) + [path for key, value in inner for path in paths(value, (*at, key))]


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(
        [(made, path) for made in (tree_router, largest_router) for path in paths(made())],
    ),
    st.sampled_from([None, "x", True, -7, 10**400, math.inf, math.nan, [], {}, {"surprise": 1}, 10**9]),
)
def test_a_damaged_router_is_refused_with_the_librarys_error_or_still_works(
    case: tuple[Callable[[], dict[str, Any]], tuple[Any, ...]], value: Any
) -> None:
    made, path = case
    values = made()
    target = values
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = copy.deepcopy(value)
    try:
        router = PlainRouter.from_dict(values)
    except PolicyError as error:
        assert "expected" in str(error) or "holds something else" in str(error)
    else:  # another valid number: must answer, and in range
        assert 0.0 <= router.p_complex(complexity(**dict.fromkeys(IMAGE, 0.4))) <= 1.0


@pytest.mark.parametrize("key", ["schema", "features", "model", "calibration"])
def test_missing_and_unknown_keys_are_named(key: str) -> None:
    values = tree_router()
    with pytest.raises(PolicyError, match=f"unknown \\['extra_{key}'\\] keys" if key != "schema" else "unknown"):
        PlainRouter.from_dict({**values, f"extra_{key}": 1})
    del values[key]
    with pytest.raises(PolicyError, match=key):
        PlainRouter.from_dict(values)


def test_calibrations_are_monotone_and_clipped() -> None:
    knots = Isotonic((-1.0, 0.0, 2.0), (0.1, 0.1, 0.8))
    raw = np.linspace(-5, 5, 1001)
    np.testing.assert_allclose(knots.batch(raw), [knots(z) for z in raw.tolist()], rtol=0, atol=1e-15)
    assert (np.diff(knots.batch(raw)) >= 0).all()
    assert (knots(-9.0), knots(9.0)) == (0.1, 0.8)
    platt = Platt(2.0, -1.0)
    np.testing.assert_allclose(platt.batch(raw), [platt(z) for z in raw.tolist()], rtol=0, atol=1e-15)
    assert (platt(-1e6), platt(1e6)) == (0.0, 1.0)
    for x, y in (((0.0, 0.0), (0.1, 0.2)), ((0.0, 1.0), (0.5, 0.2)), ((0.0,), (1.5,)), ((), ())):
        with pytest.raises(PolicyError, match="isotonic calibration has"):
            Isotonic(x, y)


def test_quality_models_round_trip_and_stay_in_range() -> None:
    steep = LinearModel((1.0,), (0.0,), 0.0)
    model = QualityModel(Inputs(IMAGE[:1]), {"native@1": steep, "native@0.5": TreeModel((stump(),), 0.2)})
    again = QualityModel.from_dict(json.loads(json.dumps(model.to_dict())))
    assert again == model
    expected = again.expected(["native@1", "native@0.5", "top@1"], complexity(**{IMAGE[0]: 7.0}))
    assert expected == {"native@1": 1.0, "native@0.5": 1.0}
    assert again.expected(["native@0.5"], complexity(**{IMAGE[0]: 0.1})) == {"native@0.5": 0.0}


@pytest.mark.parametrize(
    "p_complex", [0, 1, -1, math.nan, math.inf, 1e9, pytest.param(10**400, id="10^400"), None, "0.5"]
)
def test_a_constant_router_wants_a_probability(p_complex: Any) -> None:
    with pytest.raises(PolicyError, match=f"p_complex is {p_complex!r}; expected"):
        constant_router(p_complex)
