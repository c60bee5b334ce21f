"""The execution of one decided request: prepare, encode, generate until the deadline, measure, and step down when
memory runs out.

Knows an adapter, a meter, a clock and the planner that learns from what a request took. Must not know of media,
prompts, texts, policies or logs: `runner` makes tasks of requests and answers of runs.
"""

import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteriaList

from adaptive_fusion.choice import Candidate, Choice
from adaptive_fusion.decisions import Decision, Measurement
from adaptive_fusion.errors import InfeasibleBudgetError
from adaptive_fusion.meters import Meter
from adaptive_fusion.models import Adapter
from adaptive_fusion.oom import OutOfMemoryError, run_with_step_down
from adaptive_fusion.planner import Ask, Planner
from adaptive_fusion.point import OperatingPoint
from adaptive_fusion.timing import GenerationClock, synchronize


@dataclass(frozen=True)
class Task:
    """A decided request: how a point's inputs are prepared, and what goes to ``generate``.

    `arrived` is on the executor's clock; `given` names the entries of `extra` that `prepare` gives already.
    """

    ask: Ask
    decision: Decision
    choice: Choice
    arrived: float
    prepare: Callable[[OperatingPoint], dict[str, Any]]
    extra: dict[str, Any]
    given: frozenset[str] = frozenset()
    cancelled: threading.Event | None = None


@dataclass(frozen=True)
class Run:
    """What came of a task: the decision with the point that really ran, what it took, and ``generate``'s result.

    `reduced_length` is the length of the prompt that the model saw; `stopped_by` is ``deadline``, ``cancelled`` or
    None.
    """

    decision: Decision
    measurement: Measurement
    sequences: Any
    reduced_length: int
    stopped_by: str | None


@dataclass
class _Try:
    """One try's result; times in seconds on the clock."""

    sequences: Any
    reduced_length: int
    visual_tokens: int
    patches: int
    began: float
    encoded: float
    clock: GenerationClock
    ended: float


