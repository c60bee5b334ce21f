"""The runner end to end on real models: drop-in, chat, stream, budgets, faults."""

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import DynamicCache, GenerationConfig
from waits import MOST_S, joined

from adaptive_fusion import answering
from adaptive_fusion.budget import Budget
from adaptive_fusion.errors import (
    BudgetError,
    ConfigError,
    InfeasibleBudgetError,
    MediaError,
    UnsupportedModelError,
)
from adaptive_fusion.execution.request import build_request
from adaptive_fusion.point import NATIVE, OperatingPoint
from adaptive_fusion.policy.policy import Policy
from adaptive_fusion.reference.screens import make_scene
from adaptive_fusion.runner import AdaptiveRunner

POINTS = [
    OperatingPoint("top", downsample=0.5),
    OperatingPoint("weighted", 6, 0.5, adapter_rank=4),
    OperatingPoint("gated", 12, 0.25, adapter_rank=8),
]


@pytest.fixture(scope="module")
def runner(reference_model: Any, processor: Any) -> AdaptiveRunner:
    return AdaptiveRunner(reference_model, processor, policy="reference-balanced", seed=0)


@pytest.fixture(scope="module")
def screen() -> Image.Image:
    return make_scene("dense", 1, "eval", (160, 160)).image


@pytest.fixture(scope="module")
def batch(processor: Any, noise_image: Any) -> dict[str, Any]:
    """Three prompts of different length and image size, left-padded, as a caller's own code would make them."""
    prompt = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>{}<|im_end|>\n<|im_start|>assistant\n"
    images = [noise_image(96, 64), noise_image(48, 48, 1), noise_image(64, 160, 2)]
    texts = [prompt.format(words) for words in ("Describe.", "Read the text, all of it.", "?")]
    return dict(processor(text=texts, images=images, padding=True, return_tensors="pt"))


def test_drop_in_with_the_native_policy_equals_generate(reference_model: Any, processor: Any, batch: Any) -> None:
    runner = AdaptiveRunner(reference_model, processor, policy="native")
    expected = reference_model.generate(**batch, max_new_tokens=10, do_sample=False)
    found = runner.generate(**batch, max_new_tokens=10, do_sample=False)
    assert type(found) is type(expected) and torch.equal(found, expected)
    assert runner.last is not None and runner.last[0].point == NATIVE
    as_dict = runner.generate(**batch, max_new_tokens=6, do_sample=False, return_dict_in_generate=True)
    assert torch.equal(as_dict.sequences[:, : batch["input_ids"].shape[1]], batch["input_ids"])


