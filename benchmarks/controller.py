"""Budget control simulated: the library's own controller against others, on traces where the truth is known.

    python benchmarks/controller.py [--requests N] [--attainment A] [--trace FILE.csv] [--json] [--plot PNG]

Times, qualities and memory of the eight operating points are a stated model (`LADDER`), not a measurement;
what is real is the controller, called once per request as a runner calls it. Half of the requests are
simple. Rows:

- ``native``: the first point, always; ``best static``: the point that, known in hindsight, has the highest
  quality of those that held the target on this trace (the cheapest if none did);
- ``aimd``, ``pid``: the same predictions and memory envelope as ours, with a share of the deadline that
  they adapt: additive increase and multiplicative decrease balanced at the target's miss rate; simple-pid
  on latency / deadline;
- ``ours``; ``oracle``: knows each request's true cost beforehand.

Attainment counts feasible requests only: those that the cheapest point would have met under the load of
the moment. ``misses`` is the mean number of misses in the 20 requests after a step up of load, ``recover``
the median number of requests after its end until quality (relative to the oracle's, over 20 requests) is
back at 98 % of its usual level. A trace file has a header and a column ``load`` (factor on every time);
optional: ``work`` (patches relative to a usual request), ``simple`` (0 or 1), ``elapsed_ms`` (queueing),
``free_gb``.
"""

import argparse
import csv
import json
import math
import statistics
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from adaptive_fusion.budget import Budget
from adaptive_fusion.controller import Candidate, Controller
from adaptive_fusion.decisions import Measurement, Prediction
from adaptive_fusion.point import OperatingPoint

Array = NDArray[np.float64]
TRACES = ("stationary", "step", "sine", "burst", "squeeze")
DEADLINE_MS = 220.0
NOISE, POINT_NOISE, MEMORY_NOISE = 0.12, 0.03, 0.03
PERIOD = 500

# (fusion, downsample, share of the pixels, quality on dense requests, on simple ones, log error of the
# profile)
LADDER = (
    ("native", 1.0, 1.00, 0.900, 0.970, 0.05),
    ("weighted", 1.0, 0.75, 0.885, 0.970, -0.08),
    ("weighted", 1.0, 0.56, 0.865, 0.970, 0.10),
    ("weighted", 1.0, 0.42, 0.840, 0.968, 0.00),
    ("weighted", 0.5, 0.42, 0.800, 0.965, -0.05),
    ("weighted", 0.5, 0.32, 0.760, 0.960, 0.08),
    ("weighted", 0.5, 0.18, 0.660, 0.950, -0.10),
    ("weighted", 0.25, 0.10, 0.500, 0.920, 0.03),
)
POINTS = tuple(
    OperatingPoint(fusion, 3, down, None if share == 1.0 else int(share * 2**20)) for fusion, down, share, *_ in LADDER
)
QUALITY = np.array([[row[3] for row in LADDER], [row[4] for row in LADDER]])
BIAS = np.array([row[5] for row in LADDER])
CHEAPEST = len(LADDER) - 1


def predict(work: float, down: float, share: float) -> Prediction:
    """The stated cost model: milliseconds and GiB of a point on a request of `work` usual requests'
    patches.
    """
    patches = work * share
    tokens = patches * down * down
    return Prediction(
        100 * patches + 10 * patches * patches,
        20 + 70 * tokens,
        30 + 10 * tokens,
        0.1 + 0.5 * patches + 0.4 * tokens,
    )


WORKS = np.exp(0.5 * np.array([statistics.NormalDist().inv_cdf((i + 0.5) / 32) for i in range(32)]))


@dataclass(frozen=True)
class Trace:
    """Requests in order, and the truth about each: arrays of shape [n] or [n, points]."""

    name: str
    bucket: NDArray[np.int64]
    simple: NDArray[np.int64]
    load: Array
    elapsed: Array
    free: Array
    probed: Array
    times: Array
    memory: Array

    @property
    def quality(self) -> Array:
        """Quality of each point on each request, [n, points]."""
        return QUALITY[self.simple]


PREDICTED = [[predict(float(w), row[1], row[2]) for row in LADDER] for w in WORKS]
PREDICTED_MS = np.array([[p.latency_ms for p in row] for row in PREDICTED])
PREDICTED_GB = np.array([[p.peak_memory_gb for p in row] for row in PREDICTED])
CANDIDATES = [
    [
        tuple(Candidate(point, float(q), p) for point, q, p in zip(POINTS, QUALITY[simple], row, strict=True))
        for simple in (0, 1)
    ]
    for row in PREDICTED
]


