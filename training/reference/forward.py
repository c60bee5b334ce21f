"""The reference model on scenes: one pass of the encoder for answers at several ratios, and the accuracy on held-out
scenes.

Knows the model and batches of scenes. Must not know of optimizers or of the run.
"""

from dataclasses import dataclass

import torch
from data import IGNORE, Encoded, Rows, Stage, encode_scene, question
from guides import Gaze, WhereHeads, where_loss
from torch import Tensor
from torch.nn import functional as F
from transformers import Qwen3VLForConditionalGeneration, Qwen3VLProcessor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from adaptive_fusion.reduction.pool import downsample, pooled_grid
from adaptive_fusion.reference.screens import KINDS, make_scene

RATIOS = (0.5, 0.25)


def points(
    model: Qwen3VLForConditionalGeneration,
    rows: Rows,
    batch: Encoded,
    ratios: list[tuple[float, ...]],
    answers: list[list[tuple[str, str]]],
    where: WhereHeads | None = None,
    gaze: Gaze | None = None,
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


@dataclass(frozen=True)
class Pass:
    """What one forward pass gave: pairs of logits and labels of the answers and of `WhereHeads`, and what `Gaze` says
    of each set of answers."""

    answered: list[tuple[Tensor, Tensor]]
    located: list[tuple[Tensor, Tensor]]
    gazes: list[tuple[Tensor, list[float]]]

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
                [(logits, labels)], _, _ = points(
                    model, rows, Encoded(patches, grid, [scene]), [(ratio,)], [[question(scene)]]
                )
                right += torch.tensor([(logits.argmax(-1) == labels).sum(), labels.numel()])
            scores[f"{kind}/{ratio}"] = right
    model.train()
    return scores
