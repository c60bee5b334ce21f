"""Traces of load: requests in order, and what each would take at every operating point.

Knows cases (kinds of request with predicted costs) and a world that draws the truth about them. Must not know of
models, of where the truth comes from, or what is made of a trace.
"""

import csv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from adaptive_fusion.control.candidates import Candidate
from adaptive_fusion.errors import ConfigError

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]

TRACES = ("stationary", "step", "sine", "burst", "squeeze")
BACKGROUND = "hog"
"""The trace with background load: what results and options call it."""
MIN_REQUESTS = 2000
STEP = 1.7
PERIOD = 500
AMPLE_GB = 1024.0


@dataclass(frozen=True)
class Case:
    """A kind of request as a row sees it.

    `candidates` are what its lane offers, best first; `work` is its size relative to a usual request.
    """

    lane: str
    candidates: tuple[Candidate, ...]
    simple: bool
    work: float


@dataclass(frozen=True)
class World:
    """What requests there are and what they take.

    Columns of every array are the points of a case: native first, then its candidates in order; shorter ladders are
    filled up with points of infinite time.

    Attributes:
        cases: A request is one of these, each as likely as any other.
        quality: Expected quality ``[cases, columns]``, which is what rows know and are judged by.
        limit: The limit that is kept: ``latency_ms`` or ``ttft_ms``.
        deadline_ms: Its value.
        squeeze_gb: What is left of the memory when it is squeezed.
        memory_margin: Where memory envelopes start.
        draw: Milliseconds and GiB ``[n, columns]`` of requests of these cases ``[n]``, calm or (where the flags say
            so) beside processes that take the processor away.
        cheapest: The column of each case ``[cases]`` that takes least.
        slowdown: Factor that those processes put on times; None if that was not measured.
        answered: Measured quality of the answers ``[cases, columns]``; None if there are none.
    """

    cases: tuple[Case, ...]
    quality: FloatArray
    limit: str
    deadline_ms: float
    squeeze_gb: float
    memory_margin: float
    draw: Callable[[IntArray, BoolArray, np.random.Generator], tuple[FloatArray, FloatArray]]
    cheapest: IntArray
    slowdown: float | None = None
    answered: FloatArray | None = None


@dataclass(frozen=True)
class Trace:
    """Requests in order and the truth about each: arrays of shape ``[n]`` or ``[n, columns]``.

    `load` is the factor on times, `elapsed` the milliseconds of queueing, `free` the GiB that can be had and `probed`
    what the probe said, one request late.
    """

    name: str
    world: World
    case: IntArray
    load: FloatArray
    elapsed: FloatArray
    free: FloatArray
    probed: FloatArray
    times: FloatArray
    memory: FloatArray

    @property
    def quality(self) -> FloatArray:
        """Expected quality of each point on each request, ``[n, columns]``."""
        return self.world.quality[self.case]

    @property
    def feasible(self) -> BoolArray:
        """Would the cheapest point have met the deadline, and fitted in memory?"""
        n, cheapest = np.arange(len(self.case)), self.world.cheapest[self.case]
        in_time = self.times[n, cheapest] + self.elapsed <= self.world.deadline_ms
        return np.asarray(in_time & (self.memory[n, cheapest] <= self.free))


def make_trace(
    name: str,
    world: World,
    load: FloatArray,
    rng: np.random.Generator,
    *,
    case: IntArray | None = None,
    elapsed: FloatArray | None = None,
    free: FloatArray | None = None,
    busy: BoolArray | None = None,
) -> Trace:
    """Draw requests and truth for a given load; where `busy`, the load is in what was drawn already."""
    n = len(load)
    case = rng.integers(0, len(world.cases), n) if case is None else case
    beside = np.zeros(n, dtype=np.bool_) if busy is None else busy
    times, memory = world.draw(case, beside, rng)
    free = np.full(n, AMPLE_GB) if free is None else free
    return Trace(
        name,
        world,
        case,
        load,
        np.zeros(n) if elapsed is None else elapsed,
        free,
        np.r_[free[:1], free[:-1]],
        times * np.where(beside, 1.0, load)[:, None],
        memory,
    )


