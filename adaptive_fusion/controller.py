"""The control law: from predicted costs, budgets and what requests really took, the operating point to run.

Knows numbers: candidates with a quality and a prediction, limits, and measurements. Knows nothing of
models, images, policies or queues; the clock is injected and memory readings are arguments. Here is the choice;
what is learned from measurements is kept and moved by `corrections`.

The law, per measured quantity (time to the first token, total latency), with y(o, x) the predicted
milliseconds of operating point o on request x:

- residual ``r = ln(measured / y) - m - d_o``, where m is the common drift and d_o the point's own; ``e``
  is r clipped to +-0.7; ``m += 0.08 e``; ``d_o = 0.995 d_o + 0.03 e``;
- margin: ``q += 0.05 (miss - (1 - attainment))``, from 0.4, one q for each attainment level in use: the
  tracker of adaptive conformal inference (Gibbs and Candes 2021, eq. 2). A missed deadline counts always,
  a kept one only where the margin ruled out a better point, so that requests that are easy anyway do not
  use up the margin of the others and the room that a coarse ladder leaves is used: whatever the load does,
  misses <= (1 - attainment) n + (q_n + s - q_0) / 0.05, where s <= 0.4 is one cut at the start: after 20
  residuals and ``attainment / (1 - attainment)`` more q falls to the largest of the latter, which is the
  bound of split conformal prediction. Where the plan was not thought to fit, and for the levels of other
  requests, miss is ``1[r > q]``;
- step detection, two one-sided CUSUMs (Page 1954): ``S = max(0, S + e - 0.12)``; above 0.6 the median of
  the last 4 residuals is added to m and S starts again; downward likewise, above 1.0;
- choice: the highest quality with ``y exp(m + d_o + q) <= limit - elapsed`` for every limit set, where
  elapsed counts queueing; ties go to the cheaper point. If none fits: the cheapest that fits in memory,
  marked infeasible, or `InfeasibleBudgetError` when the budget asks for refusal. Where the answer is cut off
  at the deadline, refusal needs more: a first token that is predicted, without margin, after the deadline;
- a refusal measures nothing, so it lowers m by 0.02: else a controller that refuses everything would never
  find out that the load is over;
- a request cut off after c ms enters as ``r = ln(c / y) - m - d_o`` and a miss. If r <= 0 the cut came
  before the expected end and says nothing of the drift: then it only counts as a miss, and only if the
  plan was thought to fit;
- memory: a point fits if ``predicted * v <= min(free, vram_gb)``, with v the upper envelope of measured /
  predicted: its maximum x 1.05, forgotten by 0.02 % a request; an out-of-memory error raises v by 5 %;
- hysteresis, only after out of memory (on predicted memory) and overload (on predicted time): points
  predicted to need as much as the one that failed are out at once; after 25 clean requests the ceiling
  rises by one step (x 1.25), until it is gone; a failure within the trial doubles the wait, up to 1,600.
"""

import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from adaptive_fusion.budget import Budget
from adaptive_fusion.corrections import Corrections
from adaptive_fusion.decisions import Measurement, Prediction, Rejected
from adaptive_fusion.drift import Drift, number
from adaptive_fusion.errors import ConfigError, InfeasibleBudgetError
from adaptive_fusion.point import OperatingPoint

SCHEMA = 2
MISS_KINDS = ("oom", "overload", "timeout")
STALE_S = 600.0


@dataclass(frozen=True, slots=True)
class Candidate:
    """An operating point on offer for one request, with its expected quality in [0, 1] and predicted cost.

    `key` is the name under which its own drift is kept: the same for every request, also where the point's
    pixel budget follows the size of the image. Empty, it becomes the point's name.
    """

    point: OperatingPoint
    quality: float
    predicted: Prediction
    key: str = ""

    def __post_init__(self) -> None:
        if not self.key:
            object.__setattr__(self, "key", self.point.name)


@dataclass(frozen=True, slots=True)
class Choice:
    """What the controller chose and why.

    `margin` is the factor on the predicted time of the tightest limit (drift and safety together);
    `rejected` holds the points of higher quality that did not fit, with reasons; `limited` names the
    limits that ruled them out. `feasible` is the controller's own opinion.
    """

    candidate: Candidate
    feasible: bool
    margin: float
    reason: str
    rejected: tuple[Rejected, ...]
    budget: Budget
    elapsed_ms: float
    decided_s: float
    limited: tuple[str, ...] = ()

    @property
    def point(self) -> OperatingPoint:
        """The operating point to run."""
        return self.candidate.point


