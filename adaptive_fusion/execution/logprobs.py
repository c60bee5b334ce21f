"""Log-probabilities of an answer's tokens, from what ``generate`` kept of each step.

Knows results of ``generate``. Must not know of requests or replies.
"""

from collections.abc import Sequence
from typing import Any

import torch


def token_logprobs(result: Any, tokens: Sequence[int]) -> tuple[float, ...] | None:
    """The log-probability of each of the first row's new `tokens`, or None where it was not asked for.

    From the model's own logits (``output_logits``) if they were kept, else from the scores after processors and
    sampling's warpers (``output_scores``). None for beams, whose rows change places on the way: their result has
    ``sequences_scores``.
    """
    steps = getattr(result, "logits", None) or getattr(result, "scores", None)
    if not steps or getattr(result, "beam_indices", None) is not None:
        return None
    found = [torch.log_softmax(step[0].float(), -1)[token] for step, token in zip(steps, tokens, strict=False)]
    return tuple(float(value) for value in found)


def top_logprobs(result: Any, tokens: Sequence[int], most: int) -> list[list[tuple[int, float]]]:
    """The `most` likeliest tokens at each of the first row's new `tokens`, as (token, log-probability), best first.

    From what `token_logprobs` takes; empty where that gives None.
    """
    steps = getattr(result, "logits", None) or getattr(result, "scores", None)
    if not steps or getattr(result, "beam_indices", None) is not None:
        return []
    found = []
    for step, _ in zip(steps, tokens, strict=False):
        values, ids = torch.log_softmax(step[0].float(), -1).topk(min(most, step.shape[-1]))
        found.append(list(zip(ids.tolist(), values.tolist(), strict=True)))
    return found
