"""Ways of choosing an operating point per request, fed with a trace: the library's controller, AIMD and PID.

Knows the controller's interface and traces. Must not know of models or of the truth before a request was run.

All rows have the same predictions and start with the same memory envelope. AIMD and PID adapt a share of the deadline
and take the best point predicted to fit in it: additive increase and multiplicative decrease balanced at the target's
miss rate (Chiu and Jain 1989), and simple-pid on time / deadline with the highest setpoint that holds the target on a
stationary trace drawn apart.
"""

import math
import statistics
import time
from abc import ABC, abstractmethod
from typing import Any, Protocol

import numpy as np

from adaptive_fusion.bench.outcomes import Outcome, best_static, native, oracle, score
from adaptive_fusion.bench.traces import AMPLE_GB, Trace, World, build
from adaptive_fusion.budget import Budget
from adaptive_fusion.control.candidates import Candidate
from adaptive_fusion.control.controller import Controller
from adaptive_fusion.decisions import Measurement
from adaptive_fusion.errors import AdaptiveFusionError
from adaptive_fusion.progress import Steps

_SETPOINTS = (0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5, 0.45, 0.4, 0.35)
_TUNING = 4000
FED = 3
"""Rows that a trace is fed through, request by request."""


class Chooser(Protocol):
    """One way of choosing: returns the index of a candidate, then hears what it took.

    `case` says which request it is (an index into the world's cases), `left_ms` is what is left of the deadline,
    `lost_ms` what tries that ran out of memory took.
    """

    def choose(self, case: int, left_ms: float, free_gb: float | None) -> int: ...

    def update(self, index: int, lost_ms: float, took_ms: float, peak_gb: float) -> None: ...

    def out_of_memory(self, index: int, lost_ms: float, took_ms: float) -> None: ...


class Ours:
    """The library's controller, called as a runner calls it."""

    def __init__(self, world: World, attainment: float) -> None:
        self.world = world
        self.controller = Controller(memory_margin=world.memory_margin, clock=lambda: 0.0)
        self.budget = Budget.from_dict({world.limit: world.deadline_ms, "attainment": attainment})
        self.index = [{c.key: i for i, c in enumerate(case.candidates)} for case in world.cases]

    def choose(self, case: int, left_ms: float, free_gb: float | None) -> int:
        self.candidates = self.world.cases[case].candidates
        elapsed = self.world.deadline_ms - left_ms
        self.choice = self.controller.choose(
            self.candidates, self.budget, elapsed_ms=elapsed, free_memory_gb=free_gb
        )  # fmt: skip
        return self.index[case][self.choice.candidate.key]

    def _ran(self, index: int) -> Candidate | None:
        candidate = self.candidates[index]
        return None if candidate is self.choice.candidate else candidate

    def update(self, index: int, lost_ms: float, took_ms: float, peak_gb: float) -> None:
        # A trace knows one of the two times; the other is put where the prediction has it.
        predicted = self.candidates[index].predicted
        to_end = predicted.latency_ms / predicted.ttft_ms
        before = self.choice.elapsed_ms + lost_ms
        first, last = (took_ms, took_ms * to_end) if self.world.limit == "ttft_ms" else (took_ms / to_end, took_ms)
        taken = Measurement(0.0, 0.0, 0.0, 0.0, before + first, before + last, 0, 0, 0, 0, peak_gb)
        self.controller.update(self.choice, taken, ran=self._ran(index), lost_ms=lost_ms)

    def out_of_memory(self, index: int, lost_ms: float, took_ms: float) -> None:
        cut = self.choice.elapsed_ms + lost_ms + took_ms
        self.controller.miss(self.choice, cut, kind="oom", ran=self._ran(index), lost_ms=lost_ms)


class Share(ABC):
    """Base of AIMD and PID: best quality with predicted time within a share of what is left of the deadline."""

    def __init__(self, world: World) -> None:
        self.share = 0.7
        self.envelope = world.memory_margin
        self.left_ms = world.deadline_ms
        first = world.limit == "ttft_ms"
        self.predicted = [
            [
                (c.predicted.ttft_ms if first else c.predicted.latency_ms, c.predicted.peak_memory_gb)
                for c in case.candidates
            ]
            for case in world.cases
        ]

    def choose(self, case: int, left_ms: float, free_gb: float | None) -> int:
        self.left_ms = left_ms
        left, free = self.share * left_ms, (math.inf if free_gb is None else free_gb) / self.envelope
        rows = self.predicted[case]
        for index, (time_ms, memory_gb) in enumerate(rows):
            if time_ms <= left and memory_gb <= free:
                return index
        return min(range(len(rows)), key=lambda i: rows[i])

    def update(self, index: int, lost_ms: float, took_ms: float, peak_gb: float) -> None:
        self.adapt((lost_ms + took_ms) / max(self.left_ms, 1.0))

    def out_of_memory(self, index: int, lost_ms: float, took_ms: float) -> None:
        self.envelope = min(self.envelope * 1.05, 2.0)

    @abstractmethod
    def adapt(self, used: float) -> None:
        """Move the share after a request that used `used` of its time."""


