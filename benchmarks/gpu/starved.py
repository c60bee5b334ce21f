"""Memory that runs out for real: a process whose share of the device is too small for what it is asked.

    python -m benchmarks.gpu.starved --device cuda [--requests 50]

It prints one JSON object. Isolated in a process of its own, because the limit holds for all of it. Elsewhere than on a
GPU, where no such limit can be set, the encoder says that memory ran out for all but the last step.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from adaptive_fusion.errors import OutOfMemoryError
from adaptive_fusion.point import OperatingPoint
from adaptive_fusion.runner import AdaptiveRunner
from benchmarks.gpu.book import Desk, Row, tidy
from benchmarks.gpu.models import QUESTION, Scale, noise

ROOT = Path(__file__).resolve().parents[2]
REQUESTS, SIDE, TOKENS = 50, 1448, 4
GIB = float(1 << 30)


def run(desk: Desk, scale: Scale) -> None:
    """Both kinds of request, in one process of their own."""
    desk.row("4b", partial(_apart, scale), needs_s=55)


def _apart(scale: Scale) -> Row:
    if scale.tiny:
        return both(scale, 3)
    command = [sys.executable, "-m", "benchmarks.gpu.starved", "--device", str(scale.device)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
    # Else what building the model left in split blocks is enough for every request, and the limit is never met.
    environment.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"the process ended with {done.returncode}: {last[:200]}")
    made: Row = json.loads(done.stdout.splitlines()[-1])
    return made


def both(scale: Scale, requests: int) -> Row:
    """Of requests with a pixel budget, and of a quarter as many without one, which can only step down after the
    encoder."""
    few = max(3, requests // 4)
    return {"with a pixel budget": starve(scale, True, requests), "native": starve(scale, False, few)}


def starve(scale: Scale, budgeted: bool, requests: int) -> Row:
    """Ask the same large image `requests` times within a limit half way between its own need and a quarter's.

    `grown_gb` is what is allocated after the last request above what it was after the third, `fragments_gb` the most
    that lay unused in split blocks, `reserved_gb` the allocator's own least and most.
    """
    runner = scale.runner("4b", "native")
    side = scale.side(SIDE)
    point = OperatingPoint(max_pixels=side * side) if budgeted else OperatingPoint()
    least = OperatingPoint(downsample=0.25, max_pixels=side * side // 4 if budgeted else None)
    ask = partial(_ask, runner, noise(side, 0))
    needs = [ask(each).measurement.peak_memory_gb for each in (point, least)]
    tidy()
    kept: list[float] = []
    fragments: list[float] = []
    reserved: list[float] = []
    counts = {"answered": 0, "stepped_down": 0, "out_of_memory": 0}
    with _limited(runner, scale.device, sum(needs) / 2) as limit_gb:
        for _ in range(requests):
            try:
                reply = ask(point)
                counts["answered"] += 1
                counts["stepped_down"] += reply.decision.point != point
                del reply
            except OutOfMemoryError:
                counts["out_of_memory"] += 1
            stats = _stats(scale.device)
            kept.append(stats["allocated"])
            fragments.append(stats["fragments"])
            reserved.append(stats["reserved"])
    return {
        "requests": requests,
        "enforced": scale.device.type == "cuda",
        "limit_gb": limit_gb,
        "needs_gb": {"asked": needs[0], "least": needs[1]},
        **counts,
        "grown_gb": kept[-1] - kept[min(2, len(kept) - 1)],
        "fragments_gb": max(fragments),
        "reserved_gb": [min(reserved), max(reserved)],
    }


def _ask(runner: AdaptiveRunner, image: Any, point: OperatingPoint) -> Any:
    return runner.chat(image, QUESTION, point=point, max_new_tokens=TOKENS, do_sample=False)


def _stats(device: torch.device) -> dict[str, float]:
    """GiB that are allocated, lie in split blocks, and are reserved in all."""
    if device.type != "cuda":
        return {"allocated": 0.0, "fragments": 0.0, "reserved": 0.0}
    stats = torch.cuda.memory_stats(device)
    keys = {"allocated": "allocated_bytes", "fragments": "inactive_split_bytes", "reserved": "reserved_bytes"}
    return {name: stats[f"{key}.all.current"] / GIB for name, key in keys.items()}


@contextmanager
def _limited(runner: AdaptiveRunner, device: torch.device, more_gb: float) -> Iterator[float]:
    """Inside this context there are `more_gb` above what is reserved now; gives the limit in GiB."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        limit = torch.cuda.memory_reserved(device) + more_gb * GIB
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total), device)
        try:
            yield limit / GIB
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, device)
        return
    adapter = runner.adapter
    encode: Callable[..., Any] = adapter.encode

    def short(inputs: Any, point: OperatingPoint, *more: Any) -> Any:
        if point.downsample > 0.25:
            raise torch.OutOfMemoryError("out of memory, as a limit would say")
        return encode(inputs, point, *more)

    adapter.encode = short  # type: ignore[method-assign]
    try:
        yield more_gb
    finally:
        del adapter.encode


def shortfalls(rows: Mapping[str, Any]) -> list[str]:
    """What grew, requests that had no answer though their pixels could be taken away, and limits that were not met."""
    found = []
    for key, cases in rows.items():
        for name in ("with a pixel budget", "native"):
            case = cases[name]
            if case["grown_gb"] > 0:
                found.append(f"{key} {name}: {case['grown_gb']:.3f} GiB more after {case['requests']} requests")
            if case["stepped_down"] + case["out_of_memory"] == 0:
                found.append(f"{key} {name}: memory never ran out, so that nothing was shown")
        lost = cases["with a pixel budget"]["requests"] - cases["with a pixel budget"]["answered"]
        if lost:
            found.append(f"{key}: {lost} requests had no answer")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--requests", type=int, default=REQUESTS)
    options = parser.parse_args()
    print(json.dumps(both(Scale(torch.device(options.device)), options.requests)))


if __name__ == "__main__":
    main()
