"""Several requests as one left-padded batch, before the encoder or after it.

Knows the tensors that processors make and ``generate`` takes. Must not know models, operating points or what the
answers are for.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from adaptive_fusion.execution.timed import Encoding
from adaptive_fusion.models import Encoded

TOKEN_TENSORS = ("input_ids", "attention_mask", "mm_token_type_ids")
LEAST_SHARE = 0.25
"""Least length of a row, as a share of the longest in its batch. Padding costs prefill and a further batch costs
decoding; at this share answers of some tens of tokens take about the least time."""


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


def collate(rows: Sequence[Mapping[str, Any]], tails: Sequence[Tensor] = ()) -> dict[str, Any]:
    """One left-padded batch of requests of one row each, each followed by its tail where there are tails.

    Args:
        rows: As the processor gives them or as `Encoded.inputs`: `TOKEN_TENSORS` ``[1, length]``, pixels or the
            ``mm_encoder_outputs`` of packed models (a tuple of ``[tokens, width]`` per medium, and per tap), and
            grids. Their kinds of media may differ.
        tails: Tokens ``[n]`` that follow each prompt, such as its answer.

    Returns:
        `TOKEN_TENSORS` ``[rows, longest]``, with 0 where a row is padded and masked; all else put together along its
        first dimension, in row order.
    """
    tails = tails or [rows[0]["input_ids"].new_empty(0)] * len(rows)
    longest = max(row["input_ids"].shape[1] + len(tail) for row, tail in zip(rows, tails, strict=True))
    batch: dict[str, Any] = {}
    for key in dict.fromkeys(key for row in rows for key in row):
        values = [row[key] for row in rows if key in row]
        if key == "mm_encoder_outputs":
            kinds = dict.fromkeys(kind for value in values for kind in value)
            batch[key] = {kind: _outputs([value[kind] for value in values if kind in value]) for kind in kinds}
        elif key in TOKEN_TENSORS:
            # A prompt without media may come without types: all of it is text.
            found = (row[key] if key in row else _tail(key, row["input_ids"]) for row in rows)
            ends = (_tail(key, tail) for tail in tails)
            whole = [torch.cat([value[0], end.to(value)]) for value, end in zip(found, ends, strict=True)]
            batch[key] = torch.stack([nn.functional.pad(row, (longest - len(row), 0)) for row in whole])
        elif all(isinstance(value, Tensor) for value in values):
            batch[key] = torch.cat(values)
        else:  # seconds of each grid of a clip, in some families
            batch[key] = [one for value in values for one in value]
    return batch


def together(encodings: Sequence[Encoding]) -> Encoding:
    """Encodings of one row each as that of one batch, with the point of the first; its times reach from the first
    one's beginning to the last one's end."""
    if len(encodings) == 1:
        return encodings[0]
    parts = [each.encoded for each in encodings]
    inputs = collate([part.inputs for part in parts])
    encoded = Encoded(inputs, sum(part.visual_tokens for part in parts), sum(part.patches for part in parts))
    return replace(encodings[0], encoded=encoded, ended_s=max(each.ended_s for each in encodings))


def _tail(key: str, tokens: Tensor) -> Tensor:
    """What a tensor of `TOKEN_TENSORS` has at the positions of text tokens."""
    if key == "input_ids":
        return tokens
    return torch.ones_like(tokens) if key == "attention_mask" else torch.zeros_like(tokens)


def _outputs(parts: Sequence[Any]) -> Any:
    """The encoder outputs of all parts, one after the other; nothing but what the language model reads."""
    merged: dict[str, Any] = {"pooler_output": tuple(one for part in parts for one in part.pooler_output)}
    if getattr(parts[0], "deepstack_features", None) is not None:
        taps = zip(*(part.deepstack_features for part in parts), strict=True)
        merged["deepstack_features"] = [tuple(one for part in tap for one in part) for tap in taps]
    return type(parts[0])(**merged)
