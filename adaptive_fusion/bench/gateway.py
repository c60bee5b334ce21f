"""What a gateway is worth before an engine: time to the first token, upload, image tokens and quality, beside sending
everything, a fixed number of pixels and another package's squeezing.

Knows questions, answers and their times. Must not know how requests are sent or planned.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import numpy as np

from adaptive_fusion.evaluation.questions import Question
from adaptive_fusion.evaluation.scenes import scene_questions
from adaptive_fusion.evaluation.statistics import bootstrap_mean, bootstrap_ratio
from adaptive_fusion.progress import Progress, Steps, silent

DIRECT, ADAPTIVE, AUDIT = "direct", "adaptive", "audit"
WARM = 2
"""Questions that every row answers first, of which nothing is kept."""


@dataclass(frozen=True)
class Asked:
    """What one answer took: milliseconds, bytes sent, tokens of the image, and what it was worth."""

    ttft_ms: float
    latency_ms: float
    upload: int
    image_tokens: int
    quality: float


Ask = Callable[[Question, bytes], Asked]
"""Sends a question about an encoded picture, by a row's way."""


def stills(count: int, seed: int) -> list[Question]:
    """Questions about the stills of `count` scenes of the mixed set: half of them simple."""
    found = scene_questions(count, "eval", seed)
    return [question for question in found if question.slices["scene"] != "clip"]


def measure(
    questions: Sequence[tuple[Question, bytes]], rows: Mapping[str, Ask], *, progress: Progress = silent
) -> dict[str, list[Asked]]:
    """Every row's answers to all questions, one after the other, each question by all rows in turn, so that what else
    the machine does falls on all of them alike."""
    found: dict[str, list[Asked]] = {name: [] for name in rows}
    names = list(rows)
    for question, data in questions[:WARM]:
        for name in names:
            rows[name](question, data)
    steps = Steps(progress, "ask", len(questions) * len(names))
    for number, (question, data) in enumerate(questions):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            found[name].append(rows[name](question, data))
            steps.advance()
    return found


def summarise(asked: Mapping[str, Sequence[Asked]], seed: int) -> list[dict[str, Any]]:
    """One record a row: means, and ratios to sending everything with their intervals by resampling questions."""
    direct = asked[DIRECT]
    return [_summary(name, row, direct, seed) for name, row in asked.items()]


def _summary(name: str, row: Sequence[Asked], direct: Sequence[Asked], seed: int) -> dict[str, Any]:
    def ratio(what: str) -> Any:
        ours, theirs = ([getattr(each, what) for each in rows] for rows in (row, direct))
        return asdict(bootstrap_ratio(ours, theirs, seed=seed)) if any(theirs) else None

    return {
        "row": name,
        "questions": len(row),
        "ttft_ms": {"mean": float(np.mean([a.ttft_ms for a in row])), "median": median(a.ttft_ms for a in row)},
        "latency_ms": {
            "mean": float(np.mean([a.latency_ms for a in row])),
            "median": median(a.latency_ms for a in row),
        },
        "ttft_ratio": ratio("ttft_ms"),
        "ttft_median_ratio": median(a.ttft_ms for a in row) / median(a.ttft_ms for a in direct),
        "latency_ratio": ratio("latency_ms"),
        "upload": float(np.mean([a.upload for a in row])),
        "upload_ratio": ratio("upload"),
        "image_tokens": float(np.mean([a.image_tokens for a in row])),
        "image_tokens_ratio": ratio("image_tokens"),
        "quality": asdict(bootstrap_mean([a.quality for a in row], seed=seed)),
        "quality_ratio": ratio("quality"),
    }
