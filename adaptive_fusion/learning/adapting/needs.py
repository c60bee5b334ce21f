"""The pixels that a model itself needs, learned with the general needs as the prior.

Pure functions over arrays: knows no files, models or planners.

log2 of the share that an image and question need is taken as logistic, of scale tau, around

    m = general + a[kind] + sum of w[i] z[i],        z standardised features of the image,

an ordinal logistic regression whose offset is what the general policy says. What each run tells is an interval: the
answer is good enough at one share and not at the next smaller one. The prior is a ~ N(0, `KIND_OCTAVES`^2), w ~
N(0, `FEATURE_OCTAVES`^2), ln tau ~ N(ln `SPREAD`, `SPREAD_FACTOR`^2); the fit is its mode, so that with few images the
general needs come out and with many the model's own.

The margin on top is set by what is lost, not by the model of it. In folds, each predicted by a fit on the others, an
image loses what its answer loses at the smallest share that was run and is not below m + margin. The smallest margin
is taken from which on the mean loss R of n images is within the tolerance and (n R + 1) / (n + 1) within `BOUND`
(conformal risk control, Angelopoulos et al. 2022): with fewer than 1 / `BOUND` - 1 images there is none, and nothing is
learned.
"""

import math
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize

from adaptive_fusion.learning.adapting.answers import NAMES, Answers
from adaptive_fusion.learning.data.dataset import FloatArray, IntArray
from adaptive_fusion.policy.own_needs import OwnNeeds

KIND_OCTAVES = 1.0
FEATURE_OCTAVES = 0.3
SPREAD, SPREAD_FACTOR = 0.7, 0.5
READ = (
    "text_share", "text_height_low", "stroke_low", "stroke_count", "stroke_contrast", "enlarged",
    "flat_regions", "jpeg_bits", "log_pixels",
)  # fmt: skip
"""Features that the general needs are made of, and the size of the image."""
BOUND = 0.05
"""Bound on the expected loss of a new image that the margin must keep to whatever the distribution is."""
LEAST_IMAGES = math.ceil(1 / BOUND - 1)
"""Fewest images from which a margin can be known."""
FOLDS = 5
MARGINS = np.round(np.arange(-4.0, 8.01, 0.05), 2)
"""Octaves that are tried."""
OCTAVE_ROWS = 20.0
"""Rows that what is generally lost by an octave counts as."""
_TINY, _FAR = 1e-12, 500.0


@dataclass(frozen=True)
class Needs:
    """Fitted octaves: by kind, by standardised feature, and the scale of what they leave open."""

    kinds: dict[str, float]
    middle: FloatArray
    scale: FloatArray
    weights: FloatArray
    spread: float

    def octaves(self, answers: Answers) -> FloatArray:
        """m of each row, ``[n]``; a kind that was not there has the general one."""
        own = np.array([self.kinds.get(kind, 0.0) for kind in answers.kinds])
        found: FloatArray = answers.octaves + own + _standard(answers, self.middle, self.scale) @ self.weights
        return found


def fit_own_needs(answers: Answers, general_per_octave: float) -> tuple[OwnNeeds | None, FloatArray]:
    """The model's own needs with their margin, None for too few images; and for each row m by fits on other images,
    without the margin, ``[n]``.

    Args:
        answers: The model's own.
        general_per_octave: What is generally lost by each octave below what is needed.
    """
    if answers.images < LEAST_IMAGES or not len(answers.shares):
        return None, answers.octaves
    unseen = out_of_fold(answers)
    margin = choose_margin(answers, unseen)
    if margin is None:
        return None, answers.octaves
    found = fit_needs(answers)
    names, weights = READ, found.weights / found.scale
    own = OwnNeeds(
        found.kinds,
        names,
        tuple(map(float, found.middle)),
        tuple(map(float, weights)),
        margin,
        per_octave(answers, general_per_octave),
    )
    return own, unseen


def out_of_fold(answers: Answers) -> FloatArray:
    """m of each row by a fit on the images of other folds, ``[n]``."""
    folds, found = answers.folds(FOLDS), np.empty(len(answers))
    for fold in np.unique(folds):
        held = folds == fold
        found[held] = fit_needs(answers.take(~held)).octaves(answers.take(held)) if (~held).any() else answers.octaves
    return found


def choose_margin(answers: Answers, octaves: FloatArray) -> float | None:
    """The smallest margin on needs of rows that did not choose it, ``[n]``; None where none is good enough."""
    n, best = answers.images, None
    for margin in MARGINS[::-1]:
        loss = planned_loss(answers, octaves + margin)
        mean = float(by_image(loss, answers.group).mean())
        if mean > answers.tolerance or (n * mean + 1) / (n + 1) > BOUND + _TINY:
            break
        best = float(margin)
    return best


def planned_loss(answers: Answers, octaves: FloatArray) -> FloatArray:
    """What each row loses at the smallest share run that is not below what is planned, ``[n]``."""
    place = planned(answers.shares, octaves)
    table = np.column_stack([np.ones(len(answers)), answers.kept])
    loss: FloatArray = 1.0 - table[np.arange(len(answers)), place]
    return loss


