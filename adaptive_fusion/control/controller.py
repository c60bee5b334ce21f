"""The controller: from predicted costs, budgets and what requests really took, the operating point to run.

The law it follows and all of its gains are in `law`: that is where to change how it reacts. Here the steps of a choice
are called in their order and everything is counted; `weighing` has the steps, `learned` what measurements teach.

Knows numbers: candidates with a quality and a prediction, limits, and measurements. Knows nothing of models, images,
policies or queues; the clock is injected and memory readings are arguments.
"""

import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from adaptive_fusion.budget import Budget
from adaptive_fusion.checks import number
from adaptive_fusion.control import law, weighing
from adaptive_fusion.control.candidates import Candidate, Choice
from adaptive_fusion.control.learned import Corrections
from adaptive_fusion.control.weighing import Row, Weighed, why
from adaptive_fusion.decisions import Measurement
from adaptive_fusion.errors import ConfigError, InfeasibleBudgetError

SCHEMA = 4
MISS_KINDS = ("cancelled", "oom", "overload", "timeout")


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
        with self._lock:
            self._counts["decisions"] += 1
            learned = self._learned
            rows = self._valid(candidates)
            elapsed_ms = self._valid_elapsed(elapsed_ms)
            rows, memory_gb = self._memory_left(rows, budget, free_memory_gb)
            limits = weighing.times_left(budget, elapsed_ms, learned)
            price = learned.price(budget.attainment).value if limits else 0.0
            weighed, best = weighing.weigh(rows, limits, memory_gb, price, learned)
            feasible = best >= 0
            if feasible:
                taken, others = weighed[best], weighed[:best]
                reason = f"best quality for its risk: {why(taken)}" if limits else why(taken)
            else:
                taken = self._fall_back(rows, weighed, budget, elapsed_ms, memory_gb)
                others = [row for row in weighed if row[0] is not taken[0]]
                reason = f"nothing fits, cheapest taken: {why(taken)}"
            candidate, p_late, drift, *_ = taken
            margin = drift.margin(candidate.drift_key, budget.attainment) if drift is not None else 1.0
            return Choice(
                candidate, feasible, margin, reason, weighing.rejected(others), budget, elapsed_ms, now, p_late
            )

    def fitting(
        self, candidates: Sequence[Candidate], own: Choice, *, free_memory_gb: float | None = None
    ) -> list[Candidate]:
        """Those that fit the budget of the `own` choice about as well as it does, itself first: each would be taken if
        there were no other, at no more risk than the budget allows or that choice has. Counts as no decision."""
        budget, learned = own.budget, self._learned
        most = max(1.0 - budget.attainment, own.p_late)
        with self._lock:
            rows, memory_gb = self._memory_left(weighing.valid_rows(candidates), budget, free_memory_gb)
            limits = weighing.times_left(budget, own.elapsed_ms, learned)
            price = learned.price(budget.attainment).value if limits else 0.0
            found = [own.candidate]
            for row in rows:
                if row[4].point != own.point:
                    [(candidate, risk, *_)], best = weighing.weigh([row], limits, memory_gb, price, learned)
                    if best >= 0 and risk <= most:
                        found.append(candidate)
        return found

    def _valid(self, candidates: Sequence[Candidate]) -> list[Row]:
        """The candidates with a finite quality and prediction, sorted; the others are counted."""
        rows = weighing.valid_rows(candidates)
        self._counts["ignored"] += len(candidates) - len(rows)
        if not rows:
            raise ConfigError(f"none of {len(candidates)} candidates has a finite quality and prediction")
        return rows

    def _valid_elapsed(self, elapsed_ms: float) -> float:
        """The time that has passed; if it is no such time, 0, and counted."""
        if 0.0 <= elapsed_ms < math.inf:
            return elapsed_ms
        self._counts["ignored"] += 1
        return 0.0

    def _memory_left(self, rows: list[Row], budget: Budget, free_memory_gb: float | None) -> tuple[list[Row], float]:
        """The candidates to consider and the GiB they may take."""
        memory_gb = budget.vram_gb if budget.vram_gb is not None else math.inf
        if free_memory_gb is None:
            return rows, memory_gb
        if 0.0 <= free_memory_gb < math.inf:
            return rows, min(memory_gb, free_memory_gb)
        self._counts["ignored"] += 1
        return [min(rows, key=lambda row: row[4].predicted.peak_memory_gb)], memory_gb

    def _fall_back(
        self, rows: list[Row], weighed: list[Weighed], budget: Budget, elapsed_ms: float, memory_gb: float
    ) -> Weighed:
        """The cheapest candidate, where none fits and is worth its risk; or the refusal that the budget asks for."""
        self._counts["infeasible"] += 1
        learned = self._learned
        predicted_gb = min(memory_gb / learned.memory_envelope, learned.memory_ceiling.limit)
        cheapest = weighing.cheapest(rows, predicted_gb)
        taken = next(row for row in weighed if row[0] is cheapest)
        if budget.on_infeasible == "refuse" and weighing.hopeless(
            cheapest, budget, elapsed_ms, predicted_gb, learned.ttft
        ):
            self._refuse()
            raise InfeasibleBudgetError(
                f"no operating point fits the budget; the cheapest, {cheapest.point.name}: {why(taken)}"
            )
        return taken

    def _refuse(self) -> None:
        """Count a refusal, and expect a little less: see the law."""
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

    def price(self, attainment: float) -> float:
        """The price of a miss at an attainment level, in answers of quality 1."""
        with self._lock:
            found = self._learned.prices.get(attainment)
            return found.value if found is not None else law.PRICE_START

    def share(self, key: str, before: float) -> float:
        """P(the better plan runs after a first pass), by the `key` of its `Second`; `before` was expected at first."""
        with self._lock:
            return self._learned.shares.expect(key, before)

    def too_late_for(self, candidate: Candidate, budget: Budget, elapsed_ms: float) -> str:
        """Why `candidate` would not be in time any more with the probability that the budget asks for; empty if it
        would. `elapsed_ms` counts from the request's arrival."""
        predicted = candidate.predicted
        if budget.latency_ms is None and budget.ttft_ms is None:
            return ""
        with self._lock:
            limits = weighing.times_left(budget, elapsed_ms, self._learned)
            risk = weighing.risk_of(candidate.drift_key, predicted.ttft_ms, predicted.latency_ms, limits)
        return why((candidate, *risk)) if risk[0] > 1.0 - budget.attainment else ""

    def looked_at(self, choice: Choice, ttft_ms: float, *, escalated: bool) -> None:
        """Learn from a verdict on the first pass of `choice`, whose first token came `ttft_ms` after that pass began,
        waiting before it not counted. `update` or `miss` follows."""
        candidate, second = choice.candidate, choice.candidate.second
        with self._lock:
            if second is not None and self._clock() - choice.decided_s <= law.STALE_S:
                share = second.key or candidate.key
                self._learned.looked_at(candidate.drift_key, share, candidate.predicted, ttft_ms, escalated=escalated)

    @property
    def informed(self) -> bool:
        """Whether any request was learned from."""
        with self._lock:
            return self._learned.counts["updates"] + self._learned.counts["misses"] > 0

    def update(
        self,
        choice: Choice,
        measurement: Measurement,
        *,
        ran: Candidate | None = None,
        lost_ms: float = 0.0,
        held_ms: float = 0.0,
    ) -> None:
        """Learn from a finished request.

        Args:
            choice: What `choose` returned for it. If that is more than ten minutes old it is stale:
                ignored and counted.
            measurement: What it took, `ttft_ms` and `latency_ms` counted from arrival as `elapsed_ms` was;
                values that are negative or not finite are ignored and counted, each by itself.
            ran: The candidate that really ran, if not the chosen one (after out of memory, exploring, or going on to
                the better plan).
            lost_ms: The part of the measured times that failed tries, or a first pass, took.
            held_ms: The part of the time to the first token for which that token was held back.
        """
        now = self._clock()
        candidate = choice.candidate if ran is None else ran
        with self._lock:
            learned = self._learned
            learned.counts["updates"] += 1
            if not now - choice.decided_s <= law.STALE_S:
                learned.counts["ignored"] += 1
                return
            learned.finished(
                candidate.drift_key,
                candidate.predicted,
                measurement,
                choice.budget,
                before_ms=choice.elapsed_ms + lost_ms,
                held_ms=held_ms,
                feasible=choice.feasible,
                peak_at_most=candidate.point.blanks is not None,
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
                candidate.drift_key,
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
