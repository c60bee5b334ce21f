"""The recipe of the reference model on this machine: how fast its screens are drawn on all cores.

Training itself follows once the recipe takes a device; see `training/reference`.
"""

import os
import random
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

from benchmarks.gpu.book import Desk, Row, Skip
from benchmarks.gpu.models import Scale

RECIPE = Path(__file__).resolve().parents[2] / "training" / "reference"
BATCHES = 256


def run(desk: Desk, scale: Scale) -> None:
    """Drawing on one core and on all."""
    cores = os.cpu_count() or 1
    for workers in dict.fromkeys((1, cores)):
        desk.row(f"drawing on {workers} cores", partial(_drawing, scale, workers), needs_s=25)
    desk.row("training", _training)


def _drawing(scale: Scale, workers: int) -> Row:
    """Scenes a second of the recipe's last stage, tensors included."""
    batches = 2 if scale.tiny else BATCHES * workers // (os.cpu_count() or 1) or 1
    if scale.tiny and workers > 1:
        raise Skip("one core is enough at a tiny scale")
    if workers == 1:
        began = time.perf_counter()
        scenes = sum(map(draw, range(batches)))
    else:
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            list(pool.map(draw, range(workers)))  # imports
            began = time.perf_counter()
            scenes = sum(pool.map(draw, range(batches)))
    seconds = time.perf_counter() - began
    return {"workers": workers, "scenes": scenes, "scenes_per_s": round(scenes / seconds, 2)}


def draw(seed: int) -> int:
    """Draw one batch of the last stage; how many scenes it has."""
    import torch

    torch.set_num_threads(1)
    sys.path.insert(0, str(RECIPE))
    try:
        import build
        import data
    finally:
        sys.path.remove(str(RECIPE))
    batch = data.sample_batch(build.build_processor(), data.CURRICULUM[-1], random.Random(seed), "train")
    return len(batch.scenes)


def _training() -> Row:
    raise Skip("the recipe trains on the CPU: its batches and losses are built there")
