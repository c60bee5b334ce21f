"""What the controller learns: drift and spread of a measured time, the price of a miss, ceilings that fall at once and
rise slowly.

Pure arithmetic, deterministic and always finite; knows no points, budgets or requests. `controller` states the law that
these are parts of.
"""

import math
from collections import deque
from collections.abc import Mapping
from statistics import median
from typing import Any

from adaptive_fusion.checks import number

CLIP = 0.7
BOUND = 8.0
MAX_POINTS = 256
MAX_KEY = 200
PRICE_MIN, PRICE_MAX = 0.5, 50.0

_COMMON_GAIN = 0.08
_POINT_GAIN, _POINT_KEEP = 0.03, 0.995
_SPREAD_GAIN, _SPREAD_START, _SPREAD_MIN = 0.03, 0.3, 0.005
_SHRINK = 10
_SCALE = 1.0 / math.sqrt(2.0)  # mean absolute value to scale, of Student's t with 2 degrees of freedom
_MOST_SEEN = 33
_PRICE_GAIN, _PRICE_START = 0.3, 2.0
_SLACK, _UP, _DOWN = 0.12, 0.6, 1.0
_STEP, _WAIT, _MAX_WAIT = 1.25, 25, 1600
_FADE = 0.02
_MARGIN_MAX = 3.0


class Price:
    """What a miss costs at one attainment level, in answers of quality 1."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = _PRICE_START

    def move(self, attainment: float, *, missed: bool) -> None:
        step = attainment if missed else attainment - 1.0
        self.value = min(max(self.value + _PRICE_GAIN * step, PRICE_MIN), PRICE_MAX)


class _Own:
    """A point's own part: its offset from the common drift, and its residuals' mean absolute value."""

    __slots__ = ("offset", "seen", "spread")

    def __init__(self, offset: float = 0.0, spread: float = 0.0, seen: int = 0) -> None:
        self.offset, self.spread, self.seen = offset, spread, seen


_UNSEEN = _Own()


class Drift:
    """Log-space correction and spread of one measured quantity; see the module for the law."""

    __slots__ = ("common", "down", "points", "recent", "spread", "steps", "up")

    def __init__(self) -> None:
        self.common = 0.0
        self.spread = _SPREAD_START
        self.points: dict[str, _Own] = {}
        self.up = self.down = 0.0
        self.recent: deque[float] = deque(maxlen=4)
        self.steps = 0

    def expect(self, key: str) -> tuple[float, float]:
        """Logarithm of measured / predicted to expect of a point, and the scale of Student's t around it."""
        own = self.points.get(key, _UNSEEN)
        spread = (own.seen * own.spread + _SHRINK * self.spread) / (own.seen + _SHRINK)
        return self.common + own.offset, _SCALE * max(spread, _SPREAD_MIN)

    def factor(self, key: str) -> float:
        """Measured / predicted to expect of a point."""
        return math.exp(self.expect(key)[0])

    def margin(self, key: str, probability: float) -> float:
        """The factor on a prediction that a point's time stays below with this probability, at most e^3 its own."""
        middle, scale = self.expect(key)
        rest = max(2.0 * probability * (1.0 - probability), 1e-12)
        return math.exp(middle + min(max(scale * (2.0 * probability - 1.0) / math.sqrt(rest), 0.0), _MARGIN_MAX))

    def fade(self) -> None:
        """Expect a little less, where nothing is measured any more."""
        self.common = max(self.common - _FADE, -BOUND)

    def learn(self, key: str, log_ratio: float, *, censored: bool = False) -> None:
        """Take in one measured time; one that was `censored` says something only if it is above what is expected."""
        own = self.points.get(key)
        residual = log_ratio - self.common - (own.offset if own else 0.0)
        if censored and residual <= 0.0:
            return
        if own is None:
            if len(self.points) >= MAX_POINTS:
                del self.points[next(iter(self.points))]
            own = self.points[key] = _Own()
        error = min(max(residual, -CLIP), CLIP)
        common = self.common + _COMMON_GAIN * error
        own.offset = _POINT_KEEP * own.offset + _POINT_GAIN * error
        own.seen = min(own.seen + 1, _MOST_SEEN)
        own.spread += max(_SPREAD_GAIN, 1.0 / own.seen) * (abs(error) - own.spread)
        self.spread += _SPREAD_GAIN * (abs(error) - self.spread)
        self.recent.append(error)
        self.up = max(0.0, self.up + error - _SLACK)
        self.down = max(0.0, self.down - error - _SLACK)
        if self.up > _UP or self.down > _DOWN:
            common += median(self.recent)
            self.up = self.down = 0.0
            self.steps += 1
        self.common = min(max(common, -BOUND), BOUND)

    def state(self) -> dict[str, Any]:
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
        self.common = number(state["common"], "common", -BOUND, BOUND)
        self.spread = number(state["spread"], "spread", 0.0, CLIP)
        self.up, self.down = (number(state[name], name, 0.0, 2.0) for name in ("up", "down"))
        self.recent.extend(number(value, "recent", -CLIP, CLIP) for value in state["recent"])
        self.steps = int(number(state["steps"], "steps", 0, 1e15))
        for key, row in list(state["points"].items())[:MAX_POINTS]:
            offset, spread = number(row["offset"], "offset", -BOUND, BOUND), number(row["spread"], "spread", 0.0, CLIP)
            self.points[str(key)[:MAX_KEY]] = _Own(offset, spread, int(number(row["seen"], "seen", 0, _MOST_SEEN)))


def exceeds(log_room: float, middle: float, scale: float) -> float:
    """P(a time exceeds its room), where ln(time / predicted) is Student's t with 2 degrees of freedom around `middle`.

    Heavy-tailed as latencies are, with a distribution function in closed form; `log_room` is ln(room / predicted), and
    a residual's mean absolute value is `scale` times the square root of 2.
    """
    t = (log_room - middle) / scale
    return 0.5 - 0.5 * t / math.sqrt(2.0 + t * t)


class Ceiling:
    """A limit that falls at once and rises in steps after clean requests."""

    __slots__ = ("clean", "limit", "on_trial", "top", "wait")

    def __init__(self) -> None:
        self.limit, self.top = math.inf, 0.0
        self.wait, self.clean, self.on_trial = _WAIT, 0, False

    def drop(self, value: float) -> None:
        if self.on_trial:
            self.wait = min(2 * self.wait, _MAX_WAIT)
        self.limit, self.top = min(self.limit, value), max(self.top, value)
        self.clean, self.on_trial = 0, False

    def passed(self) -> None:
        if math.isinf(self.limit) and not self.on_trial:
            return
        self.clean += 1
        if self.clean < self.wait:
            return
        self.clean = 0
        if math.isinf(self.limit):
            self.wait, self.on_trial = _WAIT, False
            return
        self.limit, self.on_trial = self.limit * _STEP, True
        if self.limit > self.top:
            self.limit, self.top = math.inf, 0.0

    def state(self) -> dict[str, Any]:
        limit = None if math.isinf(self.limit) else self.limit
        return {
            "limit": limit,
            "top": self.top,
            "wait": self.wait,
            "clean": self.clean,
            "on_trial": self.on_trial,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        self.limit = math.inf if state["limit"] is None else number(state["limit"], "limit", 0.0, 1e15)
        self.top = number(state["top"], "top", 0.0, 1e15)
        self.wait = int(number(state["wait"], "wait", 1, _MAX_WAIT))
        self.clean = int(number(state["clean"], "clean", 0, _MAX_WAIT))
        self.on_trial = bool(state["on_trial"])
