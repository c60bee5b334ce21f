"""Is ``native`` through the runner what the model says itself, to the bit: true shapes, bfloat16, with logits."""

from typing import Any

import torch

from adaptive_fusion.execution.batches import collate
from adaptive_fusion.models import Adapter
from adaptive_fusion.point import NATIVE
from benchmarks.gpu.book import Desk, Row
from benchmarks.gpu.models import Request, Scale, exactly, several

SIZES = ("4b", "2b")
TOKENS, AGAIN = 8, 8


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
        own = [runner.model.generate(**inputs, **options) for _ in range(2 if scale.tiny else AGAIN)]
    ours = runner.generate(**inputs, **options)
    # On some devices the model itself does not repeat the last bit of its decoding steps: what it gives is a few
    # outcomes, of which the runner's has to be one. Its prefill repeats itself.
    outcomes: list[torch.Tensor] = []
    for each in map(_logits, own):
        if not any(torch.equal(each, known) for known in outcomes):
            outcomes.append(each)
    mine = _logits(ours)
    return {
        "rows": int(inputs["input_ids"].shape[0]),
        "prompt_tokens": int(inputs["input_ids"].shape[1]),
        "dtype": str(runner.dtype).removeprefix("torch."),
        "tokens_equal": any(torch.equal(each.sequences, ours.sequences) for each in own),
        "logits_equal": any(torch.equal(mine, known) for known in outcomes),
        "prefill_equal": all(torch.equal(mine[0], known[0]) for known in outcomes),
        "largest_difference": min(float((mine - known).abs().max()) for known in outcomes),
        "model_outcomes": len(outcomes),
        "distinct_tokens": int(ours.sequences[:, -TOKENS:].unique().numel()),
    }


def _logits(found: Any) -> torch.Tensor:
    """``[steps, rows, vocabulary]``."""
    return torch.stack(list(found.logits))
