"""Is ``native`` through the runner what the model says itself, to the bit: true shapes, bfloat16, with logits."""

from typing import Any

import torch

from adaptive_fusion.execution.batches import collate
from adaptive_fusion.models import Adapter
from adaptive_fusion.point import NATIVE
from benchmarks.gpu.book import Desk, Row
from benchmarks.gpu.models import Request, Scale, exactly, several

SIZES = ("4b", "2b")
TOKENS = 8


def run(desk: Desk, scale: Scale) -> None:
    """One image, several images, and a batch of three of different sizes, at each size of model."""
    for size in scale.few(SIZES):
        for case in ("one image", "several images", "batch of 3"):
            desk.row(f"{size} {case}", lambda size=size, case=case: _row(scale, size, case), needs_s=15)  # type: ignore[misc]


def _inputs(scale: Scale, adapter: Adapter, case: str) -> dict[str, Any]:
    sides = [scale.side(pixels) for pixels in (1024, 512, 768)]
    if case == "one image":
        return Request(sides[0]).inputs(adapter, NATIVE)
    if case == "several images":
        return several(adapter, sides)
    return collate([Request(side).inputs(adapter, NATIVE) for side in sides])


def _row(scale: Scale, size: str, case: str) -> Row:
    runner = scale.runner(size, "native")
    inputs = _inputs(scale, runner.adapter, case)
    options = {**exactly(TOKENS), "return_dict_in_generate": True, "output_logits": True}
    with torch.no_grad():
        first, again = (runner.model.generate(**inputs, **options) for _ in range(2))
    ours = runner.generate(**inputs, **options)
    logits, same, mine = (torch.stack(list(found.logits)) for found in (first, again, ours))
    return {
        "rows": int(inputs["input_ids"].shape[0]),
        "prompt_tokens": int(inputs["input_ids"].shape[1]),
        "dtype": str(runner.dtype).removeprefix("torch."),
        "tokens_equal": torch.equal(first.sequences, ours.sequences),
        "logits_equal": torch.equal(logits, mine),
        "largest_difference": float((logits - mine).abs().max()),
        # Where the model differs from itself, what the runner differs by says nothing.
        "model_repeats_itself": torch.equal(logits, same),
        "distinct_tokens": int(ours.sequences[:, -TOKENS:].unique().numel()),
    }