def planned(shares: FloatArray, octaves: FloatArray) -> IntArray:
    """For each row, how many of `shares` (falling) are not below 2 ** octaves: 0 takes all pixels."""
    return np.asarray((np.log2(shares)[None, :] >= octaves[:, None] - 1e-9).sum(axis=1), dtype=np.int64)


def per_octave(answers: Answers, general: float) -> float:
    """Quality lost an octave below the smallest share that is good enough, drawn to the general figure."""
    good = (answers.kept >= 1 - answers.tolerance).sum(axis=1)
    octaves = np.concatenate([[0.0], np.log2(answers.shares)])
    table = np.column_stack([np.ones(len(answers)), answers.kept])
    lost = []
    for row, count in enumerate(good):
        below = octaves[count] - 1.0
        if below >= octaves[-1]:
            lost.append(1.0 - float(np.interp(below, octaves[::-1], table[row, ::-1])))
    return (OCTAVE_ROWS * general + sum(lost)) / (OCTAVE_ROWS + len(lost))


def fit_needs(answers: Answers) -> Needs:
    """The mode of the posterior."""
    if not len(answers):
        return Needs({}, np.zeros(len(READ)), np.ones(len(READ)), np.zeros(len(READ)), SPREAD)
    x = answers.features[:, [NAMES.index(name) for name in READ]]
    middle = np.array([np.nanmedian(column) if np.isfinite(column).any() else 0.0 for column in x.T])
    spread = np.array([np.nanstd(column) if np.isfinite(column).any() else 0.0 for column in x.T])
    scale = np.where(spread > 1e-6, spread, 1.0)
    kinds = sorted(set(answers.kinds))
    design = np.column_stack(
        [
            *(np.array([kind == each for kind in answers.kinds], dtype=np.float64) for each in kinds),
            _standard(answers, middle, scale),
        ]
    )
    design[:, len(kinds) :][:, spread <= 1e-6] = 0.0
    low, high = intervals(answers)
    prior = np.concatenate([np.full(len(kinds), KIND_OCTAVES), np.full(len(READ), FEATURE_OCTAVES)])

    def loss(values: FloatArray) -> tuple[float, FloatArray]:
        return _posterior(values, design, answers.octaves, low, high, prior)

    start = np.append(np.zeros(design.shape[1]), math.log(SPREAD))
    found = minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 500, "ftol": 1e-12}).x
    own = {kind: float(value) for kind, value in zip(kinds, found, strict=False)}
    return Needs(own, middle, scale, found[len(kinds) : -1], float(math.exp(found[-1])))


def intervals(answers: Answers) -> tuple[FloatArray, FloatArray]:
    """Between which shares what is needed lies, in octaves, ``[n]`` each; endless where no share run tells."""
    octaves = np.log2(answers.shares)
    good = (answers.kept >= 1 - answers.tolerance).sum(axis=1)
    high = np.where(good == 0, np.inf, np.append(np.inf, octaves)[good])
    low = np.append(octaves, -np.inf)[good]
    return low, high


def _posterior(
    values: FloatArray, design: FloatArray, offset: FloatArray, low: FloatArray, high: FloatArray, prior: FloatArray
) -> tuple[float, FloatArray]:
    """Minus the log posterior, and its gradient."""
    weights, log_spread = values[:-1], values[-1]
    spread = math.exp(log_spread)
    middle = offset + design @ weights
    above, below = (np.clip((end - middle) / spread, -_FAR, _FAR) for end in (high, low))  # an end may be endless
    top, bottom = _sigmoid(above), _sigmoid(below)
    p = np.maximum(top - bottom, _TINY)
    slope_top, slope_bottom = top * (1 - top), bottom * (1 - bottom)
    by_middle = (slope_top - slope_bottom) / spread / p  # of minus log p
    by_spread = (above * slope_top - below * slope_bottom) / p
    off = (log_spread - math.log(SPREAD)) / SPREAD_FACTOR
    total = -np.log(p).sum() + 0.5 * ((weights / prior) ** 2).sum() + 0.5 * off**2
    gradient = np.append(design.T @ by_middle + weights / prior**2, by_spread.sum() + off / SPREAD_FACTOR)
    return float(total), gradient


def _sigmoid(z: FloatArray) -> FloatArray:
    e = np.exp(-np.abs(z))
    found: FloatArray = np.where(z >= 0, 1.0 / (1.0 + e), e / (1.0 + e))
    return found


def _standard(answers: Answers, middle: FloatArray, scale: FloatArray) -> FloatArray:
    x = answers.features[:, [NAMES.index(name) for name in READ]]
    found: FloatArray = np.where(np.isfinite(x), (x - middle) / scale, 0.0)
    return found


def by_image(values: FloatArray, group: IntArray) -> FloatArray:
    """The mean of each image's rows."""
    _, place = np.unique(group, return_inverse=True)
    means: FloatArray = np.bincount(place, weights=values) / np.bincount(place)
    return means