def make_trace(
    name: str,
    load: Array,
    rng: np.random.Generator,
    *,
    work: Array | None = None,
    simple: Array | None = None,
    elapsed: Array | None = None,
    free: Array | None = None,
) -> Trace:
    """Draw the requests and the truth for a given load; the memory probe lags by one request."""
    n = len(load)
    if work is None:
        bucket = rng.integers(0, len(WORKS), n)
    else:
        bucket = np.abs(np.log(np.maximum(work, 1e-9))[:, None] - np.log(WORKS)[None, :]).argmin(1)
    kind = rng.integers(0, 2, n) if simple is None else (simple > 0.5).astype(np.int64)
    noise = rng.normal(0, NOISE, (n, 1)) + rng.normal(0, POINT_NOISE, (n, len(LADDER)))
    times = PREDICTED_MS[bucket] * np.exp(noise + BIAS) * load[:, None]
    memory = PREDICTED_GB[bucket] * np.exp(rng.normal(0, MEMORY_NOISE, (n, len(LADDER))))
    free = np.full(n, 8.0) if free is None else free
    zero = np.zeros(n)
    return Trace(
        name,
        bucket,
        kind,
        load,
        zero if elapsed is None else elapsed,
        free,
        np.r_[free[:1], free[:-1]],
        times,
        memory,
    )


