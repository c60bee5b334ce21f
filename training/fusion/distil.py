"""Distil the fusion modules that the shipped policies name, and measure what they win back on held-out scenes.

    python training/fusion/distil.py --out runs/fusion
    python training/fusion/distil.py --out runs/fusion --shipped     # measure those that are shipped, train none

The frozen reference model answers screens of the training split at full compute; `weighted` (rank 4) and `gated`
(rank 8), each one module for 12, 9, 6 and 3 levels, learn from those answers alone. Then every row answers evaluation
scenes, and the table says how much of the quality that average pooling loses each module wins back. Two processes of
one thread share the work. An interrupted run goes on where it was; ``log.jsonl`` holds the curves, ``results.json``
every figure.
"""

import argparse
import json
import multiprocessing
import random
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from figures import RATIOS, summarise, table
from transformers.utils import logging

from adaptive_fusion.bench.answers import gated, native, weighted
from adaptive_fusion.evaluation.questions import Question
from adaptive_fusion.evaluation.scenes import media, reference_questions
from adaptive_fusion.fusion import DeepStackFusion
from adaptive_fusion.learning.distillation.distil import distil
from adaptive_fusion.learning.distillation.settings import Settings
from adaptive_fusion.learning.distillation.teacher import Teacher, answer_logits, greedy, prepare
from adaptive_fusion.models import GridAdapter
from adaptive_fusion.point import OperatingPoint
from adaptive_fusion.policy.policy import Policy
from adaptive_fusion.reference.screens import KINDS, PROMPTS, make_scene
from adaptive_fusion.runner import AdaptiveRunner

KINDS_OF_ROW = {"average": native, "weighted": weighted, "gated": gated}
MIX = (0.2, 0.45, 0.2, 0.15)
"""Shares of simple, dense, reading and clip scenes."""
SIDES = (((96, 160), 0.55), ((160, 272), 0.3), ((256, 384), 0.15))
"""Ranges of the scenes' sides in pixels, with their shares: mostly small, since those cost least."""
LARGEST = 48_000
"""Pixels; larger scenes are left out of training. What is pooled is a few patches wide, so small ones teach it too."""
SHIPPED = ("reference-balanced", "reference-latency", "reference-quality")
"""Policies that have the modules."""
BATCH = 16
MOST = 160


def questions(count: int, seed: int) -> list[Question]:
    """`count` screens of the training split less the large ones, each with the prompt of its kind."""
    rng = random.Random(seed)
    found = []
    for _ in range(count):
        kind = rng.choices(KINDS, MIX)[0]
        sides = rng.choices([s for s, _ in SIDES], [share for _, share in SIDES])[0]
        scene = make_scene(kind, rng.getrandbits(40), "train", sides)
        task = "read" if kind == "dense" and rng.random() < 0.1 else scene.task
        question = Question(media(scene), PROMPTS[task])
        if area(question.media) <= LARGEST:
            found.append(question)
    return found


