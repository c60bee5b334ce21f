"""Rows of tokens with fewer visual placeholders, and the caller's full prompt put back afterwards.

Pure tensor work on ``[batch, length]`` inputs: knows placeholder ids and how many of each segment stay, nothing of
models or processors.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adaptive_fusion.errors import UnsupportedModelError


@dataclass(frozen=True, slots=True)
class Segment:
    """One image or frame: `before` placeholders in the prompt, of which the first `after` stay."""

    before: int
    after: int


def shrink(
    inputs: Mapping[str, object], segments: Mapping[int, Sequence[Segment]], pad_token_id: int
) -> dict[str, object]:
    """Drop placeholders that no longer have a feature, in every tensor shaped like ``input_ids``.

    Args:
        inputs: Must hold ``input_ids`` ``[batch, length]``; may hold ``attention_mask`` and token types of that shape.
        segments: For each placeholder id its segments, in the order in which they stand in the batch (row by row).
        pad_token_id: Fills ``input_ids`` where rows become shorter than the longest; other tensors get 0. Rows stay
            padded on the side on which they were padded, on the left if they were not.

    Returns:
        A new mapping; where nothing is dropped its tensors are those of `inputs`.

    Raises:
        UnsupportedModelError: If a row's placeholders are not those of the segments.
    """
    ids = inputs["input_ids"]
    assert isinstance(ids, Tensor)
    keep = torch.ones(ids.shape, dtype=torch.bool)
    flat = ids.cpu()
    for token, parts in segments.items():
        found = flat == token
        total = sum(part.before for part in parts)
        if int(found.sum()) != total:
            raise UnsupportedModelError(
                f"the prompt has {int(found.sum())} placeholders of token {token}, its media have {total}; "
                "expected the processor's own tensors, not truncated"
            )
        stays = [torch.arange(part.before) < part.after for part in parts]
        if stays:
            keep[found] = torch.cat(stays)
    if bool(keep.all()):
        return dict(inputs)
    mask = inputs.get("attention_mask")
    real = mask.cpu().bool() if isinstance(mask, Tensor) and mask.shape == ids.shape else torch.ones_like(keep)
    on_right = bool((~real[:, -1]).any()) and not bool((~real[:, 0]).any())
    rows = [(keep[i] & real[i]).nonzero()[:, 0] for i in range(ids.shape[0])]
    length = max(len(row) for row in rows)
    out = dict(inputs)
    like_ids = {k: v for k, v in inputs.items() if isinstance(v, Tensor) and v.shape == ids.shape}
    like_ids.setdefault("attention_mask", torch.ones_like(ids))
    for key, tensor in like_ids.items():
        fresh = tensor.new_full((ids.shape[0], length), pad_token_id if key == "input_ids" else 0)
        for i, row in enumerate(rows):
            target = slice(0, len(row)) if on_right else slice(length - len(row), length)
            fresh[i, target] = tensor[i, row.to(tensor.device)]
        out[key] = fresh
    return out


def restore_prompt(sequences: Tensor, reduced_length: int, prompt: Tensor) -> Tensor:
    """Generated `sequences` with the reduced prompt replaced by the caller's own.

    `sequences` is ``[batch * returned, reduced_length + new]``; rows of one prompt stand together. Callers slice
    ``out[:, input_ids.shape[1]:]``, which would cut into the answer if the prompt came back shorter.
    """
    repeats = sequences.shape[0] // prompt.shape[0]
    full = prompt.repeat_interleave(repeats, dim=0).to(sequences.device)
    return torch.cat([full, sequences[:, reduced_length:]], dim=1)
