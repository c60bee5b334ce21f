"""What the controller learns: drift and margin of one measured time, and ceilings that fall at once and
rise slowly.

Pure arithmetic on logarithms, deterministic and always finite; knows no points, budgets or requests.
`controller` states the law that these are parts of.
"""

import math
from collections import deque
from collections.abc import Mapping
from statistics import median
from typing import Any

from adaptive_fusion.errors import ConfigError

CLIP = 0.7
MARGIN_MAX = 3.0
BOUND = 8.0
MAX_POINTS = 256
MAX_LEVELS = 16
MAX_KEY = 200

_COMMON_GAIN = 0.08
_POINT_GAIN, _POINT_KEEP = 0.03, 0.995
_MARGIN_GAIN, _MARGIN_START = 0.05, 0.4
_SETTLING, _MOST_SEEN = 20, 1000
_SLACK, _UP, _DOWN = 0.12, 0.6, 1.0
_STEP, _WAIT, _MAX_WAIT = 1.25, 25, 1600
_FADE = 0.02


def number(value: Any, low: float, high: float) -> float:
    """A finite number in range, or ConfigError."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ConfigError(f"controller value is {value!r}; expected a number from {low:g} to {high:g}")
    return float(value)


class Margin:
    """The safety margin of one attainment level: `log`, and what its start is cut by once enough was seen.

    Of n exchangeable residuals the next one exceeds the largest with probability 1 / (n + 1) (split conformal
    prediction, Vovk et al. 2005). So after the first residuals, in which the drift is still being learned, and
    `attainment / (1 - attainment)` more, the margin starts anew at the largest of these, if that is less.
    """

    __slots__ = ("cut", "largest", "log", "needed", "seen")

    def __init__(self, attainment: float) -> None:
        self.log, self.cut = _MARGIN_START, 0.0
        self.seen, self.largest = 0, 0.0
        enough = attainment / max(1.0 - attainment, 1e-9)
        self.needed = _SETTLING + math.ceil(enough - 1e-9) if enough < _MOST_SEEN else 0

    def move(self, step: float) -> None:
        self.log = min(max(self.log + _MARGIN_GAIN * step, 0.0), MARGIN_MAX)

    def see(self, residual: float) -> None:
        if self.seen >= self.needed:
            return
        self.seen += 1
        if self.seen > _SETTLING:
            self.largest = max(self.largest, min(residual, MARGIN_MAX))
        if self.seen == self.needed and self.largest < self.log:
            self.cut = self.log - self.largest
            self.log = self.largest


class Drift:
    """Log-space correction and margin of one measured quantity; see the module for the law."""

    __slots__ = ("common", "down", "margins", "points", "recent", "steps", "up")

    def __init__(self) -> None:
        self.common = 0.0
        self.points: dict[str, float] = {}
        self.margins: dict[float, Margin] = {}
        self.up = self.down = 0.0
        self.recent: deque[float] = deque(maxlen=4)
        self.steps = 0

    def margin(self, attainment: float) -> float:
        found = self.margins.get(attainment)
        if found is None:
            if len(self.margins) >= MAX_LEVELS:
                del self.margins[next(iter(self.margins))]
            found = self.margins[attainment] = Margin(attainment)
        return found.log

    def factor(self, key: str) -> float:
        """Measured / predicted to expect of a point, without margin."""
        return math.exp(self.common + self.points.get(key, 0.0))

    def fade(self) -> None:
        """Expect a little less, where nothing is measured any more."""
        self.common = max(self.common - _FADE, -BOUND)

    def learn(self, key: str, log_ratio: float, level: float, signal: float | None, *, censored: bool = False) -> None:
        """Take in one request: `signal` moves the margin of its own level; None stands for the quantile
        rule.
        """
        own = self.points.get(key, 0.0)
        residual = log_ratio - self.common - own
        known = not censored or residual > 0.0
        for each, margin in self.margins.items():
            if each == level and signal is not None:
                step = signal
            elif known:
                step = each - 1.0 + (residual > margin.log)
            else:
                continue
            margin.move(step)
            if known:
                margin.see(residual)
        if not known:
            return
        error = min(max(residual, -CLIP), CLIP)
        common = self.common + _COMMON_GAIN * error
        if key not in self.points and len(self.points) >= MAX_POINTS:
            del self.points[next(iter(self.points))]
        self.points[key] = _POINT_KEEP * own + _POINT_GAIN * error
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
            "points": dict(self.points),
            "margins": [
                {"attainment": level, "log": m.log, "seen": m.seen, "largest": m.largest, "cut": m.cut}
                for level, m in self.margins.items()
            ],
            "up": self.up,
            "down": self.down,
            "recent": list(self.recent),
            "steps": self.steps,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        self.common = number(state["common"], -BOUND, BOUND)
        self.up, self.down = (number(state[name], 0.0, 2.0) for name in ("up", "down"))
        self.recent.extend(number(value, -CLIP, CLIP) for value in state["recent"])
        self.steps = int(number(state["steps"], 0, 1e15))
        for key, value in list(state["points"].items())[:MAX_POINTS]:
            self.points[str(key)[:MAX_KEY]] = number(value, -BOUND, BOUND)
        for row in state["margins"][:MAX_LEVELS]:
            level = number(row["attainment"], 0.0, 1.0)
            margin = self.margins[level] = Margin(level)
            margin.log, margin.largest = (number(row[name], 0.0, MARGIN_MAX) for name in ("log", "largest"))
            margin.seen, margin.cut = int(number(row["seen"], 0, 1e6)), number(row["cut"], 0.0, MARGIN_MAX)


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
        self.limit = math.inf if state["limit"] is None else number(state["limit"], 0.0, 1e15)
        self.top = number(state["top"], 0.0, 1e15)
        self.wait = int(number(state["wait"], 1, _MAX_WAIT))
        self.clean = int(number(state["clean"], 0, _MAX_WAIT))
        self.on_trial = bool(state["on_trial"])
