"""What answers are worth, and how sure their mean is: text and matching metrics, bootstrap intervals.

Pure functions over strings, sets and arrays: knows no model, image, operating point or file. CIDEr-D lives
next door in `cider`.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from adaptive_fusion.errors import AdaptiveFusionError, ConfigError

if TYPE_CHECKING:
    from sacrebleu.metrics.bleu import BLEU

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

# A number keeps its inner separators (3.50, 12:30), a word its inner apostrophes and hyphens.
_TOKEN = re.compile(r"\d+(?:[.,:/]\d+)+|\w+(?:['-]\w+)*")
_BLOCK = 1 << 21  # indices drawn at once: 16 MB


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


@dataclass(frozen=True)
class Interval:
    """A statistic of the whole sample and its percentile bootstrap interval, in the statistic's unit."""

    mean: float
    low: float
    high: float

    def excludes(self, value: float) -> bool:
        """Tell whether `value` (0 for a difference, 1 for a ratio) lies outside the interval."""
        return not self.low <= value <= self.high


def bootstrap(
    statistic: Callable[[IntArray], float],
    size: int,
    *,
    seed: int,
    n: int = 2000,
    level: float = 0.95,
    groups: npt.ArrayLike | None = None,
) -> Interval:
    """Return the interval of `statistic(indices)`, a function of the chosen samples' indices below `size`.

    Source: Efron & Tibshirani (1993), percentile method: `n` resamples with replacement, of whole groups
    where `groups` (one label a sample) says which samples are not independent. It is a little narrow below
    about 30 samples or groups.

    Raises ConfigError on no samples, labels of another length, or a statistic that is not finite.
    """
    labels = _labels(size, groups)
    members = np.split(np.argsort(labels, kind="stable"), np.cumsum(np.bincount(labels))[:-1])
    rng = np.random.default_rng(seed)
    draws = np.empty(_checked_draws(n, level))
    for index in range(n):
        chosen = rng.integers(len(members), size=len(members))
        draws[index] = statistic(chosen if groups is None else np.concatenate([members[g] for g in chosen]))
    return _interval(statistic(np.arange(size)), draws, level)


def bootstrap_mean(
    values: npt.ArrayLike,
    *,
    seed: int,
    n: int = 2000,
    level: float = 0.95,
    groups: npt.ArrayLike | None = None,
) -> Interval:
    """Return the interval of the mean of `values`, shape [samples]; see `bootstrap` for the rest."""
    column = _column(values)
    return _ratio_of_sums(column, np.ones_like(column), seed, n, level, groups)


def bootstrap_diff(
    a: npt.ArrayLike,
    b: npt.ArrayLike,
    *,
    seed: int,
    n: int = 2000,
    level: float = 0.95,
    groups: npt.ArrayLike | None = None,
) -> Interval:
    """Return the interval of the mean of a - b, paired: a[i] and b[i] belong to the same request."""
    first, second = _paired(a, b)
    return bootstrap_mean(first - second, seed=seed, n=n, level=level, groups=groups)


def bootstrap_ratio(
    a: npt.ArrayLike,
    b: npt.ArrayLike,
    *,
    seed: int,
    n: int = 2000,
    level: float = 0.95,
    groups: npt.ArrayLike | None = None,
) -> Interval:
    """Return the interval of mean(a) / mean(b), paired: a[i] and b[i] belong to the same request.

    Raises ConfigError where the mean of `b` is 0, in the sample or a resample.
    """
    first, second = _paired(a, b)
    return _ratio_of_sums(first, second, seed, n, level, groups)


def won_back(
    full: npt.ArrayLike, reduced: npt.ArrayLike, restored: npt.ArrayLike, *, seed: int, n: int = 2000
) -> Interval | None:
    """Return the interval of the share of what `reduced` loses against `full` that `restored` has again, paired.

    None where nothing is surely lost: a share of what may be zero or negative has no interval (Fieller, 1954).
    """
    whole, less = _paired(full, reduced)
    if bootstrap_diff(whole, less, seed=seed, n=n).low <= 0:
        return None
    try:
        return bootstrap_ratio(_paired(restored, less)[0] - less, whole - less, seed=seed, n=n)
    except ConfigError:  # the loss is 0 in a resample
        return None


def _ratio_of_sums(
    top: FloatArray, bottom: FloatArray, seed: int, n: int, level: float, groups: npt.ArrayLike | None
) -> Interval:
    labels = _labels(len(top), groups)
    sums = np.stack([np.bincount(labels, weights=top), np.bincount(labels, weights=bottom)])
    units = sums.shape[1]
    rng = np.random.default_rng(seed)
    draws = np.empty((2, _checked_draws(n, level)))
    block = max(1, _BLOCK // units)
    for start in range(0, n, block):
        stop = min(n, start + block)
        chosen = rng.integers(units, size=(stop - start, units))
        draws[0, start:stop] = sums[0][chosen].sum(axis=1)
        draws[1, start:stop] = sums[1][chosen].sum(axis=1)
    if bottom.sum() == 0 or not draws[1].all():
        raise ConfigError("the mean of b is 0 in the sample or a resample; a ratio needs it away from 0")
    return _interval(top.sum() / bottom.sum(), draws[0] / draws[1], level)


def _interval(point: float, draws: FloatArray, level: float) -> Interval:
    if not (np.isfinite(point) and np.isfinite(draws).all()):
        raise ConfigError("the statistic is not finite in the sample or a resample")
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(point), float(low), float(high))


def _checked_draws(n: int, level: float) -> int:
    if n < 1 or not 0 < level < 1:
        raise ConfigError(f"got n={n}, level={level}; n must be at least 1 and level between 0 and 1")
    return n


def _labels(size: int, groups: npt.ArrayLike | None) -> IntArray:
    if size < 1:
        raise ConfigError(f"a bootstrap needs at least one sample; got {size}")
    if groups is None:
        return np.arange(size)
    names = np.asarray(groups)
    if names.shape != (size,):
        raise ConfigError(f"groups must hold one label for each of {size} samples; got shape {list(names.shape)}")
    return np.unique(names, return_inverse=True)[1].astype(np.int64)


def _column(values: npt.ArrayLike) -> FloatArray:
    column = np.asarray(values, dtype=np.float64)
    if column.ndim != 1 or not np.isfinite(column).all():
        raise ConfigError(f"values must be one row of finite numbers; got shape {list(column.shape)}")
    return column


def _paired(a: npt.ArrayLike, b: npt.ArrayLike) -> tuple[FloatArray, FloatArray]:
    first, second = _column(a), _column(b)
    if len(first) != len(second):
        raise ConfigError(f"paired values need one length; got {len(first)} and {len(second)}")
    return first, second
