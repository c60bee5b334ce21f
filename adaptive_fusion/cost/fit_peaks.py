"""Peaks of memory fitted: the encoder's and the prefill's, of which only the larger one is ever seen.

Knows samples and the terms of the cost model. Must not know of models or files.
"""

import math
from collections.abc import Sequence

from adaptive_fusion.cost.fit_stage import MIN_SAMPLES, fit_stage
from adaptive_fusion.cost.model import Work, memory_terms, peak_gb, prompt_memory_terms
from adaptive_fusion.point import OperatingPoint

Peak = tuple[OperatingPoint, Work, float]
Coefficients = tuple[float, ...]

_STARTS = (0.0, 0.15, 0.3, 0.5, 0.7, 0.85)
_ROUNDS = 12
NOTHING: Coefficients = (0.0, 0.0, 0.0, 0.0, 0.0)


def fit_peaks(samples: Sequence[Peak], cache_gb: float) -> tuple[Coefficients, Coefficients]:
    """Coefficients of both parts, `memory` and `context`.

    By turns: each sample belongs to the part that is predicted to be larger, each part is fitted to its own. Where
    that ends depends on where it begins, so it begins several times, with those samples taken for the language
    model's that have most tokens to each patch. If one part explains all there is, the other is none.

    Args:
        samples: Points, work and peaks in GiB, of short answers, whose end needs no more than their prompt.
        cache_gb: Key-value cache of one token, which is known and not fitted.

    Raises:
        ConfigError: For fewer samples than a part needs.
    """
    rows = [(prompt_memory_terms(work), peak) for _, work, peak in samples]
    best = NOTHING, _context(fit_stage("memory", rows)[0], cache_gb)
    least = _error(*best, samples)
    density = [work.prompt_tokens / (1 + sum(work.patches)) for _, work, _ in samples]
    ordered = sorted(density)
    for start in _STARTS:
        cut = ordered[int(start * (len(ordered) - 1))]
        of_encoder = [bool(work.patches) and each <= cut for (_, work, _), each in zip(samples, density, strict=True)]
        parts = best
        for _ in range(_ROUNDS):
            parts = _fitted(samples, of_encoder, parts, cache_gb)
            found = _error(*parts, samples)
            if found < least:
                best, least = parts, found
            before = of_encoder
            of_encoder = [
                peak_gb(parts[0], NOTHING, point, work) > peak_gb(NOTHING, parts[1], point, work)
                for point, work, _ in samples
            ]
            if of_encoder == before:
                break
    return best


def _fitted(
    samples: Sequence[Peak], of_encoder: Sequence[bool], before: tuple[Coefficients, Coefficients], cache_gb: float
) -> tuple[Coefficients, Coefficients]:
    """Each part fitted to its own samples; one with too few stays what it was."""
    memory, context = before
    own = [(memory_terms(p, w), peak) for (p, w, peak), its in zip(samples, of_encoder, strict=True) if its]
    others = [(prompt_memory_terms(w), peak) for (_, w, peak), its in zip(samples, of_encoder, strict=True) if not its]
    if len(own) >= MIN_SAMPLES:
        memory = fit_stage("memory", own)[0]
    if len(others) >= MIN_SAMPLES:
        context = _context(fit_stage("memory", others)[0], cache_gb)
    return memory, context


def _context(fitted: Coefficients, cache_gb: float) -> Coefficients:
    first, token, square, patch = fitted
    return first, token, cache_gb, square, patch


def _error(memory: Coefficients, context: Coefficients, samples: Sequence[Peak]) -> float:
    """Mean absolute log error."""
    return sum(
        abs(math.log(peak / max(peak_gb(memory, context, point, work), 1e-9 * peak))) for point, work, peak in samples
    ) / len(samples)
