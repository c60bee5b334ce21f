"""Requests that are made ready before their turn; what was learned goes from one runner to another."""

import json
import threading
from typing import Any

import pytest
import torch

from adaptive_fusion.budget import Budget
from adaptive_fusion.decisions import Decision
from adaptive_fusion.errors import ConfigError, ContextLengthError
from adaptive_fusion.point import NATIVE
from adaptive_fusion.reference.screens import PROMPTS, make_scene
from adaptive_fusion.runner import AdaptiveRunner


@pytest.fixture(scope="module")
def runner(reference_model: Any, processor: Any) -> AdaptiveRunner:
    return AdaptiveRunner(reference_model, processor, policy="reference-balanced")


def test_a_prepared_request_is_answered_as_one_that_is_not(runner: AdaptiveRunner, noise_image: Any) -> None:
    prepared = runner.prepared(noise_image(120, 90), "Describe.", max_new_tokens=6)
    seen: list[Decision] = []
    reply = prepared.chat(decided=seen.append)
    plain = runner.chat(noise_image(120, 90), "Describe.", max_new_tokens=6)
    assert (reply.text, reply.token_ids) == (plain.text, plain.token_ids)
    assert seen == [reply.decision] and prepared.decide().point == reply.decision.point
    assert prepared.offers()[0] == reply.decision.lane
    native = runner.chat(noise_image(120, 90), "?", point=NATIVE, max_new_tokens=1).measurement
    assert prepared.native_tokens == native.visual_tokens
    stream = prepared.stream()
    assert "".join(stream).strip() == reply.text and stream.reply.token_ids == reply.token_ids


def test_time_counts_from_arrival(runner: AdaptiveRunner, noise_image: Any) -> None:
    arrived = runner.clock() - 5.0
    prepared = runner.prepared(
        noise_image(64, 48), "?", arrived_s=arrived, max_new_tokens=1, budget=Budget(latency_ms=4000)
    )
    reply = prepared.chat()
    assert reply.measurement.latency_ms > 5000 and reply.decision.elapsed_ms > 5000 and reply.met is False
    assert not prepared.decide(refuse=False).feasible
    fresh = runner.prepared(noise_image(64, 48), "?", budget=Budget(latency_ms=60_000))
    assert fresh.decide().feasible and not fresh.decide(wait_ms=120_000, refuse=False).feasible


def test_a_request_that_is_given_up_ends(runner: AdaptiveRunner, noise_image: Any) -> None:
    cancelled = threading.Event()
    cancelled.set()
    reply = runner.prepared(noise_image(64, 48), "?", max_new_tokens=50).chat(cancelled=cancelled)
    assert reply.finish_reason == "cancelled" and len(reply.token_ids) == 1


def test_a_seed_leaves_the_random_numbers_of_others(runner: AdaptiveRunner, noise_image: Any) -> None:
    def drawn(seed: int) -> tuple[int, ...]:
        sampling = {"do_sample": True, "temperature": 3.0, "top_k": 0}
        return runner.prepared(noise_image(64, 48), "?", max_new_tokens=8, seed=seed, **sampling).chat().token_ids

    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    first, second, third = drawn(1), drawn(2), drawn(1)
    assert first == third != second and torch.equal(torch.rand(3), expected)


def test_a_prompt_beyond_the_context_is_refused_with_both_numbers(runner: AdaptiveRunner, noise_image: Any) -> None:
    prepared = runner.prepared(noise_image(64, 48), "word " * 200, max_new_tokens=5, context=150)
    with pytest.raises(ContextLengthError, match=r"prompt has about \d{3} tokens.* context is 150"):
        prepared.chat()
    plain = runner.prepared(noise_image(64, 48), "?", max_new_tokens=5).chat()
    length = plain.measurement.prompt_tokens
    for context, fits in ((length + 5, True), (length + 4, False)):
        exact = runner.prepared(noise_image(64, 48), "?", max_new_tokens=5, context=context)
        if fits:
            assert exact.chat().text == plain.text
        else:
            with pytest.raises(ContextLengthError, match=f"has {length} tokens"):
                exact.chat()


def test_an_audit_runs_native_and_says_what_would_have_been(reference_model: Any, processor: Any) -> None:
    runner = AdaptiveRunner(reference_model, processor, policy="reference-latency")
    screen, ask = make_scene("simple", 3, "train").image, PROMPTS["describe"]
    decided = runner.prepared(screen, ask, max_new_tokens=2).decide()
    reply = runner.prepared(screen, ask, max_new_tokens=2, audit=True).chat()
    audit = reply.decision.audit
    assert reply.decision.point == NATIVE and audit["point"] == decided.point.to_dict()
    assert audit["saved"]["tokens"] > 0 and audit["predicted"]["encode_ms"] > 0


def test_what_was_learned_is_taken_over_and_shared(reference_model: Any, processor: Any, noise_image: Any) -> None:
    first = AdaptiveRunner(reference_model, processor, policy="reference-balanced")
    other = first.with_policy("native")
    other.chat(noise_image(64, 48), "?", max_new_tokens=3)
    assert other.policy.name == "native" and first.controller is other.controller and first.controller.informed
    state = json.loads(json.dumps(first.state()))
    second = AdaptiveRunner(reference_model, processor, policy="reference-balanced")
    second.restore(state)
    assert second.state() == first.state() and second.controller is not first.controller
    third = AdaptiveRunner(reference_model, processor)
    for wrong in ({}, [], {**state, "profile": {}}, {**state, "controller": 5}, {**state, "lengths": {"version": 9}}):
        with pytest.raises(ConfigError):
            third.restore(wrong)  # type: ignore[arg-type]
    assert not third.controller.informed


def test_with_another_policy_the_runner_asks_no_more_than_before(reference_model: Any, processor: Any) -> None:
    for escalate in (True, False, None):
        first = AdaptiveRunner(reference_model, processor, policy="reference-balanced", escalate=escalate)
        other = first.with_policy("native")
        decided = [each.decide(None, "Hello").escalation for each in (first, other)]
        assert all(bool(said) == bool(escalate) for said in decided) or escalate is None
        assert other._escalate is escalate
