"""One request's way through a model: hard deadlines, memory that runs out, clocks and lying probes, thinned clips."""

import gc
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from starving import starving

from adaptive_fusion.budget import Budget
from adaptive_fusion.control.law import MEMORY_HEADROOM
from adaptive_fusion.cost.model import Profile
from adaptive_fusion.errors import InfeasibleBudgetError
from adaptive_fusion.media.clips import Video
from adaptive_fusion.point import NATIVE, OperatingPoint
from adaptive_fusion.policy.sufficiency import STILL_FPS
from adaptive_fusion.runner import AdaptiveRunner

PREFILL_100 = Profile(
    {}, (10.0, 0, 0, 0, 0, 0), (100.0, 0, 0), (10.0, 0, 0), (0.01, 0, 0, 0, 0), (0.01, 0, 0, 0, 0), samples=10
)


class Hands:
    """A clock that moves only when it is told to."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s

    def advance(self, ms: float) -> None:
        self.now_s += ms / 1e3


@contextmanager
def taking(model: Any, clock: Hands, prefill_ms: float, steps_ms: list[float]) -> Iterator[list[int]]:
    """Forwards of `model` move the clock: the prefill by one amount, decode steps in turn by others; lists lengths."""
    lengths: list[int] = []

    def moved(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        lengths.append(kwargs["input_ids"].shape[1])
        clock.advance(prefill_ms if lengths[-1] > 1 else steps_ms[len(lengths) % len(steps_ms)])

    handle = model.register_forward_pre_hook(moved, with_kwargs=True)
    try:
        yield lengths
    finally:
        handle.remove()


@pytest.fixture(scope="module")
def dot(noise_image: Any) -> Image.Image:
    return noise_image(48, 48)


@settings(max_examples=15, deadline=None)
@given(
    prefill=st.floats(5, 300),
    steps=st.lists(st.floats(1, 60), min_size=4, max_size=4),
    limit=st.floats(20, 500),
)
def test_an_answer_that_began_in_time_ends_within_one_step_of_the_deadline(
    reference_model: Any, processor: Any, dot: Image.Image, prefill: float, steps: list[float], limit: float
) -> None:
    clock = Hands()
    runner = AdaptiveRunner(reference_model, processor, policy="native", clock=clock, profile=PREFILL_100)
    with taking(reference_model, clock, prefill, steps):
        reply = runner.chat(
            dot,
            "?",
            point=NATIVE,
            budget=Budget(latency_ms=limit, on_deadline="stop"),
            max_new_tokens=10,
            min_new_tokens=10,
        )
    took = reply.measurement
    if took.ttft_ms <= limit:
        assert took.latency_ms <= limit + max(20.0, max(steps)) + 1e-6  # sums of floats
    else:
        assert took.new_tokens == 1
    assert reply.finish_reason == (
        "deadline" if took.new_tokens < 10 or took.latency_ms > limit else reply.finish_reason
    )
    if reply.finish_reason == "deadline" and took.new_tokens > 1:
        assert took.latency_ms + max(steps) > limit, "not stopped while another step would have fitted"


def test_no_prefill_is_started_that_is_predicted_to_miss_the_deadline(
    tiny_dense: Any, processor: Any, dot: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Hands()
    runner = AdaptiveRunner(tiny_dense, processor, policy="native", clock=clock, profile=PREFILL_100)
    asked: dict[str, Any] = {"max_new_tokens": 2, "do_sample": False}
    stop, go = Budget(latency_ms=60, on_deadline="stop"), Budget(on_infeasible="cheapest")
    with taking(tiny_dense, clock, 30.0, [5.0]) as forwards:
        with pytest.raises(InfeasibleBudgetError, match="cheapest, native@1: latency"):
            runner.chat(dot, "?", budget=replace(stop, attainment=0.5), **asked)
        assert forwards == []
        assert runner.chat(dot, "?", budget=stop.merge(go), **asked).measurement.new_tokens == 2
        # Predicted to fit when it was decided, but encoding took too long.
        encode = runner.adapter.encode

        def slow(*args: Any) -> Any:
            clock.advance(250.0)
            return encode(*args)

        runner.use_profile(PREFILL_100)
        forwards.clear()
        monkeypatch.setattr(runner.adapter, "encode", slow)
        late = Budget(latency_ms=300, on_deadline="stop")
        with pytest.raises(InfeasibleBudgetError, match="the prefill at native@1 was not started"):
            runner.chat(dot, "?", budget=late, **asked)
        assert forwards == [] and runner.controller.state()["counts"]["refused"] == 1
        assert runner.chat(dot, "?", budget=late.merge(go), **asked).measurement.new_tokens >= 1
        monkeypatch.undo()
        # The model is as it was: nothing of the refused request is left on it.
        fresh = AdaptiveRunner(tiny_dense, processor, policy="native").chat(dot, "?", **asked)
        assert runner.chat(dot, "?", **asked).text == fresh.text


def test_an_estimate_that_nothing_confirmed_refuses_nothing(tiny_dense: Any, processor: Any, dot: Image.Image) -> None:
    runner = AdaptiveRunner(tiny_dense, processor, policy="native", profile=replace(PREFILL_100, samples=0))
    budget = Budget(latency_ms=1, on_infeasible="refuse")
    assert not runner.chat(dot, "?", budget=budget, max_new_tokens=2).decision.feasible
    with pytest.raises(InfeasibleBudgetError):
        runner.chat(dot, "?", budget=budget, max_new_tokens=2)


def test_out_of_memory_leaves_no_tensor_behind(tiny_dense: Any, processor: Any, dot: Image.Image) -> None:
    """What it leaves of the process's memory: ``tests/long/test_out_of_memory.py``."""

    def tensors() -> int:
        gc.collect()
        return sum(isinstance(found, torch.Tensor) for found in gc.get_objects())

    runner = AdaptiveRunner(tiny_dense, processor, policy="native")
    with starving(runner, dot) as fail:
        fail(50)
        before = tensors()
        fail(200)
        assert tensors() == before
    fresh = AdaptiveRunner(tiny_dense, processor, policy="native")
    for point in (NATIVE, OperatingPoint("gated", 12, 0.5, adapter_rank=8)):
        asked: dict[str, Any] = {"point": point, "max_new_tokens": 8, "do_sample": False}
        assert runner.chat(dot, "?", **asked).text == fresh.chat(dot, "?", **asked).text


