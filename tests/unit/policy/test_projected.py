"""A policy before an engine: never fewer pixels than its steps were judged at, unless they pool all of them."""

from dataclasses import replace
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from adaptive_fusion.point import NATIVE
from adaptive_fusion.policy.policy import COMPLEX, LANES, SIMPLE, VIDEO, Policy
from adaptive_fusion.policy.projected import UNTRAINED, on_pixels, projected
from adaptive_fusion.policy.router import constant_router
from adaptive_fusion.policy.rungs import Rung


@given(st.sampled_from([1.0, 0.5, 0.25]), st.sampled_from([1.0, 0.5, 0.2, 0.125]), st.sampled_from([None, 50_000]))
def test_a_step_keeps_its_pixels_or_has_as_many_tokens(pooled: float, share: float, most: int | None) -> None:
    fusion = {} if pooled == 1.0 else {"fusion": "weighted", "layers": 3, "downsample": pooled}
    rung = Rung(replace(NATIVE, max_pixels=most, **fusion), 0.9, share)
    step = on_pixels(rung)
    assert step.point == replace(NATIVE, max_pixels=most) and step.quality == rung.quality
    assert step.pixel_share == (pooled**2 if share == 1.0 and most is None else share)


def test_of_steps_that_become_one_the_best_gives_the_quality() -> None:
    weighted = replace(NATIVE, fusion="weighted", layers=3)
    ladder = (
        Rung(NATIVE),
        Rung(replace(weighted, downsample=0.5), 0.9, 0.25),
        Rung(replace(weighted, downsample=0.25), 0.8, 0.25),
        Rung(replace(weighted, downsample=0.25), 0.5),
    )
    found, said = projected(Policy("p", constant_router(), 0.5, dict.fromkeys(LANES, ladder)))
    assert [(rung.pixel_share, rung.quality) for rung in found.lanes[LANES[0]]] == [
        (1.0, 1.0),
        (0.25, 0.9),
        (0.0625, 0.5),
    ]
    assert "downsample" in said and "fusion" in said


def test_without_its_trained_weights_a_lane_begins_with_more_pixels() -> None:
    weighted = replace(NATIVE, fusion="weighted", layers=3)
    few = (Rung(weighted, 1.0, 0.25), Rung(weighted, 0.9, 0.125))
    many = (Rung(weighted, 1.0, 0.75), Rung(weighted, 0.9, 0.25))
    plain = (Rung(replace(NATIVE, max_pixels=50_000), 1.0, 0.25), Rung(weighted, 0.9, 0.125))
    lanes = {SIMPLE: few, COMPLEX: many, VIDEO: plain}
    policy = Policy("p", constant_router(), 0.5, lanes, cheap=few[0].name)
    trained = replace(policy, fusion_weights=(Path("weighted3r0.safetensors"),))
    for each, begins in ((policy, (0.25, 0.75, 0.25)), (trained, (UNTRAINED, 0.75, 0.25))):
        found, _ = projected(each)
        assert tuple(found.lanes[lane][0].pixel_share for lane in lanes) == begins
        assert [found.lanes[lane][1].pixel_share for lane in lanes] == [0.125, 0.25, 0.125]
        assert found.cheap_rung == found.lanes[SIMPLE][0] or found.cheap_rung.pixel_share == begins[0]
