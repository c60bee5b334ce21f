"""One linear stage fitted: non-negative coefficients of least absolute log error.

Knows rows of terms and values. Must not know what they stand for.
"""

import math
from collections.abc import Sequence

from adaptive_fusion.errors import ConfigError

MIN_SAMPLES = 8
_ROUNDS = 25

StageSample = tuple[tuple[float, ...], float]
"""What the coefficients multiply, and what was measured."""


def fit_stage(stage: str, samples: Sequence[StageSample]) -> tuple[tuple[float, ...], list[float]]:
    """Non-negative coefficients of least absolute log error, and measured / predicted of every usable sample.

    Iteratively reweighted least squares: the absolute log error, unlike the squared relative one, neither
    leans towards small predictions nor follows the requests that another process slowed down.
    """
    import numpy as np
    from scipy.optimize import nnls

    usable = [(terms, value) for terms, value in samples if 0.0 < value < math.inf]
    if len(usable) < MIN_SAMPLES:
        raise ConfigError(f"{stage} has {len(usable)} usable samples; expected at least {MIN_SAMPLES}")
    matrix = np.array([terms for terms, _ in usable], dtype=np.float64)
    target = np.array([value for _, value in usable], dtype=np.float64)
    scale = np.where(matrix.max(0) > 0.0, matrix.max(0), 1.0) / float(np.median(target))
    best, least, weights = np.zeros(matrix.shape[1]), math.inf, 1.0 / target
    for _ in range(_ROUNDS):
        solution, _ = nnls(matrix / scale * weights[:, None], target * weights)
        predicted = np.maximum(matrix @ (solution / scale), 1e-9 * target)
        error = np.abs(np.log(target / predicted))
        if error.mean() < least:
            best, least = solution / scale, float(error.mean())
        weights = 1.0 / (np.sqrt(predicted * target) * np.sqrt(np.maximum(error, 0.01)))
    ratios = target / np.maximum(matrix @ best, 1e-12)
    return tuple(best.tolist()), ratios.tolist()
