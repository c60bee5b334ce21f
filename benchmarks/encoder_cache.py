"""What the encoder cache saves: time to the first token of a hit as a share of a miss, on the reference model.

Each pair asks two different questions of one image that nobody has seen, so that the second finds what the first has
left; pairs of all sizes take turns. A share is the median over pairs, with a bootstrap interval; both halves of a pair
run in one go, so that shares mean something on a busy machine too. Prints what falls short of its target and then
exits with 1:

    python benchmarks/encoder_cache.py [--pairs 20] [--json]
"""

import argparse
import json
import random

import numpy as np
import torch

from adaptive_fusion import AdaptiveRunner, OperatingPoint
from adaptive_fusion.evaluation.statistics import bootstrap
from adaptive_fusion.point import NATIVE
from adaptive_fusion.reference.screens import PROMPTS, make_scene

SIDES = (256, 384, 512)
TARGET = 0.5
"""Most that a hit may take of a miss."""
POINTS = {"native": (NATIVE, NATIVE), "half the grid after all of it": (NATIVE, OperatingPoint(downsample=0.5))}


def shares(runner: AdaptiveRunner, pairs: int) -> dict[str, list[float]]:
    """Hit over miss of every pair, by what was asked."""
    found: dict[str, list[float]] = {}
    order = random.Random(0)
    jobs = [(side, name) for side in SIDES for name in POINTS] * pairs
    for seed, (side, name) in enumerate(order.sample(jobs, len(jobs))):
        image = make_scene("dense", seed, "eval", (side, side)).image
        first, second = POINTS[name]
        miss = runner.chat(image, PROMPTS["describe"], point=first, max_new_tokens=1)
        hit = runner.chat(image, "What is at the top?", point=second, max_new_tokens=1)
        if (miss.decision.encoder_cache, hit.decision.encoder_cache) != ("miss", "hit"):
            raise SystemExit("a pair was no miss and a hit")
        found.setdefault(f"{side} x {side}, {name}", []).append(hit.measurement.ttft_ms / miss.measurement.ttft_ms)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    runner = AdaptiveRunner.from_pretrained("reference", policy="native", encoder_cache_mb=256)
    runner.warm_up()
    rows = {}
    for name, values in sorted(shares(runner, arguments.pairs).items()):
        every = np.array(values)
        sure = bootstrap(lambda chosen, every=every: float(np.median(every[chosen])), len(every), seed=0)
        rows[name] = {"hit_over_miss": sure.mean, "low": sure.low, "high": sure.high, "target": TARGET}
    if arguments.json:
        print(json.dumps(rows, indent=2))
    else:
        for name, row in rows.items():
            print(f"{name:45} hit / miss {row['hit_over_miss']:.3f} [{row['low']:.3f}, {row['high']:.3f}]")
    short = [name for name, row in rows.items() if row["hit_over_miss"] > TARGET]
    if short:
        raise SystemExit(f"above {TARGET} of a miss: {'; '.join(short)}")


if __name__ == "__main__":
    main()
