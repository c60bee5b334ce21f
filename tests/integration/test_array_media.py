"""Images that come as arrays: a decision reads a few of their pixels, a run all; both decide the same."""

from typing import Any

import numpy as np
import pytest

from adaptive_fusion.errors import MediaError
from adaptive_fusion.point import NATIVE
from adaptive_fusion.runner import AdaptiveRunner

ASKED = "Describe the screen."


@pytest.fixture(scope="module")
def runner(tiny_dense: Any, processor: Any) -> AdaptiveRunner:
    return AdaptiveRunner(tiny_dense, processor, policy="reference-balanced")


def test_a_decision_is_that_of_the_picture_whatever_the_array(runner: AdaptiveRunner, noise_image: Any) -> None:
    picture = noise_image(300, 200)
    eight = np.asarray(picture)
    expected = runner.decide(picture, ASKED)
    for array in (
        eight, np.asfortranarray(eight), eight.astype(np.uint16) * 257, eight / 255, (eight / 255).astype(np.float32),
        np.dstack([eight, np.full(eight.shape[:2], 255, np.uint8)]),
    ):  # fmt: skip
        found = runner.decide(array, ASKED)
        assert (found.complexity, found.lane, found.rung, found.point, found.kind) == (
            expected.complexity, expected.lane, expected.rung, expected.point, expected.kind,
        )  # fmt: skip
        assert runner.work(array, ASKED, NATIVE, 4) == runner.work(picture, ASKED, NATIVE, 4)
        assert runner.offers(array, ASKED)[0] == expected.lane
    reply = runner.chat(eight, ASKED, point=NATIVE, max_new_tokens=3)
    assert reply.text == runner.chat(picture, ASKED, point=NATIVE, max_new_tokens=3).text


def test_a_decision_checks_the_values_that_it_reads_and_a_run_checks_all(runner: AdaptiveRunner) -> None:
    array = np.full((2000, 2000), 0.5)
    array[1, 1] = np.nan  # between the rows that are read
    assert runner.decide(array, ASKED).complexity is not None
    with pytest.raises(MediaError, match=r"nan.*\[0, 1\]"):
        runner.chat(array, ASKED, max_new_tokens=2)
    for bad in (array * 300, np.full((4, 4), np.nan), np.zeros((4, 4), np.int64), np.zeros((4, 4, 7), np.uint8)):
        for use in (runner.decide, runner.offers, runner.chat):
            with pytest.raises(MediaError):
                use(bad, ASKED)  # type: ignore[operator]
