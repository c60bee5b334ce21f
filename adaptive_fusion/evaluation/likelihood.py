"""How likely a model finds given answers: after one prompt whose cache they share, or teacher-forced in one batch.

Knows models, token ids and logits. Must not know of texts, times, operating points or what a likelihood is for.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adaptive_fusion.models.caches import cache_name


@dataclass(frozen=True)
class Likelihood:
    """Of one answer: its log-likelihood, the mean of it per token, the share of its tokens that rank first, and the
    entropy of the distribution that each of its tokens comes from, in nats."""

    total: float
    mean: float
    ranked_first: float
    entropies: tuple[float, ...]


@torch.no_grad()
def prefill(model: Any, inputs: Mapping[str, Any]) -> Any:
    """The model's output for one prompt (``input_ids`` ``[1, length]``): the last logits and the cache."""
    return model(**inputs, use_cache=True, logits_to_keep=1)


@torch.no_grad()
def after_prompt(model: Any, prompt: Any, answers: Sequence[Sequence[int]]) -> list[Likelihood]:
    """The likelihood of each answer (token ids, its end included) after a prompt.

    The answers share the prompt's cache, padded on the right, where causal attention never looks.

    Args:
        model: As given to `prefill`.
        prompt: What `prefill` returned; its cache is used up.
        answers: At least one, each with at least one token.
    """
    longest = max(map(len, answers))
    ids = torch.tensor([[*row, *[row[-1]] * (longest - len(row))] for row in answers], device=prompt.logits.device)
    logits = prompt.logits.expand(len(answers), -1, -1)
    if longest > 1:
        name = cache_name(model)
        cache = getattr(prompt, name)
        cache.batch_repeat_interleave(len(answers))
        # No mask: with one, Qwen's models would count positions for the prompt as well.
        rest = model(input_ids=ids[:, :-1], use_cache=True, **{name: cache}).logits
        logits = torch.cat([logits, rest], dim=1)
    return [
        _likelihood(row[: len(answer)], ids[i, : len(answer)])
        for i, (row, answer) in enumerate(zip(logits, answers, strict=True))
    ]


def _likelihood(logits: Tensor, answer: Tensor) -> Likelihood:
    log_p = torch.log_softmax(logits.float(), dim=-1)
    likely = log_p.gather(1, answer[:, None])
    right = (logits.argmax(-1) == answer).float()
    unsure = torch.special.entr(log_p.exp()).sum(-1)
    return Likelihood(float(likely.sum()), float(likely.mean()), float(right.mean()), tuple(unsure.tolist()))


def teacher_forced(model: Any, inputs: Mapping[str, Any], answers: Sequence[Tensor]) -> list[Tensor]:
    """The logits ``[n, vocabulary]`` in float32 that predict each row's answer ``[n]``, which ends its ``input_ids``.

    Gradient reaches what `inputs` were made with.
    """
    keep = max(map(len, answers)) + 1
    logits = model(**inputs, logits_to_keep=keep, use_cache=False).logits
    return [row[-len(answer) - 1 : -1].float() for row, answer in zip(logits, answers, strict=True)]
