"""The control law: from predicted costs, budgets and what requests really took, the operating point to run.

Knows numbers: candidates with a quality and a prediction, limits, and measurements. Knows nothing of
models, images, policies or queues; the clock is injected and memory readings are arguments. Here is the choice;
what is learned from measurements is kept and moved by `learned`.

The law, per measured quantity (time to the first token, total latency), with y(o, x) the predicted
milliseconds of operating point o on request x:

- residual ``r = ln(measured / y) - m - d_o``, where m is the common drift and d_o the point's own; ``e``
  is r clipped to +-0.7; ``m += 0.08 e``; ``d_o = 0.995 d_o + 0.03 e``;
- spread: ``w += 0.03 (|e| - w)``, from 0.3, for all points together and likewise for each (its first residuals
  averaged), which counts for as many of its residuals, up to 33, against 10 of all points: w_o;
- risk: P(late) of a point is that of Student's t with 2 degrees of freedom, whose tails are as heavy as those of
  latencies and whose distribution function has a closed form, of mean m + d_o and mean absolute deviation w_o, to
  exceed ``ln((limit - elapsed) / y)``, where elapsed counts queueing; of several limits the largest;
- step detection, two one-sided CUSUMs (Page 1954): ``S = max(0, S + e - 0.12)``; above 0.6 the median of
  the last 4 residuals is added to m and S starts again; downward likewise, above 1.0;
- choice: the highest worth ``quality - price x P(late)``, the Lagrangian of "the best quality at a share of misses of
  at most 1 - attainment" (Everett 1963): misses are allowed where they buy most, but no risk above 0.8 is taken, so
  that what is late is not late by much. Ties go to the cheaper point. If nothing is worth more than 0: the cheapest
  that fits in memory, marked infeasible, or `InfeasibleBudgetError` when the budget asks for refusal. Where the answer
  is cut off at the deadline, refusal needs more: a first token that is predicted, without regard to risk, after the
  deadline;
- price, one for each attainment level in use, by dual ascent (a virtual queue, Neely 2010):
  ``price += 0.3 (miss - (1 - attainment))``, from 2, at least 0.5 (half an answer) and at most 50. Of requests not
  thought to fit only kept ones count. So, whatever the load does and however wrong P(late) is, misses of requests
  thought to fit are at most ``(1 - attainment) n + (price_n - 2) / 0.3``, as long as the price stays below its upper
  end;
- a refusal measures nothing, so it lowers m by 0.02: else a controller that refuses everything would never
  find out that the load is over;
- a request cut off after c ms enters as ``r = ln(c / y) - m - d_o`` and, if it was thought to fit, as a miss. If
  r <= 0 the cut came before the expected end and says nothing of the drift. A request that was given up by whoever
  asked is a miss only if it was late by then;
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
from typing import Any

from adaptive_fusion.budget import Budget
from adaptive_fusion.checks import number
from adaptive_fusion.control.candidates import NO_LIMIT, Candidate, Choice, Found, risk_of
from adaptive_fusion.control.estimators import Drift
from adaptive_fusion.control.learned import Corrections
from adaptive_fusion.decisions import Measurement, Rejected
from adaptive_fusion.errors import ConfigError, InfeasibleBudgetError

SCHEMA = 3
MISS_KINDS = ("cancelled", "oom", "overload", "timeout")
STALE_S = 600.0
RISK_MAX = 0.8

_Seen = tuple[Candidate, float, Drift | None, str, tuple[Any, ...]]


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
        """The candidate whose quality, less the price of its risk to be late, is highest; see the law.

        Args:
            candidates: The lane's operating points with quality and prediction, in any order, at least one.
            budget: The limits of this request.
            elapsed_ms: Milliseconds since the request arrived, queueing included.
            free_memory_gb: GiB that can still be had; None means there is no reading. A reading that is
                negative or not finite is not believed: only the candidate that needs least memory is then
                considered.

        Raises:
            InfeasibleBudgetError: If nothing is worth its risk, or fits in memory, and the budget says ``refuse``.
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
            limits = [
                (name, limit - elapsed_ms, drift)
                for name, limit, drift in (
                    ("latency", budget.latency_ms, learned.latency),
                    ("ttft", budget.ttft_ms, learned.ttft),
                )
                if limit is not None
            ]
            price = learned.price(budget.attainment).value if limits else 0.0
            envelope = math.exp(learned.memory)
            seen: list[_Seen] = []
            best, worth = -1, 0.0
            found: Found
            for negative, total, index, ttft in usable:
                if best >= 0 and -negative <= worth:
                    break  # no risk is below 0, so no point of this quality or less is worth more
                candidate = candidates[index]
                needed = candidate.predicted.peak_memory_gb
                if needed * envelope > memory_left:
                    found = (1.0, None, "memory {:.3g} > {:.3g} GiB", (needed * envelope, memory_left))
                elif needed >= learned.memory_ceiling.limit:
                    found = (1.0, None, "memory: too near a point that ran out of it", ())
                elif total >= learned.time_ceiling.limit:
                    found = (1.0, None, "overload: too near a point that was too slow", ())
                elif not limits:
                    found, best, worth = NO_LIMIT, len(seen), -negative
                else:
                    found = risk_of(candidate.key, ttft, total, limits)
                    net = -negative - price * found[0]
                    if net > worth and found[0] <= RISK_MAX:
                        best, worth = len(seen), net
                seen.append((candidate, *found))
            if best >= 0:
                chosen, p_late, drift, words, numbers = seen[best]
                why = words.format(*numbers)
                reason = f"best quality for its risk: {why}" if limits else why
                others = seen[:best]
            else:
                counts["infeasible"] += 1
                cheapest = self._cheapest(candidates, usable, memory_left / envelope)
                chosen, p_late, drift, words, numbers = next(row for row in seen if row[0] is cheapest)
                why = words.format(*numbers)
                if budget.on_infeasible == "refuse" and self._hopeless(
                    chosen, budget, elapsed_ms, memory_left / envelope
                ):
                    self._refuse()
                    raise InfeasibleBudgetError(
                        f"no operating point fits the budget; the cheapest, {chosen.point.name}: {why}"
                    )
                reason = f"nothing fits, cheapest taken: {why}"
                others = [row for row in seen if row[0] is not chosen]
            margin = drift.margin(chosen.key, budget.attainment) if drift is not None else 1.0
            rejected = tuple(Rejected(row[0].point, row[3].format(*row[4]), row[0].predicted) for row in others)
            return Choice(chosen, best >= 0, margin, reason, rejected, budget, elapsed_ms, now, p_late)

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
        drift = self._learned.latency
        if fitting:
            return min(fitting, key=lambda row: row[0] * drift.factor(row[1].key))[1]
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
            kind: ``timeout`` (stopped at its deadline), ``overload`` (given up as far too slow), ``cancelled`` (given
                up by whoever asked) or ``oom`` (this try ran out of memory; if the request is tried again, `update`
                or `miss` follows).
            ran: The candidate that really ran, if not the chosen one.
            lost_ms: The part of `censored_ms` that earlier failed tries took.

        Raises:
            ConfigError: For an unknown kind.
        """
        if kind not in MISS_KINDS:
            raise ConfigError(f"kind of miss is {kind!r}; expected one of {', '.join(MISS_KINDS)}")
        candidate = choice.candidate if ran is None else ran
        limit = choice.budget.latency_ms
        late = limit is not None and (kind in ("overload", "timeout") or (kind == "cancelled" and censored_ms > limit))
        with self._lock:
            self._learned.counts["cancelled" if kind == "cancelled" else "misses"] += 1
            self._learned.cut_off(
                candidate.key,
                candidate.predicted,
                censored_ms - choice.elapsed_ms - lost_ms,
                choice.budget.attainment,
                late=late and choice.feasible,
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
                    counts[name] = int(number(state["counts"][name], name, 0, 1e15))
            controller._learned.counts["ignored"] = 0  # the state has one number for both
        except (KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"controller state is incomplete or malformed: {error!r}") from None
        return controller
