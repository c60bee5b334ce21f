"""Several requests in one pass: each row is what it would be alone, ends alone, and nobody pays for the others."""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from batches import TIE, first_difference, gap, paying, steady, together
from server import client_of, image, serving
from waits import MOST_S, until

from adaptive_fusion.budget import Budget
from adaptive_fusion.cost.model import CostModel, Work
from adaptive_fusion.cost.plan import ANSWERS
from adaptive_fusion.errors import ContextLengthError, MediaError, RequestsFailed
from adaptive_fusion.execution.stream import Said
from adaptive_fusion.point import NATIVE, OperatingPoint
from adaptive_fusion.policy import Policy
from adaptive_fusion.prepared import Turn
from adaptive_fusion.reference.screens import make_scene
from adaptive_fusion.reply import Reply
from adaptive_fusion.runner import AdaptiveRunner
from tests.conftest import _random
from tests.contract.test_model_adapters import qwen25, qwen35

HALF = OperatingPoint(downsample=0.5)
GREEDY: dict[str, Any] = {"do_sample": False}


@pytest.fixture(scope="module")
def runner(reference_model: Any, processor: Any) -> AdaptiveRunner:
    return steady(AdaptiveRunner(reference_model, processor, policy="native", profile=paying(), escalate=False))


@pytest.fixture(params=["dense", "moe", "reference", "Qwen2.5-VL", "Qwen3.5"])
def kin(request: pytest.FixtureRequest, processor: Any) -> AdaptiveRunner:
    """A runner of each family whose requests can share a batch."""
    if request.param in ("Qwen2.5-VL", "Qwen3.5"):
        model, its = {"Qwen2.5-VL": qwen25, "Qwen3.5": qwen35}[request.param](processor)
        return steady(AdaptiveRunner(_random(model), its, policy="native", profile=paying(), escalate=False))
    names = {"dense": "tiny_dense", "moe": "tiny_moe", "reference": "reference_model"}
    model = request.getfixturevalue(names[request.param])
    return steady(AdaptiveRunner(model, processor, policy="native", profile=paying(), escalate=False))


@pytest.mark.parametrize("prefill", [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (20.0, 1.0, 0.0)], ids=["one", "each", "some"])
def test_a_row_is_what_it_would_be_alone(
    kin: AdaptiveRunner, noise_image: Any, clip: Any, prefill: tuple[float, ...]
) -> None:
    kin.use_profile(replace(paying(), prefill=prefill, decode=(0.1, 0.0, 0.0)))
    asked = [
        (noise_image(96, 160, 1), "Describe.", NATIVE, 9),
        (None, "Say something about nothing that is shown, at some length.", None, 12),
        ([noise_image(64, 48, 2), noise_image(48, 96, 3)], "Which is larger?", HALF, 5),
        (clip, "What happens?", HALF, 7),
    ]
    calls = [
        kin.prepared(media, said, point=point, max_new_tokens=most, **GREEDY) for media, said, point, most in asked
    ]
    alone = [call.chat() for call in calls]
    for one, row, call in zip(alone, together([Turn(call) for call in calls]), calls, strict=True):
        assert (row.decision.batch, one.decision.batch) == (4, 1)
        place = first_difference(one.token_ids, row.token_ids)
        if place >= 0:
            assert gap(kin, call.request.messages, one, place) < TIE
            continue
        assert (row.text, row.finish_reason) == (one.text, one.finish_reason)
        for name in ("visual_tokens", "prompt_tokens", "new_tokens", "patches"):
            assert getattr(row.measurement, name) == getattr(one.measurement, name)


