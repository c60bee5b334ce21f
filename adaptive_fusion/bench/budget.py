"""How well budgets hold on a real model: times measured point by point, traces replayed over them, a part run for real.

A model cannot run thousands of requests on six traces in minutes. So every (question, operating point) is run several
times through the runner, calm and beside processes that keep all cores busy; traces of any length then draw these
measured times, scaled by the load of the moment. A shorter part is run for real, with delays injected into the model
and with those processes, and compared with the replay of the same requests: that says how far to trust the rest.

Knows runners, questions and traces. Must not know how rows choose or how tables are drawn.
"""

import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from adaptive_fusion.bench.baselines import FED, Ours, compare, run, tuned_setpoint
from adaptive_fusion.bench.traces import (
    HOG,
    STEP,
    TRACES,
    Array,
    Case,
    Flags,
    Trace,
    Whole,
    World,
    build,
    make_trace,
    oracle,
    score,
    shortfalls,
)
from adaptive_fusion.budget import MAX_VRAM_GB, Budget
from adaptive_fusion.control.candidates import Candidate
from adaptive_fusion.decisions import Measurement
from adaptive_fusion.errors import ConfigError
from adaptive_fusion.evaluation.questions import Question
from adaptive_fusion.learning.labelling.labeller import RunnerModel
from adaptive_fusion.point import NATIVE, OperatingPoint
from adaptive_fusion.policy.rungs import Rung
from adaptive_fusion.progress import Progress, Steps, silent
from adaptive_fusion.runner import AdaptiveRunner

ANSWER_TOKENS = 160
_SPIN_S = 0.001
_HOG = """
import os
parent = os.getppid()
while os.getppid() == parent:
    for _ in range(1_000_000):
        pass
"""


@dataclass(frozen=True)
class Table:
    """What was measured: milliseconds to the first token ``[cases, columns, repeats]`` calm and (``busy``) beside other
    processes, peak GiB and answer quality ``[cases, columns]``; infinite, or 0 for quality, beyond a case's ladder.
    """

    cases: tuple[Case, ...]
    calm: Array
    busy: Array | None
    memory: Array
    answered: Array

    @property
    def hogged(self) -> float | None:
        """The median factor that other processes put on a time; None if not measured."""
        if self.busy is None:
            return None
        real = np.isfinite(self.calm[:, :, 0])
        return float(np.median(np.median(self.busy, 2)[real] / np.median(self.calm, 2)[real]))

    @property
    def default_deadline_ms(self) -> float:
        """Native's median time to the first token over the cases: half of them need more than native would get."""
        return float(np.median(self.calm[:, 0]))


@contextmanager
def cpu_hogs(count: int) -> Iterator[None]:
    """Processes that do nothing but keep `count` cores busy; they end with this one, whatever becomes of it."""
    with ExitStack() as stack:
        for _ in range(count):
            hog = subprocess.Popen([sys.executable, "-S", "-c", _HOG])
            stack.callback(hog.wait)
            stack.callback(hog.kill)
        yield


