"""What `adapt` buys with so many images: policies fitted to a model on some scenes, judged on others.

    python benchmarks/adapt.py --out runs/adapt [--model reference] [--images 400] [--draws 5]

A pool of synthetic screens (half simple, the rest dense and reading) is answered once, at the shares that `adapt` would
run, in a work folder that a later run goes on with. Then for each number of images, and each of several draws of them
from the pool, a policy is fitted and judged on all other images of the pool. Beside it: the general policy where it is
trusted (``escalate=False``), the general policy with escalation, which is what a model gets that nothing was fitted to,
and an oracle that knows the smallest share that is good enough. Figures are shares of native's.
"""

import argparse
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import torch

from adaptive_fusion.evaluation.questions import Question
from adaptive_fusion.learning.adapting.adapt import Adaptation, policy_name
from adaptive_fusion.learning.adapting.answers import Answers
from adaptive_fusion.learning.adapting.fit import adapt_policy
from adaptive_fusion.learning.adapting.judge import Taken, take
from adaptive_fusion.loading import open_runner
from adaptive_fusion.reference.screens import Kind, make_scene

KINDS: tuple[Kind, ...] = ("simple", "dense", "simple", "reading")
PROMPTS = {"simple": ("Describe the screen.",), "dense": ("Describe the screen.", "Read the text.")}
PROMPTS["reading"] = PROMPTS["dense"]
FIRST = 50_000
"""Seed of the first scene, beyond those that the reference model was trained on."""
COUNTS = (25, 50, 100, 200)
HELD = 60
"""Fewest images that are left to judge by."""
ROWS = ("kept", "tokens", "ttft", "second")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="work folder")
    parser.add_argument("--model", default="reference")
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--draws", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    runner = open_runner(options.model, "balanced")
    name = policy_name(options.model, runner.fingerprint.digest)
    work = Adaptation(runner, list(scenes(options.images)), options.out, name, measure=False)
    pool = work.answered()
    judge = partial(take, runner.adapter, profile=runner.profile)
    trusted = judge(policy=work.base, answers=pool, asks=False)
    general = judge(policy=work.base, answers=pool)
    print(f"{pool.images} images, {len(pool)} questions, shares {', '.join(f'{share:g}' for share in pool.shares)}")
    everything = np.ones(len(pool), dtype=bool)
    show("general, trusted", [figures(pool, trusted, everything)])
    show("general, escalating", [figures(pool, general, everything)])
    show("oracle", [figures(pool, oracle(pool), everything)])
    for count in COUNTS:
        if pool.images - count < HELD:
            continue
        found, beside = [], []
        for draw in range(options.draws):
            rows = drawn(pool, count, draw)
            policy = adapt_policy(pool.take(rows), work.base, "adapted").policy
            found.append(figures(pool, scattered(judge(policy=policy, answers=pool.take(~rows)), ~rows), ~rows))
            beside.append(figures(pool, general, ~rows))
        show(f"adapted, {count} images", found)
        show("  general, escalating, on the same images", beside)


def scenes(count: int) -> Iterator[Question]:
    """Questions about so many screens."""
    for seed in range(count):
        kind = KINDS[seed % len(KINDS)]
        image = make_scene(kind, FIRST + seed, "train", sides=(256, 384)).image
        yield from (Question(image, prompt, slices={"scene": kind}) for prompt in PROMPTS[kind])


def drawn(pool: Answers, count: int, draw: int) -> np.ndarray:
    """Rows of `count` images."""
    images = np.unique(pool.group)
    return np.isin(pool.group, np.random.default_rng(draw).permutation(images)[:count])


def oracle(pool: Answers) -> Taken:
    """The smallest share of one pass that is good enough, known beforehand."""
    places = [[rung.pixel_share for rung in pool.rungs].index(share) for share in (1.0, *pool.shares)]
    good = (pool.kept >= 1 - pool.tolerance).sum(axis=1)
    column, row = np.array(places)[good], np.arange(len(pool))
    parts = (pool.quality[row, column], pool.cost[row, column], pool.tokens[row, column])
    return Taken(*parts, np.zeros(len(pool), dtype=bool))


def scattered(taken: Taken, rows: np.ndarray) -> Taken:
    """What became of some rows, in the places that they have among all."""
    return Taken.together({0: (rows, taken)}, len(rows))


def figures(pool: Answers, taken: Taken, rows: np.ndarray) -> dict[str, float]:
    """Means over rows, and shares of native's sums."""
    native = [rung.name for rung in pool.rungs].index("native@1")
    return {
        "kept": float(taken.quality[rows].mean()),
        "tokens": float(taken.tokens[rows].sum() / pool.tokens[rows, native].sum()),
        "ttft": float(taken.cost[rows].sum() / pool.cost[rows, native].sum()),
        "second": float(taken.second[rows].mean()),
    }


def show(name: str, found: list[dict[str, float]]) -> None:
    """One row: the mean over draws, and the least and the most."""
    cells = []
    for key in ROWS:
        values = [each[key] for each in found]
        spread = f" ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else ""
        cells.append(f"{key} {np.mean(values):.3f}{spread}")
    print(f"{name}: {', '.join(cells)}", flush=True)
    print(json.dumps({"row": name.strip(), "figures": found}), flush=True)


if __name__ == "__main__":
    main()