class Hand:
    """A clock that is moved by hand, and goes on by a microsecond whenever it is looked at."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1e-6
        return self.now


def test_rows_stop_stream_time_out_and_are_cancelled_alone(
    reference_model: Any, processor: Any, noise_image: Any
) -> None:
    clock, given_up = Hand(), threading.Event()
    runner = AdaptiveRunner(
        reference_model, processor, policy="native", profile=paying(), escalate=False, clock=clock, budget=Budget()
    )
    ended: list[str] = []
    pieces: list[str] = []

    class Counting:
        """Streams: after its third token one row is given up, after its sixth an hour passes."""

        count = 0

        def put(self, value: Any) -> None:
            self.count += value.ndim == 1
            given_up.set() if self.count == 3 else None
            clock.now += 3600.0 if self.count == 6 else 0.0

        def end(self) -> None:
            ended.append("counted")

    def call(seed: int, **options: Any) -> Any:
        return runner.prepared(noise_image(64, 64, seed), "Describe.", **{"min_new_tokens": 14, **GREEDY, **options})

    limited = Budget(latency_ms=60_000, on_deadline="stop")
    turns = [
        Turn(call(1, max_new_tokens=14), streamer=Counting()),
        Turn(call(2, max_new_tokens=14), cancelled=given_up),
        Turn(call(3, max_new_tokens=14, budget=limited)),
        Turn(call(4, max_new_tokens=2), streamer=Said(processor.tokenizer, pieces.append)),
    ]
    names = ("counted", "given up", "late", "short")
    for turn, name in zip(turns[1:], names[1:], strict=True):
        turn.result.add_done_callback(lambda _, name=name: ended.append(name))
    first, given, late, short = together(turns)
    assert ended == ["short", "given up", "late", "counted"]
    assert [r.finish_reason for r in (first, given, late, short)] == ["length", "cancelled", "deadline", "length"]
    assert [r.measurement.new_tokens for r in (first, given, late, short)] == [14, 3, 7, 2]
    assert {reply.decision.batch for reply in (first, given, late, short)} == {4}
    assert "".join(pieces).strip() == short.text
    assert first.measurement.latency_ms > 3.6e6 > 1e6 > short.measurement.latency_ms
    # What was cut off is the beginning of what there would have been.
    for reply, turn in zip((first, given, late, short), turns, strict=True):
        whole = replace(turn.prepared, arrived_s=clock()).chat().token_ids
        assert reply.token_ids == whole[: len(reply.token_ids)]


def test_a_string_ends_the_row_that_says_it(runner: AdaptiveRunner, noise_image: Any) -> None:
    calls = [runner.prepared(noise_image(64, 64, i), "Describe.", max_new_tokens=24, **GREEDY) for i in range(2)]
    first, second = (call.chat().text for call in calls)
    stop = next(word for word in first.split() if word not in second)
    options = {"max_new_tokens": 24, "stop_strings": [stop], **GREEDY}
    asked = [runner.prepared(noise_image(64, 64, i), "Describe.", **options) for i in range(2)]
    rows = together([Turn(call) for call in asked])
    assert rows[0].text == first[: first.index(stop)] + stop and rows[0].finish_reason == "stop"
    assert rows[1].text == second and {row.decision.batch for row in rows} == {2}


@pytest.mark.parametrize(
    ("one", "other", "why"),
    [
        ({"do_sample": True, "seed": 1}, {"do_sample": True, "seed": 1}, "its sampling is seeded"),
        ({"num_beams": 2}, {"num_beams": 2}, "num_beams"),
        ({"repetition_penalty": 1.2}, {"repetition_penalty": 1.2}, "repetition_penalty reads the prompt"),
        ({"output_logits": True}, {"output_logits": True}, "output_logits"),
        ({"min_new_tokens": 2}, {}, "no other has the same arguments"),
        ({"budget": Budget(vram_gb=9)}, {}, "its memory is limited"),
    ],
)
def test_what_cannot_share_a_pass_runs_alone_and_says_why(
    runner: AdaptiveRunner, noise_image: Any, one: dict[str, Any], other: dict[str, Any], why: str
) -> None:
    options: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False}
    calls = [runner.prepared(noise_image(48, 48, i), "?", **{**options, **own}) for i, own in enumerate((one, other))]
    first, second = together([Turn(call) for call in calls])
    assert first.decision.batch == second.decision.batch == 1 and f"alone: {why}" in first.decision.reason


def test_nobody_pays_for_a_batch(reference_model: Any, processor: Any, noise_image: Any) -> None:
    # Padding makes it dearer than one after the other: a short prompt beside a long one.
    padded = replace(paying(), prefill=(0.0, 1.0, 0.0), decode=(0.0, 0.0, 1.0))
    dear = AdaptiveRunner(reference_model, processor, policy="native", profile=padded, escalate=False)
    replies = dear.chat([noise_image(256, 256, 0), None], ["?", "Hello"], max_new_tokens=3, **GREEDY)
    assert [reply.decision.batch for reply in replies] == [1, 1]
    assert "alone: a batch would take longer" in replies[0].decision.reason
    # Each row costs 10 ms a token: alone the deadline holds, in a batch it would not.
    rows = replace(paying(), decode=(1.0, 10.0, 0.0))
    runner = AdaptiveRunner(reference_model, processor, policy="native", profile=rows, escalate=False)
    asked = {"max_new_tokens": 41, **GREEDY}
    tight, free = Budget(latency_ms=600), Budget()
    calls = [runner.prepared(noise_image(48, 48, i), "?", budget=b, **asked) for i, b in enumerate((free, tight))]
    group, why = runner._group([Turn(call) for call in calls])
    assert not group and why == "a batch would cost limits or quality"
    group, _ = runner._group([Turn(calls[0]), Turn(replace(calls[0]))])
    assert len(group) == 2
    # One that is left out with a limit is not overtaken by those behind it.
    group, _ = runner._group([Turn(calls[0]), Turn(replace(calls[0])), Turn(calls[1]), Turn(replace(calls[0]))])
    assert len(group) == 2


def test_a_batch_is_weighed_by_the_plans_that_it_would_have(
    reference_model: Any, processor: Any, noise_image: Any
) -> None:
    class Changing(AdaptiveRunner):
        """Takes few pixels for a request alone, and all of them in a batch."""

        def _placed(self, turn: Turn, beside: Sequence[Work] = (), info: Any = None) -> Any:
            call = replace(turn.prepared.call, point=NATIVE if beside else OperatingPoint(max_pixels=4096))
            return super()._placed(replace(turn, prepared=replace(turn.prepared, call=call)), beside, info)

    for each_ms, together_ in ((0.0, 2), (1.0, 0)):
        profile = replace(paying(), encode=(0.0, 0.0, each_ms, 0.0, 0.0, 0.0))
        runner = Changing(reference_model, processor, policy="native", profile=profile, escalate=False)
        calls = [runner.prepared(noise_image(128, 128, i), "?", max_new_tokens=3, **GREEDY) for i in range(2)]
        group, why = runner._group([Turn(call) for call in calls])
        assert len(group) == together_ and ("longer" in why) == (not group)


def test_batches_that_turn_out_slower_are_given_up_and_tried_again(
    reference_model: Any, processor: Any, noise_image: Any
) -> None:
    clock, rows_s = Hand(), [0.1]
    runner = AdaptiveRunner(
        reference_model, processor, policy="native", profile=paying(), escalate=False, clock=clock, budget=Budget()
    )

    def hook(_: Any, __: Any, given: dict[str, Any]) -> None:  # what a step takes: more for more rows
        clock.now += 0.1 if len(given["inputs_embeds"]) == 1 else rows_s[0]

    handle = reference_model.model.language_model.register_forward_pre_hook(hook, with_kwargs=True)
    try:

        def both() -> Reply:
            options: dict[str, Any] = {"max_new_tokens": 3, **GREEDY}
            return runner.chat([noise_image(48, 48, i) for i in range(2)], ["?"] * 2, **options)[0]

        runner.chat(None, "?", max_new_tokens=3, **GREEDY)
        assert [both().decision.batch for _ in range(3)] == [2] * 3 and runner.gain.factor == pytest.approx(1.0, 0.01)
        rows_s[0] = 0.5  # two rows cost five times one
        batches = [both() for _ in range(24)]
        assert batches[0].decision.batch == 2 and batches[-1].decision.batch == 1
        assert "as others did" in batches[-1].decision.reason
        rows_s[0] = 0.1
        for _ in range(80):
            runner.gain.refused()
        assert both().decision.batch == 2
    finally:
        handle.remove()


def test_a_row_whose_reader_breaks_at_its_end_fails_alone(runner: AdaptiveRunner, noise_image: Any) -> None:
    class Broken:
        def put(self, value: Any) -> None:
            pass

        def end(self) -> None:
            raise OSError("the reader is gone")

    calls = [runner.prepared(noise_image(64, 64, i), "?", max_new_tokens=i + 2, **GREEDY) for i in range(2)]
    turns = [Turn(calls[0], streamer=Broken()), Turn(calls[1])]
    runner._answer_turns(turns)
    assert isinstance(turns[0].result.exception(0), OSError)
    reply = turns[1].result.result(0)
    assert reply.decision.batch == 2 and reply.text == calls[1].chat().text


def test_a_row_that_fails_fails_alone(runner: AdaptiveRunner, noise_image: Any) -> None:
    options = {"max_new_tokens": 4, **GREEDY}
    calls = [runner.prepared(noise_image(64, 64, i), "Describe.", **options) for i in range(2)]
    long = runner.prepared(noise_image(64, 64, 9), "Describe.", context=20, **options)
    turns = [Turn(calls[0]), Turn(long), Turn(calls[1])]
    with pytest.raises(ContextLengthError):
        together(turns)
    assert [turns[i].result.result(0).text for i in (0, 2)] == [call.chat().text for call in calls]


def test_of_several_requests_of_a_call_each_has_its_own_outcome(
    runner: AdaptiveRunner, noise_image: Any, tmp_path: Any
) -> None:
    missing = tmp_path / "no.png"
    media = [noise_image(64, 64, 0), missing, noise_image(64, 64, 1), None, noise_image(64, 64, 2), missing]
    with pytest.raises(RequestsFailed, match=r"2 of 6 requests failed.*number 1 \(MediaError") as raised:
        runner.chat(media, ["Describe."] * 6, max_new_tokens=4, **GREEDY)
    assert str(tmp_path) not in str(raised.value) and isinstance(raised.value.__cause__, MediaError)
    for one, outcome in zip(media, raised.value.outcomes, strict=True):
        if one == missing:
            assert isinstance(outcome, MediaError)
        else:
            assert outcome.text == runner.chat(one, "Describe.", max_new_tokens=4, **GREEDY).text
    with pytest.raises(RequestsFailed, match="2 of 2"):
        runner.chat([missing] * 2, ["?"] * 2)


def test_strings_of_the_models_own_configuration_end_rows_in_one_batch(
    runner: AdaptiveRunner, noise_image: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"max_new_tokens": 24, **GREEDY}
    texts = [runner.prepared(noise_image(64, 64, i), "Describe.", **options).chat().text for i in range(2)]
    stop = next(word for word in texts[0].split() if word not in texts[1])
    monkeypatch.setattr(runner.model.generation_config, "stop_strings", [stop])
    calls = [runner.prepared(noise_image(64, 64, i), "Describe.", **options) for i in range(2)]
    alone = [call.chat() for call in calls]
    rows = together([Turn(call) for call in calls])
    assert [row.text for row in rows] == [one.text for one in alone] == [texts[0].partition(stop)[0] + stop, texts[1]]
    assert {row.decision.batch for row in rows} == {2}


@contextmanager
def broken(model: Any, error: Callable[[], Exception]) -> Iterator[None]:
    """A model that takes no more than one row."""

    def hook(_: Any, __: Any, given: dict[str, Any]) -> None:
        if given.get("input_ids") is not None and len(given["input_ids"]) > 1:
            raise error()

    handle = model.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (lambda: torch.OutOfMemoryError("CUDA out of memory"), "the batch ran out of memory"),
        (lambda: ValueError("what?"), "the batch failed with ValueError"),
    ],
)
def test_a_batch_that_fails_is_answered_one_after_the_other(
    runner: AdaptiveRunner, noise_image: Any, error: Callable[[], Exception], why: str
) -> None:
    images = [noise_image(64, 64, i) for i in range(3)]
    expected = [runner.chat(each, "Describe.", max_new_tokens=4, **GREEDY).text for each in images]
    with broken(runner.model, error):
        replies = runner.chat(images, ["Describe."] * 3, max_new_tokens=4, **GREEDY)
    assert [reply.text for reply in replies] == expected
    assert all(reply.decision.batch == 1 and f"alone: {why}" in reply.decision.reason for reply in replies)


def test_the_peak_of_a_row_that_ran_out_of_memory_teaches_nothing_of_the_others(
    tiny_dense: Any, processor: Any, noise_image: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    meter = SimpleNamespace(
        free_of_charge=True, start=lambda: None, stop=lambda: 5.0, skip=lambda: None, free_gb=lambda: None
    )
    own = steady(AdaptiveRunner(tiny_dense, processor, policy="native", profile=paying(), meter=meter))
    encode, failed = own.adapter.encode, list[bool]()

    def second(*args: Any) -> Any:
        failed.append(len(failed) == 1)
        if failed[-1]:
            meter.stop = lambda: 7.0
            raise torch.OutOfMemoryError("CUDA out of memory")
        meter.stop = lambda: 5.0 if len(failed) > 3 else 7.0  # the row that failed, alone after the batch
        return encode(*args)

    monkeypatch.setattr(own.adapter, "encode", second)
    replies = own.chat([noise_image(64, 64, i) for i in range(3)], ["?"] * 3, max_new_tokens=2, **GREEDY)
    assert [reply.decision.batch for reply in replies] == [2, 1, 2]
    assert [reply.measurement.peak_memory_gb for reply in replies] == [0.0, 5.0, 0.0]


def test_one_that_runs_after_a_batch_came_to_nothing_is_the_same_request(
    runner: AdaptiveRunner, noise_image: Any
) -> None:
    said: list[tuple[str, int]] = []
    ids: dict[int, set[str]] = {0: set(), 1: set()}
    turns = []
    for i in range(2):
        call = runner.prepared(noise_image(64, 64, i), "?", max_new_tokens=2, **GREEDY)
        turn = Turn(call, decided=lambda d, i=i: ids[i].add(d.request_id), came=lambda i=i: said.append(("came", i)))
        turn.result.add_done_callback(lambda _, i=i: said.append(("done", i)))
        turns.append(turn)
    with broken(runner.model, lambda: ValueError("what?")):
        replies = together(turns)
    for i, reply in enumerate(replies):
        assert reply.decision.batch == 1 and ids[i] == {reply.decision.request_id}
    assert ids[0] != ids[1]
    # The second came with the batch, and again when the first was answered.
    assert said[-3:] == [("done", 0), ("came", 1), ("done", 1)]


def test_a_batch_is_decided_as_a_batch_and_not_asked_if_it_is_sure(reference_model: Any, processor: Any) -> None:
    runner = AdaptiveRunner(reference_model, processor, policy="reference-balanced", profile=paying(), escalate=True)
    screens = [make_scene("dense", i, "train", (160, 160)).image for i in range(2)]
    replies = runner.chat(screens, ["Describe."] * 2, max_new_tokens=3, **GREEDY)
    for reply in replies:
        assert reply.decision.batch == 2 and reply.decision.escalated is None
        assert "one batch with others" in reply.decision.escalation["why"]


def test_the_plan_that_is_cheapest_alone_need_not_be_so_in_a_batch() -> None:
    model = CostModel(replace(paying(), encode=(0.0, 0.0, 1.0, 0.0, 0.0, 0.0), prefill=(1e3, 1.0, 0.0)))
    few_tokens, few_patches, long = Work((200,), 100), Work((100,), 250), Work((10,), 400)

    def took(work: Work, *others: Work) -> float:
        return model.predict(NATIVE, model.beside(work, others)).latency_ms

    assert took(few_tokens) < took(few_patches)
    # A prefill is dear, so prompts are padded to the longest, and fewer tokens of this one save nothing.
    assert took(few_tokens, long) > took(few_patches, long)


def test_calibrate_measures_a_batch_as_one(runner: AdaptiveRunner, noise_image: Any) -> None:
    requests = [(noise_image(64 + 32 * i, 64, i), "Describe.") for i in range(3)]
    work, took = runner.work_together(requests, NATIVE, ANSWERS[0])
    single = [runner.work(media, asked, NATIVE, ANSWERS[0]) for media, asked in requests]
    assert work.batch == 3 and took.new_tokens == ANSWERS[0] == work.new_tokens
    assert sum(work.patches) == sum(sum(each.patches) for each in single)
    assert work.prompt_tokens == 3 * max(each.prompt_tokens for each in single)


@pytest.mark.parametrize("explore", [1.0, 1e-9])
def test_what_explores_runs_alone_and_others_go_together(
    explore: float, reference_model: Any, processor: Any, noise_image: Any
) -> None:
    policy = replace(Policy.load("reference-balanced"), explore=explore)
    runner = AdaptiveRunner(reference_model, processor, policy=policy, profile=paying(), seed=0)
    replies = runner.chat([noise_image(48, 48, i) for i in range(2)], ["?", "?"], max_new_tokens=2)
    assert {reply.decision.batch for reply in replies} == ({1} if explore == 1 else {2})
    assert {reply.decision.explored for reply in replies} == {explore == 1}


def test_requests_that_wait_for_the_server_go_in_together(runner: AdaptiveRunner) -> None:
    sizes = [(64, 48), (96, 64), (48, 48), (80, 64)]
    own = {"temperature": 0, "max_tokens": 6, "model": "reference"}

    def content(size: tuple[int, int]) -> Any:
        return [{"role": "user", "content": [image(*size), {"type": "text", "text": "Describe."}]}]

    with serving(runner) as server, ThreadPoolExecutor(4) as pool:
        client = client_of(server)
        alone = [client.chat.completions.create(messages=content(size), **own) for size in sizes]  # type: ignore[call-overload]

        def streamed(size: tuple[int, int]) -> tuple[str, Any]:
            text, last = "", None
            for chunk in client.chat.completions.create(messages=content(size), stream=True, **own):  # type: ignore[call-overload]
                text += chunk.choices[0].delta.content or ""
                last = chunk
            return text, last

        scheduler = server.service.scheduler
        with runner.exclusive():  # the first has the worker and waits; the others wait for the worker
            first = pool.submit(client.chat.completions.create, messages=content(sizes[0]), **own)  # type: ignore[arg-type]
            until(lambda: scheduler.running, "the first request at work")
            rest = [pool.submit(streamed, size) for size in sizes[1:]]
            until(lambda: len(scheduler._waiting) == 3, "three that wait")
        assert first.result(MOST_S).choices[0].message.content == alone[0].choices[0].message.content
        for done, single in zip(rest, alone[1:], strict=True):
            text, last = done.result(MOST_S)
            assert text.strip() == single.choices[0].message.content and last.adaptive_fusion["batch"] == 3
        assert 'request_batch_requests_bucket{le="3.0"} 8.0' in server.service.metrics.render()[0].decode()