def build(name: str, n: int, seed: int) -> Trace:
    """One of `TRACES` with n requests."""
    rng = np.random.default_rng([seed, TRACES.index(name)])
    t = np.arange(n)
    load = np.ones(n)
    if name == "step":
        return make_trace(name, np.where(t // PERIOD % 2 == 1, 1.7, 1.0), rng)
    if name == "sine":
        return make_trace(name, np.exp(0.4 * np.sin(2 * np.pi * t / 600)), rng)
    if name == "burst":
        elapsed = np.zeros(n)
        start = 0
        while (start := start + 60 + int(rng.exponential(120))) < n:
            end = start + int(rng.integers(8, 40))
            load[start:end] = rng.uniform(1.3, 2.0)
            elapsed[start:end] = rng.uniform(0, 50, len(elapsed[start:end]))
            start = end
        return make_trace(name, load, rng, elapsed=elapsed)
    if name == "squeeze":
        tight = t // 250 % 2 == 1
        return make_trace(name, np.where(tight, 1.15, 1.0), rng, free=np.where(tight, 0.45, 8.0))
    return make_trace(name, load, rng)


class Row(Protocol):
    """One way of choosing: returns the index of a point, then hears what it took.

    `bucket` and `simple` say which request it is (an index into `CANDIDATES`), `left_ms` is what is left
    of the deadline, `lost_ms` what tries that ran out of memory took.
    """

    def choose(self, bucket: int, simple: int, left_ms: float, free_gb: float) -> int: ...

    def update(self, index: int, lost_ms: float, took_ms: float, peak_gb: float) -> None: ...

    def out_of_memory(self, index: int, lost_ms: float, took_ms: float) -> None: ...


class Ours:
    """The library's controller, called as a runner calls it."""

    def __init__(self, attainment: float) -> None:
        self.controller = Controller(memory_margin=1.1, clock=lambda: 0.0)
        self.budget = Budget(latency_ms=DEADLINE_MS, attainment=attainment)
        self.index = {point.name: i for i, point in enumerate(POINTS)}

    def choose(self, bucket: int, simple: int, left_ms: float, free_gb: float) -> int:
        self.candidates = CANDIDATES[bucket][simple]
        self.choice = self.controller.choose(
            self.candidates,
            self.budget,
            elapsed_ms=DEADLINE_MS - left_ms,
            free_memory_gb=free_gb,
        )
        return self.index[self.choice.candidate.key]

    def ran(self, index: int) -> Candidate | None:
        candidate = self.candidates[index]
        return None if candidate is self.choice.candidate else candidate

    def update(self, index: int, lost_ms: float, took_ms: float, peak_gb: float) -> None:
        latency = self.choice.elapsed_ms + lost_ms + took_ms
        ttft = self.choice.elapsed_ms + lost_ms + 0.4 * took_ms
        taken = Measurement(0.0, 0.0, 0.0, 0.0, ttft, latency, 0, 0, 0, 0, peak_gb)
        self.controller.update(self.choice, taken, ran=self.ran(index), lost_ms=lost_ms)

    def out_of_memory(self, index: int, lost_ms: float, took_ms: float) -> None:
        cut = self.choice.elapsed_ms + lost_ms + took_ms
        self.controller.miss(self.choice, cut, kind="oom", ran=self.ran(index), lost_ms=lost_ms)


class Share(ABC):
    """Base of aimd and pid: best quality with predicted time within a share of what is left of the
    deadline.
    """

    def __init__(self) -> None:
        self.share = 0.7
        self.envelope = 1.1
        self.left_ms = DEADLINE_MS

    def choose(self, bucket: int, simple: int, left_ms: float, free_gb: float) -> int:
        self.left_ms = left_ms
        left, free = self.share * left_ms, free_gb / self.envelope
        for index, predicted in enumerate(PREDICTED[bucket]):
            if predicted.latency_ms <= left and predicted.peak_memory_gb <= free:
                return index
        return CHEAPEST

    def update(self, index: int, lost_ms: float, took_ms: float, peak_gb: float) -> None:
        self.adapt((lost_ms + took_ms) / max(self.left_ms, 1.0))

    def out_of_memory(self, index: int, lost_ms: float, took_ms: float) -> None:
        self.envelope = min(self.envelope * 1.05, 2.0)

    @abstractmethod
    def adapt(self, used: float) -> None:
        """Move the share after a request that used `used` of its time."""


class Aimd(Share):
    """Additive increase, multiplicative decrease, balanced so that a share `1 - attainment` of requests
    misses.
    """

    def __init__(self, attainment: float, decrease: float = 0.75) -> None:
        super().__init__()
        self.decrease = decrease
        self.increase = 0.7 * (1 - decrease) * (1 - attainment) / attainment

    def adapt(self, used: float) -> None:
        self.share = max(0.05, self.share * self.decrease) if used > 1 else min(1.5, self.share + self.increase)


class Pid(Share):
    """simple-pid on latency / deadline, set below 1 so that the noise fits."""

    def __init__(self, setpoint: float, gains: tuple[float, float, float] = (0.1, 0.1, 0.0)) -> None:
        super().__init__()
        try:
            from simple_pid import PID
        except ModuleNotFoundError:
            raise SystemExit("the pid row needs simple-pid: pip install simple-pid") from None
        self.pid = PID(*gains, setpoint=setpoint, sample_time=None, output_limits=(0.05, 1.5), starting_output=0.7)

    def adapt(self, used: float) -> None:
        self.share = self.pid(used, dt=1.0)


@dataclass
class Outcome:
    """What a row did: the point that answered, and the latency including retries after out of memory."""

    index: NDArray[np.int64]
    latency: Array
    decision_us: float


def run(trace: Trace, row: Row, *, timed: int = 4000, chunk: int = 10_000) -> Outcome:
    """Feed a trace through a row, one request at a time.

    An out-of-memory error costs 30 % of the failed try's time and the request is tried again lower down,
    at most twice. Decision and update are timed together on the first `timed` requests.
    """
    chosen: list[int] = []
    latency: list[float] = []
    spent: list[float] = []
    clock = time.perf_counter
    for first in range(0, len(trace.load), chunk):
        part = slice(first, first + chunk)
        columns = (
            trace.bucket,
            trace.simple,
            trace.elapsed,
            trace.free,
            trace.probed,
            trace.times,
            trace.memory,
        )
        for bucket, simple, elapsed, free, probed, times, memory in zip(
            *(column[part].tolist() for column in columns), strict=True
        ):
            left = DEADLINE_MS - elapsed
            begin = clock()
            index = row.choose(bucket, simple, left, probed)
            decide = clock() - begin
            lost, tries = 0.0, 1
            while memory[index] > free and tries < 3:
                row.out_of_memory(index, lost, 0.3 * times[index])
                lost += 0.3 * times[index]
                index = CHEAPEST if tries == 2 else index + math.ceil((CHEAPEST - index) / 2)
                tries += 1
            took = times[index] if memory[index] <= free else math.inf
            if took < math.inf:
                begin = clock()
                row.update(index, lost, took, memory[index])
                if len(spent) < timed:
                    spent.append(decide + clock() - begin)
            chosen.append(index)
            latency.append(elapsed + lost + took)
    return Outcome(np.array(chosen), np.array(latency), statistics.median(spent) * 1e6)


def oracle(trace: Trace) -> Outcome:
    """The best point for each request, knowing its true cost."""
    fits = (trace.times + trace.elapsed[:, None] <= DEADLINE_MS) & (trace.memory <= trace.free[:, None])
    index = np.where(fits.any(1), np.where(fits, trace.quality, -1.0).argmax(1), CHEAPEST)
    n = np.arange(len(index))
    latency = trace.elapsed + np.where(trace.memory[n, index] <= trace.free, trace.times[n, index], math.inf)
    return Outcome(index, latency, 0.0)


def fixed(trace: Trace, index: int) -> Outcome:
    """One point on every request, without retries."""
    took = np.where(trace.memory[:, index] <= trace.free, trace.times[:, index], math.inf)
    return Outcome(np.full(len(took), index), trace.elapsed + took, 0.0)


def best_static(trace: Trace, attainment: float) -> Outcome:
    """In hindsight: of the points that held the target the best one, else the one that held most."""
    outcomes = [fixed(trace, index) for index in range(len(LADDER))]
    scores = [score(trace, outcome) for outcome in outcomes]
    held = [i for i, values in enumerate(scores) if values["attainment"] >= attainment]
    if held:
        return outcomes[max(held, key=lambda i: scores[i]["quality"])]
    return outcomes[max(range(len(LADDER)), key=lambda i: scores[i]["attainment"])]


def feasible(trace: Trace) -> NDArray[np.bool_]:
    """Would the cheapest point have met the deadline, and fitted in memory?"""
    return (trace.times[:, CHEAPEST] + trace.elapsed <= DEADLINE_MS) & (trace.memory[:, CHEAPEST] <= trace.free)


def score(trace: Trace, outcome: Outcome, usual: "Outcome | None" = None) -> dict[str, float]:
    """Attainment, quality and the behaviour around steps of one row; `usual` is the oracle's outcome."""
    n = np.arange(len(outcome.index))
    could = feasible(trace)
    missed = could & (outcome.latency > DEADLINE_MS)
    quality = np.where(np.isfinite(outcome.latency), trace.quality[n, outcome.index], 0.0)
    result = {
        "attainment": 1.0 - float(missed.sum()) / max(int(could.sum()), 1),
        "quality": float(quality.mean()),
    }
    if usual is None:
        return result
    best = trace.quality[n, usual.index]
    result["of_oracle"] = result["quality"] / float(best.mean())
    jumps = np.flatnonzero(np.abs(np.diff(np.log(trace.load))) > 0.25) + 1
    ups = [j for j in jumps if trace.load[j] > trace.load[j - 1] and j + 20 <= len(n)]
    downs = [j for j in jumps if trace.load[j] < trace.load[j - 1]]
    if ups:
        counts = [int(missed[j : j + 20].sum()) for j in ups]
        result["misses"] = statistics.fmean(counts)
        result["misses_max"] = float(max(counts))
    if downs and trace.name == "step":
        kernel = np.ones(20) / 20
        ratio = np.convolve(quality, kernel, "valid") / np.convolve(best, kernel, "valid")
        calm = ratio[np.r_[False, trace.load[:-1] == 1.0][: len(ratio)] & (trace.load[: len(ratio)] == 1.0)]
        level = 0.98 * float(np.median(calm))
        waits = [
            int(np.argmax(ratio[j:] >= level)) if (ratio[j:] >= level).any() else len(ratio) - j
            for j in downs
            if j < len(ratio)
        ]
        result["recover"] = float(statistics.median(waits))
        result["recover_max"] = float(max(waits))
    return result


def tuned_setpoint(attainment: float, seed: int) -> float:
    """The highest PID setpoint that holds the target on a stationary trace drawn apart."""
    trace = build("stationary", 4000, seed + 1)
    for setpoint in (0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5, 0.45, 0.4, 0.35):
        if score(trace, run(trace, Pid(setpoint), timed=1))["attainment"] >= attainment:
            return setpoint
    return 0.3


def compare(trace: Trace, attainment: float, setpoint: float) -> dict[str, dict[str, float]]:
    """Every row on one trace."""
    best = oracle(trace)
    outcomes = {
        "native": fixed(trace, 0),
        "best static": best_static(trace, attainment),
        "aimd": run(trace, Aimd(attainment)),
        "pid": run(trace, Pid(setpoint)),
        "ours": run(trace, Ours(attainment)),
        "oracle": best,
    }
    return {
        name: {**score(trace, outcome, best), "decision_us": outcome.decision_us} for name, outcome in outcomes.items()
    }


def shortfalls(results: dict[str, dict[str, dict[str, float]]], attainment: float, n: int) -> list[str]:
    """What must hold of ``ours`` and does not; two standard errors of attainment count as a tie."""
    found: list[str] = []
    tie = 2 * math.sqrt(attainment * (1 - attainment) / n)
    for trace, rows in results.items():
        ours = rows["ours"]
        if ours["attainment"] < attainment:
            found.append(f"{trace}: attainment {ours['attainment']:.4f} < {attainment}")
        if ours["of_oracle"] < 0.95:
            found.append(f"{trace}: quality {ours['of_oracle']:.3f} of the oracle's < 0.95")
        if trace == "step" and ours["misses"] > 4:
            found.append(f"{trace}: {ours['misses']:.1f} misses in the 20 requests after a step > 4")
        if trace == "step" and ours["recover"] > 60:
            found.append(f"{trace}: recovered {ours['recover']:.0f} requests after its end > 60")
        for name, row in rows.items():
            better = row["attainment"] > ours["attainment"] + tie and row["quality"] > ours["quality"]
            if name != "oracle" and better:
                found.append(f"{trace}: {name} is better in both attainment and quality")
    return found


def read_trace(path: str, seed: int) -> Trace:
    """A trace file; see the module."""
    with open(path, newline="") as lines:
        rows = list(csv.DictReader(lines))
    if not rows or "load" not in rows[0]:
        raise SystemExit(f"{path}: expected a CSV file with a header and a column 'load'")

    def column(name: str) -> Array | None:
        return np.array([float(row[name]) for row in rows]) if name in rows[0] else None

    load = column("load")
    assert load is not None
    return make_trace(
        "file",
        load,
        np.random.default_rng(seed),
        work=column("work"),
        simple=column("simple"),
        elapsed=column("elapsed_ms"),
        free=column("free_gb"),
    )


def plot(results: dict[str, dict[str, dict[str, float]]], attainment: float, path: str) -> None:
    """Attainment against quality, one panel per trace."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(results), figsize=(3.2 * len(results), 3.2), squeeze=False)
    for axis, (name, rows) in zip(axes[0], results.items(), strict=True):
        for row, values in rows.items():
            axis.scatter(values["attainment"], values["quality"], label=row, marker="*" if row == "ours" else "o")
        axis.axvline(attainment, linestyle=":", color="grey")
        axis.set(title=name, xlabel="attainment")
    axes[0][0].set_ylabel("mean quality")
    axes[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--requests", type=int, default=20_000, help="over all traces together")
    parser.add_argument("--attainment", type=float, default=0.95)
    parser.add_argument("--trace", help="CSV file to replay instead of the five traces")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--plot", metavar="PNG")
    options = parser.parse_args(arguments)
    begin = time.perf_counter()
    n = max(2000, options.requests // len(TRACES))
    traces = (
        [read_trace(options.trace, options.seed)]
        if options.trace
        else [build(name, n, options.seed) for name in TRACES]
    )
    setpoint = tuned_setpoint(options.attainment, options.seed)
    results = {trace.name: compare(trace, options.attainment, setpoint) for trace in traces}
    seconds = time.perf_counter() - begin
    failed = shortfalls(results, options.attainment, min(len(trace.load) for trace in traces))
    if options.plot:
        plot(results, options.attainment, options.plot)
    if options.json:
        report: dict[str, Any] = {
            "attainment": options.attainment,
            "deadline_ms": DEADLINE_MS,
            "requests": sum(len(trace.load) for trace in traces),
            "seconds": seconds,
            "pid_setpoint": setpoint,
            "shortfalls": failed,
            "results": results,
        }
        json.dump(report, sys.stdout, indent=1)
        print()
        return 0
    columns = (
        "attainment",
        "quality",
        "of_oracle",
        "misses",
        "misses_max",
        "recover",
        "recover_max",
        "decision_us",
    )
    print(f"{'trace':11}{'row':12}" + "".join(f"{name:>12}" for name in columns))
    for name, rows in results.items():
        for row, values in rows.items():
            cells = (f"{values[c]:12.4f}" if c in values else " " * 12 for c in columns)
            print(f"{name:11}{row:12}" + "".join(cells))
    print(f"{sum(len(t.load) for t in traces)} requests a row in {seconds:.1f} s; target {options.attainment}")
    print("must hold: " + ("; ".join(failed) or "all of it holds"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
