"""Train the reference VLM on synthetic screens: resumable, seeded, logged.

    python training/reference/train.py --out runs/reference

Two processes of one thread each share every step (on two cores this is faster than one process of two threads). The
schedule is warm-up, constant, then a linear cool-down over the last two fifths; ``--init FOLDER`` starts from a shipped
model, and an interrupted run goes on from its newest checkpoint. ``log.jsonl`` holds the curve.
"""

import argparse
import json
import math
import os
import random
import shutil
import time
from functools import partial
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
from transformers.models.qwen3_vl.modeling_qwen3_vl import apply_rotary_pos_emb
from transformers.utils import logging

from adaptive_fusion.reduction.pool import downsample, pooled_grid
from adaptive_fusion.reference.screens import BINS, COLORS, KINDS, SHAPES, make_scene

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
    gaze: "Gaze | None" = None,
) -> tuple[list[tuple[Tensor, Tensor]], list[tuple[Tensor, Tensor]], list[tuple[Tensor, list[float]]]]:
    """Encode once, then (logits, labels) of the answer tokens for every list of ratios (one ratio per scene).

    Second come the pairs of `where` for the encoder's own features, third what `gaze` says of each list of ratios.
    """
    out = model.model.visual(batch.pixels, grid_thw=batch.grids, return_dict=True)
    merge = model.config.vision_config.spatial_merge_size
    grids = [(t, h // merge, w // merge) for t, h, w in batch.grids.tolist()]
    sizes = [t * h * w for t, h, w in grids]
    levels = [torch.split(level, sizes) for level in (out.pooler_output, *out.deepstack_features)]
    scenes = [scene for scene in batch.scenes if scene.answers]  # packed pages come last
    kind = "video" if len(batch.scenes[0].frames) > 1 else "image"
    results, gazes = [], []
    for chosen, asked in zip(ratios, answers, strict=True):
        reduced = [
            [downsample(part, [grid], ratio) for part, grid, ratio in zip(level, grids, chosen, strict=False)]
            for level in levels
        ]
        small = [pooled_grid(*grid, ratio) for grid, ratio in zip(grids, chosen, strict=False)]
        tokens = rows.batch(scenes, asked, small)
        labels, asking, looked_at = tokens.pop("labels"), tokens.pop("asking"), tokens.pop("looked_at")
        thw = torch.tensor([(t, h * merge, w * merge) for t, h, w in small])
        features = BaseModelOutputWithPooling(pooler_output=tuple(reduced[0]))
        features["deepstack_features"] = features.deepstack_features = [tuple(level) for level in reduced[1:]]
        hidden = model.model(
            **tokens, **{f"{kind}_grid_thw": thw}, mm_encoder_outputs={kind: features}, use_cache=False
        )[0]
        wanted = labels[:, 1:] != IGNORE
        results.append((model.lm_head(hidden[:, :-1][wanted]), labels[:, 1:][wanted]))
        if gaze is not None and len(asking):
            gazes.append(gaze.loss(asking, looked_at))
    return results, where(out, batch) if where is not None else [], gazes


class WhereHeads(nn.Module):
    """What lies where, read off the merged tokens while training (thrown away afterwards).

    The scenes know where every character and icon is, and saying so patch by patch teaches an encoder far faster than
    the answers alone. Characters are read off the middle tap and, later on, off the last one too; the rest off the
    last level: so fine detail comes to live in the taps, as it does in large models.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.glyph = nn.Linear(width, 8 * (len(CHARS) + 1))
        self.color = nn.Linear(width, 4 * (len(COLORS) + 1))
        self.shape = nn.Linear(width, 4 * (len(SHAPES) + 1))
        self.place = nn.Linear(width, 2 * BINS)
        self.late = nn.Linear(width, 8 * (len(CHARS) + 1))

    def forward(self, out: BaseModelOutputWithPooling, batch: Encoded) -> list[tuple[Tensor, Tensor]]:
        found = where_targets(batch)
        (_, fine, finer), last = out.deepstack_features, out.pooler_output
        pairs = (
            (self.glyph(fine), found.glyphs),
            (self.color(last), found.colors),
            (self.shape(last), found.shapes),
            (self.place(last), found.places),
            (self.late(finer), found.glyphs),
        )
        return [(logits.view(target.numel(), -1), target.flatten()) for logits, target in pairs]


def where_loss(pairs: list[tuple[Tensor, Tensor]], late: float) -> Tensor:
    """Cross-entropy, empty patches (by far the most) at a twentieth of the weight; places count a fifth."""
    total = torch.zeros(())
    for i, ((logits, target), share) in enumerate(zip(pairs, (1, 1, 1, 0.2, late), strict=False)):
        weight = torch.ones(logits.shape[-1])
        if i != 3:
            weight[0] = 0.05
        if share:
            total = total + share * F.cross_entropy(logits, target, weight=weight)
    return total


def where_accuracy(pairs: list[tuple[Tensor, Tensor]]) -> list[float]:
    """Share of the occupied patches named rightly: characters, colours, shapes (0 where a batch has none), places,
    characters off the last tap."""
    found = []
    for i, (logits, target) in enumerate(pairs):
        taken = target >= 0 if i == 3 else target > 0
        found.append(float((logits.argmax(-1) == target)[taken].float().mean()) if taken.any() else 0.0)
    return found


class Gaze:
    """Trains one attention head of each later layer of the language model to look at what is about to be said.

    Guided attention (Tachibana et al. 2018 for speech; the screens know the true alignment): the negative log of the
    attention that falls on the visual tokens that show the next word. Only queries and keys are watched, through
    hooks that live while training; the model itself stays as it is.
    """

    LAYERS = (1, 2, 3)

    def __init__(self, model: Qwen3VLForConditionalGeneration) -> None:
        self.seen: dict[tuple[int, str], Tensor] = {}
        self.angles: tuple[Tensor, Tensor] | None = None
        for i in self.LAYERS:
            attention = model.model.language_model.layers[i].self_attn
            attention.q_norm.register_forward_hook(partial(self._keep, (i, "q")))
            attention.k_norm.register_forward_hook(partial(self._keep, (i, "k")))
        model.model.language_model.rotary_emb.register_forward_hook(self._turn)

    def _keep(self, key: tuple[int, str], _module: nn.Module, _args: object, output: Tensor) -> None:
        self.seen[key] = output[:, :, :1].transpose(1, 2)

    def _turn(self, _module: nn.Module, _args: object, output: tuple[Tensor, Tensor]) -> None:
        self.angles = output

    def loss(self, asking: Tensor, looked_at: Tensor) -> tuple[Tensor, list[float]]:
        """The mean over layers, and each layer's mean attention on the right tokens."""
        assert self.angles is not None
        rows, at = asking.T
        later = torch.arange(looked_at.shape[1]) > at[:, None]
        losses = []
        for i in self.LAYERS:
            q, k = apply_rotary_pos_emb(self.seen[i, "q"], self.seen[i, "k"], *self.angles)
            scores = (q[:, 0] @ k[:, 0].transpose(1, 2) / q.shape[-1] ** 0.5)[rows, at].masked_fill(later, -torch.inf)
            losses.append(-scores.log_softmax(-1).masked_fill(~looked_at, -torch.inf).logsumexp(-1))
        return torch.stack(losses).mean(), [float((-loss.detach()).exp().mean()) for loss in losses]


def means(rows: list[list[float]]) -> list[float]:
    return [round(sum(column) / len(rows), 3) for column in zip(*rows, strict=True)]


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
                [(logits, labels)], _, _ = points(
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
    gaze = Gaze(model)
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
            ratios, questions = [], []
        elif stage.both:
            ratios = [tuple(1.0 for _ in scenes), part]
            questions = [asked, [question(scene, rng) for scene in scenes]]
        else:
            ratios, questions = [tuple(1.0 if rng.random() < 0.6 else ratio for ratio in part)], [asked]
        answered, located, gazes = points(model, rows, batch, ratios, questions, seen_where, gaze)
        losses = [F.cross_entropy(*pair) for pair in answered] or [where_loss(located, stage.late)]
        logits, labels = (answered or located)[0]
        total = losses[0] + stage.where * where_loss(located, stage.late)
        for extra in losses[1:]:
            total = total + PARTIAL_WEIGHT * extra
        for looked, _ in gazes:
            total = total + args.gaze / len(gazes) * looked
        total.backward()
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
                losses[0].item(),
                losses[-1].item(),
                (logits.argmax(-1) == labels).float().mean().item(),
                where_accuracy(located),
                gazes[0][1] if gazes else [],
            )
        )
        if not math.isfinite(window[-1][0]):
            raise SystemExit(f"loss is {window[-1][0]} at step {step}")
        bar.update()
        if rank == 0 and step % 50 == 0:
            a, b, c = (sum(column) / len(window) for column in zip(*(row[:3] for row in window), strict=True))
            found, looks = (means([row[i] for row in window if row[i]]) for i in (3, 4))
            record = {
                "step": step,
                "seen": seen,
                "loss": round(a, 4),
                "loss_part": round(b, 4),
                "accuracy": round(c, 4),
                "where": found,
                "gaze": looks,
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
    parser.add_argument("--steps", type=int, default=5600)
    parser.add_argument("--out", type=Path, default=Path("runs/reference"))
    parser.add_argument("--init", type=Path, help="folder of a model to start from")
    parser.add_argument("--start", type=float, default=0.0, help="where in the curriculum to start, 0 to 1")
    parser.add_argument("--lr", type=float, default=7e-4, help="AdamW's rate; Muon gets three times as much")
    parser.add_argument("--warmup", type=int, default=200)
    parser.add_argument("--cooldown", type=float, default=0.4, help="share of the steps that cool down")
    parser.add_argument("--every", type=int, default=500, help="steps between checkpoints")
    parser.add_argument("--gaze", type=float, default=0.3, help="weight of the guided attention")
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
