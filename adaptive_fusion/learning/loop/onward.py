"""The way of a candidate from the gate into service: first beside the policy in service, then step by step.

Knows what is asked of a rollout. Must not know how an experiment is run, nor how a candidate came to be.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from adaptive_fusion.errors import ConfigError
from adaptive_fusion.evaluation.statistics import Interval
from adaptive_fusion.learning.loop.state import RELEASED, ROLLED_BACK, RUNNING

SHADOWED = 100
"""Requests that a candidate runs beside before it answers any."""


@dataclass(frozen=True)
class Seen:
    """An experiment, as it is now: ``running``, ``rolled_back``, ``aborted`` or ``promoted``; why, and how many
    requests its candidate has had."""

    status: str
    why: str
    requests: int


class Rollout(Protocol):
    """What brings a candidate into service step by step."""

    def start(self, kind: str, name: str, candidate: str, control: str, estimate: Interval | None = None) -> None:
        """Begin a ``shadow`` or a ``canary``; one of that name that is there already stands. What the candidate was
        estimated to be worth stands beside what is measured of it."""

    def look(self, name: str) -> Seen | None:
        """The experiment of that name; None without one."""

    def end(self, name: str, why: str) -> None:
        """End it; the policy in service has everything."""


def stated(estimate: Mapping[str, Any] | None) -> Interval | None:
    """The estimate that is stated before a rollout, the doubly robust one; None where there is none."""
    found = estimate and estimate["doubly_robust"]
    return Interval(**found) if found and None not in found.values() else None


def brought_on(
    rollout: Rollout | None, kind: str, name: str, candidate: str, control: str, estimate: Interval | None
) -> dict[str, Any]:
    """Begin an experiment, or look how it goes; ``pending`` while it is under way, ``end`` where the round ends by it.

    Args:
        rollout: What runs it; None cannot look.
        kind: ``shadow`` or ``canary``.
        name: Of the experiment.
        candidate: Its folder.
        control: Name of the policy in service.
        estimate: What the candidate would have been worth on the logged traffic.
    """
    if rollout is None:
        return {"pending": f"the {kind} is under way; nothing here can look at it"}
    if rollout.look(name) is None:
        try:
            rollout.start(kind, name, candidate, control, estimate)
        except ConfigError as error:  # somebody else's runs
            return {"pending": f"the {kind} {name} waits: {error}"}
    seen = rollout.look(name)
    if seen is None or seen.status == RUNNING:
        if kind == "shadow" and seen is not None and seen.requests >= SHADOWED:
            rollout.end(name, f"{seen.requests} requests beside the old policy and no sign that it is worse")
            return {"experiment": name, "requests": seen.requests}
        had = f", {seen.requests} requests so far" if seen is not None else ""
        return {"pending": f"the {kind} {name} is under way{had}"}
    if seen.status == "promoted":
        return {"experiment": name, "end": RELEASED, "reason": seen.why}
    return {"experiment": name, "end": ROLLED_BACK, "reason": f"{kind}: {seen.why}"}
