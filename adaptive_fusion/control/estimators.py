"""What the controller learns: drift and spread of a measured time, the price of a miss, ceilings that fall at once and
rise slowly.

Pure arithmetic, deterministic and always finite; knows no points, budgets or requests. These are parts of the law that
`law` states, and every gain is there.
"""

import math
from collections import deque
from collections.abc import Mapping
from statistics import median
from typing import Any

from adaptive_fusion.checks import number
from adaptive_fusion.control import law

_MAX_KEY = 200
ENCODED = " (encoded before)"
"""Ends the keys of points at which no encoder ran."""
_SCALE = 1.0 / math.sqrt(2.0)  # mean absolute value to scale, of Student's t with 2 degrees of freedom


class Price:
    """What a miss costs at one attainment level, in answers of quality 1."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = law.PRICE_START

    def move(self, attainment: float, *, missed: bool) -> None:
        """One step of dual ascent: up after a miss, down after a deadline kept."""
        step = attainment if missed else attainment - 1.0
        self.value = min(max(self.value + law.PRICE_GAIN * step, law.PRICE_MIN), law.PRICE_MAX)


class _PointDrift:
    """A point's own part: its offset from the common drift, and the mean absolute value of its `seen` residuals."""

    __slots__ = ("offset", "seen", "spread")

    def __init__(self, offset: float = 0.0, spread: float = 0.0, seen: int = 0) -> None:
        self.offset, self.spread, self.seen = offset, spread, seen


_UNSEEN = _PointDrift()


