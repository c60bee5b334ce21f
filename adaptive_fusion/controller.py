"""The control law: from predicted costs, budgets and what requests really took, the operating point to run.

Knows numbers: candidates with a quality and a prediction, limits, and measurements. Knows nothing of models, images,
policies or queues; the clock is injected and memory readings are arguments.

The law, per measured quantity (time to the first token, total latency), with y(o, x) the predicted milliseconds of
operating point o on request x:

- residual ``r = ln(measured / y) - m - d_o``, where m is the common drift and d_o the point's own; ``e`` is r clipped
  to +-0.7; ``m += 0.08 e``; ``d_o = 0.995 d_o + 0.03 e``;
- margin: ``q += 0.05 (1[r > q] - (1 - attainment))``, from 0.4, one q for each attainment level in use. This is the
  online quantile tracker of adaptive conformal inference (Gibbs and Candes 2021, eq. 2): whatever the load does, the
  share of requests with r > q tends to 1 - attainment;
- step detection, two one-sided CUSUMs (Page 1954): ``S = max(0, S + e - 0.12)``; above 0.6 the median of the last 4
  residuals is added to m and S starts again; downward likewise, above 1.0;
- choice: the highest quality with ``y exp(m + d_o + q) <= limit - elapsed`` for every limit set, where elapsed counts
  queueing; ties go to the cheaper point. If none fits: the cheapest that fits in memory, marked infeasible, or
  `InfeasibleBudgetError` when the budget asks for refusal;
- a request cut off after c ms enters as ``r = ln(c / y) - m - d_o`` and a miss. If r <= 0 the cut came before the
  expected end and says nothing: it is counted, not learned;
- memory: a point fits if ``predicted * v <= min(free, vram_gb)``, with v the upper envelope of measured / predicted:
  its maximum x 1.05, forgotten by 0.02 % a request; an out-of-memory error raises v by 5 %;
- hysteresis, only after out of memory (on predicted memory) and overload (on predicted time): points predicted to need
  as much as the one that failed are out at once; after 25 clean requests the ceiling rises by one step (x 1.25), until
  it is gone; a failure within the trial doubles the wait, up to 1,600.
"""

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from adaptive_fusion.budget import Budget
from adaptive_fusion.decisions import Measurement, Prediction, Rejected
from adaptive_fusion.errors import ConfigError, InfeasibleBudgetError
from adaptive_fusion.point import OperatingPoint

SCHEMA = 1
MISS_KINDS = ("oom", "overload", "timeout")
MAX_POINTS = 256
MAX_LEVELS = 16
STALE_S = 600.0

_CLIP = 0.7
_COMMON_GAIN = 0.08
_POINT_GAIN, _POINT_KEEP = 0.03, 0.995
_MARGIN_GAIN, _MARGIN_START, _MARGIN_MAX = 0.05, 0.4, 3.0
_SLACK, _UP, _DOWN = 0.12, 0.6, 1.0
_BOUND = 8.0
_MEMORY_HEADROOM, _MEMORY_FORGET = math.log(1.05), 0.0002
_STEP, _WAIT, _MAX_WAIT = 1.25, 25, 1600


@dataclass(frozen=True, slots=True)
class Candidate:
    """An operating point on offer for one request, with its expected quality in [0, 1] and predicted cost."""

    point: OperatingPoint
    quality: float
    predicted: Prediction


@dataclass(frozen=True, slots=True)
class Choice:
    """What the controller chose and why.

    `margin` is the factor on the predicted time of the tightest limit (drift and safety together); `rejected` holds
    the points of higher quality that did not fit, with reasons. `feasible` is the controller's own opinion.
    """

    candidate: Candidate
    feasible: bool
    margin: float
    reason: str
    rejected: tuple[Rejected, ...]
    decided_s: float

    @property
    def point(self) -> OperatingPoint:
        """The operating point to run."""
        return self.candidate.point


