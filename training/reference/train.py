"""Train the reference VLM on synthetic screens: resumable, seeded, logged.

    python training/reference/train.py --out runs/reference

Curricula, one after the other: the first from nothing, each other from the model that the one before it leaves. Two
processes of one thread each share every step (on two cores this is faster than one process of two threads). A schedule
is warm-up, constant, then a linear cool-down. ``--curriculum refine --init FOLDER`` trains a shipped model on, and an
interrupted run goes on from its newest checkpoint. ``log.jsonl`` holds the curve.
"""

import argparse
import json
import math
import os
import random
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import build
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from data import CURRICULA, Encoded, Rows, Stage, encode_scene, kept_tokens, make_page, question, sample_batch
from forward import RATIOS, Pass, evaluate, points
from guides import Events, Gaze, WhereHeads, where_accuracy, where_loss
from muon import Muon
from torch import Tensor
from tqdm import tqdm
from transformers import Qwen3VLForConditionalGeneration
from transformers.utils import logging

PARTIAL_WEIGHT = 0.35
MUON_FACTOR = 3
HEADS_FACTOR = 4
SETTINGS: dict[str, tuple[type, str]] = {
    "steps": (int, "steps"),
    "lr": (float, "AdamW's rate; Muon gets three times as much, the guiding heads four times"),
    "warmup": (int, "steps of warm-up"),
    "cooldown": (float, "share of the steps that cool down"),
    "heads_first": (int, "steps in which only the guiding heads learn"),
    "every": (int, "steps between checkpoints"),
}
DEFAULTS: dict[str, dict[str, float]] = {
    "first": {"steps": 5600, "lr": 7e-4, "warmup": 200, "cooldown": 0.4, "heads_first": 0, "every": 500},
    "refine": {"steps": 1000, "lr": 2e-4, "warmup": 100, "cooldown": 0.7, "heads_first": 60, "every": 200},
    "finish": {"steps": 500, "lr": 1.5e-4, "warmup": 50, "cooldown": 0.8, "heads_first": 0, "every": 150},
    "clips": {"steps": 700, "lr": 2.5e-4, "warmup": 50, "cooldown": 0.7, "heads_first": 0, "every": 100},
}
"""What each curriculum is trained with; each starts from the model that the one before it leaves."""


def means(rows: list[list[float]]) -> list[float]:
    return [round(sum(column) / len(rows), 3) for column in zip(*rows, strict=True)]


def stage_at(curriculum: Sequence[Stage], progress: float) -> Stage:
    return next(stage for stage in curriculum if progress < stage.until or stage is curriculum[-1])


def learning_rate(step: int, steps: int, warmup: int, cooldown: float) -> float:
    """Trapezoid: warm-up, constant, linear to zero."""
    rise = min(1.0, (step + 1) / warmup)
    fall = min(1.0, (steps - step) / max(1.0, steps * cooldown))
    return rise * fall


def parameter_groups(model: Qwen3VLForConditionalGeneration) -> tuple[list[Tensor], list[Tensor]]:
    """Matrices of blocks and layers for Muon; embeddings, mergers, norms and biases for AdamW."""
    matrices, rest = [], []
    for name, p in model.named_parameters():
        inside = "blocks" in name or "layers" in name
        (matrices if p.ndim == 2 and inside else rest).append(p)
    return matrices, rest


