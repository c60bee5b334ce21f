"""What the controller has learned: drift of both times, prices of a miss, the envelope of memory, ceilings.

Knows predictions, measurements and limits. Knows nothing of candidates on offer or how one is chosen, and nothing of
clocks and threads: `law` states what is done here and has the gains, `controller` holds the lock.
"""

import math
from collections.abc import Mapping
from typing import Any

from adaptive_fusion.budget import Budget
from adaptive_fusion.checks import number
from adaptive_fusion.control import law
from adaptive_fusion.control.estimators import Ceiling, Drift, Price, Shares
from adaptive_fusion.decisions import Measurement, Prediction

_LOG_HEADROOM = math.log(law.MEMORY_HEADROOM)


class Corrections:
    """What measurements say of the predictions; always finite.

    Args:
        memory_margin: Where the memory envelope starts: factor on the predicted peak.
    """

    def __init__(self, memory_margin: float) -> None:
        self.ttft, self.latency = Drift(), Drift()
        self.prices: dict[float, Price] = {}
        self.log_envelope = math.log(number(memory_margin, "memory_margin", 1.0, 4.0))
        self.memory_ceiling, self.time_ceiling = Ceiling(), Ceiling()
        self.shares = Shares()
        self.counts = dict.fromkeys(("updates", "misses", "ooms", "cancelled", "ignored"), 0)

    @property
    def memory_envelope(self) -> float:
        """The factor on a predicted peak of memory that what is measured stays below."""
        return math.exp(self.log_envelope)

    def price(self, attainment: float) -> Price:
        """The price of a miss for requests of this attainment level; the oldest level makes room for a 17th."""
        found = self.prices.get(attainment)
        if found is None:
            if len(self.prices) >= law.MAX_LEVELS:
                del self.prices[next(iter(self.prices))]
            found = self.prices[attainment] = Price()
        return found

    def finished(
        self,
        key: str,
        predicted: Prediction,
        measured: Measurement,
        budget: Budget,
        *,
        before_ms: float,
        held_ms: float = 0.0,
        feasible: bool,
        peak_at_most: bool = False,
    ) -> None:
        """Learn from a request that ran to its end.

        Args:
            key: The name under which the own drift of the point that ran is kept.
            predicted: What was expected of that point.
            measured: What it took, counted from arrival; values that are negative or not finite are ignored and
                counted, each by itself.
            budget: The limits it had.
            before_ms: The part of the measured times that passed before it was run.
            held_ms: The part of the time to the first token for which that token was held back.
            feasible: Whether it was thought to fit.
            peak_at_most: Whether the predicted peak is what it may come to, so that a lower one says nothing of others.
        """
        late: list[bool] = []
        for drift, limit, taken, beside, expected in (
            (self.latency, budget.latency_ms, measured.latency_ms, before_ms, predicted.latency_ms),
            (self.ttft, budget.ttft_ms, measured.ttft_ms, before_ms + held_ms, predicted.ttft_ms),
        ):
            ratio = self._log_ratio(taken - beside, expected)
            if ratio is None:
                continue
            drift.learn(key, ratio)
            if limit is not None:
                late.append(taken > limit)
        if late and (feasible or not any(late)):
            self.price(budget.attainment).move(budget.attainment, missed=any(late))
        self.memory_ceiling.passed()
        self.time_ceiling.passed()
        if measured.peak_memory_gb > predicted.peak_memory_gb or (measured.peak_memory_gb != 0.0 and not peak_at_most):
            self._peaked(measured.peak_memory_gb, predicted.peak_memory_gb)

    def looked_at(self, key: str, share: str, predicted: Prediction, ttft_ms: float, *, escalated: bool) -> None:
        """Learn from a first pass of `key` on which a verdict was taken, its first token after `ttft_ms`; `share` is
        the name under which verdicts are counted. Of one that went on this is all its time that is known; of others
        `finished` has it."""
        self.shares.learn(share, escalated=escalated)
        if escalated and (ratio := self._log_ratio(ttft_ms, predicted.ttft_ms)) is not None:
            self.ttft.learn(key, ratio)

    def _peaked(self, measured_gb: float, predicted_gb: float) -> None:
        """Keep the envelope above this peak, and forget a little of earlier ones."""
        ratio = self._log_ratio(measured_gb, predicted_gb)
        if ratio is not None:
            peak = min(max(ratio, -law.RESIDUAL_CLIP), law.RESIDUAL_CLIP) + _LOG_HEADROOM
            # No lower: what is predicted counts answers that may still come, and shorter ones say nothing of them.
            self.log_envelope = max(peak, self.log_envelope - law.MEMORY_FORGET, _LOG_HEADROOM)

    def cut_off(
        self, key: str, predicted: Prediction, censored_ms: float, attainment: float, *, late: bool, kind: str
    ) -> None:
        """Learn from a try that did not finish within `censored_ms`; `late` if it was thought to meet a deadline and
        did not.
        """
        ratio = self._log_ratio(censored_ms, predicted.latency_ms)
        if ratio is not None:
            self.latency.learn(key, ratio, censored=True)
            if late:
                self.price(attainment).move(attainment, missed=True)
        if kind == "oom":
            self.counts["ooms"] += 1
            self.log_envelope = min(self.log_envelope + _LOG_HEADROOM, law.RESIDUAL_CLIP + _LOG_HEADROOM)
            if 0.0 < predicted.peak_memory_gb < math.inf:
                self.memory_ceiling.drop(predicted.peak_memory_gb)
        elif kind == "overload" and 0.0 < predicted.latency_ms < math.inf:
            self.time_ceiling.drop(predicted.latency_ms)

    def fade(self) -> None:
        """Expect a little less of the times, where nothing is measured any more."""
        self.latency.fade()
        self.ttft.fade()

    def _log_ratio(self, measured: float, predicted: float) -> float | None:
        """ln(measured / predicted), or None (and counted) if either is not a finite positive number."""
        if 0.0 < measured < math.inf and 0.0 < predicted < math.inf:
            ratio = measured / predicted
            if 0.0 < ratio < math.inf:
                return math.log(ratio)
        self.counts["ignored"] += 1
        return None

    def state(self) -> dict[str, Any]:
        """Everything but the counts, in finite plain values that JSON can hold."""
        return {
            "latency": self.latency.state(),
            "ttft": self.ttft.state(),
            "prices": [{"attainment": level, "value": price.value} for level, price in self.prices.items()],
            "memory": self.log_envelope,
            "memory_ceiling": self.memory_ceiling.state(),
            "time_ceiling": self.time_ceiling.state(),
            "shares": self.shares.state(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take on `state`'s values; raises as reading it does (KeyError, TypeError, ConfigError...)."""
        self.latency.restore(state["latency"])
        self.ttft.restore(state["ttft"])
        for row in state["prices"][: law.MAX_LEVELS]:
            price = self.price(number(row["attainment"], "attainment", 0.0, 1.0))
            price.value = number(row["value"], "price", law.PRICE_MIN, law.PRICE_MAX)
        self.log_envelope = number(state["memory"], "memory", -1.0, 2.0)
        self.memory_ceiling.restore(state["memory_ceiling"])
        self.time_ceiling.restore(state["time_ceiling"])
        self.shares.restore(state["shares"])