def settings_of(args: argparse.Namespace) -> Settings:
    return Settings(
        steps=args.steps,
        batch=BATCH,
        lr=args.lr,
        ratios={1.0: 0.5, 0.5: 2.0, 0.25: 2.0},
        layers={12: 3, 9: 1, 6: 1, 3: 1},
        pixel_shares={1.0: 0.6, 0.5: 0.15, 0.25: 0.15, 0.125: 0.1},
        max_new_tokens=MOST,
        holdout=0.02,
        judged=128,
        every=max(1, args.steps // 10),
        patience=10,
        seed=args.seed,
        cache_gb=args.cache_gb,
    )


def adapter_of(args: argparse.Namespace) -> GridAdapter:
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    adapter = AdaptiveRunner.from_pretrained(args.model, policy="native", dtype=torch.float32).adapter
    assert isinstance(adapter, GridAdapter)
    return adapter


def trained(name: str) -> OperatingPoint:
    """What a module is trained for: all levels, as its parts serve the smaller counts."""
    return replace(KINDS_OF_ROW[name]().point, layers=12)


def module_path(args: argparse.Namespace, name: str) -> Path:
    file = f"{trained(name).name.partition('@')[0]}.safetensors"
    shipped = Policy.load(SHIPPED[0]).fusion_weights if args.shipped else ()
    return next((path for path in shipped if path.name == file), Path(args.out) / file)


# The three stages, each shared by the processes


def ask(args: argparse.Namespace, part: int) -> int:
    """Every `workers`-th window of questions goes to the teacher; its answers stay in the shared folder."""
    adapter = adapter_of(args)
    mine = questions(args.scenes, args.seed)[part :: args.workers]
    # A batch takes as long as its longest answer, which the prompt tells most about.
    mine.sort(key=lambda question: question.prompt)
    return len(Teacher(adapter, Path(args.out) / "answers", max_new_tokens=MOST, batch=32).ask(mine))


def train(args: argparse.Namespace, name: str) -> dict[str, Any]:
    adapter = adapter_of(args)
    began = time.monotonic()

    def note(entry: Mapping[str, Any]) -> None:
        write(args, {"module": name, "seconds": round(time.monotonic() - began, 1), **entry})

    report = distil(
        adapter,
        questions(args.scenes, args.seed),
        trained(name),
        module_path(args, name),
        settings_of(args),
        answers=Path(args.out) / "answers",
        resume=True,
        note=note,
    )
    return report.to_dict()


@torch.no_grad()
def measure(args: argparse.Namespace, part: int) -> dict[str, dict[str, list[float]]]:
    """Quality and token accuracy of every row on every `workers`-th question: {row: {metric: [a value a question]}}."""
    adapter = adapter_of(args)
    for name in ("weighted", "gated"):
        adapter.add_fusion(DeepStackFusion.from_file(module_path(args, name)))
    mine = held_out(args.judge)[part :: args.workers]
    order = sorted(range(len(mine)), key=lambda i: (mine[i].slice, area(mine[i].media)))
    found: dict[str, dict[str, list[float]]] = {}
    tokenizer = adapter.processor.tokenizer
    for name, kind in KINDS_OF_ROW.items():
        for ratio in RATIOS:
            point = kind(ratio).point
            quality, accuracy = [0.0] * len(mine), [0.0] * len(mine)
            for start in range(0, len(order), BATCH):
                chosen = order[start : start + BATCH]
                rows = [prepare(adapter, mine[i]) for i in chosen]
                truths = [mine[i].references[0] for i in chosen]
                ends = [[*tokenizer(t, add_special_tokens=False).input_ids, tokenizer.eos_token_id] for t in truths]
                right = [torch.tensor(ids) for ids in ends]
                said = greedy(adapter, rows, point, MOST)
                logits = answer_logits(adapter, rows, right, point)
                for i, tokens, scores, truth in zip(chosen, said, logits, right, strict=True):
                    score = mine[i].score(tokenizer.decode(tokens, skip_special_tokens=True).strip())
                    assert score is not None  # all reference scenes have a metric
                    quality[i] = score
                    accuracy[i] = float((scores.argmax(-1) == truth).float().mean())
            found[f"{name}@{ratio:g}"] = {"quality": quality, "token_accuracy": accuracy}
            write(args, {"measured": f"{name}@{ratio:g}", "part": part, "quality": float(np.mean(quality))})
    return found


def held_out(count: int) -> list[Question]:
    """Evaluation scenes: `count` dense and reading ones each, half as many simple ones and clips."""
    kept: list[Question] = []
    for name in ("dense", "reading", "simple", "clips"):
        most = count if name in ("dense", "reading") else count // 2
        kept += [asked for asked in reference_questions(max(2, count)) if asked.slice == name][:most]
    return kept


def area(medium: Any) -> int:
    """Pixels of an image, or of all frames of a clip."""
    return int(np.prod(np.shape(medium.frames if hasattr(medium, "frames") else medium)[:-1]))


# What came of it


def ship(args: argparse.Namespace) -> None:
    """Put the modules, in half precision, into the shipped policies; their ladders' figures are then of older ones."""
    with tempfile.TemporaryDirectory() as folder:
        files = []
        for path in (module_path(args, name) for name in ("weighted", "gated")):
            files.append(Path(folder) / path.name)
            DeepStackFusion.from_file(path).save(files[-1], torch.float16)
        for policy in SHIPPED:
            replace(Policy.load(policy), fusion_weights=tuple(files)).save(args.ship / policy)


def write(args: argparse.Namespace, entry: Mapping[str, Any]) -> None:
    """One line for the log and for whoever watches."""
    line = json.dumps({"time": round(time.time(), 1), **entry})
    with (Path(args.out) / "log.jsonl").open("a", encoding="utf-8") as log:
        log.write(line + "\n")
    print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/fusion"))
    parser.add_argument("--model", default="reference", help="reference or a folder in Hugging Face format")
    parser.add_argument("--scenes", type=int, default=4_000, help="unlabelled training screens")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--judge", type=int, default=48, help="evaluation scenes of dense and reading each")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--cache-gb", type=float, default=4.0, help="memory of each process for encoder levels")
    parser.add_argument("--shipped", action="store_true", help="judge the modules that the policies have; train none")
    parser.add_argument("--ship", type=Path, metavar="POLICIES", help="folder of policies that get the modules")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    names, parts = ("gated", "weighted"), list(range(args.workers))
    with ProcessPoolExecutor(args.workers, multiprocessing.get_context("spawn")) as pool:

        def everywhere(task: Any, over: Sequence[Any]) -> list[Any]:
            began = time.monotonic()
            done = list(pool.map(task, [args] * len(over), over))
            write(args, {"stage": task.__name__, "seconds": round(time.monotonic() - began, 1)})
            return done

        reports = {}
        if not args.shipped:
            everywhere(ask, parts)
            reports = dict(zip(names, everywhere(train, names), strict=True))
        for name, report in reports.items():
            write(args, {"report": name, **report})
        measured = everywhere(measure, parts)
    judged = held_out(args.judge)
    found: dict[str, dict[str, list[float]]] = {
        row: {metric: [0.0] * len(judged) for metric in columns} for row, columns in measured[0].items()
    }
    for part, own in zip(parts, measured, strict=True):
        for row, columns in own.items():
            for metric, values in columns.items():
                found[row][metric][part :: args.workers] = values
    records = summarise(found, [asked.slice for asked in judged])
    (args.out / "results.json").write_text(
        json.dumps({"reports": reports, "records": records, "items": found}, indent=1) + "\n", encoding="utf-8"
    )
    (args.out / "table.md").write_text(table(records) + "\n", encoding="utf-8")
    print(table(records))
    if args.ship:
        ship(args)


if __name__ == "__main__":
    main()
