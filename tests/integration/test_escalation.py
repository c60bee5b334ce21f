"""Going on to the better plan: what is shown, what it leaves behind, and what rules it out."""

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import LogitsProcessor, StoppingCriteria
from transformers.generation.streamers import BaseStreamer
from waits import MOST_S

from adaptive_fusion.budget import Budget
from adaptive_fusion.errors import ConfigError
from adaptive_fusion.evaluation.questions import Question
from adaptive_fusion.learning.labelling.labeller import RunnerModel
from adaptive_fusion.learning.labelling.scoring import ModelScorer
from adaptive_fusion.point import NATIVE, OperatingPoint
from adaptive_fusion.policy.escalation import Escalation, Threshold
from adaptive_fusion.policy.policy import LANES, Policy
from adaptive_fusion.policy.router import constant_router
from adaptive_fusion.policy.rungs import Rung
from adaptive_fusion.reference.screens import PROMPTS, make_scene
from adaptive_fusion.runner import AdaptiveRunner

CHEAP = Rung(OperatingPoint("weighted", 6, 0.25, adapter_rank=4), quality=0.8)
ALWAYS, SELDOM = 0.0, 50.0
PROMPT = PROMPTS["describe"]


def policy(threshold: float | None, k: int = 1, **changes: Any) -> Policy:
    """One cheap rung for everything, whose answer is not trusted above a threshold."""
    rules = None if threshold is None else Escalation(k, thresholds={"*": {"*": Threshold(threshold)}})
    return Policy("cheap", constant_router(), 0.5, dict.fromkeys(LANES, (CHEAP,)), escalation=rules, **changes)


@pytest.fixture(scope="module")
def make(reference_model: Any, processor: Any) -> Callable[..., AdaptiveRunner]:
    def runner(threshold: float | None, k: int = 1, **options: Any) -> AdaptiveRunner:
        return AdaptiveRunner(reference_model, processor, policy=policy(threshold, k), **options)

    return runner


@pytest.fixture(scope="module")
def screen() -> Image.Image:
    return make_scene("dense", 1, "eval", (160, 160)).image


@pytest.fixture(scope="module")
def tensors(processor: Any, screen: Image.Image) -> dict[str, Any]:
    text = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Describe.<|im_end|>\n<|im_start|>assistant\n"
    return dict(processor(text=[text], images=[screen], return_tensors="pt"))


@contextmanager
def at_each_forward(model: Any, do: Callable[[], Any]) -> Iterator[None]:
    def hook(*_: Any) -> None:
        do()

    handle = model.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


class Shown(BaseStreamer):
    """What a streamer is put, as lists."""

    def __init__(self) -> None:
        self.put_, self.ended = [], 0

    def put(self, value: torch.Tensor) -> None:
        self.put_.append(value.tolist())

    def end(self) -> None:
        self.ended += 1


@pytest.mark.parametrize("k", [1, 3])
def test_an_answer_that_goes_on_is_the_better_plans_and_shows_nothing_else(
    make: Any, screen: Image.Image, tensors: Any, k: int
) -> None:
    runner, most = make(ALWAYS, k), {"max_new_tokens": 8}
    alone = runner.chat(screen, PROMPT, point=NATIVE, **most)
    kept = make(None).chat(screen, PROMPT, **most)
    assert alone.text != kept.text  # else nothing could be told apart
    stream = runner.stream(screen, PROMPT, **most)
    assert "".join(stream).strip() == stream.reply.text == alone.text
    for reply in (stream.reply, runner.chat(screen, PROMPT, **most), asyncio.run(runner.achat(screen, PROMPT, **most))):
        decision = reply.decision
        assert reply.token_ids == alone.token_ids and decision.escalated is True and decision.point == NATIVE
        assert decision.rung == "native@1" and "went on to native@1" in decision.reason
        assert decision.escalation["first_rung"] == CHEAP.name and decision.escalation["k"] == k
        assert reply.measurement.ttft_ms > decision.escalation["first_ms"] + reply.measurement.prefill_ms
    plain, mine = Shown(), Shown()
    expected = runner.generate(**tensors, point=NATIVE, streamer=plain, **most)
    assert torch.equal(runner.generate(**tensors, streamer=mine, **most), expected)
    assert runner.last[0].escalated and (mine.put_, mine.ended) == (plain.put_, 1)


