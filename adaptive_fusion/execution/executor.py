"""The execution of one decided request: run it until the deadline, measure it, and step down when memory runs out.

Knows timed passes, a meter and the controller that learns from what a request took. Must not know of media, prompts,
texts, policies or logs: `runner` makes tasks of requests and answers of runs.
"""

import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from adaptive_fusion.budget import Budget
from adaptive_fusion.control.candidates import Candidate, Choice, Second
from adaptive_fusion.control.controller import Controller
from adaptive_fusion.control.escalating import NO_SECOND
from adaptive_fusion.decisions import Decision, Measurement
from adaptive_fusion.errors import InfeasibleBudgetError, OutOfMemoryError
from adaptive_fusion.execution.escalation import FirstLook, Unsure
from adaptive_fusion.execution.meters import Meter
from adaptive_fusion.execution.oom import run_with_step_down
from adaptive_fusion.execution.timed import Encoding, Pass, TimedModel
from adaptive_fusion.models import Adapter
from adaptive_fusion.point import MIN_PIXELS, OperatingPoint

Prepare = Callable[[OperatingPoint], Mapping[str, Any]]
"""Gives the processor's tensors within a point's pixel budget, on the model's device."""
Predict = Callable[[OperatingPoint], Candidate]
"""What another point than the decided one would have been expected to take."""


@dataclass(frozen=True)
class Task:
    """A decided request.

    Attributes:
        decision: What was decided, for the log.
        choice: The same for the controller.
        arrived: On the executor's clock, in seconds.
        prepare: Gives the inputs at a point.
        options: Gives ``generate``'s arguments beside the inputs, for the ``input_ids`` that the model sees.
        whole: Whether the prompt must keep every token, so that there is nothing to step down to.
        cancelled: Set by whoever gives the request up.
    """

    decision: Decision
    choice: Choice
    arrived: float
    prepare: Prepare
    options: Callable[[Tensor], Mapping[str, Any]]
    whole: bool = False
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

    @property
    def output(self) -> Any:
        """What ``generate`` returned, if it was asked for more than tokens."""
        return None if isinstance(self.sequences, Tensor) else self.sequences

    @property
    def new_tokens(self) -> Tensor:
        """The first row's new tokens ``[n]``."""
        whole = self.sequences if isinstance(self.sequences, Tensor) else self.sequences.sequences
        found: Tensor = whole[0, self.reduced_length :]
        return found


