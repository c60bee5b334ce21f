"""What is explored: a bounded share, only what fits, with the probabilities that are logged; never what must not be."""

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from controlled import LADDER, LOOSE, settled
from hypothesis import given
from hypothesis import strategies as st

from adaptive_fusion.budget import Budget
from adaptive_fusion.control.exploring import MOST, check_share, draw, explores, uniforms
from adaptive_fusion.decisions import Decision
from adaptive_fusion.errors import ConfigError
from adaptive_fusion.point import NATIVE
from adaptive_fusion.policy.familiar import Familiar
from adaptive_fusion.policy.policy import COMPLEX, SIMPLE, Policy
from adaptive_fusion.runner import AdaptiveRunner


def test_an_id_is_drawn_alike_everywhere() -> None:
    """Fixed cases: what they say may not change with a version of Python or of this library."""
    assert uniforms("a") == pytest.approx((0.15532484244927325, 0.16365637031983582), abs=1e-15)
    assert uniforms("a", 1) == pytest.approx((0.9011185900655024, 0.6154657189904755), abs=1e-15)


@given(share=st.floats(0.0, 1.0), count=st.integers(1, 4), name=st.text(max_size=20))
def test_propensities_are_those_of_the_draw(share: float, count: int, name: str) -> None:
    fitting = LADDER[:count]
    taken, drawn = draw(fitting, fitting[0], name, share)
    assert 0.0 <= drawn.propensity <= 1.0 and taken in fitting
    assert drawn.explored == (uniforms(name)[0] < share)
    each = share / count
    assert drawn.propensity == pytest.approx(each + (1 - share if taken is fitting[0] else 0.0))


def test_points_are_taken_as_often_as_their_propensity_says() -> None:
    n, share = 20_000, 0.2
    found = [draw(LADDER, LADDER[1], str(i), share) for i in range(n)]
    counts = Counter(taken.quality for taken, _ in found)
    said = {taken.quality: drawn.propensity for taken, drawn in found}
    assert set(counts) == {each.quality for each in LADDER}
    for quality, count in counts.items():
        assert count / n == pytest.approx(said[quality], abs=0.01)
    assert sum(drawn.explored for _, drawn in found) / n == pytest.approx(share, abs=0.01)


@given(latency=st.floats(20.0, 400.0), gb=st.floats(0.2, 3.0))
def test_what_fits_is_no_riskier_than_allowed_and_within_memory(latency: float, gb: float) -> None:
    controller, budget = settled(noise=0.1), Budget(latency_ms=latency, vram_gb=gb, attainment=0.9)
    own = controller.choose(LADDER, budget)
    if not own.feasible:
        return
    fitting = controller.fitting(LADDER, own)
    assert fitting[0] is own.candidate and len({each.point for each in fitting}) == len(fitting)
    for each in fitting:
        alone = controller.choose([each], replace(budget, on_infeasible="cheapest"))
        assert alone.feasible and alone.p_late <= max(1 - budget.attainment, own.p_late) + 1e-12


def test_without_limits_all_points_fit_and_no_decision_is_counted() -> None:
    controller = settled()
    own = controller.choose(LADDER, LOOSE)
    before = controller.state()["counts"]
    assert len(controller.fitting(LADDER, own)) == len(LADDER)
    assert controller.state()["counts"] == before


@pytest.mark.parametrize("share", [-0.1, MOST + 0.01, float("nan"), True, "much"])
def test_a_share_out_of_range_is_refused(share: Any) -> None:
    with pytest.raises(ConfigError, match="explore is"):
        check_share(share)


# Through a runner

SMALL = {"max_new_tokens": 1}


@pytest.fixture(scope="module")
def runner(reference_model: Any, processor: Any) -> AdaptiveRunner:
    policy = replace(Policy.load("reference-balanced"), explore=1.0)
    return AdaptiveRunner(reference_model, processor, policy=policy)


def test_the_decision_follows_from_the_id(runner: AdaptiveRunner, noise_image: Any) -> None:
    reply = runner.chat(noise_image(64, 48), "Describe.", **SMALL)
    decision = reply.decision
    assert decision.explored and decision.reason.startswith("exploring: drawn of ")
    assert decision.propensity == pytest.approx(1 / int(decision.reason.split()[3]))
    lanes = runner.policy.lanes
    assert decision.rung in {rung.name for lane in (SIMPLE, COMPLEX) for rung in lanes[lane]}
    prepared = runner.prepared(noise_image(64, 48), "Describe.", **SMALL)
    info = replace(runner._info_of(prepared), request_id=decision.request_id)
    again, _ = runner._planner.decide(info, runner.budget)
    assert (again.rung, again.propensity, again.request_id) == (
        decision.rung,
        decision.propensity,
        decision.request_id,
    )


