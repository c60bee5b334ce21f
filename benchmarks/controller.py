"""Budget control simulated: the library's own controller against others, on long traces where the truth is known.

    python benchmarks/controller.py [--requests N] [--attainment A] [--trace FILE.csv] [--json] [--plot PNG]

Times, qualities and memory of the eight operating points are a stated model (`LADDER`), not a measurement; what is
real is the controller, called once per request as a runner calls it. Half of the requests are simple.
`adaptive-fusion bench budget` puts the same rows on the same traces with times measured on the reference model; rows,
traces, the form of a trace file and what the columns mean are told in `adaptive_fusion.bench.baselines` and `traces`.
Here ``best static`` has one point for all requests.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from adaptive_fusion.bench import report
from adaptive_fusion.bench.baselines import FED, compare, tuned_setpoint
from adaptive_fusion.bench.outcomes import shortfalls
from adaptive_fusion.bench.traces import (
    MIN_REQUESTS,
    TRACES,
    BoolArray,
    Case,
    FloatArray,
    IntArray,
    World,
    build,
    read_trace,
)
from adaptive_fusion.commands.output import progress
from adaptive_fusion.control.candidates import Candidate
from adaptive_fusion.decisions import Prediction
from adaptive_fusion.errors import AdaptiveFusionError
from adaptive_fusion.point import OperatingPoint
from adaptive_fusion.progress import Steps

DEADLINE_MS = 220.0
SQUEEZE_GB = 0.45
NOISE, POINT_NOISE, MEMORY_NOISE = 0.12, 0.03, 0.03

# (fusion, downsample, share of the pixels, quality on dense requests, on simple ones, log error of the profile)
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
WORKS = np.exp(0.5 * np.array([statistics.NormalDist().inv_cdf((i + 0.5) / 32) for i in range(32)]))


def predict(work: float, down: float, share: float) -> Prediction:
    """The stated cost model: milliseconds and GiB of a point on a request of `work` usual requests' patches."""
    patches = work * share
    tokens = patches * down * down
    return Prediction(
        100 * patches + 10 * patches * patches,
        20 + 70 * tokens,
        30 + 10 * tokens,
        0.1 + 0.5 * patches + 0.4 * tokens,
    )


def stated_world() -> World:
    """Requests of 32 sizes, simple and dense; the first rung is native, so the native column repeats it."""
    cases, quality, predicted = [], [], []
    for work in WORKS.tolist():
        costs = [predict(work, row[1], row[2]) for row in LADDER]
        for simple in (False, True):
            worth = [row[4] if simple else row[3] for row in LADDER]
            rungs = tuple(Candidate(p, q, cost) for p, q, cost in zip(POINTS, worth, costs, strict=True))
            cases.append(Case("all", rungs, simple, work))
            quality.append([worth[0], *worth])
            predicted.append([(cost.latency_ms, cost.peak_memory_gb) for cost in (costs[0], *costs)])
    expected = np.array(predicted)
    bias = np.array([LADDER[0][5], *(row[5] for row in LADDER)])

    def draw(case: IntArray, _busy: BoolArray, rng: np.random.Generator) -> tuple[FloatArray, FloatArray]:
        shape = (len(case), len(bias))
        noise = rng.normal(0, NOISE, (len(case), 1)) + rng.normal(0, POINT_NOISE, shape) + bias
        times = expected[case, :, 0] * np.exp(noise)
        return times, expected[case, :, 1] * np.exp(rng.normal(0, MEMORY_NOISE, shape))

    return World(
        cases=tuple(cases),
        quality=np.array(quality),
        limit="latency_ms",
        deadline_ms=DEADLINE_MS,
        squeeze_gb=SQUEEZE_GB,
        memory_margin=1.1,
        draw=draw,
        cheapest=np.full(len(cases), len(LADDER)),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--requests", type=int, default=20_000, help="over all traces together")
    parser.add_argument("--attainment", type=float, default=0.95)
    parser.add_argument("--trace", type=Path, help="CSV file to replay instead of the five traces")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--plot", type=Path, metavar="PNG")
    options = parser.parse_args(arguments)
    begin = time.perf_counter()
    n = max(MIN_REQUESTS, options.requests // len(TRACES))
    world = stated_world()
    try:
        setpoint = tuned_setpoint(world, options.attainment, options.seed)
        if options.trace is not None:
            traces = [read_trace(options.trace, options.seed)(world)]
        else:
            traces = [build(name, world, n, options.seed) for name in TRACES]
        with progress(options.json) as shown:
            steps = Steps(shown, "replay", FED * len(traces))
            results = {trace.name: compare(trace, options.attainment, setpoint, steps) for trace in traces}
        seconds = time.perf_counter() - begin
        found = {
            "attainment": options.attainment,
            "limit": world.limit,
            "deadline_ms": DEADLINE_MS,
            "requests": min(len(trace.load) for trace in traces),
            "seconds": seconds,
            "pid_setpoint": setpoint,
            "shortfalls": shortfalls(results, options.attainment, min(len(trace.load) for trace in traces)),
            "traces": results,
        }
        if options.plot:
            report.plot_budget(found, options.plot)
    except AdaptiveFusionError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    if options.json:
        json.dump(found, sys.stdout, indent=1)
        print()
        return 0
    report.console().print(report.budget_table(found))
    total = sum(len(trace.load) for trace in traces)
    print(f"{total} requests a row in {seconds:.1f} s; stated costs, not measured ones")
    print(report.must_hold(found["shortfalls"]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
