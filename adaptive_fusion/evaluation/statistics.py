"""How sure a mean is: bootstrap intervals of means, differences, ratios and any statistic of row weights.

Pure functions over arrays: knows no model, text, image, operating point or file.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from adaptive_fusion.errors import ConfigError

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
_WORK = 20_000_000  # rows that a bootstrap goes through
_BLOCK = 1 << 21  # indices drawn at once: 16 MB
_MOST_BET = 0.9  # of what a gambler has; below 1, so that one value never takes all


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


def most_mean(values: npt.ArrayLike, *, level: float = 0.95) -> float:
    """Return what the mean of independent values in [0, 1], shape [samples], stays below with the given confidence,
    whatever their distribution and however few were seen: about 3 / n where all n are 0 and a bootstrap sees nothing.

    Source: the Hoeffding-Bentkus bound of Bates et al. (2021), arXiv:2101.02703.

    Raises ConfigError on no values or one outside [0, 1].
    """
    column = _column(values)
    if column.min() < -1e-9 or column.max() > 1 + 1e-9:
        raise ConfigError(f"values reach from {column.min():g} to {column.max():g}; expected 0 to 1")
    n, mean, allowed = len(column), min(1.0, max(0.0, float(column.mean()))), 1.0 - level
    low, high = mean, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if _seen_by_chance(n, mean, middle) > allowed:
            low = middle
        else:
            high = middle
    return high


def most_mean_by_betting(values: npt.ArrayLike, *, level: float = 0.95) -> float:
    """Return what the mean of independent values in [0, 1], shape [samples], stays below with the given confidence,
    whatever their distribution. Where values vary little it is far tighter than `most_mean`, and a little wider where
    all are 0.

    Source: the one-sided hedged capital process of Waudby-Smith and Ramdas (2024), arXiv:2010.09686, on 1 - values: a
    mean is ruled out where a gambler who bets against it, by what was seen before, has 1 / (1 - level) times the stake.

    Raises ConfigError on no values or one outside [0, 1].
    """
    column = 1.0 - _column(values)
    if not len(column) or column.min() < -1e-9 or column.max() > 1 + 1e-9:
        raise ConfigError("values must be at least one number, each from 0 to 1")
    n, wanted = len(column), math.log(1.0 / (1.0 - level))
    count = np.arange(1, n + 1)
    means = (0.5 + np.cumsum(column)) / (count + 1)
    variances = (0.25 + np.cumsum((column - means) ** 2)) / (count + 1)
    before = np.append(0.25, variances[:-1])
    bets = np.sqrt(2.0 * wanted / (n * before))
    low, high = 0.0, float(column.mean())
    for _ in range(50):
        middle = (low + high) / 2
        wealth = np.cumsum(np.log1p(np.minimum(bets, _MOST_BET / max(middle, 1e-12)) * (column - middle)))
        if float(wealth.max()) >= wanted:
            low = middle
        else:
            high = middle
    return 1.0 - low


def _seen_by_chance(n: int, mean: float, true: float) -> float:
    """A bound on the probability that n values of mean `true`, no less than `mean`, have a mean so small."""
    if true >= 1.0:
        return float(mean >= 1.0)
    distance = (1 - mean) * math.log((1 - mean) / (1 - true)) if mean < 1 else 0.0
    distance += mean * math.log(mean / true) if mean > 0 else 0.0
    count = min(n, math.ceil(n * mean - 1e-9))
    ways = [math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) for k in range(count + 1)]
    logs = [each + k * math.log(true) + (n - k) * math.log1p(-true) for k, each in enumerate(ways)]
    return min(1.0, math.exp(-n * distance), math.e * sum(map(math.exp, logs)))


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


def resamples(group: IntArray, n: int, seed: int) -> Iterator[FloatArray]:
    """Row weights ``[rows]`` of `n` bootstrap resamples of whole groups; of many rows fewer, at least 100."""
    n = min(n, max(100, _WORK // len(group)))
    members = np.unique(group, return_inverse=True)[1]
    size = int(members.max()) + 1
    rng = np.random.default_rng(seed)
    for _ in range(n):
        yield np.bincount(rng.integers(size, size=size), minlength=size)[members].astype(np.float64)


def intervals(
    statistics: Callable[[FloatArray], Mapping[str, float]],
    group: IntArray,
    *,
    seed: int,
    n: int = 500,
    level: float = 0.95,
) -> dict[str, Interval]:
    """Percentile bootstrap intervals (see `bootstrap`) of several statistics of row weights at once.

    A statistic that is not finite in a resample is left out of that resample; its ends are NaN if it never
    is. An interval reaches at least to its own value, which resampling can bias (calibration errors grow).
    """
    whole = statistics(np.ones(len(group)))
    draws: dict[str, list[float]] = {name: [] for name in whole}
    for weight in resamples(group, n, seed):
        for name, value in statistics(weight).items():
            if np.isfinite(value):
                draws[name].append(value)
    tails = ((1 - level) / 2, (1 + level) / 2)
    out = {}
    for name, values in draws.items():
        low, high = np.quantile(values, tails) if values else (np.nan, np.nan)
        out[name] = Interval(whole[name], float(min(low, whole[name])), float(max(high, whole[name])))
    return out
