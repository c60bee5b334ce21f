"""When a policy that was adapted may take the general one's place, and when it must not."""

from typing import Any

import numpy as np
import pytest

from adaptive_fusion.evaluation.statistics import Interval, most_mean_by_betting
from adaptive_fusion.learning.adapting.asking import MANY
from adaptive_fusion.learning.adapting.judge import SURELY, refused

TOLERANCE = 0.02


def found(kept: float, general: float, ttft: Any, surely: float = 0.985) -> dict[str, Interval]:
    more = kept - general
    return {
        "adapted kept": Interval(kept, kept - 0.005, min(1.0, kept + 0.005)),
        "adapted surely": Interval(surely, surely, surely),
        "general kept": Interval(general, general - 0.005, min(1.0, general + 0.005)),
        "kept over general": Interval(more, more - 0.005, more + 0.005),
        "ttft over general": Interval(*ttft),
    }


SAME = (0.0, 0.0, 0.0)
CHEAPER, DEARER = (-0.1, -0.15, -0.05), (0.1, 0.05, 0.15)


@pytest.mark.parametrize(
    ("figures", "why"),
    [
        (found(0.98, 0.98, SAME, surely=0.85), ""),  # few images: it is the general one
        (found(0.991, 0.9999, CHEAPER), ""),  # what is promised is enough
        (found(0.988, 0.989, CHEAPER), ""),  # as little less as is luck
        (found(0.987, 0.999, CHEAPER), "expected 0.9875 or more"),
        (found(0.96, 0.97, CHEAPER), "expected 0.9675 or more"),  # the other one's losses are no excuse for more
        (found(0.991, 0.995, CHEAPER, surely=0.97), "0.9700 is all that is sure; expected 0.9800"),
        (found(0.991, 0.995, CHEAPER, surely=0.982), ""),
        (found(0.996, 0.995, CHEAPER, surely=0.97), ""),  # the other one is no surer
        (found(0.992, 0.992, (-0.05, -0.15, 0.05)), ""),  # more likely cheaper than not, four times in five
        (found(0.992, 0.992, (-0.01, -0.05, 0.03)), "not surely as cheap"),  # cheaper by chance
        (found(1.0, 0.985, DEARER), "not surely as cheap"),  # full compute
        (found(0.99, 0.9, DEARER), ""),  # the general one loses too much
        (found(0.904, 0.9, DEARER, surely=0.8), "not surely as cheap"),  # not surely better
        (found(1.0, 0.979, DEARER), "not surely as cheap"),  # nor needed
    ],
)
def test_only_what_keeps_what_is_promised_and_is_cheaper_or_sorely_needed_replaces_the_general_policy(
    figures: dict[str, Interval], why: str
) -> None:
    said = refused(figures, "general", TOLERANCE, 600)
    assert (why in said) if why else said == ""


def test_of_few_images_no_more_is_asked_than_they_can_promise_and_of_very_few_the_whole() -> None:
    """Losses of .006 each, as those of the policies that are looked for, pass with as many images as are recommended
    and more; a tenth of the images that lose three times the tolerance pass with none."""
    for images in (MANY, 100, 200, 400, 1000):
        little, much = np.full(images, 0.006), np.where(np.arange(images) % 10, 0.0, 0.06)
        surely = [1 - most_mean_by_betting(values, level=SURELY) for values in (little, 4 * much)]
        assert refused(found(0.994, 0.997, CHEAPER, surely[0]), "general", TOLERANCE, images) == ""
        assert "all that is sure" in refused(found(0.99, 0.997, CHEAPER, surely[1]), "general", TOLERANCE, images)
        assert refused(found(0.994, 0.997, CHEAPER, 1 - TOLERANCE), "general", TOLERANCE, images) == ""
    few = MANY - 1
    assert "expected 0.980" in refused(found(0.994, 0.997, CHEAPER, 0.97), "general", TOLERANCE, few)


def test_a_loss_that_grows_is_refused_from_some_point_on() -> None:
    """More lost at the same cost never turns a refusal into its opposite."""
    said = [
        bool(refused(found(0.995 - x, 0.99, CHEAPER, 0.99 - x), "general", TOLERANCE, 200))
        for x in np.arange(0, 0.2, 0.005)
    ]
    assert said == sorted(said) and said[-1] and not said[0]