def build(name: str, world: World, n: int, seed: int) -> Trace:
    """One of `TRACES`, or `BACKGROUND` in a world where such load was measured, with n requests."""
    rng = np.random.default_rng([seed, (*TRACES, BACKGROUND).index(name)])
    t = np.arange(n)
    load = np.ones(n)
    on = t // PERIOD % 2 == 1
    if name == "step":
        return make_trace(name, world, np.where(on, STEP, 1.0), rng)
    if name == BACKGROUND:
        if world.slowdown is None:
            raise ConfigError("the trace hog needs times measured beside other processes; there are none")
        return make_trace(name, world, np.where(on, world.slowdown, 1.0), rng, busy=on)
    if name == "sine":
        return make_trace(name, world, np.exp(0.4 * np.sin(2 * np.pi * t / 600)), rng)
    if name == "burst":
        elapsed = np.zeros(n)
        start = 0
        while (start := start + 60 + int(rng.exponential(120))) < n:
            end = start + int(rng.integers(8, 40))
            load[start:end] = rng.uniform(1.3, 2.0)
            elapsed[start:end] = rng.uniform(0, 0.23 * world.deadline_ms, len(elapsed[start:end]))
            start = end
        return make_trace(name, world, load, rng, elapsed=elapsed)
    if name == "squeeze":
        tight = t // 250 % 2 == 1
        free = np.where(tight, world.squeeze_gb, AMPLE_GB)
        return make_trace(name, world, np.where(tight, 1.15, 1.0), rng, free=free)
    return make_trace(name, world, load, rng)


def read_trace(path: Path, seed: int) -> Callable[[World], Trace]:
    """What draws the trace of a file in a world: CSV with a header and a column ``load`` (factor on every time).

    Optional columns: ``work`` (size relative to a usual request) and ``simple`` (0 or 1), which pick the case;
    ``elapsed_ms`` (queueing); ``free_gb``.

    Raises:
        ConfigError: For a file that cannot be read, without that column, or with values that are not numbers in range.
    """
    try:
        with path.open(newline="", encoding="utf-8") as lines:
            rows = list(csv.DictReader(lines))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"trace {path.name!r} cannot be read: {type(error).__name__}") from error
    if not rows or "load" not in rows[0]:
        raise ConfigError(f"trace {path.name!r} has columns {sorted(rows[0]) if rows else []}; expected at least load")

    def column(name: str, low: float) -> FloatArray | None:
        if name not in rows[0]:
            return None
        try:
            values = np.array([float(row[name]) for row in rows])
        except (TypeError, ValueError):
            raise ConfigError(f"trace {path.name!r} has something else than numbers in column {name}") from None
        if not (np.isfinite(values).all() and (values >= low).all()):
            raise ConfigError(f"trace {path.name!r} has {values.min():g} in {name}; expected numbers from {low:g}")
        return values

    load = column("load", 1e-3)
    assert load is not None  # its presence was checked
    work, simple = column("work", 1e-9), column("simple", 0.0)
    elapsed, free = column("elapsed_ms", 0.0), column("free_gb", 0.0)

    def draw(world: World) -> Trace:
        rng = np.random.default_rng(seed)
        case = _pick(world, len(load), rng, work, simple)
        return make_trace("file", world, load, rng, case=case, elapsed=elapsed, free=free)

    return draw


def _pick(
    world: World, n: int, rng: np.random.Generator, work: FloatArray | None, simple: FloatArray | None
) -> IntArray:
    """The case nearest to what is asked for, any of those equally near."""
    distance = rng.uniform(0, 1e-6, (n, len(world.cases)))
    if work is not None:
        sizes = np.log([case.work for case in world.cases])
        distance += np.abs(np.log(work)[:, None] - sizes[None, :])
    if simple is not None:
        kinds = np.array([case.simple for case in world.cases])
        distance += 1e6 * (kinds[None, :] != (simple > 0.5)[:, None])
    return np.asarray(distance.argmin(1))
