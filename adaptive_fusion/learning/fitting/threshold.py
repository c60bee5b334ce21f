"""The threshold of a routing score: as few strong calls as keep the quality, with its intervals.

Knows scores and the curve of two arms. Must not know of policies, features or files.
"""

from dataclasses import dataclass

import numpy as np

from adaptive_fusion.errors import ConfigError
from adaptive_fusion.evaluation.statistics import FloatArray, Interval, resamples
from adaptive_fusion.learning.judging.curve import Arms, RoutingCurve

_GRID = 200


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
    routing = RoutingCurve(score, arms)
    full = routing.curve()
    chosen = np.unique(np.linspace(0, len(full.share) - 1, min(_GRID, len(full.share))).astype(int))
    upper, lower = full.threshold[chosen], np.append(full.threshold, 0.0)[chosen + 1]
    values = np.where(np.isinf(upper), np.minimum(1.0, lower + 1e-9), (upper + lower) / 2)
    values[-1] = 0.0

    def kept(weight: FloatArray | None) -> tuple[FloatArray, FloatArray, FloatArray]:
        curve = routing.curve(weight)
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
