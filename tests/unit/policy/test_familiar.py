"""What is unlike: few of the same kinds, most of what is none, and files that are refused."""

import copy
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from unfamiliar import FAMILIES, blurred

from adaptive_fusion.errors import PolicyError
from adaptive_fusion.features.detail import DETAIL_FEATURES, detail_features
from adaptive_fusion.features.image import IMAGE_FEATURES, image_features, take_sample
from adaptive_fusion.learning.fitting.familiar import fit_familiar
from adaptive_fusion.policy.familiar import Familiar
from adaptive_fusion.reference.screens import make_scene

NAMES = IMAGE_FEATURES[:6]


def kinds(rng: np.random.Generator, sizes: tuple[int, ...] = (200, 300)) -> dict[str, np.ndarray]:
    """Two kinds of their own scales and correlations, of which one feature differs by factors."""
    found = {}
    for name, size in zip(("left", "right"), sizes, strict=True):
        mix = rng.normal(size=(len(NAMES), len(NAMES)))
        rows = rng.normal(size=(size, len(NAMES))) @ mix + rng.normal(size=len(NAMES)) * 5
        rows[:, 0] = np.exp(rows[:, 0] / 10 - 3)
        found[name] = rows
    return found


def features(row: Any) -> dict[str, float]:
    return dict(zip(NAMES, map(float, row), strict=True))


@pytest.fixture(scope="module")
def fitted() -> Familiar:
    rng = np.random.default_rng(0)
    tables = kinds(rng)
    return fit_familiar(NAMES, tables, {"odd": tables["left"][:80] * [1, 1, 1, -1, 1, 1]}, alpha=0.05)


@settings(max_examples=4, deadline=None)
@given(seed=st.integers(0, 10_000), alpha=st.sampled_from([0.02, 0.05, 0.2]), strange=st.booleans())
def test_no_more_than_alpha_of_the_same_kinds_are_unlike(seed: int, alpha: float, strange: bool) -> None:
    """Whatever was fitted: the guarantee is of the calibration alone."""
    rng = np.random.default_rng(seed)
    tables = kinds(rng, (400, 600))
    seen = {name: rows[:250] for name, rows in tables.items()}
    fitted = fit_familiar(NAMES, seen, {"odd": rng.normal(size=(50, len(NAMES)))} if strange else None, alpha=alpha)
    # As many of each kind as calibrate, relative to each other: 75 and 75.
    fresh = np.concatenate([tables["left"][250:400], tables["right"][250:400]])
    share = np.mean([fitted.is_unlike(features(row)) for row in fresh])
    n = len(fitted.calibration)
    deviation = np.sqrt(alpha * (1 - alpha) * (1 / n + 1 / len(fresh)))
    assert share <= alpha + 4.5 * deviation + 1 / n


def test_far_is_unlike_and_middle_is_not(fitted: Familiar) -> None:
    tables = kinds(np.random.default_rng(0))
    middle = features(np.median(tables["right"], axis=0))
    assert not fitted.is_unlike(middle)
    assert fitted.p_value(middle) > 0.2
    far = middle | {NAMES[2]: middle[NAMES[2]] - 200}
    assert fitted.is_unlike(far)
    assert fitted.p_value(far) == 1 / (len(fitted.calibration) + 1)
    assert NAMES[2] in fitted.why(far)
    assert "low" in fitted.why(far)
    assert f"limit {fitted.limit:.1f}" in fitted.why(far)


def test_p_value_and_limit_agree(fitted: Familiar) -> None:
    rng = np.random.default_rng(5)
    for row in (*rng.normal(size=(100, len(NAMES))) * 8, *kinds(rng)["left"][:50]):
        assert fitted.is_unlike(features(row)) == (fitted.p_value(features(row)) <= fitted.alpha)


def test_what_is_strange_lies_further_for_having_been_shown() -> None:
    tables = kinds(np.random.default_rng(1))
    odd = tables["left"] + np.array([0, 0, 0, 0, 0, 1.5])  # among the others in each feature, not in all together
    shares = []
    for strange in (None, {"odd": odd[:100]}):
        fitted = fit_familiar(NAMES, tables, strange)
        shares.append(np.mean([fitted.is_unlike(features(row)) for row in odd[100:]]))
    assert shares[1] > shares[0]


