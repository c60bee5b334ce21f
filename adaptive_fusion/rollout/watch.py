"""One guardrail at work: what was seen of its metric in each arm, and the evidence that the canary is worse.

Knows guardrails and evidence. Must not know requests or what becomes of an experiment.
"""

import math
from collections.abc import Mapping
from typing import Any

from adaptive_fusion.rollout.assignment import ARMS, CANARY, CONTROL
from adaptive_fusion.rollout.evidence import Single, Unpaired
from adaptive_fusion.rollout.guardrails import Guardrail
from adaptive_fusion.rollout.means import MeanSequence

SHOWN = math.log(20.0)
"""Evidence, as a logarithm, that shows a canary not to be worse than tolerated: wrong in one of 20 that are."""
DOUBT = math.log(3.0)
"""Evidence against the canary that no step up is taken on: it may be chance, and more requests will say."""
_ONE_BET = (0.98,)  # of what must not happen at all, such as a dead canary: quick, and blind to anything less
_USUAL = 0.75
"""Share of the control's outcomes from which on a metric is one that outcomes have."""


class Watch:
    """What is known by one guardrail.

    Args:
        rail: The guardrail.
        paired: Whether outcomes are differences on the same request, as in shadow.
    """

    def __init__(self, rail: Guardrail, paired: bool) -> None:
        self.rail = rail
        self.threshold = -math.log(rail.alpha)
        margin = rail.scaled_margin
        self.evidence: Unpaired | Single
        if rail.limit is not None:
            self.evidence = Single(rail.limit, low=0.0, bets=_ONE_BET)
        elif paired:
            self.evidence = Single(margin)
        else:
            self.evidence = Unpaired(margin, binary=rail.binary, eager=rail.eager)
        self.good = None
        if rail.tolerance is not None and not paired:
            self.good = Unpaired(-rail.tolerance / (rail.high - rail.low), binary=rail.binary, eager=True)
        self.means = {arm: MeanSequence() for arm in ARMS}
        self.difference = MeanSequence()  # of pairs, from (-1, 1) to (0, 1)
        self._seen, self._with = dict.fromkeys(ARMS, 0), dict.fromkeys(ARMS, 0)
        self._without = 0  # of the canary's in a row

    def ratio(self, share: float) -> None:
        """The canary has this share of all units from now on."""
        if isinstance(self.evidence, Unpaired):
            self.evidence.ratio(share)

    def observe(self, arm: str, value: float | None) -> None:
        """An arm's outcome; None if it has no such metric."""
        rail, canary = self.rail, arm == CANARY
        self._seen[arm] += 1
        bad = None if value is None else rail.badness(value)
        if bad is None:
            self._without += canary
            return
        seen = self._with[arm] = self._with[arm] + 1
        if canary:
            self._without = 0
        if rail.every > 1 and seen % rail.every:
            return
        self.means[arm].observe(bad)
        evidence = self.evidence
        if isinstance(evidence, Unpaired):
            evidence.observe(canary, bad)
        elif rail.limit is not None and canary:
            evidence.observe(bad)
        if self.good is not None and self.good.peak < SHOWN:
            self.good.observe(not canary, bad)  # with the arms changed round

    def pair(self, control: float, canary: float) -> None:
        """Both arms' values on the same request."""
        bad = [self.rail.badness(value) for value in (control, canary)]
        if bad[0] is None or bad[1] is None or self.rail.limit is not None:
            return
        for arm, value in zip(ARMS, bad, strict=True):
            self._seen[arm] += 1
            self._with[arm] += 1
            self.means[arm].observe(value or 0.0)
        self.difference.observe((bad[1] - bad[0] + 1.0) / 2.0)
        if isinstance(self.evidence, Single):
            self.evidence.observe(bad[1] - bad[0])

    @property
    def worse(self) -> str:
        """Why the canary is to be taken back, in words; empty while there is no reason."""
        rail, name = self.rail, self.rail.name
        if self._without and rail.required and self._without >= rail.required and self._usual:
            return f"{name} is missing: the canary's last {self._without} requests came without it"
        if self.evidence.peak < self.threshold:
            return ""
        means = {arm: self.means[arm].mean for arm in ARMS}
        found = ", ".join(f"{arm} {rail.value(mean):.4g}" for arm, mean in means.items() if mean is not None)
        limit = f"limit {rail.limit:g}" if rail.limit is not None else f"margin {rail.margin:g}"
        return f"{name} is worse ({found}, {limit}): evidence {math.exp(min(self.evidence.peak, 99)):.3g} to 1, " + (
            f"needed {1 / rail.alpha:g}"
        )

    @property
    def doubtful(self) -> bool:
        """Whether a step up had better wait."""
        return self.evidence.peak >= DOUBT and self.evidence.log_e >= DOUBT  # as it is never above its peak

    @property
    def shown_good(self) -> bool:
        """Whether the canary was shown not to be worse than tolerated, or nothing of the kind is asked for."""
        asked = self.good is not None and self._usual
        return not asked or (self.good is not None and self.good.peak >= SHOWN)

    @property
    def _usual(self) -> bool:
        seen = self._seen[CONTROL]
        return seen > 0 and self._with[CONTROL] >= _USUAL * seen

    def row(self) -> dict[str, Any]:
        """For `status`: means with their intervals in the metric's own unit, and the evidence, plain values for JSON.
        ``e`` is the highest evidence so far; at ``needed`` the canary is taken back."""
        rail = self.rail
        found: dict[str, Any] = {
            "name": rail.name, "meaning": rail.meaning, "worse": rail.worse, "margin": rail.margin,
            "alpha": rail.alpha, "limit": rail.limit, "e": math.exp(min(self.evidence.peak, 99.0)),
            "needed": 1.0 / rail.alpha, "missing_in_a_row": self._without,
        }  # fmt: skip
        for arm, sequence in self.means.items():
            ends = sorted(rail.value(end) for end in sequence.interval)
            mean = None if sequence.mean is None else rail.value(sequence.mean)
            found[arm] = {"n": sequence.n, "mean": mean, "low": ends[0], "high": ends[1]}
        if self.difference.n:
            scale = rail.high - rail.low
            ends = [(2.0 * end - 1.0) * scale for end in self.difference.interval]
            found["difference"] = {"n": self.difference.n, "low": ends[0], "high": ends[1]}  # positive is worse
        return found

    def state(self) -> dict[str, Any]:
        """Everything, in plain values for JSON."""
        return {
            "evidence": self.evidence.state(), "good": None if self.good is None else self.good.state(),
            "means": {arm: each.state() for arm, each in self.means.items()}, "difference": self.difference.state(),
            "seen": dict(self._seen), "with": dict(self._with), "without": self._without,
        }  # fmt: skip

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`."""
        self.evidence.restore(state["evidence"])
        if self.good is not None:
            self.good.restore(state["good"])
        for arm, each in self.means.items():
            each.restore(state["means"][arm])
        self.difference.restore(state["difference"])
        self._seen, self._with, self._without = dict(state["seen"]), dict(state["with"]), state["without"]
