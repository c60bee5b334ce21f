"""How near a student's next-token distributions come to its teacher's. Knows tensors; nothing of models or training."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from adaptive_fusion.learning.distillation.teacher import TeacherOutput


@dataclass(frozen=True)
class Judged:
    """Held-out KL per answer token in nats, and the share of the teacher's tokens the student ranks first, by ratio."""

    kl: dict[float, float]
    agreement: dict[float, float]


def divergence(teacher: TeacherOutput, logits: Tensor) -> Tensor:
    """KL(teacher || student) at each position ``[n]``, in nats, tokens the teacher left out being one outcome.

    Args:
        teacher: Its answer and likeliest tokens.
        logits: The student's, ``[n, vocabulary]``.
    """
    student = torch.log_softmax(logits, dim=-1)
    theirs = teacher.logprobs.to(logits.device)
    ours = student.gather(1, teacher.indices.to(logits.device).long())
    total = (theirs.exp() * (theirs - ours)).sum(1)
    if ours.shape[1] == logits.shape[1]:
        return total
    rest, our_rest = (_remainder(part) for part in (theirs, ours))
    return total + rest.exp() * (rest - our_rest)


def _remainder(logprobs: Tensor) -> Tensor:
    """Log of the probability that ``[n, k]`` leaves over, at least 1e-7."""
    return torch.log1p(-logprobs.exp().sum(1).clamp(max=1 - 1e-7))


def judge(answers: Iterable[tuple[TeacherOutput, Tensor]]) -> tuple[float, float]:
    """KL per token in nats, and the share of the teacher's tokens that have the student's highest logit.

    Args:
        answers: The teacher's answers, each with the student's logits ``[n, vocabulary]``; at least one token in all.
    """
    losses, right = [], []
    for teacher, logits in answers:
        losses.append(divergence(teacher, logits))
        right.append((logits.argmax(-1).cpu() == teacher.tokens).float())
    return float(torch.cat(losses).mean()), float(torch.cat(right).mean())
