"""Train the reference VLM on synthetic screens: resumable, seeded, logged.

    python training/reference/train.py --steps 3000 --out runs/reference

Two processes of one thread each share every step (on two cores this is faster than one process of two threads). The
schedule is warm-up, constant, then a linear cool-down over the last fifth; ``--init FOLDER`` starts from a shipped
model, and an interrupted run goes on from its newest checkpoint. ``log.jsonl`` holds the curve.
"""

import argparse
import json
import math
import os
import random
import shutil
import time
from pathlib import Path

import build
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from data import (
    CHARS,
    CURRICULUM,
    IGNORE,
    Encoded,
    Rows,
    Stage,
    encode_scene,
    make_page,
    question,
    sample_batch,
    where_targets,
)
from muon import Muon
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import Qwen3VLForConditionalGeneration, Qwen3VLProcessor
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import logging

from adaptive_fusion.fusion.downsample import downsample, pooled_grid
from adaptive_fusion.reference.screens import COLORS, KINDS, SHAPES, make_scene

RATIOS = (0.5, 0.25)
PARTIAL_WEIGHT = 0.35
MUON_FACTOR = 3


def points(
    model: Qwen3VLForConditionalGeneration,
    rows: Rows,
    batch: Encoded,
    ratios: list[tuple[float, ...]],
    answers: list[list[tuple[str, str]]],
    where: "WhereHeads | None" = None,
) -> list[tuple[Tensor, Tensor]]:
    """Encode once, then (logits, labels) of the answer tokens for every list of ratios (one ratio per scene).

    With `where` its three pairs for the encoder's own features come after those.
    """
    out = model.model.visual(batch.pixels, grid_thw=batch.grids, return_dict=True)
    merge = model.config.vision_config.spatial_merge_size
    grids = [(t, h // merge, w // merge) for t, h, w in batch.grids.tolist()]
    sizes = [t * h * w for t, h, w in grids]
    levels = [torch.split(level, sizes) for level in (out.pooler_output, *out.deepstack_features)]
    scenes = [scene for scene in batch.scenes if scene.answers]  # packed pages come last
    kind = "video" if len(batch.scenes[0].frames) > 1 else "image"
    results = []
    for chosen, asked in zip(ratios, answers, strict=True):
        reduced = [
            [downsample(part, [grid], ratio) for part, grid, ratio in zip(level, grids, chosen, strict=False)]
            for level in levels
        ]
        small = [pooled_grid(*grid, ratio) for grid, ratio in zip(grids, chosen, strict=False)]
        tokens = rows.batch(scenes, asked, small)
        labels = tokens.pop("labels")
        thw = torch.tensor([(t, h * merge, w * merge) for t, h, w in small])
        features = BaseModelOutputWithPooling(pooler_output=tuple(reduced[0]))
        features["deepstack_features"] = features.deepstack_features = [tuple(level) for level in reduced[1:]]
        hidden = model.model(
            **tokens, **{f"{kind}_grid_thw": thw}, mm_encoder_outputs={kind: features}, use_cache=False
        )[0]
        wanted = labels[:, 1:] != IGNORE
        results.append((model.lm_head(hidden[:, :-1][wanted]), labels[:, 1:][wanted]))
    if where is not None:
        results += where(out, batch)
    return results


class WhereHeads(nn.Module):
    """What lies where, read off the merged tokens while training (thrown away afterwards).

    The scenes know where every character and icon is, and saying so patch by patch teaches an encoder far faster than
    the answers alone. Characters are read off the middle tap, colours and shapes off the last level, so that fine
    detail comes to live in the taps, as it does in large models.
    """

    TAP = 1

    def __init__(self, width: int) -> None:
        super().__init__()
        self.glyph = nn.Linear(width, 4 * (len(CHARS) + 1))
        self.color = nn.Linear(width, 4 * (len(COLORS) + 1))
        self.shape = nn.Linear(width, 4 * (len(SHAPES) + 1))

    def forward(self, out: BaseModelOutputWithPooling, batch: Encoded) -> list[tuple[Tensor, Tensor]]:
        targets = where_targets(batch)
        sources = (out.deepstack_features[self.TAP], out.pooler_output, out.pooler_output)
        heads = (self.glyph, self.color, self.shape)
        return [
            (head(source).view(targets.shape[1] * 4, -1), target.flatten())
            for head, source, target in zip(heads, sources, targets, strict=True)
        ]


def where_loss(pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Cross-entropy with empty patches, by far the most, at a twentieth of the weight."""
    total = torch.zeros(())
    for logits, target in pairs:
        weight = torch.ones(logits.shape[-1])
        weight[0] = 0.05
        total = total + F.cross_entropy(logits, target, weight=weight)
    return total


def where_accuracy(pairs: list[tuple[Tensor, Tensor]]) -> list[float]:
    """Share of the occupied patches named rightly: characters, colours, shapes (0 where a batch has none)."""
    found = []
    for logits, target in pairs:
        taken = target > 0
        found.append(float((logits.argmax(-1) == target)[taken].float().mean()) if taken.any() else 0.0)
    return found


def stage_at(progress: float) -> Stage:
    return next(stage for stage in CURRICULUM if progress < stage.until or stage is CURRICULUM[-1])


def learning_rate(step: int, steps: int, warmup: int, cooldown: float) -> float:
    """Trapezoid: warm-up, constant, linear to zero."""
    rise = min(1.0, (step + 1) / warmup)
    fall = min(1.0, (steps - step) / max(1.0, steps * cooldown))
    return rise * fall


@torch.no_grad()
def evaluate(
    model: Qwen3VLForConditionalGeneration,
    processor: Qwen3VLProcessor,
    rows: Rows,
    stage: Stage,
    count: int,
    offset: int,
) -> dict[str, Tensor]:
    """Teacher-forced token accuracy on held-out scenes: ``kind/ratio`` to (right, all)."""
    model.eval()
    scores = {}
    for kind in KINDS:
        scenes = [make_scene(kind, offset + i, "eval", stage.sides, stage.effort) for i in range(count)]
        for ratio in (1.0, *RATIOS):
            right = torch.zeros(2)
            for scene in scenes:
                patches, grid = encode_scene(processor, scene)
                [(logits, labels)] = points(
                    model, rows, Encoded(patches, grid, [scene]), [(ratio,)], [[question(scene)]]
                )
                right += torch.tensor([(logits.argmax(-1) == labels).sum(), labels.numel()])
            scores[f"{kind}/{ratio}"] = right
    model.train()
    return scores


def parameter_groups(model: Qwen3VLForConditionalGeneration) -> tuple[list[Tensor], list[Tensor]]:
    """Matrices of blocks and layers for Muon; embeddings, mergers, norms and biases for AdamW."""
    matrices, rest = [], []
    for name, p in model.named_parameters():
        inside = "blocks" in name or "layers" in name
        (matrices if p.ndim == 2 and inside else rest).append(p)
    return matrices, rest


def work(rank: int, args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if args.world > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{args.out.resolve()}/rendezvous", rank=rank, world_size=args.world
        )
    processor = build.build_processor()
    rows = Rows(processor)
    if args.init:
        model = Qwen3VLForConditionalGeneration.from_pretrained(args.init, dtype=torch.float32)
    else:
        model = build.build_model(processor.tokenizer, args.seed)
    model.train()
    if not args.init:
        rng = random.Random(args.seed)
        build.whiten(model, torch.cat([encode_scene(processor, make_page(rng, (96, 128)))[0] for _ in range(120)]))
    where = WhereHeads(model.config.text_config.hidden_size)
    matrices, rest = parameter_groups(model)
    rest += list(where.parameters())
    optimizers = [
        Muon(matrices, lr=MUON_FACTOR * args.lr),
        torch.optim.AdamW(rest, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01),
    ]
    checkpoint, step, seen = args.out / "checkpoint.pt", 0, 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        where.load_state_dict(state["where"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        step, seen = state["step"], state["seen"]
    params = [*matrices, *rest]
    bar = tqdm(total=args.steps, initial=step, disable=rank > 0, mininterval=10)
    log = (args.out / "log.jsonl").open("a") if rank == 0 else None
    began, window, counted = time.monotonic(), [], 0
    while step < args.steps:
        # The data of a step follow from (seed, step, rank) alone, so a resumed run sees what an unbroken one would.
        rng = random.Random(f"{args.seed}/{step}/{rank}")
        progress = args.start + (1 - args.start) * step / args.steps
        stage = stage_at(progress)
        batch = sample_batch(processor, stage, rng, "train")
        scenes = [scene for scene in batch.scenes if scene.answers]
        part = tuple(rng.choice(RATIOS) for _ in scenes)
        asked = [question(scene, rng) for scene in scenes]
        seen_where = where if batch.scenes[0].kind != "clip" else None
        if not scenes:
            located = points(model, rows, batch, [], [], where)
            located_loss = loss = loss_part = where_loss(located)
            logits, labels = located[0]
            located_loss.backward()
        elif stage.both:
            again = [question(scene, rng) for scene in scenes]
            full = tuple(1.0 for _ in scenes)
            [(logits, labels), partial, *located] = points(model, rows, batch, [full, part], [asked, again], seen_where)
            loss = F.cross_entropy(logits, labels)
            loss_part = F.cross_entropy(*partial)
            located_loss = where_loss(located)
            (loss + PARTIAL_WEIGHT * loss_part + args.where * located_loss).backward()
        else:
            mixed = tuple(1.0 if rng.random() < 0.6 else ratio for ratio in part)
            [(logits, labels), *located] = points(model, rows, batch, [mixed], [asked], seen_where)
            loss = loss_part = F.cross_entropy(logits, labels)
            located_loss = where_loss(located)
            (loss + args.where * located_loss).backward()
        flat = torch.cat([p.grad.reshape(-1) if p.grad is not None else torch.zeros(p.numel()) for p in params])
        if args.world > 1:
            dist.all_reduce(flat)
            flat /= args.world
        norm = flat.norm()
        flat *= min(1.0, 1.0 / (float(norm) + 1e-6))
        for p, grad in zip(params, flat.split([p.numel() for p in params]), strict=True):
            p.grad = grad.view_as(p)
        scale = learning_rate(step, args.steps, args.warmup, args.cooldown)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = args.lr * scale * (MUON_FACTOR if isinstance(optimizer, Muon) else 1)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step, seen, counted = (
            step + 1,
            seen + len(batch.scenes) * args.world,
            counted + len(batch.scenes) * args.world,
        )
        window.append(
            (
                loss.item(),
                loss_part.item(),
                (logits.argmax(-1) == labels).float().mean().item(),
                *where_accuracy(located),
            )
        )
        if not math.isfinite(window[-1][0]):
            raise SystemExit(f"loss is {window[-1][0]} at step {step}")
        bar.update()
        if rank == 0 and step % 50 == 0:
            a, b, c = (sum(column) / len(window) for column in zip(*(row[:3] for row in window), strict=True))
            stills = [row[3:] for row in window if len(row) > 3]
            found = [round(sum(column) / len(stills), 3) for column in zip(*stills, strict=True)]
            record = {
                "step": step,
                "seen": seen,
                "loss": round(a, 4),
                "loss_part": round(b, 4),
                "accuracy": round(c, 4),
                "where": found,
                "norm": round(float(norm), 2),
                "lr": args.lr * scale,
                "rate": round(counted / (time.monotonic() - began), 1),
            }
            print(json.dumps(record), file=log, flush=True)
            window, began, counted = [], time.monotonic(), 0
        if (step % args.every == 0 and stage.pages < 1) or step == args.steps:
            scores = evaluate(model, processor, rows, stage, 6, 1000 * rank)
            table = torch.stack(list(scores.values()))
            if args.world > 1:
                dist.all_reduce(table)
            if rank == 0:
                held = {key: round(float(row[0] / row[1]), 3) for key, row in zip(scores, table, strict=True)}
                print(
                    json.dumps({"step": step, "stage": list(stage.sides), "held_out": held}),
                    file=log,
                    flush=True,
                )
                state = {
                    "model": model.state_dict(),
                    "where": where.state_dict(),
                    "optimizers": [o.state_dict() for o in optimizers],
                    "step": step,
                    "seen": seen,
                }
                torch.save(state, checkpoint.with_suffix(".tmp"))
                checkpoint.with_suffix(".tmp").rename(checkpoint)
                build.save(model, processor, args.out / "model")
            began, counted = time.monotonic(), 0
    if args.world > 1:
        dist.barrier()
        dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--out", type=Path, default=Path("runs/reference"))
    parser.add_argument("--init", type=Path, help="folder of a model to start from")
    parser.add_argument("--start", type=float, default=0.0, help="where in the curriculum to start, 0 to 1")
    parser.add_argument("--lr", type=float, default=7e-4, help="AdamW's rate; Muon gets three times as much")
    parser.add_argument("--warmup", type=int, default=200)
    parser.add_argument("--cooldown", type=float, default=0.2, help="share of the steps that cool down")
    parser.add_argument("--every", type=int, default=500, help="steps between checkpoints")
    parser.add_argument("--where", type=float, default=0.5, help="weight of the location losses of the encoder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--world", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--fresh", action="store_true", help="forget a checkpoint in --out")
    args = parser.parse_args()
    if args.fresh:
        shutil.rmtree(args.out, ignore_errors=True)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "rendezvous").unlink(missing_ok=True)
    mp.spawn(work, args=(args,), nprocs=args.world)


if __name__ == "__main__":
    main()