class Drift:
    """How far one measured quantity is off its prediction, in log space: common to all points and each point's own."""

    __slots__ = ("common", "down", "points", "recent", "spread", "steps", "up")

    def __init__(self) -> None:
        self.common = 0.0
        self.spread = law.SPREAD_START
        self.points: dict[str, _PointDrift] = {}
        self.up = self.down = 0.0
        self.recent: deque[float] = deque(maxlen=law.STEP_RESIDUALS)
        self.steps = 0

    def expect(self, key: str) -> tuple[float, float]:
        """Logarithm of measured / predicted to expect of a point, and the scale of Student's t around it."""
        own = self.points.get(key, _UNSEEN)
        spread = (own.seen * own.spread + law.COMMON_WEIGHT * self.spread) / (own.seen + law.COMMON_WEIGHT)
        return self.common + own.offset, _SCALE * max(spread, law.SPREAD_MIN)

    def factor(self, key: str) -> float:
        """Measured / predicted to expect of a point."""
        return math.exp(self.expect(key)[0])

    def margin(self, key: str, probability: float) -> float:
        """The factor on a prediction that a point's time stays below with this probability, at most e^3 its own."""
        mean, scale = self.expect(key)
        rest = max(2.0 * probability * (1.0 - probability), 1e-12)
        quantile = scale * (2.0 * probability - 1.0) / math.sqrt(rest)
        return math.exp(mean + min(max(quantile, 0.0), law.MARGIN_MAX))

    def fade(self) -> None:
        """Expect a little less, where nothing is measured any more."""
        self.common = max(self.common - law.REFUSAL_FADE, -law.DRIFT_MAX)

    def learn(self, key: str, log_ratio: float, *, censored: bool = False) -> None:
        """Take in one measured time; one that was `censored` says something only if it is above what is expected.

        Of a key that ends in `ENCODED` only its own part is learned: it says nothing of what encoding takes, which is
        a part of what is common to all points.
        """
        own = self.points.get(key)
        residual = log_ratio - self.common - (own.offset if own else 0.0)
        if censored and residual <= 0.0:
            return
        if own is None:
            own = self._new_point(key)
        error = min(max(residual, -law.RESIDUAL_CLIP), law.RESIDUAL_CLIP)
        own.offset = law.OWN_KEEP * own.offset + law.OWN_GAIN * error
        own.seen = min(own.seen + 1, law.OWN_WEIGHT_MAX)
        own.spread += max(law.SPREAD_GAIN, 1.0 / own.seen) * (abs(error) - own.spread)
        if key.endswith(ENCODED):
            return
        common = self.common + law.COMMON_GAIN * error
        self.spread += law.SPREAD_GAIN * (abs(error) - self.spread)
        self.recent.append(error)
        self.up = max(0.0, self.up + error - law.STEP_SLACK)
        self.down = max(0.0, self.down - error - law.STEP_SLACK)
        if self.up > law.STEP_UP or self.down > law.STEP_DOWN:
            common += median(self.recent)
            self.up = self.down = 0.0
            self.steps += 1
        self.common = min(max(common, -law.DRIFT_MAX), law.DRIFT_MAX)

    def _new_point(self, key: str) -> _PointDrift:
        """Begin a point's own part; the oldest makes room."""
        if len(self.points) >= law.MAX_POINTS:
            del self.points[next(iter(self.points))]
        own = self.points[key] = _PointDrift()
        return own

    def state(self) -> dict[str, Any]:
        """Finite plain values that JSON can hold."""
        return {
            "common": self.common,
            "spread": self.spread,
            "points": {
                key: {"offset": own.offset, "spread": own.spread, "seen": own.seen} for key, own in self.points.items()
            },
            "up": self.up,
            "down": self.down,
            "recent": list(self.recent),
            "steps": self.steps,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take on `state`'s values; raises as reading it does (KeyError, TypeError, ConfigError...)."""
        clip, most = law.RESIDUAL_CLIP, law.DRIFT_MAX
        self.common = number(state["common"], "common", -most, most)
        self.spread = number(state["spread"], "spread", 0.0, clip)
        self.up, self.down = (number(state[name], name, 0.0, 2.0) for name in ("up", "down"))
        self.recent.extend(number(value, "recent", -clip, clip) for value in state["recent"])
        self.steps = int(number(state["steps"], "steps", 0, 1e15))
        for key, row in list(state["points"].items())[: law.MAX_POINTS]:
            offset, spread = number(row["offset"], "offset", -most, most), number(row["spread"], "spread", 0.0, clip)
            seen = int(number(row["seen"], "seen", 0, law.OWN_WEIGHT_MAX))
            self.points[str(key)[:_MAX_KEY]] = _PointDrift(offset, spread, seen)


def probability_above(log_limit: float, mean: float, scale: float) -> float:
    """P(a time exceeds its limit), where ln(time / predicted) is Student's t with 2 degrees of freedom around `mean`.

    Heavy-tailed as latencies are, with a distribution function in closed form; `log_limit` is ln(limit / predicted),
    and a residual's mean absolute value is `scale` times the square root of 2.
    """
    t = (log_limit - mean) / scale
    return 0.5 - 0.5 * t / math.sqrt(2.0 + t * t)


class Ceiling:
    """A limit that falls at once, to what failed, and rises in steps after clean requests.

    `top` is the largest value that failed: above it the ceiling is gone. While it is `on_trial`, just raised, another
    failure doubles the wait for the next step.
    """

    __slots__ = ("clean", "limit", "on_trial", "top", "wait")

    def __init__(self) -> None:
        self.limit, self.top = math.inf, 0.0
        self.wait, self.clean, self.on_trial = law.CEILING_WAIT, 0, False

    def drop(self, value: float) -> None:
        """What was predicted to need `value` has failed."""
        if self.on_trial:
            self.wait = min(2 * self.wait, law.CEILING_WAIT_MAX)
        self.limit, self.top = min(self.limit, value), max(self.top, value)
        self.clean, self.on_trial = 0, False

    def passed(self) -> None:
        """A request ran clean."""
        if math.isinf(self.limit) and not self.on_trial:
            return
        self.clean += 1
        if self.clean < self.wait:
            return
        self.clean = 0
        if math.isinf(self.limit):
            self.wait, self.on_trial = law.CEILING_WAIT, False
            return
        self.limit, self.on_trial = self.limit * law.CEILING_STEP, True
        if self.limit > self.top:
            self.limit, self.top = math.inf, 0.0

    def state(self) -> dict[str, Any]:
        """Finite plain values that JSON can hold; without a ceiling the limit is None."""
        limit = None if math.isinf(self.limit) else self.limit
        return {
            "limit": limit,
            "top": self.top,
            "wait": self.wait,
            "clean": self.clean,
            "on_trial": self.on_trial,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take on `state`'s values; raises as reading it does (KeyError, TypeError, ConfigError...)."""
        self.limit = math.inf if state["limit"] is None else number(state["limit"], "limit", 0.0, 1e15)
        self.top = number(state["top"], "top", 0.0, 1e15)
        self.wait = int(number(state["wait"], "wait", 1, law.CEILING_WAIT_MAX))
        self.clean = int(number(state["clean"], "clean", 0, law.CEILING_WAIT_MAX))
        self.on_trial = bool(state["on_trial"])


class Shares:
    """How often a plan's answers were not trusted, by the plan's key: running means that begin at what is expected."""

    __slots__ = ("points",)

    def __init__(self) -> None:
        self.points: dict[str, tuple[float, int]] = {}

    def expect(self, key: str, before: float) -> float:
        """P(the second pass runs), where `before` was expected before anything was seen."""
        mean, seen = self.points.get(key, (0.0, 0))
        return (seen * mean + law.SHARE_WEIGHT * before) / (seen + law.SHARE_WEIGHT)

    def learn(self, key: str, *, escalated: bool) -> None:
        """Take in one verdict."""
        if key not in self.points and len(self.points) >= law.MAX_POINTS:
            del self.points[next(iter(self.points))]
        mean, seen = self.points.get(key, (0.0, 0))
        seen = min(seen + 1, law.SHARE_MEMORY)
        self.points[key] = mean + (float(escalated) - mean) / seen, seen

    def state(self) -> dict[str, Any]:
        """Finite plain values that JSON can hold."""
        return {key: {"mean": mean, "seen": seen} for key, (mean, seen) in self.points.items()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take on `state`'s values; raises as reading it does (KeyError, TypeError, ConfigError...)."""
        for key, row in list(state.items())[: law.MAX_POINTS]:
            seen = int(number(row["seen"], "seen", 0, law.SHARE_MEMORY))
            self.points[str(key)[:_MAX_KEY]] = number(row["mean"], "mean", 0.0, 1.0), seen