def test_the_peak_of_a_try_that_ran_out_is_not_that_of_the_point_that_answered(
    tiny_dense: Any, processor: Any, dot: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    meter, profile = Liar([0.01]), replace(PREFILL_100, memory_margin=1.05)
    runner = AdaptiveRunner(tiny_dense, processor, policy="native", meter=meter, profile=profile)
    runner.chat(dot, "?", max_new_tokens=2)
    before = runner.controller.state()["memory"]
    encode, left = runner.adapter.encode, [1]

    def failing(*args: Any) -> Any:
        if left and left.pop():
            meter.readings = [4.0]  # what the failed try had come to
            raise torch.OutOfMemoryError("CUDA out of memory")
        return encode(*args)

    monkeypatch.setattr(runner.adapter, "encode", failing)
    reply = runner.chat(dot, "?", max_new_tokens=2)
    assert reply.measurement.peak_memory_gb == 4.0 and "stepped down" in reply.decision.reason
    assert runner.controller.state()["memory"] == pytest.approx(before + math.log(MEMORY_HEADROOM))


class Liar:
    """A meter whose every reading is the next of a list, whatever it means."""

    def __init__(self, readings: list[float | None]) -> None:
        self.readings, self.turn = readings, 0
        self.free_of_charge = True

    def start(self) -> None: ...

    def skip(self) -> None: ...

    def free_gb(self) -> float | None:
        self.turn += 1
        return self.readings[self.turn % len(self.readings)]

    stop = free_gb


def test_memory_is_measured_where_that_is_free_or_a_memory_budget_asks_for_it(
    tiny_dense: Any, processor: Any, dot: Image.Image
) -> None:
    for free, budget, expected in ((True, None, 0.5), (False, None, 0.0), (False, Budget(vram_gb=9), 0.5)):
        meter = Liar([0.5])
        meter.free_of_charge = free
        runner = AdaptiveRunner(tiny_dense, processor, policy="native", meter=meter)
        reply = runner.chat(dot, "?", budget=budget, max_new_tokens=2)
        assert reply.measurement.peak_memory_gb == expected
        assert "took encode" in reply.explain() and ("0.500 GiB, " in reply.explain()) == bool(expected)


odd = st.floats(allow_nan=True, allow_infinity=True) | st.sampled_from([0.0, -1.0, 1.0, 1e9])


@settings(max_examples=12, deadline=None)
@given(st.lists(odd, min_size=3, max_size=9), st.lists(odd | st.none(), min_size=1, max_size=4))
def test_clocks_that_jump_and_probes_that_lie_leave_a_finite_state(
    tiny_dense: Any, processor: Any, dot: Image.Image, jumps: list[float], readings: list[float | None]
) -> None:
    turn = [0]

    def clock() -> float:
        turn[0] += 1
        return jumps[turn[0] % len(jumps)]

    runner = AdaptiveRunner(tiny_dense, processor, policy="reference-balanced", clock=clock, meter=Liar(readings))
    for budget in (Budget(latency_ms=50, vram_gb=1), Budget(ttft_ms=5, on_deadline="stop", latency_ms=80)):
        with suppress(InfeasibleBudgetError):
            runner.chat(dot, "?", budget=budget, max_new_tokens=2)
    state = [runner.controller.state(), runner.lengths.state()]
    assert json.loads(json.dumps(state, allow_nan=False)) == state
    honest = AdaptiveRunner(tiny_dense, processor, policy="reference-balanced")
    honest.controller = honest._planner.controller = runner.controller
    assert honest.chat(dot, "?", budget=Budget(latency_ms=60_000), max_new_tokens=2).measurement.new_tokens >= 1


def test_a_frame_rate_is_applied_and_counted_and_times_stay_right(tiny_dense: Any, processor: Any, clip: Video) -> None:
    runner = AdaptiveRunner(tiny_dense, processor, policy="native")
    seen: list[Any] = []
    prepare = runner.adapter.prepare
    runner.adapter.prepare = lambda messages, point: seen.append(prepare(messages, point)) or seen[-1]  # type: ignore[func-returns-value,method-assign]
    few = OperatingPoint(max_fps=1.0)
    for point in (NATIVE, few):
        reply = runner.chat(clip, "What happens?", point=point, max_new_tokens=2)
        assert reply.measurement.patches == sum(runner.work(clip, "What happens?", point, 2).patches)
    (all_, half), count = [int(inputs["video_grid_thw"][0, 0]) for inputs in seen], len(clip.frames)
    assert (all_, half) == (-(-count // 2), -(-max(2, int(clip.duration_s)) // 2)) and half < all_
    kept = clip.at_most(1.0)
    pairs = [kept.timestamps_s[i : i + 2] for i in range(0, len(kept.frames), 2)]
    text = processor.tokenizer.decode(seen[1]["input_ids"][0])
    for pair in pairs:
        assert f"<{sum(pair) / len(pair):.1f} seconds>" in text


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 40), st.floats(0.1, 60), st.none() | st.floats(0.05, 120))
def test_thinned_clips_keep_their_ends_and_their_times(count: int, duration: float, fps: float | None) -> None:
    frames = np.zeros((count, 2, 2, 3), np.uint8)
    frames[:, 0, 0, 0] = np.arange(count)
    clip = Video(frames, tuple(duration * i / count for i in range(count)), duration, count)
    few = clip.at_most(fps)
    numbers = few.frames[:, 0, 0, 0].tolist()
    assert numbers[0] == 0 and numbers[-1] == count - 1 and numbers == sorted(set(numbers))
    assert few.timestamps_s == tuple(clip.timestamps_s[i] for i in numbers) and few.duration_s == duration
    assert fps is None or len(numbers) == 2 or few.fps <= fps * (1 + 1e-5) + 1e-6
    assert few.at_most(fps) is few


def test_a_clip_in_which_nothing_changes_gets_few_frames(tiny_dense: Any, processor: Any, clip: Video) -> None:
    runner = AdaptiveRunner(tiny_dense, processor, policy="reference-quality", escalate=False)
    times = tuple(i / 2 for i in range(12))
    still = Video(np.repeat(clip.frames[:1], 12, axis=0), times, 6.0, 12)
    moving = Video(clip.frames[np.arange(12) % len(clip.frames)], times, 6.0, 12)
    assert runner.decide(moving, "What happens?").point.max_fps is None
    decided = runner.decide(still, "What happens?")
    assert decided.point.max_fps == STILL_FPS and decided.lane == "video"
    reply = runner.chat(still, "What happens?", max_new_tokens=2)
    assert reply.measurement.patches < sum(runner.work(still, "?", replace(decided.point, max_fps=None), 2).patches)