class Executor:
    """Runs tasks on one model, one at a time: the caller holds the model's lock.

    Args:
        adapter: The way to the model.
        meter: Measures the peak of a request; where that costs time, only requests with a memory budget are measured.
        clock: Seconds, monotonic.
    """

    def __init__(self, adapter: Adapter, meter: Meter, clock: Callable[[], float]) -> None:
        self.adapter, self.meter = adapter, meter
        self.timed = TimedModel(adapter, clock)
        self.spare: Callable[[], None] = lambda: None
        """Called where memory has run out: gives up what is kept for later requests."""

    def run(self, task: Task, controller: Controller, predict: Predict) -> Run:
        """Run the decided point and let the controller learn from what it took.

        Where the choice has a second pass, that one runs after the prefill of the first if the model is not sure.

        Out of memory steps down to cheaper points, at most three tries in all. With a hard deadline and
        ``on_infeasible="refuse"`` no prefill is started whose first token is predicted to come after the deadline.

        Raises:
            InfeasibleBudgetError: If the prefill was not started for that reason.
            OutOfMemoryError: If every try ran out of memory.
        """
        tries = Tries(self.timed, task, controller, predict)
        measured = self._begin_measuring(task.choice.budget)
        peak = None
        steps = [tries.used] if task.whole else self._steps_down(tries.used)
        try:
            done = self._first_or_second(tries, steps)
        except InfeasibleBudgetError:
            controller.refused(task.choice)
            raise
        finally:
            if measured:
                peak = self.meter.stop()
        measurement = tries.shown(done.measurement(task.arrived, peak))
        tries.learn(measurement, done.timer.stopped_by)
        return Run(tries.decision(), measurement, done.result, done.encoding.length, done.timer.stopped_by)

    def _first_or_second(self, tries: "Tries", steps: list[OperatingPoint]) -> Pass:
        """The pass that answers. Nothing of the first is alive any more when the second begins."""
        run = partial(run_with_step_down, tries.attempt, on_oom=tries.out_of_memory, release=self.release)
        try:
            return run(steps)
        except Unsure:
            better = tries.go_on()
        return run(self._steps_down(better))

    def untouched(
        self,
        decision: Decision,
        inputs: Mapping[str, Any],
        options: Mapping[str, Any],
        arrived: float,
        limits: Budget,
    ) -> Run:
        """Give a call to the model as it is; a hard deadline still ends it. Nothing is predicted for it and nothing is
        learned from it: a cache, embeddings or a loop of the caller's own cost what no shape tells."""
        measured, peak = self._begin_measuring(limits), None
        try:
            done = self.timed.generate(self.timed.as_given(inputs), options, deadline_s=deadline_s(limits, arrived))
        finally:
            if measured:
                peak = self.meter.stop()
        measurement = done.measurement(arrived, peak)
        return Run(decision, measurement, done.result, done.encoding.length, done.timer.stopped_by)

    def warm_up(self, points: Iterable[OperatingPoint], prepare: Prepare, **options: Any) -> None:
        """Prepare, encode and generate two tokens at each point, with the meter running as in a measured request.
        `options` are of ``generate``, and such as every request will have.

        Nothing learns from it, and random numbers come as if it had not been. A point that runs out of memory is
        passed over: a request that takes it finds out for itself.
        """

        def attempt(point: OperatingPoint) -> None:
            encoding = self.timed.encode(partial(prepare, point), point)
            self.timed.generate(encoding, {**options, "min_new_tokens": 2, "max_new_tokens": 2})

        device = self.adapter.device
        self.meter.start()
        try:
            with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
                for point in points:
                    with suppress(OutOfMemoryError):
                        run_with_step_down(attempt, [point], release=release)
        finally:
            self.meter.stop()

    def release(self) -> None:
        """Give up what is kept for later requests, and memory that is cached on the device."""
        self.spare()
        release()

    def _begin_measuring(self, budget: Budget) -> bool:
        """Start the meter where it is free of charge or memory is limited; whether it was started."""
        if self.meter.free_of_charge or budget.vram_gb is not None:
            self.meter.start()
            return True
        self.meter.skip()
        return False

    def _steps_down(self, point: OperatingPoint) -> list[OperatingPoint]:
        """`point` and two cheaper ones: half the token grid's side, then a quarter with a quarter of the pixels."""
        ladder = [point]
        for ratio, share in ((0.5, 2), (0.25, 4)):
            pixels = max(MIN_PIXELS, point.max_pixels // share) if point.max_pixels else None
            cheaper, _ = self.adapter.restrict(
                replace(point, downsample=min(point.downsample, ratio), max_pixels=pixels)
            )
            if cheaper != ladder[-1]:
                ladder.append(cheaper)
        return ladder


class Tries:
    """The tries of one task: which point runs, what failed ones and a first pass took, and what the controller hears
    of it."""

    def __init__(self, timed: TimedModel, task: Task, controller: Controller, predict: Predict) -> None:
        self.timed, self.task, self.controller, self._predict = timed, task, controller, predict
        self.used = task.decision.point
        self.lost_ms = self.held_ms = self.first_ms = 0.0
        self.ran_out = False
        self.second = task.choice.candidate.second
        self.look: FirstLook | None = None
        self._planned = task.choice.candidate

    def attempt(self, point: OperatingPoint) -> Pass:
        """Prepare, encode and generate at `point`.

        Raises:
            Unsure: If the model is not sure of its answer and there is time for the better plan.
        """
        task, look = self.task, self._look(point)
        encoding, options = self.encoded(point)
        deadline = deadline_s(task.choice.budget, task.arrived)
        generate = partial(self.timed.generate, encoding, deadline_s=deadline, cancelled=task.cancelled)
        if look is None:
            return generate(options)
        done: Pass = look.run(self.timed.adapter.model, options, generate)
        if look.k > 1 and look.decided_s is not None:
            # Nothing was shown before the verdict.
            self.held_ms = max(0.0, look.decided_s - done.first_s) * 1e3
        return done

    def encoded(self, point: OperatingPoint) -> tuple[Encoding, Mapping[str, Any]]:
        """The request prepared and encoded at `point`, and ``generate``'s options for it.

        Raises:
            InfeasibleBudgetError: If its first token would come too late for a budget that refuses then.
        """
        self.used = point
        encoding = self.timed.encode(partial(self.task.prepare, point), point)
        self._refuse_if_late(encoding, deadline_s(self.task.choice.budget, self.task.arrived))
        return encoding, self.task.options(encoding.encoded.inputs["input_ids"])

    def _look(self, point: OperatingPoint) -> FirstLook | None:
        """A look at the pass that is about to begin, if it is the first and another may follow."""
        second = self.second
        if second is None or self.look is not None or point != self.task.choice.point:
            return None
        too_late, timed = partial(self._too_late, second), self.timed
        self.look = FirstLook(second.k, second.threshold, too_late, timed.clock)
        return self.look

    def go_on(self) -> OperatingPoint:
        """The first pass was given up: the point of the better plan."""
        assert self.second is not None and self.look is not None and self.look.decided_s is not None
        ended = self.look.decided_s
        self.first_ms = (ended - self.task.arrived) * 1e3 - self.task.choice.elapsed_ms - self.lost_ms
        self._looked_at(escalated=True)
        self.lost_ms = (ended - self.task.arrived) * 1e3 - self.task.choice.elapsed_ms
        self._planned = self.second.candidate
        return self._planned.point

    def shown(self, measurement: Measurement) -> Measurement:
        """`measurement` with the time at which the first token could be shown."""
        return replace(measurement, ttft_ms=measurement.ttft_ms + self.held_ms) if self.held_ms else measurement

    def _too_late(self, second: Second) -> str:
        """Why the better plan must not be begun any more."""
        if self.task.cancelled is not None and self.task.cancelled.is_set():
            return "the request was cancelled"
        elapsed = (self.timed.clock() - self.task.arrived) * 1e3
        return self.controller.too_late_for(second.candidate, self.task.choice.budget, elapsed)

    def _looked_at(self, *, escalated: bool) -> None:
        look = self.look
        if look is not None and look.first_s is not None:
            first = (look.first_s - self.task.arrived) * 1e3 - self.task.choice.elapsed_ms - self.lost_ms
            self.controller.looked_at(self.task.choice, first, escalated=escalated)

    def out_of_memory(self, _point: OperatingPoint, _said: str) -> None:
        """A try ran out of memory."""
        self.ran_out = True
        choice = self.task.choice
        elapsed = (self.timed.clock() - self.task.arrived) * 1e3
        self.controller.miss(choice, elapsed, kind="oom", ran=self._ran(), lost_ms=self.lost_ms)
        self.lost_ms = elapsed - choice.elapsed_ms

    def learn(self, measurement: Measurement, stopped_by: str | None) -> None:
        """The last try came to its end, by itself or stopped."""
        choice, ran = self.task.choice, self._ran()
        expected = ran or choice.candidate
        if measurement.visual_tokens and not measurement.patches and not expected.encoded:
            # The pass before it has left what the encoder makes, so its time says nothing of what was predicted.
            ran = replace(self._predict(self.used), key=expected.key)
        if self.look is not None and self.look.escalated is False:
            self._looked_at(escalated=False)
        if self.ran_out:  # the peak is that of the try that did, of which the controller has heard
            measurement = replace(measurement, peak_memory_gb=0.0)
        if stopped_by is None:
            self.controller.update(choice, measurement, ran=ran, lost_ms=self.lost_ms, held_ms=self.held_ms)
        else:
            kind = "cancelled" if stopped_by == "cancelled" else "timeout"
            self.controller.miss(choice, measurement.latency_ms, kind=kind, ran=ran, lost_ms=self.lost_ms)

    def decision(self) -> Decision:
        """The decision with the point that really ran, and what came of a look at the first."""
        decided = self._with_look(self.task.decision)
        if self.used == self._planned.point:
            return decided
        reason = f"{decided.reason}; stepped down after running out of memory"
        return replace(decided, point=self.used, reason=reason)

    def _with_look(self, decided: Decision) -> Decision:
        look, planned = self.look, dict(decided.escalation)
        if look is None:
            return decided
        if look.escalated is None:
            reason = f"{decided.reason}; {NO_SECOND}{look.why}"
            return replace(decided, reason=reason, escalation={**planned, "why": look.why})
        seen = {**planned, "entropy": look.entropy}
        if not look.escalated:
            return replace(decided, escalated=False, escalation=seen)
        second, first = self._planned, self.task.choice.candidate
        return replace(
            decided,
            escalated=True,
            escalation={**seen, "first_rung": first.key, "first_ms": self.first_ms},
            point=second.point,
            rung=second.key,
            predicted=second.predicted,
            reason=f"{decided.reason}; went on to {second.key}: entropy {look.entropy:.3g}, above {look.threshold:.3g}",
        )

    def _ran(self) -> Candidate | None:
        """The candidate that ran, if it is not the chosen one."""
        if self.used == self.task.choice.point:
            return None
        return self._planned if self.used == self._planned.point else self._predict(self.used)

    def _refuse_if_late(self, encoding: Encoding, deadline: float | None) -> None:
        """Raise InfeasibleBudgetError where the first token is predicted to come after the deadline, if the budget
        asks for it."""
        if deadline is None or self.task.choice.budget.on_infeasible != "refuse":
            return
        candidate = self._ran() or self.task.choice.candidate
        prefill_ms = candidate.predicted.prefill_ms * self.controller.slowdown(candidate.drift_key)
        left_ms = (deadline - encoding.ended_s) * 1e3
        if prefill_ms > max(left_ms, 0.0):
            raise InfeasibleBudgetError(
                f"the prefill at {self.used.name} was not started: predicted to take {prefill_ms:.0f} ms, with "
                f"{left_ms:.0f} ms left to the deadline"
            )


def deadline_s(budget: Budget, arrived: float) -> float | None:
    """When, on the clock, the answer is cut off; None if it is not."""
    if budget.latency_ms is None or budget.on_deadline != "stop":
        return None
    return arrived + budget.latency_ms / 1e3


def release() -> None:
    """Give memory that is cached on the device back."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
