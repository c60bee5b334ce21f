"""What a distillation run sees and when: decided by content and seed alone, so that an interrupted run goes on as if
it had not been. Knows questions; nothing of models, tensors or files.
"""

import hashlib
import random
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from adaptive_fusion.errors import ConfigError
from adaptive_fusion.evaluation.questions import Question
from adaptive_fusion.learning.distillation.teacher import WINDOW

T = TypeVar("T")


def share(text: str, seed: int) -> float:
    """A number in [0, 1) that only `text` and `seed` decide."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{text}".encode()).digest()[:6]) / 2**48


def draw(weights: Mapping[T, float], share: float) -> T:
    """The value at `share` (in [0, 1)) of the way through the `weights` of the values."""
    left = share * sum(weights.values())
    for value, weight in weights.items():
        left -= weight
        if left < 0:
            return value
    return value


def split(
    questions: Sequence[Question], *, holdout: float, judged: int, seed: int
) -> tuple[list[Question], list[Question]]:
    """Questions to train on and questions held out, by the hash of their images.

    Args:
        questions: In any order.
        holdout: Share of the images that are held out, at least one of them and never all.
        judged: At most this many questions are held out; further ones about the same images are left out.
        seed: Of the choice.

    Raises:
        ConfigError: With fewer than two images: one has to be held out.
    """
    contents = sorted({question.content for question in questions}, key=lambda content: share(content, seed))
    if len(contents) < 2:
        raise ConfigError(f"got {len(contents)} different images; expected at least 2, since some are held out")
    count = sum(share(content, seed) < holdout for content in contents)
    chosen = set(contents[: min(max(1, count), len(contents) - 1)])
    held = [question for question in questions if question.content in chosen]
    return [question for question in questions if question.content not in chosen], held[:judged]


def batch_at(
    step: int, questions: Sequence[Question], size: int, length: Callable[[Question], int], seed: int
) -> list[Question]:
    """The questions of a step, of like lengths: every epoch has a new order.

    Args:
        step: Counted from 0.
        questions: At least one.
        size: Questions of a batch, if there are that many.
        length: Tokens of a question and its answer.
        seed: Of the order.
    """
    size = min(size, len(questions))
    epoch, place = divmod(step, len(questions) // size)
    rng = random.Random(f"{seed}/epoch {epoch}")
    order = rng.sample(questions, len(questions) // size * size)
    window = WINDOW * size
    for start in range(0, len(order), window):
        order[start : start + window] = sorted(order[start : start + window], key=length)
    firsts = list(range(0, len(order), size))
    rng.shuffle(firsts)
    return order[firsts[place] : firsts[place] + size]