class Executor:
    """Runs tasks on one model, one at a time: the caller holds the model's lock.

    Args:
        adapter: The way to the model.
        meter: Measures the peak of a request; where that costs time, only requests with a memory budget are measured.
        clock: Seconds, monotonic.
    """

    def __init__(self, adapter: Adapter, meter: Meter, clock: Callable[[], float]) -> None:
        self.adapter, self.meter, self._clock = adapter, meter, clock

    def run(self, task: Task, planner: Planner) -> Run:
        """Run the decided point and let the planner's controller learn from what it took.

        Out of memory steps down to cheaper points, at most three tries in all. With a hard deadline and
        ``on_infeasible="refuse"`` no prefill is started whose first token is predicted to come after the deadline.

        Raises:
            InfeasibleBudgetError: If the prefill was not started for that reason.
            OutOfMemoryError: If every try ran out of memory.
        """
        choice, budget, controller = task.choice, task.choice.budget, planner.controller
        used, lost_ms = task.decision.point, 0.0
        deadline = None
        if budget.latency_ms is not None and budget.on_deadline == "stop":
            deadline = task.arrived + budget.latency_ms / 1e3

        def ran() -> Candidate | None:
            return None if used == choice.point else planner.candidate(used, 0.0, task.ask)

        def attempt(point: OperatingPoint) -> _Try:
            nonlocal used
            used = point
            ready = partial(synchronize, self.adapter.model.device)
            clock = GenerationClock(self._clock, deadline, task.cancelled, ready)
            prefill_ms = 0.0
            if budget.on_infeasible == "refuse":
                candidate = ran() or choice.candidate
                prefill_ms = candidate.predicted.prefill_ms * controller.slowdown(candidate.key)
            return self._once(point, task, clock, deadline, prefill_ms)

        def out_of_memory(_point: OperatingPoint, _said: str) -> None:
            nonlocal lost_ms
            elapsed = (self._clock() - task.arrived) * 1e3
            controller.miss(choice, elapsed, kind="oom", ran=ran(), lost_ms=lost_ms)
            lost_ms = elapsed - choice.elapsed_ms

        measured = self.meter.free_of_charge or budget.vram_gb is not None
        peak = None
        if measured:
            self.meter.start()
        else:
            self.meter.skip()
        try:
            done = run_with_step_down(attempt, self._steps_down(used), on_oom=out_of_memory, release=_release)
        except InfeasibleBudgetError:
            controller.refused(choice)
            raise
        finally:
            if measured:
                peak = self.meter.stop()
        decision = task.decision
        if used != decision.point:
            reason = f"{decision.reason}; stepped down after running out of memory"
            decision = replace(decision, point=used, reason=reason)
        measurement = _measurement(done, task.arrived, peak)
        if done.clock.stopped_by is not None:
            kind = "cancelled" if done.clock.stopped_by == "cancelled" else "timeout"
            controller.miss(choice, measurement.latency_ms, kind=kind, ran=ran(), lost_ms=lost_ms)
        else:
            controller.update(choice, measurement, ran=ran(), lost_ms=lost_ms)
        return Run(decision, measurement, done.sequences, done.reduced_length, done.clock.stopped_by)

    def warm_up(self, points: Iterable[OperatingPoint], prepare: Callable[[OperatingPoint], dict[str, Any]]) -> None:
        """Prepare, encode and generate two tokens at each point, with the meter running as in a measured request.

        Nothing learns from it, and random numbers come as if it had not been. A point that runs out of memory is
        passed over: a request that takes it finds out for itself.
        """
        model = self.adapter.model

        def attempt(point: OperatingPoint) -> None:
            with torch.no_grad():
                encoded = self.adapter.encode(prepare(point), point)
                model.generate(**encoded.inputs, min_new_tokens=2, max_new_tokens=2)

        device = torch.device(model.device)
        self.meter.start()
        try:
            with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
                for point in points:
                    with suppress(OutOfMemoryError):
                        run_with_step_down(attempt, [point], release=_release)
        finally:
            self.meter.stop()

    def _once(
        self, point: OperatingPoint, task: Task, clock: GenerationClock, deadline: float | None, prefill_ms: float
    ) -> _Try:
        inputs = task.prepare(point)
        began = self._clock()
        with torch.no_grad():
            encoded = self.adapter.encode(inputs, point)
            synchronize(self.adapter.model.device)
            ended = self._clock()
            if deadline is not None and prefill_ms > 0.0 and ended + prefill_ms / 1e3 > deadline:
                raise InfeasibleBudgetError(
                    f"the prefill at {point.name} was not started: predicted to take {prefill_ms:.0f} ms, with "
                    f"{(deadline - ended) * 1e3:.0f} ms left to the deadline"
                )
            extra = {k: v for k, v in task.extra.items() if k not in task.given}
            kwargs = {**extra, **encoded.inputs}
            criteria = StoppingCriteriaList([*(task.extra.get("stopping_criteria") or []), clock])
            sequences = self.adapter.model.generate(**{**kwargs, "stopping_criteria": criteria})
        length = int(encoded.inputs["input_ids"].shape[1])
        return _Try(sequences, length, encoded.visual_tokens, encoded.patches, began, ended, clock, self._clock())

    def _steps_down(self, point: OperatingPoint) -> list[OperatingPoint]:
        """`point` and two cheaper ones: half the token grid's side, then a quarter with a quarter of the pixels."""
        ladder = [point]
        for ratio, share in ((0.5, 2), (0.25, 4)):
            pixels = max(1024, point.max_pixels // share) if point.max_pixels else None
            cheaper, _ = self.adapter.restrict(
                replace(point, downsample=min(point.downsample, ratio), max_pixels=pixels)
            )
            if cheaper != ladder[-1]:
                ladder.append(cheaper)
        return ladder


def _measurement(done: _Try, arrived: float, peak_gb: float | None) -> Measurement:
    first = done.clock.first_s if done.clock.first_s is not None else done.ended
    sequences = done.sequences if isinstance(done.sequences, Tensor) else done.sequences.sequences
    return Measurement(
        preprocess_ms=(done.began - arrived) * 1e3,
        encode_ms=(done.encoded - done.began) * 1e3,
        prefill_ms=(first - done.encoded) * 1e3,
        decode_ms=(done.ended - first) * 1e3,
        ttft_ms=(first - arrived) * 1e3,
        latency_ms=(done.ended - arrived) * 1e3,
        visual_tokens=done.visual_tokens,
        prompt_tokens=done.reduced_length,
        new_tokens=int(sequences.shape[1] - done.reduced_length),
        patches=done.patches,
        peak_memory_gb=peak_gb if peak_gb is not None else 0.0,
    )


def _release() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
