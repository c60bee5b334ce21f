"""The reference model on scenes: one pass of the encoder for answers at several ratios, and the accuracy on held-out
scenes.

Knows the model and batches of scenes. Must not know of optimizers or of the run.
"""

from dataclasses import dataclass

import torch
from data import IGNORE, Encoded, Rows, Stage, encode_scene, event_targets, question
from guides import Events, Gaze, WhereHeads, where_loss
from torch import Tensor
from torch.nn import functional as F
from transformers import Qwen3VLForConditionalGeneration, Qwen3VLProcessor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from adaptive_fusion.reduction.pool import downsample, pooled_grid
from adaptive_fusion.reference.screens import KINDS, Scene, make_scene

RATIOS = (0.5, 0.25)


def points(
    model: Qwen3VLForConditionalGeneration,
    rows: Rows,
    batch: Encoded,
    ratios: list[tuple[float, ...]],
    answers: list[list[tuple[str, str]]],
    where: WhereHeads | None = None,
    gaze: Gaze | None = None,
    events: Events | None = None,
    keeps: list[Tensor | None] | None = None,
) -> tuple[
    list[tuple[Tensor, Tensor]],
    list[tuple[Tensor, Tensor]],
    list[tuple[Tensor, list[float]]],
    list[tuple[Tensor, Tensor]],
]:
    """Encode once, then (logits, labels) of the answer tokens for every list of ratios (one ratio per scene).

    Second come the pairs of `where` for the encoder's own features, third what `gaze` says of each list of ratios,
    fourth the pairs of `events` for each. `keeps` has, for a list of ratios, which of all its visual tokens stay: a
    boolean ``[tokens]``; those that do keep the positions that they have among all.
    """
    out = model.model.visual(batch.pixels, grid_thw=batch.grids, return_dict=True)
    merge = model.config.vision_config.spatial_merge_size
    grids = [(t, h // merge, w // merge) for t, h, w in batch.grids.tolist()]
    sizes = [t * h * w for t, h, w in grids]
    levels = [torch.split(level, sizes) for level in (out.pooler_output, *out.deepstack_features)]
    scenes = [scene for scene in batch.scenes if scene.answers]  # packed pages come last
    kind = "video" if len(batch.scenes[0].frames) > 1 else "image"
    results, gazes, happened = [], [], []
    for chosen, asked, keep in zip(ratios, answers, keeps or [None] * len(ratios), strict=True):
        reduced = [
            [downsample(part, [grid], ratio) for part, grid, ratio in zip(level, grids, chosen, strict=False)]
            for level in levels
        ]
        small = [pooled_grid(*grid, ratio) for grid, ratio in zip(grids, chosen, strict=False)]
        tokens = rows.batch(scenes, asked, small)
        thw = torch.tensor([(t, h * merge, w * merge) for t, h, w in small])
        targets = torch.cat([event_of(*pair).flatten() for pair in zip(scenes, small, strict=True)])
        if keep is not None:
            positions, _ = model.model.get_rope_index(
                tokens["input_ids"],
                tokens["mm_token_type_ids"],
                attention_mask=tokens["attention_mask"],
                **{f"{kind}_grid_thw": thw},
            )
            tokens = thinned(tokens, positions, keep, rows.tokenizer.pad_token_id)
            parts = torch.split(keep, [t * h * w for t, h, w in small])
            reduced = [[part[left] for part, left in zip(level, parts, strict=True)] for level in reduced]
            targets = targets[keep]
        labels, asking, looked_at = tokens.pop("labels"), tokens.pop("asking"), tokens.pop("looked_at")
        features = BaseModelOutputWithPooling(pooler_output=tuple(reduced[0]))
        features["deepstack_features"] = features.deepstack_features = [tuple(level) for level in reduced[1:]]
        hidden = model.model(
            **tokens, **{f"{kind}_grid_thw": thw}, mm_encoder_outputs={kind: features}, use_cache=False
        )[0]
        wanted = labels[:, 1:] != IGNORE
        results.append((model.lm_head(hidden[:, :-1][wanted]), labels[:, 1:][wanted]))
        if gaze is not None and len(asking):
            gazes.append(gaze.loss(asking, looked_at))
        if events is not None and kind == "video":
            happened.append(events.pair(tokens["input_ids"] == rows.pads[True], targets))
    return results, where(out, batch) if where is not None else [], gazes, happened


def event_of(scene: Scene, grid: tuple[int, int, int]) -> Tensor:
    """What has happened where in a clip, by token; zeros for a still."""
    if len(scene.frames) == 1:
        return torch.zeros(grid, dtype=torch.long)
    return torch.from_numpy(event_targets(scene, *grid[1:])[: grid[0]])


def thinned(tokens: dict[str, Tensor], positions: Tensor, keep: Tensor, pad: int) -> dict[str, Tensor]:
    """Rows without the visual tokens that `keep` ``[tokens]`` leaves out; the others keep their `positions`."""
    stays = tokens["attention_mask"].bool()
    stays[tokens["mm_token_type_ids"] > 0] = keep
    length = int(stays.sum(1).max())
    # A stable sort by "leaves" brings what stays to the front, in order.
    order = (~stays).int().argsort(dim=1, stable=True)[:, :length]
    found = {key: value.gather(1, order) for key, value in tokens.items() if key not in ("asking", "looked_at")}
    beyond = ~stays.gather(1, order)
    found["attention_mask"] = (~beyond).long()
    found["labels"] = found["labels"].masked_fill(beyond, IGNORE)
    found["input_ids"] = found["input_ids"].masked_fill(beyond, pad)
    rows, at = tokens["asking"].T
    found["asking"] = torch.stack([rows, stays.cumsum(1)[rows, at] - 1], 1)
    found["looked_at"] = tokens["looked_at"].gather(1, order[rows]) & ~beyond[rows]
    seen = found["looked_at"].any(1)
    found["asking"], found["looked_at"] = found["asking"][seen], found["looked_at"][seen]
    found["position_ids"] = positions.gather(2, order.expand(3, -1, -1))
    del found["mm_token_type_ids"]
    return found


@dataclass(frozen=True)
class Pass:
    """What one forward pass gave: pairs of logits and labels of the answers and of `WhereHeads`, and what `Gaze` and
    `Events` say of each set of answers."""

    answered: list[tuple[Tensor, Tensor]]
    located: list[tuple[Tensor, Tensor]]
    gazes: list[tuple[Tensor, list[float]]]
    happened: list[tuple[Tensor, Tensor]]

    def losses(self, stage: Stage) -> list[Tensor]:
        """Of each set of answers; of what lies where, in a batch of pages without questions."""
        return [F.cross_entropy(*pair) for pair in self.answered] or [where_loss(self.located, stage.late)]

    def accuracy(self) -> float:
        """Share of the first set's tokens (or places) that are right."""
        logits, labels = (self.answered or self.located)[0]
        return (logits.argmax(-1) == labels).float().mean().item()


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
                [(logits, labels)], *_ = points(
                    model, rows, Encoded(patches, grid, [scene]), [(ratio,)], [[question(scene)]]
                )
                right += torch.tensor([(logits.argmax(-1) == labels).sum(), labels.numel()])
            scores[f"{kind}/{ratio}"] = right
    model.train()
    return scores
