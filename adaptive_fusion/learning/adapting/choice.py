"""Which shares of the native pixels are worth running on a set of images: those whose outcomes say most.

Pure functions over arrays. Knows nothing of models, images or policies.

Before anything is run, log2 of the share that a model needs of an image is taken as logistic around what is generally
enough, `SPREAD` octaves wide. Running a set of shares tells between which two of them it lies: the entropy of that
answer, averaged over the images, is the information (Lindley 1956), and shares are taken one after the other, each the
one that adds most.
"""

from collections.abc import Sequence

import numpy as np

from adaptive_fusion.learning.data.dataset import FloatArray

SPREAD = 1.0
"""Octaves, the scale of a logistic distribution: nothing is known yet of how far this model is from the general one."""
MOST = 8
"""Shares that are run on each image, beside all of its pixels. Together they take about three prefills."""


def informative(
    octaves: FloatArray, shares: Sequence[float], most: int = MOST, always: Sequence[float] = ()
) -> list[float]:
    """The `most` of `shares` that say most, in order of what they add, after those that are wanted in any case.

    Args:
        octaves: log2 of the share that is generally enough for each image, ``[n]``, at least one.
        shares: On offer, in (0, 1).
        most: How many, those wanted included.
        always: Some of `shares`.
    """
    below = {share: 1.0 / (1.0 + np.exp(-(np.log2(share) - octaves) / SPREAD)) for share in shares}
    chosen = list(always)
    rest = [share for share in shares if share not in chosen]
    while rest and len(chosen) < most:
        worth = [_entropy(below, [*chosen, share]) for share in rest]
        chosen.append(rest.pop(int(np.argmax(worth))))
    return chosen


def _entropy(below: dict[float, FloatArray], chosen: Sequence[float]) -> float:
    """Mean entropy, in nats, of where between the chosen shares the need lies."""
    ends = [np.zeros_like(below[chosen[0]]), *(below[share] for share in sorted(chosen))]
    parts = np.diff(np.stack([*ends, np.ones_like(ends[0])]), axis=0)
    return float(-(parts * np.log(np.maximum(parts, 1e-300))).sum(axis=0).mean())
