"""The lane of the general policies: more detail never makes an image simpler, whatever the images it is fitted to."""

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptive_fusion.features.complexity import VERSION, Complexity
from adaptive_fusion.features.detail import DETAIL_FEATURES
from adaptive_fusion.features.detail import VERSION as DETAIL_VERSION
from adaptive_fusion.policy.policy import Policy
from adaptive_fusion.policy.router import PlainRouter

ROOT = Path(__file__).resolve().parents[3]
RECIPE = ROOT / "training" / "general"
FINER_WHEN_LESS = {"text_height_low", "text_height", "stroke_low", "stroke", "flank"}


@pytest.fixture(scope="module")
def lanes() -> Iterator[ModuleType]:
    """The recipe, whose modules import each other by short names that are given back afterwards."""
    before = set(sys.modules)
    sys.path.insert(0, str(RECIPE))
    try:
        import lanes

        yield lanes
    finally:
        sys.path.remove(str(RECIPE))
        for name in set(sys.modules) - before:
            if getattr(sys.modules[name], "__file__", None) and str(RECIPE) in str(sys.modules[name].__file__):
                del sys.modules[name]


@pytest.fixture(scope="module")
def fitted(lanes: ModuleType) -> PlainRouter:
    """On made numbers in which half of the features fall where images are complex: weights would be of either sign."""
    rng = np.random.default_rng(0)
    sizes = {"a": 40, "b": 30, "c": 30, "pages": 30, "signs": 30, "icons": 20}
    group = np.repeat(list(sizes), list(sizes.values()))
    kind = np.select([group < "d", group == "icons"], [lanes.PEOPLE, lanes.EMPTY], lanes.TEXT)
    hidden = rng.normal(size=len(group))
    rank = np.full(len(group), np.nan)
    for name in "abc":
        own = group == name
        rank[own] = (hidden[own].argsort().argsort() + 0.5) / own.sum()
    slopes = np.where(np.arange(len(lanes.NAMES)) % 2, -0.5, 1.0)
    features = hidden[:, None] * slopes + rng.normal(size=(len(group), len(lanes.NAMES)))
    is_complex = np.where(kind == lanes.PEOPLE, rank > 0.5, (kind == lanes.TEXT) & (hidden > 0))
    table = lanes.Table(kind, group, features, rank, is_complex, np.full_like(features, np.nan))
    router, threshold = lanes.fit(table)
    p = router.p_complex_batch(features)
    assert p[is_complex].mean() > p[~is_complex].mean() + 0.1 and 0 < threshold < 1
    assert PlainRouter.from_dict(router.to_dict()) == router
    assert isinstance(router, PlainRouter)
    return router


@pytest.fixture(scope="module", params=["fitted", "balanced", "latency", "quality"])
def router(request: pytest.FixtureRequest) -> PlainRouter:
    if request.param == "fitted":
        found = request.getfixturevalue("fitted")
    else:
        found = Policy.load(ROOT / "policies" / request.param).router
    assert isinstance(found, PlainRouter)
    return found


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_more_detail_never_makes_an_image_simpler(router: PlainRouter, data: st.DataObject) -> None:
    names = router.inputs.names
    value = st.one_of(st.floats(-50, 50), st.just(math.nan))
    step = st.one_of(st.just(0.0), st.floats(0, 50))
    drawn = data.draw(st.lists(st.tuples(value, step), min_size=len(names), max_size=len(names)))
    before = {name: x for name, (x, _) in zip(names, drawn, strict=True)}
    after = {
        name: x - more if name in FINER_WHEN_LESS else x + more for name, (x, more) in zip(names, drawn, strict=True)
    }
    assert router.p_complex(as_measured(after)) >= router.p_complex(as_measured(before)) - 1e-12


def as_measured(values: dict[str, float]) -> Complexity:
    detail = {name: value for name, value in values.items() if name in DETAIL_FEATURES}
    features = {name: value for name, value in values.items() if name not in detail}
    return Complexity(0.5, features, VERSION, "image", detail, DETAIL_VERSION)