@pytest.mark.parametrize("k", [1, 3, 4])
def test_an_answer_that_is_kept_is_that_of_the_point_alone(
    make: Any, screen: Image.Image, tensors: Any, k: int
) -> None:
    runner, most = make(SELDOM, k), {"max_new_tokens": 8}
    without = make(None)
    expected = without.chat(screen, PROMPT, **most)
    stream = runner.stream(screen, PROMPT, **most)
    assert "".join(stream).strip() == expected.text and stream.reply.token_ids == expected.token_ids
    decision = stream.reply.decision
    assert decision.escalated is False and decision.point == expected.decision.point
    assert 0 < decision.escalation["entropy"] < SELDOM and "kept" in decision.explain(stream.reply.measurement)
    plain, mine = Shown(), Shown()
    expected = without.generate(**tensors, streamer=plain, **most)
    assert torch.equal(runner.generate(**tensors, streamer=mine, **most), expected)
    assert (mine.put_, mine.ended) == (plain.put_, plain.ended)
    # An answer that ends before k tokens is judged by those it has, and shown.
    short = runner.stream(screen, PROMPT, max_new_tokens=1)
    assert list(short) and short.reply.decision.escalated is False


def test_the_entropy_is_of_the_models_own_logits(make: Any, screen: Image.Image) -> None:
    runner = make(SELDOM)
    plain = runner.chat(screen, PROMPT, max_new_tokens=2).decision.escalation["entropy"]
    first = runner.chat(screen, PROMPT, max_new_tokens=1, output_logits=True).output.logits[0]
    assert plain == pytest.approx(torch.distributions.Categorical(logits=first[0]).entropy().item(), rel=1e-5)
    changed = {
        "do_sample": True,
        "temperature": 3.0,
        "top_k": 2,
        "repetition_penalty": 5.0,
        "no_repeat_ngram_size": 2,
        "suppress_tokens": [int(first.argmax())],
        "min_new_tokens": 2,
    }
    assert runner.chat(screen, PROMPT, max_new_tokens=2, **changed).decision.escalation["entropy"] == plain


@pytest.mark.parametrize("k", [1, 3])
def test_the_same_seed_gives_the_same_sample(make: Any, screen: Image.Image, k: int) -> None:
    sampled = {"max_new_tokens": 8, "do_sample": True, "temperature": 2.0}

    def drawn(runner: AdaptiveRunner, **how: Any) -> Any:
        torch.manual_seed(7)
        return runner.chat(screen, PROMPT, **sampled, **how).token_ids

    assert drawn(make(ALWAYS, k)) == drawn(make(None), point=NATIVE) != drawn(make(None))
    assert drawn(make(SELDOM, k)) == drawn(make(None))


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1e-5
        return self.now

    def jump(self) -> None:
        self.now += 100.0


def test_a_deadline_that_cannot_pay_for_two_passes_gets_one_and_says_so(
    make: Any, screen: Image.Image, reference_model: Any
) -> None:
    expected = make(None).chat(screen, PROMPT, max_new_tokens=4).token_ids
    runner = make(ALWAYS, clock=(clock := Clock()))
    choices = runner.offers(screen, PROMPT, max_new_tokens=4)[1]
    planned = runner.chat(
        screen, PROMPT, max_new_tokens=4, budget=Budget(latency_ms=2 * choices[0].predicted.latency_ms)
    )
    assert planned.decision.escalated is None and planned.decision.rung == CHEAP.name
    assert "no second pass: two passes, latency" in planned.decision.reason and planned.token_ids == expected
    with at_each_forward(reference_model, clock.jump):
        late = runner.chat(screen, PROMPT, max_new_tokens=4, budget=Budget(latency_ms=99_000))
    assert late.decision.escalation["to"] == "native@1" and late.decision.escalated is None
    assert "no second pass: latency" in late.decision.reason and "late with" in late.decision.escalation["why"]
    assert late.token_ids == expected