@pytest.mark.parametrize("point", POINTS, ids=lambda p: p.name)
def test_generate_returns_the_full_prompt_and_the_new_tokens(runner: AdaptiveRunner, batch: Any, point: Any) -> None:
    length = batch["input_ids"].shape[1]
    out = runner.generate(**batch, point=point, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert torch.equal(out[:, :length], batch["input_ids"]) and out.shape[1] == length + 5
    beams = runner.generate(
        **batch,
        point=point,
        max_new_tokens=4,
        min_new_tokens=4,
        num_beams=2,
        num_return_sequences=2,
        do_sample=False,
    )
    assert beams.shape == (6, length + 4)
    assert torch.equal(beams[:, :length], batch["input_ids"].repeat_interleave(2, 0))


def test_chat_says_what_was_decided_and_what_it_took(runner: AdaptiveRunner, screen: Image.Image) -> None:
    reply = runner.chat(screen, "Describe the screen.", budget=Budget(latency_ms=60_000), max_new_tokens=8)
    decision, measured = reply.decision, reply.measurement
    assert decision.complexity is not None and 0 <= decision.complexity.score <= 1
    assert decision.lane in ("weighted", "gated") and decision.reason and decision.predicted is not None
    assert decision.budget == {"latency_ms": 60_000.0} and reply.met is True
    assert 0 < measured.ttft_ms <= measured.latency_ms and measured.new_tokens <= 8
    total = measured.preprocess_ms + measured.encode_ms + measured.prefill_ms + measured.decode_ms
    assert total == pytest.approx(measured.latency_ms, rel=1e-6)
    assert measured.visual_tokens > 0 and measured.patches >= measured.visual_tokens
    assert "->" in decision.explain()


def test_native_chat_equals_the_plain_transformers_way(
    runner: AdaptiveRunner, reference_model: Any, processor: Any, screen: Image.Image
) -> None:
    content = [{"type": "image", "image": screen}, {"type": "text", "text": "Describe the screen."}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
    )
    out = reference_model.generate(**inputs, max_new_tokens=24, do_sample=False)
    expected = processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    with runner.native():
        reply = runner.chat(screen, "Describe the screen.", max_new_tokens=24, do_sample=False)
    assert reply.text == expected and reply.decision.point == NATIVE
    assert runner.chat([{"role": "user", "content": content}], max_new_tokens=24, point=NATIVE).text == expected


def test_stream_gives_the_same_text_and_frees_the_model_when_abandoned(
    runner: AdaptiveRunner, screen: Image.Image
) -> None:
    args: dict[str, Any] = {"max_new_tokens": 24, "point": NATIVE, "do_sample": False}
    before = runner.controller.state()["counts"]
    whole = runner.chat(screen, "Describe the screen.", **args)
    stream = runner.stream(screen, "Describe the screen.", **args)
    assert "".join(stream).strip() == whole.text and stream.reply.text == whole.text
    abandoned = runner.stream(screen, "Describe the screen.", point=NATIVE, max_new_tokens=2000, min_new_tokens=2000)
    abandoned.close()
    assert abandoned.reply.finish_reason == "cancelled" and abandoned.reply.measurement.new_tokens < 2000
    counts = runner.controller.state()["counts"]
    assert counts["cancelled"] == before["cancelled"] + 1 and counts["misses"] == before["misses"]
    assert runner.chat(screen, "Describe the screen.", **args).text == whole.text
    with pytest.raises(MediaError):
        list(runner.stream(b"not an image", "?"))


SAMPLED = {"do_sample": True, "temperature": 2.0, "output_logits": True}


@pytest.mark.parametrize("options", [{"do_sample": False}, SAMPLED])
def test_memory_that_runs_out_in_mid_stream_never_takes_back_what_was_given(
    runner: AdaptiveRunner, reference_model: Any, screen: Image.Image, options: dict[str, Any]
) -> None:
    """The next try, at a cheaper point, repeats the tokens that are out and goes on."""
    steps = [0]

    def run_out(*_: Any) -> None:
        steps[0] += 1
        if steps[0] in (6, 10):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    handle = reference_model.register_forward_pre_hook(run_out)
    try:
        stream = runner.stream(
            screen, "Describe the screen.", point=NATIVE, max_new_tokens=12, min_new_tokens=12, **options
        )
        said = "".join(stream)
    finally:
        handle.remove()
    reply = stream.reply
    assert steps[0] == 6 + 4 + 12 and "stepped down" in reply.decision.reason
    assert len(reply.token_ids) == 12 and said.strip() == reply.text


def test_a_hard_deadline_ends_the_answer(runner: AdaptiveRunner, screen: Image.Image) -> None:
    budget = Budget(latency_ms=400, on_deadline="stop")
    reply = runner.chat(screen, "?", budget=budget, point=NATIVE, max_new_tokens=4000, min_new_tokens=4000)
    assert reply.finish_reason == "deadline" and reply.measurement.new_tokens < 4000


def test_out_of_memory_steps_down_and_leaves_nothing_behind(
    reference_model: Any, processor: Any, screen: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = AdaptiveRunner(reference_model, processor, policy="native")
    expected = runner.chat(screen, "Describe the screen.", max_new_tokens=8, do_sample=False).text
    encode, tried = runner.adapter.encode, []

    def fails_at_full_size(inputs: Any, point: OperatingPoint) -> Any:
        tried.append(point)
        if point.downsample == 1.0:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return encode(inputs, point)

    monkeypatch.setattr(runner.adapter, "encode", fails_at_full_size)
    reply = runner.chat(screen, "Describe the screen.", max_new_tokens=8)
    assert [p.downsample for p in tried] == [1.0, 0.5] and reply.decision.point.downsample == 0.5
    assert "out of memory" in reply.decision.reason
    monkeypatch.undo()
    with runner.native():
        assert runner.chat(screen, "Describe the screen.", max_new_tokens=8, do_sample=False).text == expected


def test_an_unrelated_error_is_raised_once_and_the_next_request_is_unharmed(
    runner: AdaptiveRunner, screen: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = runner.chat(screen, "?", point=POINTS[1], max_new_tokens=6, do_sample=False).text
    calls: list[int] = []

    def broken(*_: Any, **__: Any) -> Any:
        calls.append(1)
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(runner.adapter, "encode", broken)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        runner.chat(screen, "?", max_new_tokens=6)
    assert len(calls) == 1
    monkeypatch.undo()
    assert runner.chat(screen, "?", point=POINTS[1], max_new_tokens=6, do_sample=False).text == before


def test_threads_share_one_model(runner: AdaptiveRunner, noise_image: Any) -> None:
    images = [noise_image(32 + 16 * i, 48, i) for i in range(4)]
    alone = [runner.chat(image, "?", point=NATIVE, max_new_tokens=6, do_sample=False).text for image in images]
    found: dict[int, str] = {}

    def ask(i: int) -> None:
        found[i] = runner.chat(images[i % 4], "?", point=NATIVE, max_new_tokens=6, do_sample=False).text

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(12)]
    for thread in threads:
        thread.start()
    joined(threads)
    assert found == {i: alone[i % 4] for i in range(12)}


def test_an_exclusive_model_answers_this_thread_alone(
    runner: AdaptiveRunner, reference_model: Any, processor: Any, screen: Image.Image
) -> None:
    other = AdaptiveRunner(reference_model, processor, policy="native", seed=0)
    begun, users = threading.Event(), []

    def ask() -> None:
        begun.set()
        other.chat(screen, "?", max_new_tokens=2)

    thread = threading.Thread(target=ask)
    hook = reference_model.register_forward_hook(lambda *_: users.append(threading.get_ident()))
    try:
        with runner.exclusive() as model:
            assert model is reference_model
            thread.start()
            assert begun.wait(MOST_S)
            for _ in range(3):
                runner.chat(screen, "?", max_new_tokens=6)
            assert set(users) == {threading.get_ident()}
        joined([thread])
        assert set(users) == {threading.get_ident(), thread.ident}
    finally:
        hook.remove()


def test_log_keeps_numbers_and_hashes_only(
    reference_model: Any, processor: Any, screen: Image.Image, tmp_path: Path
) -> None:
    runner = AdaptiveRunner(reference_model, processor, log=tmp_path / "log.jsonl")
    runner.chat(screen, "Where is the secret?", max_new_tokens=2)
    runner.chat(None, "Hello", max_new_tokens=2)
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    first, second = map(json.loads, lines)
    assert "secret" not in lines[0] and len(first["prompt_hash"]) == 64 and len(first["content_hash"]) == 64
    assert first["point"]["fusion"] and first["measurement"]["ttft_ms"] > 0 and first["propensity"] == 1.0
    assert second["kind"] == second["lane"] == "text" and second["content_hash"] is None


def test_attributes_are_the_models_and_bad_knobs_are_named(
    runner: AdaptiveRunner, reference_model: Any, screen: Image.Image
) -> None:
    assert runner.config is reference_model.config and runner.device == reference_model.device
    with pytest.raises(AttributeError):
        _ = runner.no_such_thing
    with pytest.raises(BudgetError, match="-1"):
        runner.chat(screen, "?", budget=Budget(latency_ms=-1))
    with pytest.raises(ConfigError, match="max_new_tokens is 0"):
        runner.chat(screen, "?", max_new_tokens=0)
    with pytest.raises(ConfigError, match="neither"):
        runner.chat(None)
    runner.chat(screen, "?", max_new_tokens=2)  # an estimate that no request has confirmed refuses nothing
    with pytest.raises(InfeasibleBudgetError):
        runner.chat(screen, "?", budget=Budget(latency_ms=0.001, on_infeasible="refuse"))
    tight = runner.chat(screen, "?", budget=Budget(latency_ms=0.001), max_new_tokens=2)
    assert not tight.decision.feasible and tight.met is False


def test_policy_objects_and_unknown_names(reference_model: Any, processor: Any) -> None:
    policy = Policy.load("reference-latency")
    assert AdaptiveRunner(reference_model, processor, policy=policy).policy is policy
    with pytest.raises(ConfigError, match="nonsense"):
        AdaptiveRunner(reference_model, processor, policy="nonsense")
    with pytest.raises(UnsupportedModelError, match="Linear"):
        AdaptiveRunner(torch.nn.Linear(1, 1), processor)


def test_a_stream_inside_native_is_native(runner: AdaptiveRunner, screen: Image.Image) -> None:
    with runner.native():
        stream = runner.stream(screen, "Describe the screen.", max_new_tokens=4, do_sample=False)
    assert stream.reply.decision.point == NATIVE and stream.reply.decision.lane == "fixed"


def test_what_generate_returns_and_ends_by_is_understood(runner: AdaptiveRunner, screen: Image.Image) -> None:
    args: dict[str, Any] = {"point": NATIVE, "do_sample": False}
    plain = runner.chat(screen, "Describe the screen.", max_new_tokens=12, **args)
    as_dict = runner.chat(screen, "Describe the screen.", max_new_tokens=12, return_dict_in_generate=True, **args)
    assert as_dict.text == plain.text and plain.finish_reason == "length"
    # Ended by the caller's own token, long before the limit.
    tokenizer = runner.processor.tokenizer
    third = int(tokenizer(plain.text, add_special_tokens=False).input_ids[2])
    ended = runner.chat(screen, "Describe the screen.", max_new_tokens=12, eos_token_id=third, **args)
    assert ended.finish_reason == "stop" and ended.measurement.new_tokens < 12
    with pytest.raises(ConfigError, match="num_return_sequences is 2"):
        runner.chat(screen, "Describe the screen.", num_return_sequences=2, do_sample=True)
    several = GenerationConfig(num_return_sequences=3, do_sample=True)
    with pytest.raises(ConfigError, match="num_return_sequences is 3"):
        runner.chat(screen, "Describe the screen.", generation_config=several)


def test_tokens_of_a_long_text_are_counted_piece_by_piece(
    runner: AdaptiveRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["many words of a text " * 9, "x" * 333, " " * 100, "a b", "é\n" * 80]
    for text in texts:
        whole = runner._text_tokens(build_request(None, text))
        with monkeypatch.context() as patched:
            patched.setattr(answering, "PIECE", 50)
            pieces = list(answering._pieces(text))
            assert "".join(pieces) == text and max(map(len, pieces)) <= 50
            assert abs(runner._text_tokens(build_request(None, text)) - whole) <= 2 * (len(pieces) - 1)


def test_the_whole_conversation_counts_in_the_prediction(runner: AdaptiveRunner, screen: Image.Image) -> None:
    def asked(history: str) -> Any:
        messages = [
            {"role": "system", "content": history},
            {"role": "user", "content": [{"type": "image", "image": screen}, {"type": "text", "text": "What is it?"}]},
        ]
        return runner.decide(messages).predicted

    assert asked("word " * 400).prefill_ms > asked("word").prefill_ms


def test_a_call_with_a_cache_goes_to_the_model_as_it_is(
    runner: AdaptiveRunner, processor: Any, screen: Image.Image
) -> None:
    content = [{"type": "image", "image": screen}, {"type": "text", "text": "Describe the screen."}]
    inputs = runner.adapter.prepare([{"role": "user", "content": content}], NATIVE)
    args: dict[str, Any] = {"do_sample": False, "max_new_tokens": 4}
    half = OperatingPoint(downsample=0.5)
    with pytest.raises(ConfigError, match=r"native@0\.5, but cache"):
        runner.generate(**inputs, point=half, cache=DynamicCache(), **args)
    with_cache = runner.generate(**inputs, cache=DynamicCache(), **args)
    assert with_cache.tolist() == runner.model.generate(**inputs, **args).tolist()
    assert runner.last is not None
    decision, took = runner.last
    assert decision.point == NATIVE and decision.predicted is None and decision.reason.startswith("native: cache ")
    assert took.new_tokens == 4 and took.ttft_ms <= took.latency_ms
