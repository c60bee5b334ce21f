"""Batches are set against requests alone by what both were seen to take, and are tried again after a while."""

import math

from hypothesis import given
from hypothesis import strategies as st
from pytest import approx

from adaptive_fusion.control.gain import Gain

strange = st.floats() | st.floats(1e-3, 1e6)


@given(st.lists(st.tuples(st.sampled_from(("ran_alone", "ran_together")), strange, strange), max_size=30))
def test_whatever_is_measured_the_factor_stays_finite(seen: list[tuple[str, float, float]]) -> None:
    gain = Gain()
    for kind, measured, predicted in seen:
        getattr(gain, kind)(measured, predicted)
        gain.refused()
        assert 0.0 < gain.factor < math.inf


@given(st.floats(0.01, 100), st.floats(0.25, 4))
def test_a_slow_machine_says_nothing_of_batches_and_slow_batches_are_tried_again(slow: float, dear: float) -> None:
    gain = Gain()
    for _ in range(30):
        gain.ran_alone(slow * 100.0, 100.0)
        gain.ran_together(slow * dear * 300.0, 300.0)
    assert gain.factor == approx(dear, rel=0.01)
    for _ in range(400):
        gain.refused()
    assert gain.factor == approx(1.0, rel=0.01)
