"""Fit what a policy's images are like, and from which distance on one is unlike them.

Knows tables of features by kind of data. Must not know where they come from, nor of policies' other parts.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from adaptive_fusion.errors import PolicyError
from adaptive_fusion.policy.clouds import NEAREST, Cloud, Clouds, Space, Strange
from adaptive_fusion.policy.familiar import Familiar
from adaptive_fusion.policy.predictors import Matrix

LOG_OFFSETS = {
    "edge_density": 0.01,
    "background_share": 0.01,
    "colourfulness": 2.0,
    "fine_edges": 0.001,
    "strokes": 0.001,
    "contrast_1px": 0.001,
    "contrast_2px": 0.001,
    "stroke_contrast": 0.02,
}
"""Features that differ by factors, and what is added before the logarithm: about the least that says anything."""

FITTED = 0.7  # share of the images of each kind; the others calibrate
ALPHA = 0.03
REACH = 6.0  # standard deviations, fitted and asked alike
RIDGE = 0.3  # added to every variance, of 1: another source of a kind is a little different
TAILS = (0.985, 0.998)
"""Quantiles of a part on familiar images between which the value lies that becomes 1."""
SEEN = 0.98  # of a strange family: the share that should lie beyond 1
INVERSE_RIDGE = 1.0  # of the linear log odds
DIGITS = 4
OWN = "own logs"
"""Kind of the images that a policy was fitted to again."""
LEAST_IMAGES = 150
"""Of a kind of one's own: 30 % of them calibrate."""


def fit_familiar(
    names: tuple[str, ...],
    kinds: Mapping[str, Matrix],
    strange: Mapping[str, Matrix] | None = None,
    *,
    alpha: float = ALPHA,
    ridge: float = RIDGE,
    seed: int = 0,
) -> Familiar:
    """Fit to images by kind.

    Args:
        names: The features, d of them.
        kinds: By name of the kind, (n, d), or (n, v, d) for v variants of each image (other sizes of it). All variants
            of some images are fitted; of each other image, the first calibrates.
        strange: Images that a policy is not meant for, (n, d) by family, or none.
        alpha: Share of familiar images that may be called unlike.
        ridge: Added to variances, in units of the variance of all images.
        seed: Of the split.

    Raises:
        PolicyError: For no kind, shapes that do not fit, or too few images for alpha.
    """
    if not kinds:
        raise PolicyError("there are no kinds of images; expected at least one")
    tables = {name: _variants(rows, len(names), name) for name, rows in kinds.items()}
    families = {name: _variants(rows, len(names), name)[:, 0] for name, rows in (strange or {}).items()}
    rng = np.random.default_rng(seed)
    fitted, held_out = {}, []
    for name, table in tables.items():
        order = rng.permutation(len(table))
        count = max(1, round(FITTED * len(table)))
        fitted[name] = table[order[:count]].reshape(-1, len(names))
        held_out.append(table[order[count:], 0])
    space = _space(names, np.concatenate([*fitted.values()]))
    z = space.rows(np.concatenate([*fitted.values()]))
    clouds = Clouds(
        space,
        tuple(_cloud(name, space.rows(rows), ridge) for name, rows in fitted.items()),
        tuple(_strange(name, space.rows(rows), z, ridge) for name, rows in families.items()),
    )
    calibrating = np.concatenate(held_out)
    if len(calibrating) < 1 / alpha - 1:
        raise PolicyError(
            f"{len(calibrating)} images are left to calibrate on; expected at least {math.ceil(1 / alpha - 1)}"
        )
    shown = {name: clouds.parts_of(space.rows(rows)) for name, rows in families.items()}
    middle, spread = _scales(clouds, clouds.parts_of(z), shown)
    parts = clouds.parts_of(space.rows(calibrating))
    distances = ((parts - np.asarray(middle)) / np.asarray(spread)).max(axis=1)
    return Familiar(clouds, middle, spread, tuple(sorted(map(float, distances))), alpha)


