"""What the simulation says of replicas, from what `scale` measured of a request's work: of one and two on the same
machine, and of up to a thousand that have machines of their own.

Knows the simulation. Must not know servers.
"""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from adaptive_fusion.plots import new_figure, save_figure
from benchmarks.fleet import Load, at_rate, by_clients

HELD = 0.95
CALM = 0.7
"""Of what is held: load at which times and cached images of fleets are told."""
SIZES = (1, 2, 4, 10, 30, 100, 300, 1000)


def load_of(found: dict[str, Any], count: str = "1", **more: Any) -> Load:
    """What a request does, as it was measured while there were so many replicas and it was alone."""
    work, cached = found["work"][count], found["cached"]
    return Load(
        [work["replica_s"] * each for each in work["spread"]],
        [work["replica_s"] * cached["of_new"] * each for each in cached["spread"]],
        around_s=max(0.0, work["mean_s"] - work["replica_s"]),  # some of what is done around it is done beside it
        **more,
    )


def predictions(found: dict[str, Any], clients: int) -> dict[str, dict[str, float]]:
    """The simulation's word on what was measured, and what it is off by."""
    out = {}
    for count, row in found["measured"].items():
        cores = found["cores"] - found["work"][count]["resting"]
        # Processor time of requests on two cores at once, in times of one alone: memory and caches are shared.
        slowed = _processor_s(found["beside"]) / _processor_s(found["work"]["2"])
        load = load_of(found, count, cores=cores, slowed=max(1.0, slowed), images=32, zipf=0.0)
        most = by_clients(load, int(count), clients, 4000).throughput
        took = mean(at_rate(load, int(count), row["rate"], 8000, steady=True).took_s)
        out[count] = {
            "throughput": most,
            "throughput_off": most / row["throughput"] - 1,
            "mean_s": took,
            "mean_off": took / row["mean_s"] - 1,
        }
    return out


def _processor_s(row: dict[str, Any]) -> float:
    return float(row["replica_s"] + row["around_s"])


def held(load: Load, count: int, limit_s: float, requests: int) -> float:
    """Requests a second that replicas hold with enough of them within the limit, found by bisection."""
    low, high = 0.0, count / mean(load.hit_s if load.held else load.miss_s)
    for _ in range(7):
        rate = (low + high) / 2
        if at_rate(load, count, rate, requests).within(limit_s) >= HELD:
            low = rate
        else:
            high = rate
    return low


def fleets(found: dict[str, Any], deadline: float, most: int, images: int, kept: int) -> list[dict[str, float]]:
    """What replicas on machines of their own hold, with and without caches."""
    limit_s = deadline * found["work"]["1"]["alone_s"]
    rows = []
    for count in (size for size in SIZES if size <= most):
        requests = 100 * count if count > 10 else 1500
        plain = held(load_of(found), count, limit_s, requests)
        cached = load_of(found, images=images, held=kept)
        rate = held(cached, count, limit_s, requests)
        fleet = at_rate(cached, count, CALM * rate, 6 * requests)
        rows.append(
            {
                "replicas": count,
                "held": plain,
                "held_cached": rate,
                "hit_rate": fleet.hit_rate,
                "median_s": fleet.quantile(0.5),
                "p95_s": fleet.quantile(0.95),
            }
        )
    return rows


def draw(rows: Sequence[dict[str, float]], path: Path) -> None:
    """What `fleets` found, as a PNG: what is held a replica, and how often an image is cached."""
    figure = new_figure(8, 3.6)
    left, right = figure.subplots(1, 2)
    counts = [row["replicas"] for row in rows]
    for key, label in (("held", "no cache"), ("held_cached", "with caches")):
        left.plot(counts, [row[key] / row["replicas"] for row in rows], "o-", label=label)
    left.set_ylabel("requests a second held, a replica")
    left.legend()
    right.plot(counts, [row["hit_rate"] for row in rows], "o-", label="image is cached")
    right.set_ylabel("share of requests with a cached image")
    right.set_ylim(0, 1)
    for axes in (left, right):
        axes.set_xscale("log")
        axes.set_xlabel("replicas")
        axes.grid(alpha=0.3)
    left.set_ylim(bottom=0)
    save_figure(figure, path)
