"""Per-question scores and measurements of every row, and which questions a slice holds.

Knows answers and metrics. Must not know of rows that belong together, means or tables.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from adaptive_fusion.bench.answers import Answer
from adaptive_fusion.evaluation.cider import cider_d
from adaptive_fusion.evaluation.questions import Question
from adaptive_fusion.evaluation.text import bleu_statistics, exact_match, matching_accuracy, tokenize

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

MIXED = "mixed"
QUALITIES = ("quality", "exact", "cider", "reading", "matching", "token_accuracy")
STAGES = ("preprocess_ms", "encode_ms", "prefill_ms", "decode_ms", "ttft_ms", "latency_ms")
COUNTS = ("visual_tokens", "patches", "new_tokens", "peak_memory_gb")


@dataclass(frozen=True)
class RowScores:
    """Of one row: columns ``[questions]``, NaN where a metric does not apply, and BLEU's statistics."""

    columns: dict[str, FloatArray]
    bleu: IntArray
    timed: bool

    def take(self, name: str, chosen: IntArray) -> FloatArray:
        """The chosen questions' values that apply."""
        values = self.columns[name][chosen]
        return values[~np.isnan(values)]


def slices(questions: Sequence[Question]) -> dict[str, IntArray]:
    """Indices of each slice's questions; `mixed` is all of them where there are several slices."""
    names = list(dict.fromkeys(question.slice for question in questions))
    found = {name: np.array([i for i, question in enumerate(questions) if question.slice == name]) for name in names}
    return found if len(names) == 1 else {**found, MIXED: np.arange(len(questions))}


def all_together(names: Iterable[str]) -> str:
    """The slice of all questions: `mixed`, or the only one there is."""
    names = list(names)
    return MIXED if MIXED in names else names[0]


def score_all(questions: Sequence[Question], answers: Mapping[str, Sequence[Answer]]) -> dict[str, RowScores]:
    """Quality, CIDEr-D, reading, matching, token accuracy and measurements of every row, per question.

    CIDEr-D takes its document frequencies from all references of the evaluation set. `reading` is the ANLS of the
    questions that are scored by it.
    """
    references = [[tokenize(text) for text in question.references] for question in questions]
    return {name: _scores(questions, references, row) for name, row in answers.items()}


def _scores(
    questions: Sequence[Question], references: Sequence[Sequence[list[str]]], answers: Sequence[Answer]
) -> RowScores:
    texts = [tokenize(answer.text) for answer in answers]
    pairs = list(zip(questions, answers, strict=True))
    quality = [question.score(answer.text) for question, answer in pairs]
    columns: dict[str, FloatArray] = {
        "quality": _column(quality),
        "exact": _column(exact_match(answer.text, question.references) for question, answer in pairs),
        "cider": cider_d(texts, references),
        "reading": _column(
            q if question.metric == "anls" else None for question, q in zip(questions, quality, strict=True)
        ),
        "matching": _column(_matched(question, answer.likelihoods) for question, answer in pairs),
        "token_accuracy": _column(answer.token_accuracy for answer in answers),
    }
    measured = [answer.measurement for answer in answers]
    for key in (*STAGES, *COUNTS):
        columns[key] = _column(None if m is None else float(getattr(m, key)) for m in measured)
    return RowScores(columns, bleu_statistics(texts, references), all(m is not None for m in measured))


def _matched(question: Question, likelihoods: Sequence[float]) -> float | None:
    if not question.negatives:
        return None
    if not likelihoods:  # nobody looked: a guess among the candidates
        return 1.0 / (1 + len(question.negatives))
    return float(matching_accuracy([likelihoods])[0])


def _column(values: Iterable[float | None]) -> FloatArray:
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)