class Worker:
    """One process of the run: model, guides, optimizers, and how far it is.

    Where there are several, each takes a batch of its own, gradients are averaged, and the first keeps log and
    checkpoint. The data of a step follow from (seed, step, rank) alone, so that a resumed run sees what an unbroken
    one would.
    """

    def __init__(self, rank: int, args: argparse.Namespace) -> None:
        self.rank, self.args = rank, args
        self.processor = build.build_processor()
        self.rows = Rows(self.processor)
        self.model = self._first_model()
        self.where = WhereHeads(self.model.config.text_config.hidden_size)
        self.gaze, self.events = Gaze(self.model), Events(self.model)
        matrices, rest = parameter_groups(self.model)
        heads = [*self.where.parameters(), *self.events.head.parameters()]
        self.parameters = [*matrices, *rest, *heads]
        self.optimizers: list[Any] = [
            Muon(matrices, lr=MUON_FACTOR * args.lr),
            torch.optim.AdamW(rest, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01),
            torch.optim.AdamW(heads, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01),
        ]
        self.step = self.seen = 0
        self.checkpoint = args.out / "checkpoint.pt"
        self._resume()
        self.log = (args.out / "log.jsonl").open("a") if rank == 0 else None
        self._begin_window()

    def _first_model(self) -> Qwen3VLForConditionalGeneration:
        """A shipped model to start from, or a fresh one whose first layer whitens patches of pages."""
        if self.args.init:
            return Qwen3VLForConditionalGeneration.from_pretrained(self.args.init, dtype=torch.float32).train()
        model = build.build_model(self.processor.tokenizer, self.args.seed).train()
        rng = random.Random(self.args.seed)
        pages = [encode_scene(self.processor, make_page(rng, (96, 128)))[0] for _ in range(120)]
        build.whiten(model, torch.cat(pages))
        return model

    def _resume(self) -> None:
        """Go on from the checkpoint; at the start of a curriculum, with the guiding heads of the one before."""
        if not self.checkpoint.exists():
            before = Path(self.args.init or "").parent / "checkpoint.pt"
            if self.args.init and before.exists():
                state = torch.load(before, weights_only=True)
                self.where.load_state_dict(state["where"])
                self.events.head.load_state_dict(state["events"])
            return
        state = torch.load(self.checkpoint, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.where.load_state_dict(state["where"])
        self.events.head.load_state_dict(state["events"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.seen = state["step"], state["seen"]

    # Steps

    def run(self) -> None:
        """All steps that are left, with log lines and checkpoints when they are due."""
        args = self.args
        bar = tqdm(total=args.steps, initial=self.step, disable=self.rank > 0, mininterval=10)
        while self.step < args.steps:
            stage = stage_at(CURRICULA[args.curriculum], args.start + (1 - args.start) * self.step / args.steps)
            norm, lr = self._train(stage)
            bar.update()
            if self.rank == 0 and self.step % 50 == 0:
                self._write_window(norm, lr)
            if (self.step % args.every == 0 and stage.pages < 1) or self.step == args.steps:
                self._judge(stage)

    def _train(self, stage: Stage) -> tuple[float, float]:
        """One step; the norm of its gradient, and the learning rate."""
        batch, found = self._forward(stage, random.Random(f"{self.args.seed}/{self.step}/{self.rank}"))
        losses = found.losses(stage)
        total = losses[0] + stage.where * where_loss(found.located, stage.late)
        for extra in losses[1:]:
            total = total + PARTIAL_WEIGHT * extra
        for looked, _ in found.gazes:
            total = total + self.args.gaze / len(found.gazes) * looked
        for happened in found.happened:
            total = total + self.args.gaze / len(found.happened) * Events.loss(happened)
        total.backward()
        norm = self._average_gradients()
        lr = self._update()
        self._count(batch, found, losses)
        return norm, lr

    def _forward(self, stage: Stage, rng: random.Random) -> tuple[Encoded, Pass]:
        """A batch, and what the model makes of it: at full tokens and at fewer, or of each scene at one of these."""
        batch = sample_batch(self.processor, stage, rng, "train")
        scenes = [scene for scene in batch.scenes if scene.answers]
        drops = scenes and stage.both and stage.dropped and rng.random() < stage.dropped
        keep = kept_tokens(batch, rng) if drops else None
        part = tuple(1.0 if keep is not None else rng.choice(RATIOS) for _ in scenes)
        asked = [question(scene, rng) for scene in scenes]
        if not scenes:
            ratios, questions, keeps = [], [], []
        elif stage.both:
            ratios = [tuple(1.0 for _ in scenes), part]
            questions, keeps = [asked, [question(scene, rng) for scene in scenes]], [None, keep]
        else:
            ratios, questions = [tuple(1.0 if rng.random() < 0.6 else ratio for ratio in part)], [asked]
            keeps = [None]
        where = self.where if batch.scenes[0].kind != "clip" else None
        found = points(self.model, self.rows, batch, ratios, questions, where, self.gaze, self.events, keeps)
        return batch, Pass(*found)

    def _average_gradients(self) -> float:
        """Over all processes, clipped to norm 1; returns the norm before."""
        sizes = [p.numel() for p in self.parameters]
        flat = torch.cat(
            [p.grad.reshape(-1) if p.grad is not None else torch.zeros(p.numel()) for p in self.parameters]
        )
        if self.args.world > 1:
            dist.all_reduce(flat)
            flat /= self.args.world
        norm = float(flat.norm())
        flat *= min(1.0, 1.0 / (norm + 1e-6))
        for p, grad in zip(self.parameters, flat.split(sizes), strict=True):
            p.grad = grad.view_as(p)
        return norm

    def _update(self) -> float:
        """Step all optimizers; returns AdamW's learning rate."""
        args = self.args
        lr = args.lr * learning_rate(self.step, args.steps, args.warmup, args.cooldown)
        # Fresh heads on a trained model learn first, alone: what they say at the start would only do it harm.
        waits = self.step < args.heads_first
        muon, rest, heads = self.optimizers
        for optimizer, rate in (
            (muon, MUON_FACTOR * lr * (not waits)),
            (rest, lr * (not waits)),
            (heads, HEADS_FACTOR * lr),
        ):
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return lr

    # Log and checkpoint

    def _begin_window(self) -> None:
        self.window: list[tuple[float, float, float, list[float], list[float]]] = []
        self._begin_count()

    def _begin_count(self) -> None:
        self.began, self.counted = time.monotonic(), 0

    def _count(self, batch: Encoded, found: Pass, losses: list[Tensor]) -> None:
        scenes = len(batch.scenes) * self.args.world
        self.step, self.seen, self.counted = self.step + 1, self.seen + scenes, self.counted + scenes
        looks = found.gazes[0][1] if found.gazes else []
        placed = where_accuracy(found.located)
        self.window.append((losses[0].item(), losses[-1].item(), found.accuracy(), placed, looks))
        if not math.isfinite(self.window[-1][0]):
            raise SystemExit(f"loss is {self.window[-1][0]} at step {self.step}")

    def _write_window(self, norm: float, lr: float) -> None:
        """Means since the last line of the log."""
        window = self.window
        loss, part, accuracy = (sum(column) / len(window) for column in zip(*(row[:3] for row in window), strict=True))
        found, looks = (means([row[i] for row in window if row[i]]) for i in (3, 4))
        self._write(
            {
                "step": self.step,
                "seen": self.seen,
                "loss": round(loss, 4),
                "loss_part": round(part, 4),
                "accuracy": round(accuracy, 4),
                "where": found,
                "gaze": looks,
                "norm": round(norm, 2),
                "lr": lr,
                "rate": round(self.counted / (time.monotonic() - self.began), 1),
            }
        )
        self._begin_window()

    def _judge(self, stage: Stage) -> None:
        """Held-out scenes, shared by the processes; then the checkpoint."""
        scores = evaluate(self.model, self.processor, self.rows, stage, 6, 1000 * self.rank)
        table = torch.stack(list(scores.values()))
        if self.args.world > 1:
            dist.all_reduce(table)
        if self.rank == 0:
            held = {key: round(float(row[0] / row[1]), 3) for key, row in zip(scores, table, strict=True)}
            self._write({"step": self.step, "stage": list(stage.sides), "held_out": held})
            self._save()
        self._begin_count()

    def _write(self, record: dict[str, Any]) -> None:
        print(json.dumps(record), file=self.log, flush=True)

    def _save(self) -> None:
        state = {
            "model": self.model.state_dict(),
            "where": self.where.state_dict(),
            "events": self.events.head.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "seen": self.seen,
        }
        torch.save(state, self.checkpoint.with_suffix(".tmp"))
        self.checkpoint.with_suffix(".tmp").rename(self.checkpoint)
        build.save(self.model, self.processor, self.args.out / "model")


def work(rank: int, args: argparse.Namespace) -> None:
    """One process, from its start to its end."""
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if args.world > 1:
        rendezvous = f"file://{args.out.resolve()}/rendezvous"
        dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=args.world)
    Worker(rank, args).run()
    if args.world > 1:
        dist.barrier()
        dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/reference"), help="a folder in it for each curriculum")
    parser.add_argument("--curriculum", choices=tuple(CURRICULA), nargs="+", default=list(CURRICULA))
    parser.add_argument("--init", type=Path, help="folder of a model to start from")
    parser.add_argument("--start", type=float, default=0.0, help="where in the curriculum to start, 0 to 1")
    for name, (kind, help_) in SETTINGS.items():
        defaults = ", ".join(f"{values[name]} ({each})" for each, values in DEFAULTS.items())
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, help=f"{help_}; by default {defaults}")
    parser.add_argument("--gaze", type=float, default=0.3, help="weight of the guided attention")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--world", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--fresh", action="store_true", help="forget checkpoints in --out")
    args = parser.parse_args()
    for curriculum in args.curriculum:
        own = {name: value for name, value in vars(args).items() if value is not None}
        run = argparse.Namespace(**{"init": None, **DEFAULTS[curriculum], **own})
        run.curriculum, run.out = curriculum, args.out / curriculum
        if args.fresh:
            shutil.rmtree(run.out, ignore_errors=True)
        run.out.mkdir(parents=True, exist_ok=True)
        (run.out / "rendezvous").unlink(missing_ok=True)
        mp.spawn(work, args=(run,), nprocs=run.world)
        args.init = run.out / "model"


if __name__ == "__main__":
    main()
