"""What a policy was fitted to, and in what a model differs from that."""

from dataclasses import replace
from typing import Any

import pytest

from adaptive_fusion.errors import PolicyError
from adaptive_fusion.policy.fitted import Fingerprint, Fitted

MODEL = Fingerprint(
    "Qwen3VLForConditionalGeneration",
    {"depth": 24, "hidden_size": 1024, "taps": [5, 11, 17]},
    {"hidden_size": 2560, "num_hidden_layers": 36},
    "0123456789abcdef",
    {"min_pixels": 65_536, "max_pixels": 16_777_216},
)
FITTED = Fitted(MODEL, ("charts", "photographs"), {"edge_density": (0.0, 0.4)})


def test_a_file_says_the_same_again() -> None:
    for fitted in (FITTED, Fitted(), Fitted(kinds=("a",))):
        assert Fitted.from_dict(fitted.to_dict()) == fitted
    assert Fitted().is_general and not FITTED.is_general


@pytest.mark.parametrize(
    ("other", "weights", "said"),
    [
        ({}, [], ""),
        ({"architecture": "Gemma3ForConditionalGeneration"}, ["warning"], "here Gemma3"),
        ({"vision": {**MODEL.vision, "depth": 27}}, ["warning"], "vision shape (depth 24, here 27)"),
        ({"vision": {"depth": 24, "hidden_size": 1024}}, ["warning"], r"taps [5, 11, 17], here None"),
        ({"text": {**MODEL.text, "hidden_size": 4096}}, ["warning"], "text shape (hidden_size 2560, here 4096)"),
        ({"digest": "fedcba9876543210"}, ["note"], "other weights of this shape"),
        ({"digest": "", "unread": "offloaded"}, ["note"], "weights not compared (offloaded)"),
        ({"processor": {**MODEL.processor, "max_pixels": 9}}, ["note"], "max_pixels 16777216, here 9"),
        ({"digest": "0", "text": {}, "processor": {}}, ["warning", "note"], "other limits of the processor"),
    ],
)
def test_shapes_are_warnings_and_weights_and_limits_are_notes(
    other: dict[str, Any], weights: list[str], said: str
) -> None:
    found = FITTED.differences(replace(MODEL, **other))
    assert [difference.weight for difference in found] == weights
    assert said in "; ".join(difference.in_words() for difference in found)
    assert Fitted(kinds=("a",)).differences(replace(MODEL, **other)) == ()


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"model": {"architecture": "A"}}, "model has missing"),
        ({"model": {**MODEL.to_dict(), "digest": 5}}, "digest of model is 5"),
        ({"model": {**MODEL.to_dict(), "vision": [1]}}, r"vision of model is \[1\]"),
        ({"kinds": "charts"}, "kinds of fitted is 'charts'"),
        ({"features": {"edge_density": [1]}}, r"edge_density of fitted is \[1\]"),
        ({"features": {"edge_density": [1, float("nan")]}}, "edge_density is nan"),
        ({"features": {"edge_density": [3, 1]}}, "in that order"),
        ({"more": 1}, "unknown"),
        ([], "expected a table"),
    ],
)
def test_what_is_no_such_table_is_refused(values: Any, said: str) -> None:
    with pytest.raises(PolicyError, match=said):
        Fitted.from_dict(values)
