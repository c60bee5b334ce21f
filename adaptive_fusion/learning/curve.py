"""What a routing score is worth: the cost-quality curve between a cheap and a strong arm, and figures of it.

Knows arrays: a score, the quality and cost of both arms, weights. Must not know of policies, features or
files.

Source: RouteLLM (Ong et al. 2024, arXiv:2406.18665, section 2 and its evaluation code). With c the share of
requests that go to the strong arm and Q(c) the mean quality then, ``PGR(c) = (Q(c) - Q(0)) / (Q(1) - Q(0))``
is the performance gap recovered, ``APGR`` its mean over c (random routing has 0.5), and ``CPT(x)`` the
smallest c with ``PGR(c) >= x``. Requests of equal score are taken in random order, so the curve is straight
between them.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from adaptive_fusion.errors import ConfigError
from adaptive_fusion.learning.metrics import Interval

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

_GRID = 200
_WORK = 20_000_000  # rows that a bootstrap goes through


@dataclass(frozen=True)
class Arms:
    """Quality and cost of the cheap and the strong arm on the same requests, and their groups, each ``[n]``.

    Raises:
        ConfigError: Without requests, for unequal lengths or values that are not finite.
    """

    cheap: FloatArray
    strong: FloatArray
    cheap_cost: FloatArray
    strong_cost: FloatArray
    group: IntArray

    def __post_init__(self) -> None:
        parts = (self.cheap, self.strong, self.cheap_cost, self.strong_cost)
        if not len(self.cheap) or len({part.shape for part in (*parts, self.group)}) > 1:
            raise ConfigError(f"arms have shapes {[part.shape for part in parts]}; expected one, not empty")
        if not all(np.isfinite(part).all() for part in parts):
            raise ConfigError("qualities and costs of the arms must be finite")

    @property
    def gain(self) -> FloatArray:
        """What the strong arm adds, ``[n]``: the score of the oracle."""
        return self.strong - self.cheap


@dataclass(frozen=True)
class Curve:
    """Points of the cost-quality curve, from all cheap to all strong.

    Attributes:
        threshold: Requests whose score is at least this go to the strong arm; infinite at the cheap end.
        share: Their share.
        quality: Mean quality of all requests.
        cost: Mean cost of all requests.
    """

    threshold: FloatArray
    share: FloatArray
    quality: FloatArray
    cost: FloatArray

    @property
    def pgr(self) -> FloatArray:
        """Performance gap recovered at each point; NaN where the arms are equally good."""
        gap = self.quality[-1] - self.quality[0]
        return (self.quality - self.quality[0]) / gap if gap else np.full_like(self.quality, np.nan)

    @property
    def apgr(self) -> float:
        """Mean performance gap recovered over the shares 0 to 1."""
        return float(np.trapezoid(self.pgr, self.share))

    def cpt(self, level: float) -> float:
        """Smallest share of strong calls that recovers `level` of the gap, 0 to 1; NaN if none does."""
        reached = np.flatnonzero(self.pgr >= level)
        if not len(reached):
            return float("nan")
        k = int(reached[0])
        if k == 0:
            return float(self.share[0])
        below, above = self.pgr[k - 1], self.pgr[k]
        part = (level - below) / (above - below)
        return float(self.share[k - 1] + part * (self.share[k] - self.share[k - 1]))

    def at_cost(self, cost: float) -> float:
        """The best quality that the curve offers at this mean cost or less."""
        within = self.quality[self.cost <= cost * (1 + 1e-12)]
        order = np.argsort(self.cost, kind="stable")
        between = float(np.interp(cost, self.cost[order], self.quality[order]))
        return max(between, float(within.max())) if len(within) else between

    def to_reach(self, quality: float) -> float:
        """The least mean cost at which the curve has this quality; NaN if it never has."""
        reached = np.flatnonzero(self.quality >= quality - 1e-12)
        if not len(reached):
            return float("nan")
        k = int(reached[0])
        if k == 0 or self.quality[k] <= quality:
            return float(self.cost[k])
        part = (quality - self.quality[k - 1]) / (self.quality[k] - self.quality[k - 1])
        return float(self.cost[k - 1] + part * (self.cost[k] - self.cost[k - 1]))


class Router:
    """The curve of one score, for any weighting of the requests: what a bootstrap evaluates again and
    again."""

    def __init__(self, score: FloatArray, arms: Arms) -> None:
        if score.shape != arms.cheap.shape or not np.isfinite(score).all():
            raise ConfigError(f"score has shape {score.shape}; expected {arms.cheap.shape}, finite")
        self._order = np.argsort(-score, kind="stable")
        ordered = score[self._order]
        self._last = np.flatnonzero(np.append(ordered[1:] != ordered[:-1], True))
        self._threshold = np.append(np.inf, ordered[self._last])
        self._arms = arms

    def curve(self, weight: FloatArray | None = None) -> Curve:
        """The curve with these weights of the requests, ``[n]``; all equal without."""
        arms, order = self._arms, self._order
        w = np.ones(len(order)) if weight is None else weight[order]
        total = w.sum()

        def along(cheap: FloatArray, strong: FloatArray) -> FloatArray:
            base = float(cheap[order] @ w)
            steps = np.cumsum((strong - cheap)[order] * w)[self._last]
            line: FloatArray = np.append(base, base + steps) / total
            return line

        share = np.append(0.0, np.cumsum(w)[self._last] / total)
        share[-1] = 1.0
        return Curve(self._threshold, share, along(arms.cheap, arms.strong), along(arms.cheap_cost, arms.strong_cost))


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
    """Percentile bootstrap intervals (see `metrics.bootstrap`) of several statistics of row weights at once.

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