class Controller:
    """Chooses operating points and learns from what they took; thread-safe and deterministic.

    Args:
        memory_margin: Where the memory envelope starts: factor on the predicted peak, the profile's
            `memory_margin`.
        clock: Seconds, monotonic; only the age of a decision is taken from it.
    """

    def __init__(self, *, memory_margin: float = 1.25, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._learned = Corrections(memory_margin)
        self._counts = dict.fromkeys(("decisions", "infeasible", "refused", "ignored"), 0)

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
            free_memory_gb: GiB that can still be had; None means there is no reading. A reading that is
                negative or not finite is not believed: only the candidate that needs least memory is then
                considered.

        Raises:
            InfeasibleBudgetError: If nothing fits and the budget says ``refuse``.
            ConfigError: If there is no candidate with a finite quality and prediction.
        """
        now = self._clock()
        inf = math.inf
        with self._lock:
            counts, learned = self._counts, self._learned
            counts["decisions"] += 1
            usable: list[tuple[float, float, int, float]] = []
            for index, candidate in enumerate(candidates):
                predicted = candidate.predicted
                ttft = predicted.encode_ms + predicted.prefill_ms
                total = ttft + predicted.decode_ms
                if (
                    0.0 <= ttft <= total < inf
                    and 0.0 <= predicted.peak_memory_gb < inf
                    and -inf < candidate.quality < inf
                ):
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
            limits: list[tuple[str, float, Drift, float]] = []
            for name, limit, drift in (
                ("latency", budget.latency_ms, learned.latency),
                ("ttft", budget.ttft_ms, learned.ttft),
            ):
                if limit is not None:
                    limits.append((name, limit - elapsed_ms, drift, drift.margin(budget.attainment)))
            envelope = math.exp(learned.memory)
            rejected: list[Rejected] = []
            limited: tuple[str, ...] = ()
            for _, total, index, ttft in usable:
                candidate = candidates[index]
                point = candidate.point
                needed = candidate.predicted.peak_memory_gb * envelope
                margin, tightest, why, reason = 1.0, -1.0, "", "best quality, no time limit set"
                if needed > memory_left:
                    why = f"memory {needed:.3g} > {memory_left:.3g} GiB"
                elif candidate.predicted.peak_memory_gb >= learned.memory_ceiling.limit:
                    why = "memory: too near a point that ran out of it"
                elif total >= learned.time_ceiling.limit:
                    why = "overload: too near a point that was too slow"
                else:
                    for name, left, drift, safety in limits:
                        factor = math.exp(drift.common + drift.points.get(candidate.key, 0.0) + safety)
                        expected = factor * (total if name == "latency" else ttft)
                        if expected > left:
                            why = f"{name} {expected:.0f} > {left:.0f} ms"
                            if name not in limited:
                                limited += (name,)
                            break
                        if expected > tightest * left:
                            tightest, margin = expected / left if left else 1.0, factor
                            reason = f"best quality that fits: {name} {expected:.0f} <= {left:.0f} ms"
                if not why:
                    return Choice(candidate, True, margin, reason, tuple(rejected), budget, elapsed_ms, now, limited)
                rejected.append(Rejected(point, why, candidate.predicted))
            counts["infeasible"] += 1
            fallback = self._cheapest(candidates, usable, memory_left / envelope)
            why = next(row.reason for row in rejected if row.point == fallback.point)
            if budget.on_infeasible == "refuse" and self._hopeless(
                fallback, budget, elapsed_ms, memory_left / envelope
            ):
                self._refuse()
                raise InfeasibleBudgetError(
                    f"no operating point fits the budget; the cheapest, {fallback.point.name}: {why}"
                )
            margin = 1.0
            if limits:
                _, _, drift, safety = limits[0]
                margin = math.exp(drift.common + drift.points.get(fallback.key, 0.0) + safety)
            others = tuple(row for row in rejected if row.point != fallback.point)
            reason = f"nothing fits, cheapest taken: {why}"
            return Choice(fallback, False, margin, reason, others, budget, elapsed_ms, now, limited)

    def _cheapest(
        self,
        candidates: Sequence[Candidate],
        usable: Sequence[tuple[float, float, int, float]],
        memory_left: float,
    ) -> Candidate:
        """Fastest of those that fit in memory (late is better than out of memory), else the least in
        memory.
        """
        memory_left = min(memory_left, self._learned.memory_ceiling.limit)
        rows = [(total, candidates[index]) for _, total, index, _ in usable]
        fitting = [row for row in rows if row[1].predicted.peak_memory_gb < memory_left]
        drift = self._learned.latency.points
        if fitting:
            return min(fitting, key=lambda row: row[0] * math.exp(drift.get(row[1].key, 0.0)))[1]
        return min(rows, key=lambda row: (row[1].predicted.peak_memory_gb, row[0]))[1]

    def _hopeless(self, fallback: Candidate, budget: Budget, elapsed_ms: float, memory_left: float) -> bool:
        """Whether starting is no use: always, if nothing fits, but where a late end is cut off."""
        if budget.on_deadline != "stop" or budget.latency_ms is None:
            return True
        if not fallback.predicted.peak_memory_gb < min(memory_left, self._learned.memory_ceiling.limit):
            return True
        first_ms = fallback.predicted.ttft_ms * self._learned.ttft.factor(fallback.key)
        return first_ms > budget.latency_ms - elapsed_ms

    def _refuse(self) -> None:
        self._counts["refused"] += 1
        self._learned.fade()

    def refused(self, choice: Choice) -> None:
        """Take note that `choice` was given up before its prefill, being too late for its deadline."""
        with self._lock:
            self._refuse()

    def slowdown(self, key: str) -> float:
        """How much later than predicted the first token of a candidate's `key` lately came, as a factor."""
        with self._lock:
            return self._learned.ttft.factor(key)

    @property
    def informed(self) -> bool:
        """Whether any request was learned from."""
        with self._lock:
            return self._learned.counts["updates"] + self._learned.counts["misses"] > 0

    def update(
        self, choice: Choice, measurement: Measurement, *, ran: Candidate | None = None, lost_ms: float = 0.0
    ) -> None:
        """Learn from a finished request.

        Args:
            choice: What `choose` returned for it. If that is more than ten minutes old it is stale:
                ignored and counted.
            measurement: What it took, `ttft_ms` and `latency_ms` counted from arrival as `elapsed_ms` was;
                values that are negative or not finite are ignored and counted, each by itself.
            ran: The candidate that really ran, if not the chosen one (after out of memory, or exploring).
            lost_ms: The part of the measured times that failed tries took.
        """
        now = self._clock()
        candidate = choice.candidate if ran is None else ran
        with self._lock:
            learned = self._learned
            learned.counts["updates"] += 1
            if not now - choice.decided_s <= STALE_S:
                learned.counts["ignored"] += 1
                return
            learned.finished(
                candidate.key,
                candidate.predicted,
                measurement,
                choice.budget,
                before_ms=choice.elapsed_ms + lost_ms,
                feasible=choice.feasible,
                limited=choice.limited if ran is None else (),
            )

    def miss(
        self,
        choice: Choice,
        censored_ms: float,
        *,
        kind: str = "timeout",
        ran: Candidate | None = None,
        lost_ms: float = 0.0,
    ) -> None:
        """Learn from a request, or a try of it, that did not finish.

        Args:
            choice: What `choose` returned for it.
            censored_ms: When it was cut off, from arrival: the latency is at least this.
            kind: ``timeout`` (stopped at its deadline), ``overload`` (given up as far too slow) or ``oom``
                (this try ran out of memory; if the request is tried again, `update` or `miss` follows).
            ran: The candidate that really ran, if not the chosen one.
            lost_ms: The part of `censored_ms` that earlier failed tries took.

        Raises:
            ConfigError: For an unknown kind.
        """
        if kind not in MISS_KINDS:
            raise ConfigError(f"kind of miss is {kind!r}; expected one of {', '.join(MISS_KINDS)}")
        candidate = choice.candidate if ran is None else ran
        with self._lock:
            self._learned.counts["misses"] += 1
            self._learned.cut_off(
                candidate.key,
                candidate.predicted,
                censored_ms - choice.elapsed_ms - lost_ms,
                choice.budget.attainment,
                late=kind != "oom" and choice.feasible and choice.budget.latency_ms is not None,
                kind=kind,
            )

    def state(self) -> dict[str, Any]:
        """Everything that was learned, in finite plain values that JSON can hold."""
        with self._lock:
            learned = self._learned
            counts = {**self._counts, **learned.counts, "ignored": self._counts["ignored"] + learned.counts["ignored"]}
            return {"schema": SCHEMA, **learned.state(), "counts": counts}

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
            controller._learned.restore(state)
            for counts in (controller._learned.counts, controller._counts):
                for name in counts:
                    counts[name] = int(number(state["counts"][name], 0, 1e15))
            controller._learned.counts["ignored"] = 0  # the state has one number for both
        except (KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"controller state is incomplete or malformed: {error!r}") from None
        return controller