@pytest.mark.parametrize("passes", [1, 2])
def test_a_request_that_is_cut_off_in_either_pass_leaves_the_model_as_it_was(
    make: Any, screen: Image.Image, reference_model: Any, passes: int
) -> None:
    runner, fresh = make(ALWAYS), make(None)
    expected = fresh.chat(screen, PROMPT, max_new_tokens=6)
    begun, streams = [], []

    def cut() -> None:
        begun.append(1)
        if len(begun) == passes:
            streams[0]._cancelled.set()

    ready = threading.Event()
    with at_each_forward(reference_model, lambda: (ready.wait(MOST_S), cut())):
        streams.append(runner.stream(screen, PROMPT, max_new_tokens=6))
        ready.set()
        reply = streams[0].reply
    assert reply.finish_reason == "cancelled" and len(reply.token_ids) == 1
    assert reply.decision.escalated is (None if passes == 1 else True)
    clock = Clock()
    stopped = make(ALWAYS, clock=clock)
    begun.clear()
    with at_each_forward(reference_model, lambda: (begun.append(1), clock.jump() if len(begun) == passes else None)):
        hard = Budget(latency_ms=50_000, on_deadline="stop")
        assert stopped.chat(screen, PROMPT, max_new_tokens=6, budget=hard).finish_reason == "deadline"
    assert len(begun) == passes
    assert not reference_model._forward_hooks
    assert fresh.chat(screen, PROMPT, max_new_tokens=6).token_ids == expected.token_ids


def test_memory_that_runs_out_in_the_second_pass_steps_down(
    make: Any, screen: Image.Image, reference_model: Any
) -> None:
    runner, calls = make(ALWAYS), []

    def fail_once() -> None:
        calls.append(1)
        if len(calls) == 2:
            raise MemoryError

    with at_each_forward(reference_model, fail_once):
        reply = runner.chat(screen, PROMPT, max_new_tokens=1)
    decision = reply.decision
    assert len(calls) == 3 and decision.escalated and decision.point == OperatingPoint(downsample=0.5)
    assert decision.reason.endswith("stepped down after running out of memory")
    assert reply.token_ids == make(None).chat(screen, PROMPT, max_new_tokens=1, point=decision.point).token_ids


class Grammar(LogitsProcessor):
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores


class Watcher(StoppingCriteria):
    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> Any:
        return torch.zeros(len(input_ids), dtype=torch.bool)


NEVER = {
    "num_beams is 2": {"num_beams": 2},
    "prefix_allowed_tokens_fn holds": {"prefix_allowed_tokens_fn": lambda *_: [5]},
    "logits_processor has a Grammar": {"logits_processor": [Grammar()]},
    "max_time counts": {"max_time": 100.0},
    "encoder_repetition_penalty reads": {"encoder_repetition_penalty": 2.0},
    "the point was given": {"point": CHEAP.point},
    "stopping_criteria has a Watcher": {"stopping_criteria": [Watcher()]},
}


@pytest.mark.parametrize("why", NEVER)
def test_what_a_second_pass_would_not_suit_gets_one_and_says_why(make: Any, screen: Image.Image, why: str) -> None:
    runner = make(ALWAYS, 2 if why.startswith("stopping") else 1)
    decision = runner.chat(screen, PROMPT, max_new_tokens=2, **NEVER[why]).decision
    assert decision.escalated is None and why in decision.reason and why in decision.escalation["why"]


