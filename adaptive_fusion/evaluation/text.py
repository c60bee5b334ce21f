"""What answers are worth: text and matching metrics.

Pure functions over strings, sets and arrays: knows no model, image, operating point or file. CIDEr-D lives
next door in `cider`, intervals in `statistics`.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from adaptive_fusion.errors import AdaptiveFusionError, ConfigError
from adaptive_fusion.reference.screens import elements

if TYPE_CHECKING:
    from sacrebleu.metrics.bleu import BLEU

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

# A number keeps its inner separators (3.50, 12:30), a word its inner apostrophes and hyphens.
_TOKEN = re.compile(r"\d+(?:[.,:/]\d+)+|\w+(?:['-]\w+)*")


def tokenize(text: str) -> list[str]:
    """Split a caption into lower-case words and numbers without punctuation: what CIDEr-D and BLEU take.

    Unicode is NFKC-normalised first. Scripts without spaces between words give one token per run of letters.
    """
    return _TOKEN.findall(unicodedata.normalize("NFKC", text).lower().replace("\u2019", "'"))


def bleu_statistics(candidates: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> IntArray:
    """Return each sample's sufficient statistics for BLEU-4 over token lists, shape [samples, 10].

    Columns: matches of order 1-4, candidate n-grams of order 1-4, candidate length, closest reference length.
    They add up: `bleu4(statistics[chosen])` is the corpus BLEU of the chosen samples, so resampling is cheap.

    Raises ConfigError on unequal lengths or no reference, AdaptiveFusionError without sacrebleu.
    """
    if len(candidates) != len(references) or not all(references):
        raise ConfigError(f"got {len(candidates)} candidates, {len(references)} samples; each needs a reference")
    bleu = _sacrebleu_class()(tokenize="none", force=True, effective_order=True)
    scores = [
        bleu.sentence_score(" ".join(candidate), [" ".join(tokens) for tokens in group])
        for candidate, group in zip(candidates, references, strict=True)
    ]
    rows = [[*score.counts, *score.totals, score.sys_len, score.ref_len] for score in scores]
    return np.array(rows, dtype=np.int64).reshape(-1, 10)


def bleu4(statistics: IntArray) -> float:
    """Return corpus BLEU-4 in [0, 100] from rows of `bleu_statistics`.

    Source: Papineni et al. (2002); equals `sacrebleu.corpus_bleu` (Post, 2018) with its exp smoothing.
    """
    total = [int(value) for value in statistics.sum(axis=0)]
    score = _sacrebleu_class().compute_bleu(total[:4], total[4:8], total[8], total[9], smooth_method="exp")
    return float(score.score)


def _sacrebleu_class() -> "type[BLEU]":
    try:
        from sacrebleu.metrics.bleu import BLEU
    except ImportError as error:
        raise AdaptiveFusionError("BLEU needs sacrebleu: pip install 'adaptive-fusion[train]'") from error
    found: type[BLEU] = BLEU
    return found


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """Return 1.0 if the prediction is one of the references up to case and white space, else 0.0."""
    return float(_plain(prediction) in {_plain(reference) for reference in references})


def anls(prediction: str, references: Sequence[str], *, threshold: float = 0.5) -> float:
    """Return the normalised Levenshtein similarity to the closest reference, 0.0 if it is below `threshold`.

    Source: Biten et al., "Scene Text Visual Question Answering" (2019), as DocVQA's evaluation script has
    it: lower-cased, white space collapsed, and a similarity of just `threshold` still counts.

    Raises ConfigError without a reference.
    """
    if not references:
        raise ConfigError("anls needs at least one reference; got none")
    answer = _plain(prediction)
    best = max(_similarity(answer, _plain(reference)) for reference in references)
    return best if best >= threshold else 0.0


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def _similarity(a: str, b: str) -> float:
    longest = max(len(a), len(b))
    return 1.0 - _levenshtein(a, b) / longest if longest else 1.0


def _levenshtein(a: str, b: str) -> int:
    above = list(range(len(b) + 1))
    for row, left in enumerate(a, start=1):
        current = [row]
        for column, right in enumerate(b, start=1):
            change = above[column - 1] + (left != right)
            current.append(min(change, above[column] + 1, current[-1] + 1))
        above = current
    return above[-1]


def element_recall(predicted: Sequence[Hashable], truth: Sequence[Hashable]) -> float:
    """Return the share of a screen's elements that were stated fully right, in [0, 1]; 1.0 if it has none.

    Multisets: an element that occurs twice must be stated twice. Order and surplus statements do not matter.
    """
    if not truth:
        return 1.0
    return (Counter(predicted) & Counter(truth)).total() / len(truth)


def matching_accuracy(loglik: npt.ArrayLike) -> FloatArray:
    """Return per image 1.0 if its true caption is the likeliest, else 0.0, shape [n].

    `loglik` has shape [n, 1 + k]: column 0 is the true caption, the others hard negatives. A tie counts as
    wrong. Whether to divide by the length of the captions is the caller's choice.

    Raises ConfigError on another shape or NaN.
    """
    values = np.asarray(loglik, dtype=np.float64)
    if values.ndim != 2 or values.shape[1] < 2:
        raise ConfigError(f"log-likelihoods must have shape [n, 1 + k] with k >= 1; got {list(values.shape)}")
    if np.isnan(values).any():
        raise ConfigError(f"log-likelihoods must be numbers; got {int(np.isnan(values).sum())} NaN")
    best_negative = values[:, 1:].max(axis=1)
    return np.where(values[:, 0] > best_negative, 1.0, 0.0)


def recall(answer: str, references: Sequence[str]) -> float:
    """Share of the scene's elements that a free description states fully right."""
    return element_recall(elements(answer), elements(references[0]))


def word_f1(prediction: str, references: Sequence[str]) -> float:
    """Harmonic mean of precision and recall of the words against the closest reference (Rajpurkar et al.
    2016)."""
    best = 0.0
    said = Counter(tokenize(prediction))
    for reference in references:
        words = Counter(tokenize(reference))
        shared = (said & words).total()
        total = said.total() + words.total()
        best = max(best, 2 * shared / total if total else 1.0)
    return best


METRICS: dict[str, Callable[[str, Sequence[str]], float]] = {
    "anls": anls,
    "elements": recall,
    "exact": exact_match,
    "words": word_f1,
}
"""How an answer is scored against references, in [0, 1]: read text, elements of a reference scene's
description, short answers, captions."""
