"""What measuring complexity costs, on one thread, for decoded images.

    python benchmarks/complexity.py [--rounds N] [--json]

The image is a dense screen drawn here: panels, rows of small text, bars. Rows: 1080p and 4K, as a PIL image
and as an array; `edge_entropy`, edge density and entropy alone with the sampling they need; `full`, all of
`measure_complexity`. Variants take turns in random order, so that other load on the machine hits all alike.
Median and 95th percentile are of the thread's CPU time, which other processes cannot stretch by taking the
processor, though they can by sharing its core and caches; `wall` is the median of the wall time.
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import cv2
import numpy as np
from PIL import Image, ImageDraw

from adaptive_fusion.features.complexity import measure_complexity
from adaptive_fusion.features.image import Pixels, edge_density_and_entropy, take_sample

SIZES = {"1080p": (1920, 1080), "4K": (3840, 2160)}
LIMITS_MS = {"edge_entropy": 1.0, "full": 1.5}


def dense_screen(width: int, height: int) -> Image.Image:
    """A dashboard of small text and bars; the same for the same size."""
    rng = random.Random(0)
    image = Image.new("RGB", (width, height), (246, 246, 248))
    draw = ImageDraw.Draw(image)
    column, row = width // 8, height // 6
    for left in range(0, width - column + 1, column):
        for top in range(0, height - row + 1, row):
            ground = tuple(rng.randrange(200, 256) for _ in range(3))
            draw.rectangle((left + 4, top + 4, left + column - 4, top + row - 4), ground, (120, 120, 130))
            for line in range(top + 12, top + row // 2, 14):
                text = "".join(rng.choices("abcdefghijklmnopqrstuvwxyz 0123456789", k=column // 8))
                draw.text((left + 10, line), text, tuple(rng.randrange(120) for _ in range(3)))
            for bar in range(left + 10, left + column - 24, 18):
                colour = tuple(rng.randrange(256) for _ in range(3))
                high = rng.randrange(8, row // 2 - 16)
                draw.rectangle((bar, top + row - 10 - high, bar + 12, top + row - 10), colour)
    return image


def edge_and_entropy(image: Pixels) -> tuple[float, float]:
    return edge_density_and_entropy(take_sample(image, with_scan=False).grey)


def measure(rounds: int) -> list[dict[str, Any]]:
    variants: dict[tuple[str, str, str], Callable[[], object]] = {}
    for size, (width, height) in SIZES.items():
        image = dense_screen(width, height)
        for form, pixels in (("PIL", image), ("array", np.asarray(image).copy())):
            variants[size, form, "edge_entropy"] = partial(edge_and_entropy, pixels)
            variants[size, form, "full"] = partial(measure_complexity, pixels)
    times: dict[tuple[str, str, str], list[tuple[float, float]]] = {key: [] for key in variants}
    order = list(variants)
    for lap in range(rounds + 5):
        random.Random(lap).shuffle(order)
        for key in order:
            variants[key]()  # the caches of one image are those of a server that has just decoded it
            wall, cpu = time.perf_counter(), time.thread_time()
            variants[key]()
            if lap >= 5:
                times[key].append(((time.thread_time() - cpu) * 1e3, (time.perf_counter() - wall) * 1e3))
    rows = []
    for (size, form, what), taken in times.items():
        cpu_ms, wall_ms = zip(*taken, strict=True)
        rows.append(
            {
                "size": size,
                "input": form,
                "what": what,
                "median_ms": round(statistics.median(cpu_ms), 3),
                "p95_ms": round(statistics.quantiles(cpu_ms, n=20)[-1], 3),
                "wall_ms": round(statistics.median(wall_ms), 3),
                "limit_ms": LIMITS_MS[what],
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    cv2.setNumThreads(1)
    rows = measure(max(2, options.rounds))
    if options.json:
        print(json.dumps(rows))
        return
    print(f"{'image':8}{'input':8}{'what':14}{'median':>10}{'p95':>10}{'wall':>10}{'limit':>10}   (ms)")
    for row in rows:
        figures = "".join(f"{row[key]:10.3f}" for key in ("median_ms", "p95_ms", "wall_ms", "limit_ms"))
        print(f"{row['size']:8}{row['input']:8}{row['what']:14}{figures}")


if __name__ == "__main__":
    main()