def test_round_trip_is_exact(fitted: Familiar) -> None:
    again = Familiar.from_dict(json.loads(json.dumps(fitted.to_dict())))
    assert again == fitted
    row = features(kinds(np.random.default_rng(3))["left"][0])
    assert again.distance(row) == fitted.distance(row)
    assert again.kinds == ("left", "right")


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        (("schema",), 2, "schema version 2"),
        (("alpha",), 1.0, "below 1"),
        (("alpha",), 0.001, "at least 999"),
        (("extra",), 1, "unknown ['extra']"),
        (("kinds",), [], "one or more"),
        (("kinds",), {}, "expected a list"),
        (("kinds", 0, "mean"), [1.0], "whiten of left has rows"),
        (("kinds", 0, "name"), "right", "each named once"),
        (("kinds", 0, "whiten", 2, 2), 0.0, "above 0"),
        (("kinds", 0, "whiten", 2, 0), float("nan"), "nan"),
        (("features", "names", 0), "sharpness", "['sharpness']"),
        (("features", "names", 0), NAMES[1], "more than once"),
        (("features", "detail"), "0", "version '0'"),
        (("features", "scale", 1), 0.0, "scale of"),
        (("features", "offset"), [0.0], "offset has 1 numbers"),
        (("strange", 0, "weights"), [1.0], "weights of odd"),
        (("strange", 0, "cloud", "name"), "left", "each named once"),
        (("spread", 0), -1.0, "spread"),
        (("middle",), [0.0], "middle has 1 numbers"),
        (("calibration",), [3.0, 2.0], "not sorted"),
    ],
)
def test_broken_files_are_refused(fitted: Familiar, path: tuple[Any, ...], value: Any, says: str) -> None:
    values = copy.deepcopy(fitted.to_dict())
    place: Any = values
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(PolicyError) as error:
        Familiar.from_dict(values)
    assert says in str(error.value)


def test_a_feature_that_is_missing_or_no_number_is_refused(fitted: Familiar) -> None:
    row = features(kinds(np.random.default_rng(3))["left"][0])
    for wrong in ({name: row[name] for name in NAMES[1:]}, row | {NAMES[0]: float("nan")}):
        with pytest.raises(PolicyError, match=NAMES[0]):
            fitted.distance(wrong)


def test_tables_that_do_not_fit_are_refused() -> None:
    rows = np.zeros((30, len(NAMES)))
    for tables, says in (
        ({}, "no kinds"),
        ({"page": rows[:, 1:]}, "page has a table"),
        ({"page": rows * np.nan}, "all finite"),
        ({"page": rows}, "at least 33"),
    ):
        with pytest.raises(PolicyError, match=says):
            fit_familiar(NAMES, tables)


MEASURED = (*IMAGE_FEATURES, *DETAIL_FEATURES)


def measure(image: Image.Image) -> list[float]:
    return [*image_features(take_sample(image)), *detail_features(image)]


def test_fitted_on_screens_it_knows_screens_and_nothing_else() -> None:
    kinds: tuple[Any, ...] = ("simple", "dense", "reading")
    tables = {kind: np.array([measure(make_scene(kind, seed, "train").image) for seed in range(60)]) for kind in kinds}
    fitted = fit_familiar(MEASURED, tables, alpha=0.1)

    def share(images: list[Image.Image]) -> float:
        rows = [dict(zip(MEASURED, measure(image), strict=True)) for image in images]
        return float(np.mean([fitted.is_unlike(row) for row in rows]))

    unseen = [make_scene(kind, seed, "eval").image for kind in kinds for seed in range(10)]
    assert share(unseen) <= 0.2
    rng = np.random.default_rng(0)
    strange = {
        family: [Image.fromarray(generator(rng)) for generator in generators for _ in range(4)]
        for family, generators in FAMILIES.items()
    }
    strange["blur"] = [Image.fromarray(blurred(rng, np.asarray(image))) for image in unseen[::3]]
    for family, images in strange.items():
        assert share(images) >= 0.9, family