def test_a_context_that_full_compute_does_not_fit_into_keeps_the_cheap_answer(make: Any, screen: Image.Image) -> None:
    runner = make(ALWAYS)
    tokens = runner.chat(screen, PROMPT, max_new_tokens=2, point=NATIVE).measurement.prompt_tokens
    reply, roomy = (
        runner.prepared(screen, PROMPT, max_new_tokens=2, context=tokens + more).chat() for more in (-10, 100)
    )
    assert reply.decision.escalated is None and "model's context" in reply.decision.reason and reply.token_ids
    assert roomy.decision.escalated is True


def test_several_returned_sequences_are_never_given_up(make: Any, tensors: Any) -> None:
    runner = make(ALWAYS)
    runner.generate(**tensors, max_new_tokens=2, do_sample=True, num_return_sequences=2)
    assert "num_return_sequences is 2" in runner.last[0].reason and runner.last[0].escalated is None


def test_it_is_on_where_the_caller_or_the_policy_says_so(
    reference_model: Any, processor: Any, screen: Image.Image, tmp_path: Path
) -> None:
    def asked(threshold: float | None, escalate: bool | None) -> dict[str, Any]:
        runner = AdaptiveRunner(reference_model, processor, policy=policy(threshold), escalate=escalate)
        return dict(runner.decide(screen, PROMPT).escalation)

    assert not asked(None, None) and not asked(None, False) and not asked(SELDOM, False)
    assert asked(SELDOM, None)["threshold"] == SELDOM == asked(SELDOM, True)["threshold"]
    assert asked(None, True)["threshold"] == Escalation().threshold(CHEAP.name, "describe").threshold
    with pytest.raises(ConfigError, match="escalate is 'yes'; expected True, False, or None"):
        asked(None, "yes")
    sure = replace(policy(ALWAYS), tolerance=0.5)
    for each in (sure, policy(ALWAYS)):
        runner = AdaptiveRunner(reference_model, processor, policy=each, log=tmp_path / "log.jsonl")
        runner.chat(screen, PROMPT, max_new_tokens=1)
    assert "second pass" not in runner.decide(None, PROMPT).reason  # text alone: there is nothing to say
    first, second = map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines())
    assert first["escalated"] is None and first["escalation"]["why"] == "the plan counts as good as any"
    assert second["escalated"] is True and second["escalation"]["first_ms"] > 0 and second["rung"] == "native@1"


def test_each_pass_teaches_its_own_rung(make: Any, screen: Image.Image) -> None:
    runner = make(ALWAYS)
    for _ in range(3):
        runner.chat(screen, PROMPT, max_new_tokens=1)
    state = runner.controller.state()
    assert state["shares"] == {f"{CHEAP.name} describe": {"mean": 1.0, "seen": 3}}
    assert {key: row["seen"] for key, row in state["ttft"]["points"].items()} == {CHEAP.name: 3, "native@1": 3}
    assert set(state["latency"]["points"]) == {"native@1"}


def test_labels_note_the_entropies_that_requests_see(make: Any, screen: Image.Image) -> None:
    scorer = ModelScorer(RunnerModel(make(None), max_new_tokens=6))
    asked = [Question(screen, PROMPT, references) for references in (("a2 pink diamond",), ())]
    answered, scored = (scorer.score(question, [CHEAP]).entropies for question in asked)
    for k in (1, 3):
        seen = make(SELDOM, k).chat(screen, PROMPT, max_new_tokens=6).decision.escalation["entropy"]
        assert sum(answered[CHEAP.name][:k]) / k == pytest.approx(seen, rel=1e-3)
    assert len(answered[CHEAP.name]) == 4 and set(answered) == set(scored) == {CHEAP.name, "native@1"}
    # Of a given answer those of its tokens, the first of which follows from the prompt alone.
    assert len(scored[CHEAP.name]) == 4
    assert scored[CHEAP.name][0] == pytest.approx(answered[CHEAP.name][0], rel=1e-3)