class _Drift:
    """Log-space correction and margin of one measured quantity; see the module for the law."""

    __slots__ = ("common", "down", "margins", "points", "recent", "steps", "up")

    def __init__(self) -> None:
        self.common = 0.0
        self.points: dict[OperatingPoint, float] = {}
        self.margins: dict[float, float] = {}
        self.up = self.down = 0.0
        self.recent: deque[float] = deque(maxlen=4)
        self.steps = 0

    def margin(self, attainment: float) -> float:
        found = self.margins.get(attainment)
        if found is None:
            if len(self.margins) >= MAX_LEVELS:
                del self.margins[next(iter(self.margins))]
            found = self.margins[attainment] = _MARGIN_START
        return found

    def learn(self, point: OperatingPoint, log_ratio: float, censored: bool = False) -> None:
        own = self.points.get(point, 0.0)
        residual = log_ratio - self.common - own
        if censored and residual <= 0.0:
            return
        for level, margin in self.margins.items():
            missed = 1.0 if censored or residual > margin else 0.0
            margin += _MARGIN_GAIN * (missed - 1.0 + level)
            self.margins[level] = min(max(margin, 0.0), _MARGIN_MAX)
        error = min(max(residual, -_CLIP), _CLIP)
        common = self.common + _COMMON_GAIN * error
        if point not in self.points and len(self.points) >= MAX_POINTS:
            del self.points[next(iter(self.points))]
        self.points[point] = _POINT_KEEP * own + _POINT_GAIN * error
        self.recent.append(error)
        self.up = max(0.0, self.up + error - _SLACK)
        self.down = max(0.0, self.down - error - _SLACK)
        if self.up > _UP or self.down > _DOWN:
            common += median(self.recent)
            self.up = self.down = 0.0
            self.steps += 1
        self.common = min(max(common, -_BOUND), _BOUND)

    def state(self) -> dict[str, Any]:
        return {
            "common": self.common,
            "points": [{"point": point.to_dict(), "log": value} for point, value in self.points.items()],
            "margins": [{"attainment": level, "log": value} for level, value in self.margins.items()],
            "up": self.up,
            "down": self.down,
            "recent": list(self.recent),
            "steps": self.steps,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        self.common = _number(state["common"], -_BOUND, _BOUND)
        self.up, self.down = (_number(state[name], 0.0, 2.0) for name in ("up", "down"))
        self.recent.extend(_number(value, -_CLIP, _CLIP) for value in state["recent"])
        self.steps = int(_number(state["steps"], 0, 1e15))
        for row in state["points"][:MAX_POINTS]:
            self.points[OperatingPoint.from_dict(row["point"])] = _number(row["log"], -_BOUND, _BOUND)
        for row in state["margins"][:MAX_LEVELS]:
            self.margins[_number(row["attainment"], 0.0, 1.0)] = _number(row["log"], 0.0, _MARGIN_MAX)


class _Ceiling:
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
        return {"limit": limit, "top": self.top, "wait": self.wait, "clean": self.clean, "on_trial": self.on_trial}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.limit = math.inf if state["limit"] is None else _number(state["limit"], 0.0, 1e15)
        self.top = _number(state["top"], 0.0, 1e15)
        self.wait = int(_number(state["wait"], 1, _MAX_WAIT))
        self.clean = int(_number(state["clean"], 0, _MAX_WAIT))
        self.on_trial = bool(state["on_trial"])


class Controller:
    """Chooses operating points and learns from what they took; thread-safe and deterministic.

    Args:
        memory_margin: Where the memory envelope starts: factor on the predicted peak, the profile's `memory_margin`.
        clock: Seconds, monotonic; only the age of a decision is taken from it.
    """

    def __init__(self, *, memory_margin: float = 1.25, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._ttft, self._latency = _Drift(), _Drift()
        self._memory = math.log(_number(memory_margin, 1.0, 4.0))
        self._memory_ceiling, self._time_ceiling = _Ceiling(), _Ceiling()
        self._counts = dict.fromkeys(
            ("decisions", "infeasible", "refused", "updates", "misses", "ooms", "ignored"), 0
        )

    def choose(
        self,
        candidates: Sequence[Candidate],
        budget: Budget,
        *,
        elapsed_ms: float = 0.0,
        free_memory_gb: float | None = None,
    ) -> Choice:
        """The candidate of highest quality that fits the budget.

        Args:
            candidates: The lane's operating points with quality and prediction, in any order, at least one.
            budget: The limits of this request.
            elapsed_ms: Milliseconds since the request arrived, queueing included.
            free_memory_gb: GiB that can still be had; None means there is no reading. A reading that is negative or not
                finite is not believed: only the candidate that needs least memory is then considered.

        Raises:
            InfeasibleBudgetError: If nothing fits and the budget says ``refuse``.
            ConfigError: If there is no candidate with a finite quality and prediction.
        """
        now = self._clock()
        inf = math.inf
        with self._lock:
            counts = self._counts
            counts["decisions"] += 1
            usable: list[tuple[float, float, int, float]] = []
            for index, candidate in enumerate(candidates):
                predicted = candidate.predicted
                ttft = predicted.encode_ms + predicted.prefill_ms
                total = ttft + predicted.decode_ms
                if 0.0 <= ttft <= total < inf and 0.0 <= predicted.peak_memory_gb < inf and -inf < candidate.quality < inf:
                    usable.append((-candidate.quality, total, index, ttft))
                else:
                    counts["ignored"] += 1
            if not usable:
                raise ConfigError(f"none of {len(candidates)} candidates has a finite quality and prediction")
            usable.sort()
            if not 0.0 <= elapsed_ms < inf:
                counts["ignored"] += 1
                elapsed_ms = 0.0
            memory_left = budget.vram_gb if budget.vram_gb is not None else inf
            if free_memory_gb is not None:
                if 0.0 <= free_memory_gb < inf:
                    memory_left = min(memory_left, free_memory_gb)
                else:
                    counts["ignored"] += 1
                    usable = [min(usable, key=lambda row: candidates[row[2]].predicted.peak_memory_gb)]
            limits: list[tuple[str, float, _Drift, float]] = []
            for name, limit, drift in (
                ("latency", budget.latency_ms, self._latency),
                ("ttft", budget.ttft_ms, self._ttft),
            ):
                if limit is not None:
                    limits.append((name, limit - elapsed_ms, drift, drift.margin(budget.attainment)))
            envelope = math.exp(self._memory)
            rejected: list[Rejected] = []
            for _, total, index, ttft in usable:
                candidate = candidates[index]
                point = candidate.point
                needed = candidate.predicted.peak_memory_gb * envelope
                margin, tightest, why, reason = 1.0, -1.0, "", "best quality, no time limit set"
                if needed > memory_left:
                    why = f"memory {needed:.3g} > {memory_left:.3g} GiB"
                elif candidate.predicted.peak_memory_gb >= self._memory_ceiling.limit:
                    why = "memory: too near a point that ran out of it"
                elif total >= self._time_ceiling.limit:
                    why = "overload: too near a point that was too slow"
                else:
                    for name, left, drift, safety in limits:
                        factor = math.exp(drift.common + drift.points.get(point, 0.0) + safety)
                        expected = factor * (total if name == "latency" else ttft)
                        if expected > left:
                            why = f"{name} {expected:.0f} > {left:.0f} ms"
                            break
                        if expected > tightest * left:
                            tightest, margin = expected / left if left else 1.0, factor
                            reason = f"best quality that fits: {name} {expected:.0f} <= {left:.0f} ms"
                if not why:
                    return Choice(candidate, True, margin, reason, tuple(rejected), now)
                rejected.append(Rejected(point, why, candidate.predicted))
            counts["infeasible"] += 1
            fallback = self._cheapest(candidates, usable, memory_left / envelope)
            why = next(row.reason for row in rejected if row.point == fallback.point)
            if budget.on_infeasible == "refuse":
                counts["refused"] += 1
                raise InfeasibleBudgetError(f"no operating point fits the budget; the cheapest, {fallback.point.name}: {why}")
            margin = 1.0
            if limits:
                _, _, drift, safety = limits[0]
                margin = math.exp(drift.common + drift.points.get(fallback.point, 0.0) + safety)
            others = tuple(row for row in rejected if row.point != fallback.point)
            return Choice(fallback, False, margin, f"nothing fits, cheapest taken: {why}", others, now)

    def _cheapest(
        self, candidates: Sequence[Candidate], usable: Sequence[tuple[float, float, int, float]], memory_left: float
    ) -> Candidate:
        """Fastest of those that fit in memory (late is better than out of memory), else the least in memory."""
        memory_left = min(memory_left, self._memory_ceiling.limit)
        rows = [(total, candidates[index]) for _, total, index, _ in usable]
        fitting = [row for row in rows if row[1].predicted.peak_memory_gb < memory_left]
        if fitting:
            return min(fitting, key=lambda row: (row[0] * math.exp(self._latency.points.get(row[1].point, 0.0))))[1]
        return min(rows, key=lambda row: (row[1].predicted.peak_memory_gb, row[0]))[1]

    def update(
        self,
        point: OperatingPoint,
        predicted: Prediction,
        measurement: Measurement,
        *,
        elapsed_ms: float = 0.0,
        decided_s: float | None = None,
    ) -> None:
        """Learn from a finished request.

        Args:
            point: The point that ran.
            predicted: What was predicted for it.
            measurement: What it took; values that are negative or not finite are ignored and counted, each by itself.
            elapsed_ms: The part of the measured times that lay before the decision, such as queueing.
            decided_s: `Choice.decided_s`; a decision more than ten minutes old is stale: ignored and counted.
        """
        now = self._clock()
        with self._lock:
            self._counts["updates"] += 1
            if decided_s is not None and not now - decided_s <= STALE_S:
                self._counts["ignored"] += 1
                return
            latency = self._log_ratio(measurement.latency_ms - elapsed_ms, predicted.latency_ms)
            ttft = self._log_ratio(measurement.ttft_ms - elapsed_ms, predicted.ttft_ms)
            if latency is not None:
                self._latency.learn(point, latency)
                self._memory_ceiling.passed()
                self._time_ceiling.passed()
            if ttft is not None:
                self._ttft.learn(point, ttft)
            if measurement.peak_memory_gb != 0.0:
                memory = self._log_ratio(measurement.peak_memory_gb, predicted.peak_memory_gb)
                if memory is not None:
                    bounded = min(max(memory, -_CLIP), _CLIP) + _MEMORY_HEADROOM
                    self._memory = max(bounded, self._memory - _MEMORY_FORGET, _MEMORY_HEADROOM - _CLIP)

    def miss(
        self,
        point: OperatingPoint,
        predicted: Prediction,
        censored_ms: float,
        *,
        kind: str = "timeout",
        elapsed_ms: float = 0.0,
    ) -> None:
        """Learn from a request that did not finish.

        Args:
            point: The point that ran.
            predicted: What was predicted for it.
            censored_ms: When it was cut off, from arrival: the latency is at least this.
            kind: ``timeout`` (stopped at its deadline), ``overload`` (far too slow, or the queue overflowed) or ``oom``.
            elapsed_ms: The part of `censored_ms` that lay before the decision.

        Raises:
            ConfigError: For an unknown kind.
        """
        if kind not in MISS_KINDS:
            raise ConfigError(f"kind of miss is {kind!r}; expected one of {', '.join(MISS_KINDS)}")
        with self._lock:
            self._counts["misses"] += 1
            log_ratio = self._log_ratio(censored_ms - elapsed_ms, predicted.latency_ms)
            if log_ratio is not None:
                self._latency.learn(point, log_ratio, censored=True)
            if kind == "oom":
                self._counts["ooms"] += 1
                self._memory = min(self._memory + _MEMORY_HEADROOM, _CLIP + _MEMORY_HEADROOM)
                if 0.0 < predicted.peak_memory_gb < math.inf:
                    self._memory_ceiling.drop(predicted.peak_memory_gb)
            elif kind == "overload" and 0.0 < predicted.latency_ms < math.inf:
                self._time_ceiling.drop(predicted.latency_ms)

    def _log_ratio(self, measured: float, predicted: float) -> float | None:
        """ln(measured / predicted), or None (and counted) if either is not a finite positive number."""
        if 0.0 < measured < math.inf and 0.0 < predicted < math.inf:
            ratio = measured / predicted
            if 0.0 < ratio < math.inf:
                return math.log(ratio)
        self._counts["ignored"] += 1
        return None

    def state(self) -> dict[str, Any]:
        """Everything that was learned, in finite plain values that JSON can hold."""
        with self._lock:
            return {
                "schema": SCHEMA,
                "latency": self._latency.state(),
                "ttft": self._ttft.state(),
                "memory": self._memory,
                "memory_ceiling": self._memory_ceiling.state(),
                "time_ceiling": self._time_ceiling.state(),
                "counts": dict(self._counts),
            }

    @classmethod
    def from_state(cls, state: Mapping[str, Any], *, clock: Callable[[], float] = time.monotonic) -> "Controller":
        """A controller that goes on where `state` was taken.

        Raises:
            ConfigError: For another schema, missing parts, or values that are not finite and in range.
        """
        if state.get("schema") != SCHEMA:
            raise ConfigError(f"controller state has schema {state.get('schema')!r}; expected {SCHEMA}")
        controller = cls(clock=clock)
        try:
            controller._latency.restore(state["latency"])
            controller._ttft.restore(state["ttft"])
            controller._memory = _number(state["memory"], -1.0, 2.0)
            controller._memory_ceiling.restore(state["memory_ceiling"])
            controller._time_ceiling.restore(state["time_ceiling"])
            for name in controller._counts:
                controller._counts[name] = int(_number(state["counts"][name], 0, 1e15))
        except (KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"controller state is incomplete or malformed: {error!r}") from None
        return controller


def _number(value: Any, low: float, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ConfigError(f"controller value is {value!r}; expected a number from {low:g} to {high:g}")
    return float(value)