def fitted_again(known: Familiar | None, rows: Matrix, names: Sequence[str], *, seed: int = 0) -> Familiar | None:
    """A range of familiar images that holds those that a policy was fitted on now, beside those that it held before.

    They become a kind of their own. Of those that are held out at most alpha lie outside afterwards: where the former
    limit is too small for that, it becomes theirs.

    Args:
        known: The range before; None fits one to these images alone.
        rows: (n, names) features of images; those with a feature that is not finite are left out.
        names: Of the columns.

    Returns:
        The range; `known` where there are too few images to say anything.
    """
    columns = tuple(names) if known is None else known.clouds.space.names
    if not set(columns) <= set(names):
        return known
    table = np.asarray(rows, np.float64)[:, [list(names).index(name) for name in columns]]
    if known is None:
        useful = np.isfinite(table).all(axis=0) & (np.ptp(table, axis=0) > 0) if len(table) else np.zeros(0, bool)
        columns, table = tuple(name for name, use in zip(columns, useful, strict=False) if use), table[:, useful]
    table = table[np.isfinite(table).all(axis=1)]
    if len(table) < LEAST_IMAGES or not columns:
        return known
    if known is None:
        return fit_familiar(columns, {OWN: table}, seed=seed)
    order = np.random.default_rng(seed).permutation(len(table))
    count = round(FITTED * len(table))
    taken = {cloud.name for cloud in known.clouds.kinds} | {each.cloud.name for each in known.clouds.strange}
    name = next(each for each in (OWN, *(f"{OWN} {n}" for n in range(2, 1000))) if each not in taken)
    own = _cloud(name, known.clouds.space.rows(table[order[:count]]), RIDGE)
    clouds = replace(known.clouds, kinds=(*known.clouds.kinds, own))
    parts = clouds.parts_of(clouds.space.rows(table[order[count:]]))
    distances = ((parts - np.asarray(known.middle)) / np.asarray(known.spread)).max(axis=1)
    found = replace(known, clouds=clouds, calibration=tuple(sorted(map(float, distances))))
    return found if found.limit > known.limit else replace(known, clouds=clouds)


def _variants(rows: Matrix, width: int, name: str) -> Matrix:
    table = np.asarray(rows, np.float64)
    table = table[:, None] if table.ndim == 2 else table
    if table.ndim != 3 or table.shape[2] != width or not table.size or not np.isfinite(table).all():
        raise PolicyError(
            f"{name} has a table {np.shape(rows)}; expected (images, {width}) or (images, variants, {width}), "
            "all finite and at least one"
        )
    return table


def _space(names: tuple[str, ...], rows: Matrix) -> Space:
    """Median and, of a normal distribution, standard deviation from the 10th to the 90th percentile."""
    offset = tuple(LOG_OFFSETS.get(name, 0.0) for name in names)
    plain = Space(names, (0.0,) * len(names), (1.0,) * len(names), offset, 1e9).rows(rows)
    low, middle, high = np.quantile(plain, [0.1, 0.5, 0.9], axis=0)
    scale = np.maximum((high - low) / 2.563, 0.25 * plain.std(axis=0))
    return Space(names, _rounded(middle), _rounded(np.where(scale > 0, scale, 1.0)), offset, REACH)


def _cloud(name: str, z: Matrix, ridge: float) -> Cloud:
    away = z - z.mean(axis=0)
    covariance = away.T @ away / len(z) + ridge * np.eye(z.shape[1])
    whiten = np.linalg.inv(np.linalg.cholesky(covariance))
    return Cloud(name, _rounded(z.mean(axis=0)), tuple(_rounded(row[: i + 1]) for i, row in enumerate(whiten)))


def _strange(name: str, z: Matrix, known: Matrix, ridge: float) -> Strange:
    from sklearn.linear_model import LogisticRegression

    rows = np.concatenate([known, z])
    is_strange = np.arange(len(rows)) >= len(known)
    weight = np.where(is_strange, len(known) / len(z), 1.0)
    odds = LogisticRegression(C=INVERSE_RIDGE, max_iter=500).fit(rows, is_strange, sample_weight=weight)
    return Strange(_cloud(name, z, ridge), _rounded(odds.coef_[0]), float(odds.intercept_[0]))


def _scales(clouds: Clouds, known: Matrix, shown: Mapping[str, Matrix]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Median and spread of each part on familiar images.

    Parts share what alpha allows: one that tells its family apart with room to spare takes little of it (a high
    quantile of the familiar images becomes 1), one that does not takes more. The nearest kind takes little: another
    source of a kind is a little different.
    """
    middle, spread = np.median(known, axis=0), []
    for index, name in enumerate(clouds.parts):
        low, high = np.quantile(known[:, index], TAILS)
        at = high if name == NEAREST else np.clip(np.quantile(shown[name][:, index], 1 - SEEN), low, high)
        spread.append(max(at - middle[index], 1e-3))
    return _rounded(middle), _rounded(spread)


def _rounded(values: Iterable[float]) -> tuple[float, ...]:
    return tuple(float(f"{value:.{DIGITS}g}") for value in values)
