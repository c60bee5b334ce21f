"""Traces of load: requests in order, what each would take at every operating point, and how well a row did on them.

Knows cases (kinds of request with predicted costs), a world that draws the truth about them, and outcomes. Must not
know of models, of where the truth comes from, or how a row chooses.

Attainment counts feasible requests only: those that the cheapest point would have met under the load of the moment.
`misses` is the mean number of misses in the 20 requests after a step up of load, `recover` the median number of
requests after its end until quality (relative to the oracle's, over 20 requests) is back at 98 % of its usual level.
"""

import csv
import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from adaptive_fusion.control.candidates import Candidate
from adaptive_fusion.errors import ConfigError

Array = NDArray[np.float64]
Whole = NDArray[np.int64]
Flags = NDArray[np.bool_]

TRACES = ("stationary", "step", "sine", "burst", "squeeze")
HOG = "hog"
MIN_REQUESTS = 2000
STEP = 1.7
PERIOD = 500
AMPLE_GB = 1024.0
_AFTER = 20


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
        hogged: Factor that those processes put on times; None if that was not measured.
        answered: Measured quality of the answers ``[cases, columns]``; None if there are none.
    """

    cases: tuple[Case, ...]
    quality: Array
    limit: str
    deadline_ms: float
    squeeze_gb: float
    memory_margin: float
    draw: Callable[[Whole, Flags, np.random.Generator], tuple[Array, Array]]
    cheapest: Whole
    hogged: float | None = None
    answered: Array | None = None


@dataclass(frozen=True)
class Trace:
    """Requests in order and the truth about each: arrays of shape ``[n]`` or ``[n, columns]``.

    `load` is the factor on times, `elapsed` the milliseconds of queueing, `free` the GiB that can be had and `probed`
    what the probe said, one request late.
    """

    name: str
    world: World
    case: Whole
    load: Array
    elapsed: Array
    free: Array
    probed: Array
    times: Array
    memory: Array

    @property
    def quality(self) -> Array:
        """Expected quality of each point on each request, ``[n, columns]``."""
        return self.world.quality[self.case]

    @property
    def feasible(self) -> Flags:
        """Would the cheapest point have met the deadline, and fitted in memory?"""
        n, cheapest = np.arange(len(self.case)), self.world.cheapest[self.case]
        in_time = self.times[n, cheapest] + self.elapsed <= self.world.deadline_ms
        return np.asarray(in_time & (self.memory[n, cheapest] <= self.free))


@dataclass
class Outcome:
    """What a row did: the column that answered ``[n]``, and the time including retries after out of memory."""

    index: Whole
    latency: Array
    decision_us: float = 0.0


def make_trace(
    name: str,
    world: World,
    load: Array,
    rng: np.random.Generator,
    *,
    case: Whole | None = None,
    elapsed: Array | None = None,
    free: Array | None = None,
    busy: Flags | None = None,
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
    """One of `TRACES`, or ``hog`` in a world where that was measured, with n requests."""
    rng = np.random.default_rng([seed, (*TRACES, HOG).index(name)])
    t = np.arange(n)
    load = np.ones(n)
    on = t // PERIOD % 2 == 1
    if name == "step":
        return make_trace(name, world, np.where(on, STEP, 1.0), rng)
    if name == HOG:
        if world.hogged is None:
            raise ConfigError("the trace hog needs times measured beside other processes; there are none")
        return make_trace(name, world, np.where(on, world.hogged, 1.0), rng, busy=on)
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

    def column(name: str, low: float) -> Array | None:
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


def _pick(world: World, n: int, rng: np.random.Generator, work: Array | None, simple: Array | None) -> Whole:
    """The case nearest to what is asked for, any of those equally near."""
    distance = rng.uniform(0, 1e-6, (n, len(world.cases)))
    if work is not None:
        sizes = np.log([case.work for case in world.cases])
        distance += np.abs(np.log(work)[:, None] - sizes[None, :])
    if simple is not None:
        kinds = np.array([case.simple for case in world.cases])
        distance += 1e6 * (kinds[None, :] != (simple > 0.5)[:, None])
    return np.asarray(distance.argmin(1))


# Outcomes that need no row


def native(trace: Trace) -> Outcome:
    """The model untouched on every request."""
    return _taken(trace, np.zeros(len(trace.case), dtype=np.int64))


def oracle(trace: Trace) -> Outcome:
    """The best candidate for each request, knowing its true cost."""
    fits = (trace.times + trace.elapsed[:, None] <= trace.world.deadline_ms) & (trace.memory <= trace.free[:, None])
    fits[:, 0] = False
    best = np.where(fits, trace.quality, -1.0).argmax(1)
    return _taken(trace, np.where(fits.any(1), best, trace.world.cheapest[trace.case]))


def best_static(trace: Trace, attainment: float) -> Outcome:
    """One candidate for each lane, known in hindsight: of the choices that held the target the one of highest quality,
    else the one that held most.
    """
    could, quality = trace.feasible, trace.quality
    lanes = np.array([case.lane for case in trace.world.cases])[trace.case]
    sizes = {case.lane: len(case.candidates) for case in trace.world.cases}
    late = (trace.times + trace.elapsed[:, None] > trace.world.deadline_ms) | (trace.memory > trace.free[:, None])
    died = trace.memory > trace.free[:, None]
    parts: dict[str, list[tuple[float, float]]] = {}
    for lane, size in sizes.items():
        own = lanes == lane
        parts[lane] = [
            (float((late[own, i] & could[own]).sum()), float(np.where(died[own, i], 0.0, quality[own, i]).sum()))
            for i in range(1, size + 1)
        ]
    allowed = (1 - attainment) * int(could.sum()) + 1e-9
    held: tuple[float, tuple[int, ...]] | None = None
    least: tuple[float, tuple[int, ...]] = (math.inf, ())
    for chosen in product(*(range(size) for size in sizes.values())):
        rows = [parts[lane][i] for lane, i in zip(sizes, chosen, strict=True)]
        missed, worth = sum(row[0] for row in rows), sum(row[1] for row in rows)
        if missed <= allowed and (held is None or worth > held[0]):
            held = worth, chosen
        if missed < least[0]:
            least = missed, chosen
    columns = dict(zip(sizes, (held or least)[1], strict=True))
    return _taken(trace, np.array([columns[lane] + 1 for lane in lanes.tolist()]))


def _taken(trace: Trace, index: Whole) -> Outcome:
    """These columns, without retries."""
    n = np.arange(len(index))
    took = np.where(trace.memory[n, index] <= trace.free, trace.times[n, index], math.inf)
    return Outcome(index, trace.elapsed + took)


# Scores


def score(trace: Trace, outcome: Outcome, best: Outcome) -> dict[str, float]:
    """Attainment, quality and the behaviour around steps of load; `best` is the oracle's outcome."""
    n = np.arange(len(outcome.index))
    could = trace.feasible
    missed = could & (outcome.latency > trace.world.deadline_ms)
    died = ~np.isfinite(outcome.latency)
    quality = np.where(died, 0.0, trace.quality[n, outcome.index])
    reached = trace.quality[n, best.index]
    result = {
        "attainment": 1.0 - float(missed.sum()) / max(int(could.sum()), 1),
        "feasible": float(could.mean()),
        "quality": float(quality.mean()),
        "of_oracle": float(quality.mean()) / float(reached.mean()),
        "decision_us": outcome.decision_us,
    }
    if trace.world.answered is not None:
        answered = trace.world.answered[trace.case][n, outcome.index]
        result["answered"] = float(np.where(died, 0.0, answered).mean())
    jumps = [int(j) + 1 for j in np.flatnonzero(np.abs(np.diff(np.log(trace.load))) > 0.25)]
    ups = [j for j in jumps if trace.load[j] > trace.load[j - 1] and j + _AFTER <= len(n)]
    if ups:
        counts = [int(missed[j : j + _AFTER].sum()) for j in ups]
        result |= {"misses": statistics.fmean(counts), "misses_max": float(max(counts))}
    downs = [j for j in jumps if trace.load[j] < trace.load[j - 1]]
    if downs and trace.name in ("step", HOG):
        result |= _recovery(trace, quality, reached, downs)
    return result


