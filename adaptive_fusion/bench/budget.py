"""How well budgets hold on a real model: traces replayed over measured times, and a part run for real.

A model cannot run thousands of requests on six traces in minutes. So every (question, operating point) is run several
times through the runner, calm and beside processes that keep all cores busy (`measured`); traces of any length then
draw these measured times, scaled by the load of the moment. A shorter part is run for real, with delays injected into
the model and with those processes, and compared with the replay of the same requests: that says how far to trust the
rest.

Knows runners, questions and traces. Must not know how rows choose or how tables are drawn.
"""

from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import numpy as np

from adaptive_fusion.bench.baselines import FED, Ours, compare, run, tuned_setpoint
from adaptive_fusion.bench.load import Delay, background_load
from adaptive_fusion.bench.outcomes import oracle, score, shortfalls
from adaptive_fusion.bench.traces import BACKGROUND, STEP, TRACES, Trace, World, build, make_trace
from adaptive_fusion.budget import Budget
from adaptive_fusion.errors import ConfigError
from adaptive_fusion.evaluation.questions import Question
from adaptive_fusion.progress import Progress, Steps, silent
from adaptive_fusion.runner import AdaptiveRunner


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
    names = TRACES if world.slowdown is None else (*TRACES, BACKGROUND)
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
        "hog_factor": world.slowdown,
        "squeeze_gb": world.squeeze_gb,
        "pid_setpoint": setpoint,
        "shortfalls": shortfalls(results, attainment, least),
        "traces": results,
    }


class _Live:
    """A row that really asks: the runner decides and runs; what it chose and took is kept."""

    def __init__(
        self, runner: AdaptiveRunner, questions: Sequence[Question], budget: Budget, columns: list[dict[str, int]]
    ) -> None:
        self.runner, self.questions, self.budget, self.columns = runner, questions, budget, columns
        self.index: list[int] = []
        self.ttft_ms: list[float] = []
        self.decision_ms: list[float] = []

    def ask(self, case: int) -> None:
        question = self.questions[case]
        reply = self.runner.chat(
            question.load(), question.prompt, budget=self.budget, max_new_tokens=2, do_sample=False
        )  # fmt: skip
        self.index.append(self.columns[case].get(reply.decision.rung, 0))
        self.ttft_ms.append(reply.measurement.ttft_ms)
        self.decision_ms.append(reply.decision.elapsed_ms)


def run_real(
    runner: AdaptiveRunner,
    questions: Sequence[Question],
    world: World,
    attainment: float,
    n: int,
    *,
    background: int = 0,
    seed: int = 0,
    progress: Progress = silent,
) -> list[dict[str, Any]]:
    """`n` real requests under a step of load by injected delay, as many again beside `background` busy processes if
    there are to be any, and what the replay makes of the same requests.

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
    names = ("step", BACKGROUND) if background else ("step",)
    steps = Steps(progress, "run", n * len(names))
    checks = []
    for name in names:
        load = np.where(on, STEP if name == "step" else (world.slowdown or 1.0), 1.0)
        trace = make_trace(name, world, load, rng, busy=on if name == BACKGROUND else None)
        live = _Live(runner, questions, budget, columns)
        runner.use_profile(runner.profile, runner.profile_note)
        with Delay(runner) as delay:
            for part in (slice(0, start), slice(start, end), slice(end, n)):
                with background_load(background if name == BACKGROUND and on[part].all() else 0):
                    for case, factor in zip(trace.case[part].tolist(), load[part].tolist(), strict=True):
                        delay.factor = 1.0 if name == BACKGROUND else factor
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
