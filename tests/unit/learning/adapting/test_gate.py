"""When a policy that was adapted may take the general one's place, and when it must not."""

from typing import Any

import numpy as np
import pytest

from adaptive_fusion.evaluation.statistics import Interval
from adaptive_fusion.learning.adapting.judge import refused

TOLERANCE = 0.02


def found(kept: Any, general: float, more: Any, tokens: Any) -> dict[str, Interval]:
    return {
        "adapted kept": Interval(*kept),
        "general kept": Interval(general, general - 0.01, min(1.0, general + 0.01)),
        "kept over general": Interval(*more),
        "tokens over general": Interval(*tokens),
    }


SAME = (0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("figures", "why"),
    [
        (found((0.99, 0.98, 1.0), 0.99, SAME, SAME), ""),  # few images: it is the general one
        (found((0.985, 0.98, 0.99), 0.99, (-0.005, -0.01, 0.0), (-0.1, -0.15, -0.05)), ""),
        (
            found((0.985, 0.98, 0.99), 0.999, (-0.014, -0.02, -0.01), (-0.1, -0.15, -0.05)),
            "over general; expected -0.01",
        ),
        (found((0.94, 0.92, 0.96), 0.99, (-0.05, -0.07, -0.03), (-0.3, -0.4, -0.2)), "expected 0.980 or more"),
        (found((0.99, 0.98, 1.0), 0.99, SAME, (-0.01, -0.05, 0.03)), "not surely as cheap"),  # cheaper by chance
        (found((1.0, 1.0, 1.0), 0.985, (0.015, 0.005, 0.03), (0.1, 0.05, 0.15)), "not surely as cheap"),  # full compute
        (found((0.99, 0.98, 1.0), 0.9, (0.09, 0.05, 0.12), (0.1, 0.05, 0.15)), ""),  # the general one loses too much
        (
            found((0.99, 0.98, 1.0), 0.9, (0.02, -0.01, 0.05), (0.1, 0.05, 0.15)),
            "not surely as cheap",
        ),  # not surely better
        (found((1.0, 1.0, 1.0), 0.975, (0.02, 0.01, 0.03), (0.1, 0.05, 0.15)), "not surely as cheap"),  # nor needed
    ],
)
def test_only_what_is_surely_as_cheap_or_sorely_needed_replaces_the_general_policy(
    figures: dict[str, Interval], why: str
) -> None:
    said = refused(figures, "general", TOLERANCE)
    assert (why in said) if why else said == ""


def test_a_loss_that_grows_is_refused_from_some_point_on() -> None:
    """More lost at the same cost never turns a refusal into its opposite."""
    said = [
        bool(refused(found((0.99 - x, 0.98 - x, 1 - x), 0.99, (-x, -x, -x), (-0.2, -0.3, -0.1)), "general", TOLERANCE))
        for x in np.linspace(0.0, 0.2, 41)
    ]
    assert said == sorted(said) and said[-1] and not said[0]
