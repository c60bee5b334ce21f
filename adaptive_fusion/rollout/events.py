"""What happens in an experiment, and what that brings: plain values that can be kept and read again.

Knows arms. Must not know what an event means, nor where it is kept.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from adaptive_fusion.rollout.assignment import CANARY


@dataclass(frozen=True)
class Outcome:
    """What came of a request of an arm: its metrics by name, in their own units."""

    arm: str
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class Late:
    """What became known of an answered request later: a rating, a shadow label."""

    arm: str
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class Pair:
    """Metrics of both arms on the same request."""

    control: Mapping[str, float]
    canary: Mapping[str, float]


@dataclass(frozen=True)
class Missing:
    """Requests of the canary that never came to an end."""

    why: str


@dataclass(frozen=True)
class Command:
    """What somebody wants: ``promote`` or ``abort``."""

    what: str
    who: str
    why: str


_NUMBERS, _MOST = (int, float), 1e300
Event = Outcome | Late | Pair | Missing | Command


@dataclass(frozen=True)
class Transition:
    """A change that an event brought: to which status and share, by whom and why."""

    status: str
    step: int
    share: float
    who: str
    why: str


def to_event(kind: str, arm: str, data: Mapping[str, Any]) -> Event:
    """An event from the plain values that it is stored as; the way back of `from_event`."""
    if kind == "outcome":
        return Outcome(arm, data)
    if kind == "late":
        return Late(arm, data)
    if kind == "pair":
        return Pair(data["control"], data["canary"])
    if kind == "missing":
        return Missing(data["why"])
    return Command(data["what"], data["who"], data["why"])


def from_event(event: Event) -> tuple[str, str, Mapping[str, Any]]:
    """Kind, arm and plain values of an event."""
    if isinstance(event, Outcome):
        return "outcome", event.arm, event.metrics
    if isinstance(event, Late):
        return "late", event.arm, event.metrics
    if isinstance(event, Pair):
        return "pair", "", {"control": event.control, "canary": event.canary}
    if isinstance(event, Missing):
        return "missing", CANARY, {"why": event.why}
    return "command", "", {"what": event.what, "who": event.who, "why": event.why}


def finite(metrics: Mapping[str, float]) -> dict[str, float]:
    """Metrics as they may be stored: a value that is no finite number is left out, which counts as missing."""
    return {
        name: float(value) for name, value in metrics.items() if isinstance(value, _NUMBERS) and -_MOST < value < _MOST
    }
