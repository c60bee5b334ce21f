"""Batches are set against requests alone by what both were seen to take, and are tried again after a while."""

import math

from hypothesis import given
from hypothesis import strategies as st
from pytest import approx

from adaptive_fusion.control.gain import Gain
from adaptive_fusion.decisions import Prediction

strange = st.floats() | st.floats(1e-3, 1e6)


def said(encode_ms: float, prefill_ms: float = 0.0, decode_ms: float = 0.0) -> Prediction:
    return Prediction(encode_ms, prefill_ms, decode_ms, 0.0)


@given(st.lists(st.tuples(st.sampled_from(("alone", "together")), strange, strange), max_size=30))
def test_whatever_is_measured_the_factor_stays_finite(seen: list[tuple[str, float, float]]) -> None:
    gain = Gain()
    for kind, measured, predicted in seen:
        if kind == "alone":
            gain.ran_alone((measured, 1.0, measured), said(predicted, predicted, 1.0))
        else:
            gain.ran_together(measured, said(1.0, predicted))
        gain.refused()
        assert 0.0 < gain.factor < math.inf
        assert 0.0 < gain.corrected(said(1.0, 1.0, 1.0)).latency_ms < math.inf


@given(st.floats(0.01, 100), st.floats(0.25, 4))
def test_a_slow_machine_says_nothing_of_batches_and_slow_batches_are_tried_again(slow: float, dear: float) -> None:
    gain = Gain()
    for _ in range(60):
        gain.ran_alone((slow * 50.0, slow * 30.0, slow * 20.0), said(50.0, 30.0, 20.0))
        gain.ran_together(slow * dear * 300.0, gain.corrected(said(500.0, 100.0, 200.0)))
    assert gain.factor == approx(dear, rel=0.02)
    for _ in range(400):
        gain.refused()
    assert gain.factor == approx(1.0, rel=0.02)


def test_a_stage_that_is_predicted_wrongly_is_not_taken_for_batches_being_slow() -> None:
    """Decoding takes ten times what is predicted; requests without much of it are many, and short."""
    gain = Gain()
    for tokens in (1, 64) * 60:
        gain.ran_alone((40.0, 10.0, 50.0 * tokens), said(40.0, 10.0, 5.0 * tokens))
    batch = gain.corrected(said(80.0, 20.0, 320.0))
    assert batch.latency_ms == approx(80.0 + 20.0 + 3200.0, rel=0.01)
    gain.ran_together(3220.0, batch)
    assert gain.factor == approx(1.0, rel=0.01)
