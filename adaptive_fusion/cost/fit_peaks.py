"""Peaks of memory fitted: the encoder's and the language model's, of which only the larger one is ever seen.

Knows samples and the terms of the cost model. Must not know of models or files.
"""

import math
from collections.abc import Sequence
from operator import mul
from typing import Any

from adaptive_fusion.cost.fit_stage import MIN_SAMPLES, fit_stage
from adaptive_fusion.cost.model import Work, context_terms, memory_terms
from adaptive_fusion.point import OperatingPoint

Peak = tuple[OperatingPoint, Work, float]
Coefficients = tuple[float, ...]

_STARTS = (0.0, 0.15, 0.3, 0.5, 0.7, 0.85)
_ROUNDS = 12
NOTHING: Coefficients = (0.0, 0.0, 0.0, 0.0, 0.0)


def peak_of(memory: Coefficients, context: Coefficients, point: OperatingPoint, work: Work) -> float:
    """The peak that the cost model predicts, in GiB."""
    return max(_dot(memory, memory_terms(point, work)), _dot(context, context_terms(work)))


def fit_peaks(samples: Sequence[Peak]) -> tuple[Coefficients, Coefficients]:
    """Coefficients of both parts, `memory` and `context`.

    By turns: each sample belongs to the part that is predicted to be larger, each part is fitted to its own. Where
    that ends depends on where it begins, so it begins several times, with those samples taken for the language
    model's that have most tokens to each patch. If one part explains all there is, the other is none.

    Args:
        samples: Points, work and peaks in GiB.

    Raises:
        ConfigError: For fewer samples than a part needs.
    """
    best = NOTHING, fit_stage("memory", [(context_terms(work), peak) for _, work, peak in samples])[0]
    least = _error(*best, samples)
    density = [(work.prompt_tokens + work.batch * work.new_tokens) / (1 + sum(work.patches)) for _, work, _ in samples]
    ordered = sorted(density)
    for start in _STARTS:
        cut = ordered[int(start * (len(ordered) - 1))]
        of_encoder = [bool(work.patches) and each <= cut for (_, work, _), each in zip(samples, density, strict=True)]
        parts = best
        for _ in range(_ROUNDS):
            parts = _fitted(samples, of_encoder, parts)
            found = _error(*parts, samples)
            if found < least:
                best, least = parts, found
            before, of_encoder = of_encoder, [
                _dot(parts[0], memory_terms(point, work)) > _dot(parts[1], context_terms(work))
                for point, work, _ in samples
            ]  # fmt: skip
            if of_encoder == before:
                break
    return best


def _fitted(
    samples: Sequence[Peak], of_encoder: Sequence[bool], before: tuple[Coefficients, Coefficients]
) -> tuple[Coefficients, Coefficients]:
    """Each part fitted to its own samples; one with too few stays what it was."""
    own = [(memory_terms(p, w), peak) for (p, w, peak), its in zip(samples, of_encoder, strict=True) if its]
    others = [(context_terms(w), peak) for (_, w, peak), its in zip(samples, of_encoder, strict=True) if not its]
    found = list(before)
    for place, rows in enumerate((own, others)):
        if len(rows) >= MIN_SAMPLES:
            found[place] = fit_stage("memory", rows)[0]
    return found[0], found[1]


def _error(memory: Coefficients, context: Coefficients, samples: Sequence[Peak]) -> float:
    """Mean absolute log error."""
    return sum(
        abs(math.log(peak / max(peak_of(memory, context, point, work), 1e-9 * peak))) for point, work, peak in samples
    ) / len(samples)


def _dot(coefficients: Coefficients, terms: Sequence[Any]) -> float:
    total: float = sum(map(mul, coefficients, terms))
    return total
