"""What a routing score is worth: the cost-quality curve between a cheap and a strong arm, and figures of it.

Knows arrays: a score, the quality and cost of both arms, weights. Must not know of policies, features or
files.

Source: RouteLLM (Ong et al. 2024, arXiv:2406.18665, section 2 and its evaluation code). With c the share of
requests that go to the strong arm and Q(c) the mean quality then, ``PGR(c) = (Q(c) - Q(0)) / (Q(1) - Q(0))``
is the performance gap recovered, ``APGR`` its mean over c (random routing has 0.5), and ``CPT(x)`` the
smallest c with ``PGR(c) >= x``. Requests of equal score are taken in random order, so the curve is straight
between them.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from adaptive_fusion.errors import ConfigError
from adaptive_fusion.evaluation.statistics import FloatArray, IntArray

BoolArray = npt.NDArray[np.bool_]


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

    def routed(self, to_strong: BoolArray) -> tuple[FloatArray, FloatArray]:
        """Quality and cost of each request, ``[n]``, if those `to_strong` take the strong arm, the others the cheap."""
        quality = np.where(to_strong, self.strong, self.cheap)
        return quality, np.where(to_strong, self.strong_cost, self.cheap_cost)


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


class RoutingCurve:
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


def calibration_error(p: FloatArray, y: FloatArray, weight: FloatArray | None = None, bins: int = 15) -> float:
    """Expected calibration error: mean distance of predicted from seen frequency over equal-width bins of
    `p`.

    Source: Guo et al. (2017), eq. 3. Shapes ``[n]``; 0 is perfect, 1 the worst.
    """
    w = np.ones(len(p)) if weight is None else weight
    place = np.minimum((p * bins).astype(int), bins - 1)
    gaps = np.bincount(place, weights=w * (p - y), minlength=bins)
    return float(np.abs(gaps).sum() / w.sum())
