"""Several encoded requests as one left-padded batch.

Knows the tensors that go to ``generate`` with encoder outputs in place of pixels. Must not know models,
operating points or what the answers are for.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

LEAST_SHARE = 0.25
"""Padding costs prefill, a batch more costs decoding: with this, answers of tens of tokens take about the least."""


def batches(lengths: Sequence[int], most: int) -> Iterator[list[int]]:
    """Indices of `lengths` in groups, longest first, whose padded size (rows times longest) is at most `most`,
    and none of whose rows is shorter than `LEAST_SHARE` of the longest; a row that is longer than `most` alone."""
    group: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        longest = lengths[group[0]] if group else 0
        if group and ((len(group) + 1) * longest > most or lengths[index] < LEAST_SHARE * longest):
            yield group
            group = []
        group.append(index)
    if group:
        yield group


def joined(parts: Sequence[Mapping[str, Any]], pad_token_id: int) -> dict[str, Any]:
    """One batch of requests of one row each, with the same kinds of media.

    Args:
        parts: As `Encoded.inputs`: ``input_ids`` ``[1, length]`` and tensors like it, grids, and
            ``mm_encoder_outputs`` of packed models (a tuple of ``[tokens, width]`` per medium, and per tap).
        pad_token_id: Fills ``input_ids`` on the left; all else gets 0 there.
    """
    longest = max(part["input_ids"].shape[1] for part in parts)
    batch: dict[str, Any] = {}
    for key in parts[0]:
        values = [part[key] for part in parts]
        if key == "mm_encoder_outputs":
            batch[key] = {kind: _outputs([value[kind] for value in values]) for kind in values[0]}
        elif all(v.shape == part["input_ids"].shape for v, part in zip(values, parts, strict=True)):
            fill = pad_token_id if key == "input_ids" else 0
            batch[key] = torch.cat([_padded(value, longest, fill) for value in values])
        else:
            batch[key] = torch.cat(values)
    return batch


def _padded(row: Tensor, length: int, fill: int) -> Tensor:
    return torch.nn.functional.pad(row, (length - row.shape[1], 0), value=fill)


def _outputs(parts: Sequence[Any]) -> Any:
    """The encoder outputs of all parts, one after the other; nothing but what the language model reads."""
    merged: dict[str, Any] = {"pooler_output": tuple(one for part in parts for one in part.pooler_output)}
    if getattr(parts[0], "deepstack_features", None) is not None:
        taps = zip(*(part.deepstack_features for part in parts), strict=True)
        merged["deepstack_features"] = [tuple(one for part in tap for one in part) for tap in taps]
    return type(parts[0])(**merged)