class Aimd(Share):
    """Additive increase, multiplicative decrease, balanced so that a share `1 - attainment` of requests misses."""

    def __init__(self, world: World, attainment: float, decrease: float = 0.75) -> None:
        super().__init__(world)
        self.decrease = decrease
        self.increase = 0.7 * (1 - decrease) * (1 - attainment) / attainment

    def adapt(self, used: float) -> None:
        self.share = max(0.05, self.share * self.decrease) if used > 1 else min(1.5, self.share + self.increase)


class Pid(Share):
    """simple-pid on time / deadline, set below 1 so that the noise fits.

    Raises:
        AdaptiveFusionError: If simple-pid is not installed.
    """

    def __init__(self, world: World, setpoint: float, gains: tuple[float, float, float] = (0.1, 0.1, 0.0)) -> None:
        super().__init__(world)
        self.pid = require_pid()(
            *gains, setpoint=setpoint, sample_time=None, output_limits=(0.05, 1.5), starting_output=0.7
        )

    def adapt(self, used: float) -> None:
        self.share = self.pid(used, dt=1.0)


def require_pid() -> Any:
    """The class ``simple_pid.PID``.

    Raises:
        AdaptiveFusionError: If simple-pid is not installed.
    """
    try:
        from simple_pid import PID
    except ImportError:
        raise AdaptiveFusionError("the row pid needs simple-pid: pip install 'adaptive-fusion[train]'") from None
    return PID


def tuned_setpoint(world: World, attainment: float, seed: int) -> float:
    """The highest setpoint that holds the target on a stationary trace drawn apart."""
    trace = build("stationary", world, _TUNING, seed + 1)
    best = oracle(trace)
    for setpoint in _SETPOINTS:
        if score(trace, run(trace, Pid(world, setpoint), timed=1), best)["attainment"] >= attainment:
            return setpoint
    return 0.3


def run(trace: Trace, row: Chooser, *, timed: int = 4000, chunk: int = 10_000) -> Outcome:
    """Feed a trace through a row, one request at a time.

    An out-of-memory error costs 30 % of the failed try's time and the request is tried again lower down, at most
    twice. Decision and update are timed together on the first `timed` requests.
    """
    chosen: list[int] = []
    latency: list[float] = []
    spent: list[float] = []
    clock = time.perf_counter
    deadline = trace.world.deadline_ms
    cheapest = [int(column) - 1 for column in trace.world.cheapest]
    columns = (trace.case, trace.elapsed, trace.free, trace.probed, trace.times[:, 1:], trace.memory[:, 1:])
    for first in range(0, len(trace.load), chunk):
        part = slice(first, first + chunk)
        for case, elapsed, free, probed, times, memory in zip(*(c[part].tolist() for c in columns), strict=True):
            begin = clock()
            index = row.choose(case, deadline - elapsed, probed if probed < AMPLE_GB else None)
            decide = clock() - begin
            last = cheapest[case]
            lost, tries = 0.0, 1
            while memory[index] > free and tries < 3:
                row.out_of_memory(index, lost, 0.3 * times[index])
                lost += 0.3 * times[index]
                index = last if tries == 2 else index + math.ceil((last - index) / 2)
                tries += 1
            took = times[index] if memory[index] <= free else math.inf
            if took < math.inf:
                begin = clock()
                row.update(index, lost, took, memory[index])
                if len(spent) < timed:
                    spent.append(decide + clock() - begin)
            chosen.append(index + 1)
            latency.append(elapsed + lost + took)
    return Outcome(np.array(chosen), np.array(latency), statistics.median(spent) * 1e6 if spent else 0.0)


def compare(trace: Trace, attainment: float, setpoint: float, steps: Steps) -> dict[str, dict[str, float]]:
    """Scores of every row on one trace; `steps` advances after each of the `FED` rows that take time."""
    best = oracle(trace)
    outcomes = {"native": native(trace), "best static": best_static(trace, attainment)}
    fed: dict[str, Chooser] = {
        "aimd": Aimd(trace.world, attainment),
        "pid": Pid(trace.world, setpoint),
        "ours": Ours(trace.world, attainment),
    }
    for name, row in fed.items():
        outcomes[name] = run(trace, row)
        steps.advance()
    outcomes["oracle"] = best
    return {name: score(trace, outcome, best) for name, outcome in outcomes.items()}
