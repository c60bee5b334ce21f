"""What a runner gives back: the answer, the decision behind it and what it took.

Knows records. Must not know of models or of how an answer comes about.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from adaptive_fusion.decisions import Decision, Measurement


@dataclass(frozen=True)
class Reply:
    """An answer with the decision behind it and what it took.

    Attributes:
        text: The answer; of a begun one what follows.
        finish_reason: ``stop`` (the model ended), ``length`` (`max_new_tokens`), ``deadline`` or ``cancelled``.
        decision: What was decided, and why.
        measurement: What it took.
        token_ids: The answer's tokens, its end included.
        logprobs: The log-probability of each, if ``output_logits`` or ``output_scores`` was asked for.
        output: What ``generate`` returned, if it was asked for more than tokens; its prompt is the one the model saw.
    """

    text: str
    finish_reason: str
    decision: Decision
    measurement: Measurement
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] | None = None
    output: Any = field(default=None, repr=False, compare=False)

    @property
    def met(self) -> bool | None:
        """Whether every time and memory limit of the budget was kept; None without a limit."""
        return budget_met(self.decision.budget, self.measurement)

    def explain(self) -> str:
        """`Decision.explain` with what the request took."""
        return self.decision.explain(self.measurement)


def budget_met(budget: Mapping[str, Any], measured: Measurement) -> bool | None:
    """Whether `measured` keeps the limits set in `budget` (`Budget.to_dict`'s form); None without a limit on something
    that was seen: a time that nobody could take is NaN."""
    pairs = {
        "latency_ms": measured.latency_ms,
        "ttft_ms": measured.ttft_ms,
        "vram_gb": measured.peak_memory_gb,
    }
    checks = [value <= budget[name] for name, value in pairs.items() if name in budget and not math.isnan(value)]
    return all(checks) if checks else None
