"""CIDEr-D: how much of what people agree on about an image a caption says, by tf-idf weighted n-grams.

Pure numbers over token lists: knows no tokenizer, image, model or file.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from adaptive_fusion.errors import ConfigError

Tokens = Sequence[str]
FloatArray = npt.NDArray[np.float64]


def cider_d(
    candidates: Sequence[Tokens],
    references: Sequence[Sequence[Tokens]],
    df_corpus: Sequence[Sequence[Tokens]] | None = None,
    *,
    sigma: float = 6.0,
    n: int = 4,
) -> FloatArray:
    """Return CIDEr-D of each candidate against its own references, shape [samples], each in [0, 10].

    Source: Vedantam, Zitnick, Parikh, "CIDEr" (2015), the "D" variant: candidate counts are clipped to the
    reference's, a Gaussian of width `sigma` (tokens) punishes a wrong length. Agrees with pycocoevalcap's
    `Cider` on the same tokens; the corpus score is the mean over samples.

    Document frequencies come from `df_corpus` (reference lists of many images) or else from `references`.
    Score the whole evaluation set in one call and slice the result: a slice scored alone has other
    frequencies, and a corpus of one image has no rare words, so that everything scores 0.

    Raises ConfigError if the lengths differ, a sample has no reference, or the corpus is empty.
    """
    if len(candidates) != len(references):
        raise ConfigError(f"got {len(candidates)} candidates for {len(references)} samples; one each is needed")
    for index, group in enumerate(references):
        if not group:
            raise ConfigError(f"sample {index} has no reference; at least one is needed")
    if n < 1 or not sigma > 0:
        raise ConfigError(f"got n={n}, sigma={sigma}; n must be at least 1 and sigma above 0")
    corpus = references if df_corpus is None else df_corpus
    if not corpus:
        raise ConfigError("document frequencies need at least one image's references; got none")

    documents = Counter(gram for group in corpus for gram in {g for tokens in group for g in _ngrams(tokens, n)})
    log_size = math.log(len(corpus))

    def vectorise(tokens: Tokens) -> tuple[dict[tuple[str, ...], float], FloatArray]:
        counts = Counter(_ngrams(tokens, n))
        weights = {g: count * (log_size - math.log(max(1, documents[g]))) for g, count in counts.items()}
        squares = np.zeros(n)
        for gram, weight in weights.items():
            squares[len(gram) - 1] += weight * weight
        return weights, np.sqrt(squares)

    scores = np.zeros(len(candidates))
    for index, (candidate, group) in enumerate(zip(candidates, references, strict=True)):
        weights, norms = vectorise(candidate)
        for reference in group:
            ref_weights, ref_norms = vectorise(reference)
            dots = np.zeros(n)
            for gram in weights.keys() & ref_weights.keys():
                dots[len(gram) - 1] += min(weights[gram], ref_weights[gram]) * ref_weights[gram]
            both = norms * ref_norms
            cosines = np.divide(dots, both, out=np.zeros(n), where=both > 0)
            delta = len(candidate) - len(reference)
            scores[index] += cosines.mean() * math.exp(-(delta**2) / (2 * sigma**2))
        scores[index] *= 10 / len(group)
    return scores


def _ngrams(tokens: Tokens, n: int) -> Iterator[tuple[str, ...]]:
    for order in range(1, n + 1):
        for start in range(len(tokens) - order + 1):
            yield tuple(tokens[start : start + order])