class Delay:
    """Stretches by `factor` what a runner's model does: preprocessing, encoding and every forward.

    A context manager; afterwards model and adapter are as they were. It sleeps, and spins for the last millisecond.
    """

    def __init__(self, runner: AdaptiveRunner) -> None:
        self.runner, self.factor = runner, 1.0
        self._began = 0.0
        self._stack = ExitStack()

    def _wait(self, began: float) -> None:
        until = began + (time.perf_counter() - began) * self.factor
        if self.factor > 1.0:
            time.sleep(max(0.0, until - time.perf_counter() - _SPIN_S))
            while time.perf_counter() < until:
                pass

    def _stretched(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def slow(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            result = call(*args, **kwargs)
            self._wait(began)
            return result

        return slow

    def _before(self, *_: Any) -> None:
        self._began = time.perf_counter()

    def _after(self, *_: Any) -> None:
        self._wait(self._began)

    def __enter__(self) -> "Delay":
        adapter, model = self.runner.adapter, self.runner.model
        for name in ("prepare", "encode"):
            setattr(adapter, name, self._stretched(getattr(adapter, name)))
            self._stack.callback(delattr, adapter, name)
        self._stack.callback(model.register_forward_pre_hook(self._before).remove)
        self._stack.callback(model.register_forward_hook(self._after).remove)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


def measure_table(
    runner: AdaptiveRunner,
    items: Sequence[Question],
    *,
    repeats: int = 3,
    hogs: int = 0,
    progress: Progress = silent,
) -> Table:
    """Run every question at native and at each point of its lane, `repeats` times calm and, with `hogs`, as often
    beside that many busy processes.

    Peak memory (once) and times are those of requests that run alone and stop at the second token; they are measured
    apart, because measuring memory takes time on the CPU. Points take turns, so that a slow minute of the machine falls
    on all of them. Before that every question is answered in full, at all its points in one batch, for the quality of
    the answers.

    Args:
        progress: See `Progress`; a step is an answer or a request.

    Raises:
        ConfigError: For a question whose answers have no quality, or a number of repeats below 1.
    """
    if repeats < 1:
        raise ConfigError(f"repeats is {repeats!r}; expected at least 1")
    offers = [runner.offers(item.load(), item.prompt, max_new_tokens=ANSWER_TOKENS) for item in items]
    points = [[NATIVE, *(candidate.point for candidate in found)] for _, found in offers]
    jobs = [(case, column) for case, row in enumerate(points) for column in range(len(row))]
    steps = Steps(progress, "measure", len(jobs) * (2 + repeats * (2 if hogs else 1)))
    shape = (len(items), max(map(len, points)))
    calm, busy = np.full((*shape, repeats), math.inf), np.full((*shape, repeats), math.inf)
    memory, answered = np.full(shape, math.inf), np.zeros(shape)

    def ask(case: int, column: int, budget: Budget | None = None) -> Measurement:
        item, point = items[case], points[case][column]
        reply = runner.chat(item.load(), item.prompt, point=point, budget=budget, max_new_tokens=2, do_sample=False)
        steps.advance()
        return reply.measurement

    measured = Budget(vram_gb=MAX_VRAM_GB)  # never reached; without one the peak may go unmeasured
    for case, column in jobs:
        memory[case, column] = ask(case, column, measured).peak_memory_gb
    model = RunnerModel(runner, max_new_tokens=ANSWER_TOKENS)
    for case, item in enumerate(items):
        for column, worth in enumerate(_answered(model, item, points[case])):
            answered[case, column] = worth
            steps.advance()
    for turn in range(repeats):
        for case, column in [*jobs[turn % len(jobs) :], *jobs[: turn % len(jobs)]]:
            calm[case, column, turn] = ask(case, column).ttft_ms
    if hogs:
        with cpu_hogs(hogs):
            for turn in range(repeats):
                for case, column in jobs:
                    busy[case, column, turn] = ask(case, column).ttft_ms
    return Table(_cases(items, offers), calm, busy if hogs else None, memory, answered)


def _answered(model: RunnerModel, item: Question, points: Sequence[OperatingPoint]) -> list[float]:
    """What the answers at these points are worth."""
    if item.metric is None:
        raise ConfigError(f"a question of {item.slice} has no metric; expected questions with one")
    rungs = [Rung(point) for point in points]
    found = model.answers(item, rungs)
    return [float(item.score(found[rung.name][0]) or 0.0) for rung in rungs]


def _cases(items: Sequence[Question], offers: Sequence[tuple[str, list[Candidate]]]) -> tuple[Case, ...]:
    works = [max(c.predicted.encode_ms for c in found) for _, found in offers]
    usual = median(works)
    return tuple(
        Case(lane, tuple(found), item.slice == "simple", work / usual)
        for item, (lane, found), work in zip(items, offers, works, strict=True)
    )


def measured_world(table: Table, deadline_ms: float, memory_margin: float) -> World:
    """Requests like those of the table, half of them simple if its questions are; all points of a request are drawn
    from one round of measuring, times and memory as they were.
    """
    width = table.calm.shape[1]
    quality = np.full((len(table.cases), width), -1.0)
    for row, case in zip(quality, table.cases, strict=True):
        row[: 1 + len(case.candidates)] = [1.0, *(candidate.quality for candidate in case.candidates)]
    middle = np.median(table.calm[:, 1:], 2)

    def draw(case: Whole, beside: Flags, rng: np.random.Generator) -> tuple[Array, Array]:
        turn = rng.integers(0, table.calm.shape[2], len(case))
        times = table.calm[case, :, turn]
        if table.busy is not None and beside.any():
            times = np.where(beside[:, None], table.busy[case, :, turn], times)
        return times, table.memory[case]

    return World(
        cases=table.cases,
        quality=quality,
        limit="ttft_ms",
        deadline_ms=deadline_ms,
        squeeze_gb=_squeeze(table),
        memory_margin=memory_margin,
        draw=draw,
        cheapest=middle.argmin(1) + 1,
        hogged=table.hogged,
        answered=table.answered,
    )


def _squeeze(table: Table) -> float:
    """Half way between the largest need of any case's most frugal point and that of its hungriest."""
    frugal = max(
        float(row[1 : 1 + len(case.candidates)].min()) for row, case in zip(table.memory, table.cases, strict=True)
    )
    return (frugal + float(table.memory[np.isfinite(table.memory)].max())) / 2


def replay(
    world: World,
    attainment: float,
    n: int,
    *,
    seed: int = 0,
    trace: Callable[[World], Trace] | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Every row on every trace of this world, n requests each (or on `trace` alone), as plain values.

    A step of `progress` is a row of a trace.
    """
    setpoint = tuned_setpoint(world, attainment, seed)
    names = TRACES if world.hogged is None else (*TRACES, HOG)
    traces = [trace(world)] if trace is not None else [build(name, world, n, seed) for name in names]
    steps = Steps(progress, "replay", FED * len(traces))
    results = {each.name: compare(each, attainment, setpoint, steps) for each in traces}
    least = min(len(each.load) for each in traces)
    return {
        "attainment": attainment,
        "limit": world.limit,
        "deadline_ms": world.deadline_ms,
        "requests": least,
        "cases": len(world.cases),
        "hog_factor": world.hogged,
        "squeeze_gb": world.squeeze_gb,
        "pid_setpoint": setpoint,
        "shortfalls": shortfalls(results, attainment, least),
        "traces": results,
    }


class _Live:
    """A row that really asks: the runner decides and runs; what it chose and took is kept."""

    def __init__(
        self, runner: AdaptiveRunner, items: Sequence[Question], budget: Budget, columns: list[dict[str, int]]
    ) -> None:
        self.runner, self.items, self.budget, self.columns = runner, items, budget, columns
        self.index: list[int] = []
        self.ttft_ms: list[float] = []
        self.decision_ms: list[float] = []

    def ask(self, case: int) -> None:
        item = self.items[case]
        reply = self.runner.chat(
            item.load(), item.prompt, budget=self.budget, max_new_tokens=2, do_sample=False
        )  # fmt: skip
        self.index.append(self.columns[case].get(reply.decision.rung, 0))
        self.ttft_ms.append(reply.measurement.ttft_ms)
        self.decision_ms.append(reply.decision.elapsed_ms)


def run_real(
    runner: AdaptiveRunner,
    items: Sequence[Question],
    world: World,
    attainment: float,
    n: int,
    *,
    hogs: int = 0,
    seed: int = 0,
    progress: Progress = silent,
) -> list[dict[str, Any]]:
    """`n` real requests under a step of load by injected delay, with `hogs` as many again beside busy processes; and
    what the replay makes of the same requests.

    The controller starts anew for each. `ratio` is the median of real / replayed time at the same point, `agreed` the
    share of requests for which both chose the same point. A step of `progress` is a request.

    Raises:
        ConfigError: For fewer than 12 requests.
    """
    if n < 12:
        raise ConfigError(f"the real part has {n!r} requests; expected at least 12")
    on = np.arange(n) * 3 // n == 1
    start, end = int(on.argmax()), int(on.argmax() + on.sum())
    rng = np.random.default_rng([seed, n])
    budget = Budget.from_dict({world.limit: world.deadline_ms, "attainment": attainment})
    columns = [{c.key: i + 1 for i, c in enumerate(case.candidates)} for case in world.cases]
    names = ("step", HOG) if hogs else ("step",)
    steps = Steps(progress, "run", n * len(names))
    checks = []
    for name in names:
        load = np.where(on, STEP if name == "step" else (world.hogged or 1.0), 1.0)
        trace = make_trace(name, world, load, rng, busy=on if name == HOG else None)
        live = _Live(runner, items, budget, columns)
        runner.use_profile(runner.profile, runner.profile_note)
        with Delay(runner) as delay:
            for part in (slice(0, start), slice(start, end), slice(end, n)):
                with cpu_hogs(hogs if name == HOG and on[part].all() else 0):
                    for case, factor in zip(trace.case[part].tolist(), load[part].tolist(), strict=True):
                        delay.factor = 1.0 if name == HOG else factor
                        live.ask(case)
                        steps.advance()
        checks.append(_check(name, trace, live, attainment))
    runner.use_profile(runner.profile, runner.profile_note)
    return checks


def _check(name: str, trace: Trace, live: _Live, attainment: float) -> dict[str, Any]:
    outcome = run(trace, Ours(trace.world, attainment))
    best = oracle(trace)
    index, took = np.array(live.index), np.array(live.ttft_ms)
    replayed = trace.times[np.arange(len(index)), index]
    could = trace.feasible
    missed = could & (took > trace.world.deadline_ms)
    expected = score(trace, outcome, best)
    return {
        "trace": name,
        "requests": len(index),
        "attainment": 1.0 - float(missed.sum()) / max(1, int(could.sum())),
        "attainment_replayed": expected["attainment"],
        "quality": float(trace.quality[np.arange(len(index)), index].mean()),
        "quality_replayed": expected["quality"],
        "ratio": float(np.median(took / replayed)),
        "ratio_loaded": float(np.median((took / replayed)[trace.load > 1.0])) if (trace.load > 1.0).any() else None,
        "agreed": float((index == outcome.index).mean()),
        "before_deciding_ms": median(live.decision_ms),
    }