def _recovery(trace: Trace, quality: Array, reached: Array, downs: list[int]) -> dict[str, float]:
    kernel = np.ones(_AFTER) / _AFTER
    ratio = np.convolve(quality, kernel, "valid") / np.convolve(reached, kernel, "valid")
    calm = ratio[np.r_[False, trace.load[:-1] == 1.0][: len(ratio)] & (trace.load[: len(ratio)] == 1.0)]
    back = ratio >= 0.98 * float(np.median(calm))
    waits = [int(np.argmax(back[j:])) if back[j:].any() else len(ratio) - j for j in downs if j < len(ratio)]
    return {"recover": float(statistics.median(waits)), "recover_max": float(max(waits))} if waits else {}


def shortfalls(results: Mapping[str, Mapping[str, Mapping[str, float]]], attainment: float, n: int) -> list[str]:
    """What should hold of ``ours`` on traces of n requests and does not; a tie is within two standard errors."""
    found: list[str] = []
    tie = 2 * math.sqrt(attainment * (1 - attainment) / n)
    for trace, rows in results.items():
        ours = rows["ours"]
        if ours["attainment"] < attainment:
            found.append(f"{trace}: attainment {ours['attainment']:.4f} < {attainment}")
        if ours["of_oracle"] < 0.95:
            found.append(f"{trace}: quality {ours['of_oracle']:.3f} of the oracle's < 0.95")
        if trace == "step" and ours.get("misses", 0.0) > 4:
            found.append(f"{trace}: {ours['misses']:.1f} misses in the 20 requests after a step > 4")
        if trace == "step" and ours.get("recover", 0.0) > 60:
            found.append(f"{trace}: recovered {ours['recover']:.0f} requests after its end > 60")
        for name, row in rows.items():
            better = row["attainment"] > ours["attainment"] + tie and row["quality"] > ours["quality"]
            if name != "oracle" and better:
                found.append(f"{trace}: {name} is better in both attainment and quality")
    return found