@dataclass(frozen=True)
class Threshold:
    """A chosen threshold, and what it costs and keeps on the data it was chosen on.

    `value` has the interval of the threshold that each resample would have chosen; `quality` is the share
    kept of the strong arm's quality, `share` that of strong calls, `cost` the share of the strong arm's cost.
    """

    value: Interval
    quality: Interval
    share: Interval
    cost: Interval
    met: bool


OBJECTIVES = ("cost", "quality")


def choose_threshold(
    score: FloatArray,
    arms: Arms,
    *,
    objective: str = "quality",
    tolerance: float = 0.02,
    seed: int = 0,
    n: int = 500,
) -> Threshold:
    """The highest threshold (fewest strong calls) that keeps ``1 - tolerance`` of the strong arm's mean
    quality.

    For the objective ``cost`` it must do so in the sample; for ``quality`` at the lower end of the 95 %
    bootstrap interval, so that fewer data give a more careful threshold. Candidates lie half-way between
    neighbouring scores, at most 200 of them. Where none is good enough all requests go to the strong arm and
    `met` is False.

    Raises:
        ConfigError: For another objective.
    """
    if objective not in OBJECTIVES:
        raise ConfigError(f"objective is {objective!r}; expected one of {', '.join(OBJECTIVES)}")
    router = Router(score, arms)
    full = router.curve()
    chosen = np.unique(np.linspace(0, len(full.share) - 1, min(_GRID, len(full.share))).astype(int))
    upper, lower = full.threshold[chosen], np.append(full.threshold, 0.0)[chosen + 1]
    values = np.where(np.isinf(upper), np.minimum(1.0, lower + 1e-9), (upper + lower) / 2)
    values[-1] = 0.0

    def kept(weight: FloatArray | None) -> tuple[FloatArray, FloatArray, FloatArray]:
        curve = router.curve(weight)
        best, dearest = curve.quality[-1], curve.cost[-1]
        quality = curve.quality[chosen] / best if best else np.ones(len(chosen))
        cost = curve.cost[chosen] / dearest if dearest else curve.share[chosen]
        return quality, curve.share[chosen], cost

    def first(quality: FloatArray) -> int:
        good = np.flatnonzero(quality >= 1 - tolerance)
        return int(good[0]) if len(good) else len(chosen) - 1

    draws = [kept(weight) for weight in resamples(arms.group, n, seed)]
    point = kept(None)
    bound = np.quantile([draw[0] for draw in draws], 0.025, axis=0) if objective == "quality" else point[0]
    k = first(bound)

    def interval(part: int) -> Interval:
        low, high = np.quantile([draw[part][k] for draw in draws], [0.025, 0.975])
        return Interval(float(point[part][k]), float(low), float(high))

    low, high = np.quantile([values[first(draw[0])] for draw in draws], [0.025, 0.975])
    return Threshold(
        value=Interval(float(values[k]), float(min(low, values[k])), float(max(high, values[k]))),
        quality=interval(0),
        share=interval(1),
        cost=interval(2),
        met=bool(bound[k] >= 1 - tolerance),
    )


def calibration_error(p: FloatArray, y: FloatArray, weight: FloatArray | None = None, bins: int = 15) -> float:
    """Expected calibration error: mean distance of predicted from seen frequency over equal-width bins of
    `p`.

    Source: Guo et al. (2017), eq. 3. Shapes ``[n]``; 0 is perfect, 1 the worst.
    """
    w = np.ones(len(p)) if weight is None else weight
    place = np.minimum((p * bins).astype(int), bins - 1)
    gaps = np.bincount(place, weights=w * (p - y), minlength=bins)
    return float(np.abs(gaps).sum() / w.sum())