def test_what_another_router_would_take_is_explored_and_the_steps_far_below_are_not(
    runner: AdaptiveRunner, noise_image: Any
) -> None:
    prepared = runner.prepared(noise_image(64, 48), "Describe.", **SMALL)
    info = runner._info_of(prepared)
    drawn = [runner._planner.decide(replace(info, request_id=str(i)), runner.budget)[0] for i in range(60)]
    lanes, taken = runner.policy.lanes, {decision.rung for decision in drawn}
    own = runner._planner.decide(info, runner.budget)[0]
    names = [rung.name for rung in lanes[own.lane]]
    below = names[names.index(own.rung) + 1 :][:1]
    arms = {lanes[SIMPLE][0].name, lanes[COMPLEX][0].name, runner.policy.cheap_rung.name}
    # Steps that are one and the same for an image of this size are one.
    assert {own.rung, *arms} <= taken <= {own.rung, *arms, *below}
    assert sum(decision.propensity for decision in {d.rung: d for d in drawn}.values()) == pytest.approx(1.0)


def never(decision: Decision) -> None:
    assert not decision.explored and decision.propensity == 1.0


def test_what_is_never_explored(runner: AdaptiveRunner, noise_image: Any) -> None:
    image = noise_image(64, 48)
    never(runner.chat(image, "Describe.", point=NATIVE, **SMALL).decision)
    with runner.native():
        never(runner.chat(image, "Describe.", **SMALL).decision)
    never(runner.chat(None, "Hello?", **SMALL).decision)
    never(runner.decide(image, "Describe."))
    part = {"type": "image", "image": image, "detail": "high"}
    asked = [{"role": "user", "content": [part, {"type": "text", "text": "Describe."}]}]
    never(runner.chat(asked, **SMALL).decision)
    prepared = runner.prepared(image, "Describe.", audit=True, **SMALL)
    never(prepared.chat().decision)


def test_a_conversation_stays_with_what_was_chosen_not_with_what_was_drawn(
    runner: AdaptiveRunner, reference_model: Any, processor: Any, noise_image: Any
) -> None:
    content = [{"type": "image", "image": noise_image(48, 64)}, {"type": "text", "text": "Describe."}]
    first = [{"role": "user", "content": content}]
    answer = runner.chat(first, **SMALL)
    assert answer.decision.explored
    second = [*first, {"role": "assistant", "content": answer.text}, {"role": "user", "content": "And?"}]
    assert not runner.chat(second, **SMALL).decision.conversation
    # What a policy without exploring chose is kept, and an exploring one does not touch it.
    chosen = AdaptiveRunner(reference_model, processor, policy="reference-balanced")
    reply = chosen.chat(first, **SMALL)
    other = chosen.with_policy(runner.policy)
    second = [*first, {"role": "assistant", "content": reply.text}, {"role": "user", "content": "And?"}]
    kept = other.chat(second, **SMALL).decision
    never(kept)
    assert kept.conversation["from"] == reply.decision.rung


def test_a_careful_policy_explores_nothing_and_one_that_was_fitted_again_does(
    reference_model: Any, processor: Any, noise_image: Any
) -> None:
    """An image unlike those of the fit runs at full compute, whatever is to be explored."""
    general = replace(Policy.load("balanced"), explore=1.0)
    assert isinstance(general.familiar, Familiar)
    image = noise_image(64, 48)
    careful = AdaptiveRunner(reference_model, processor, policy=general).chat(image, "Describe.", **SMALL).decision
    never(careful)
    assert "unlike the images" in careful.reason and careful.point.is_full
    again = replace(general, familiar=None)
    assert AdaptiveRunner(reference_model, processor, policy=again).chat(image, "Describe.", **SMALL).decision.explored


def test_the_option_is_the_policys_share(reference_model: Any, processor: Any) -> None:
    runner = AdaptiveRunner(reference_model, processor, policy="reference-balanced", explore=0.05)
    assert runner.policy.explore == 0.05 and runner.with_policy("reference-latency").policy.explore == 0.05
    assert AdaptiveRunner(reference_model, processor, policy="reference-balanced").policy.explore == 0.0
    assert explores("", 1.0) is False
    with pytest.raises(ConfigError, match=r"explore is 0\.5"):
        AdaptiveRunner(reference_model, processor, policy="reference-balanced", explore=0.5)
