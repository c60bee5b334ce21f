"""An experiment and its course: what it is, and what every event makes of it.

A pure state machine: events in, transitions out, the same for the same events, whoever has them. It has no clock, no
file and no random numbers. Knows guardrails and shares. Must not know of requests, stores or runners.

Kinds: ``audit`` decides by the new policy, logs that and runs natively; ``shadow`` answers by the old policy and runs
the new one beside it on a sampled share; ``ab`` gives each arm a fixed share; ``canary`` raises the new policy's share
step by step, and at the last it has everything. Every kind but audit is guarded.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from adaptive_fusion.checks import integer, number
from adaptive_fusion.errors import ConfigError
from adaptive_fusion.rollout.assignment import ARMS, CANARY, UNITS
from adaptive_fusion.rollout.guardrails import DEFAULT, Guardrail, guardrails_from
from adaptive_fusion.rollout.watch import Watch

AUDIT, SHADOW, AB, CANARIES = "audit", "shadow", "ab", "canary"
KINDS = (AUDIT, SHADOW, AB, CANARIES)
RUNNING, ROLLED_BACK, ABORTED, PROMOTED = "running", "rolled_back", "aborted", "promoted"
STEPS = (0.01, 0.05, 0.25, 0.5, 1.0)
LEAST = (20, 50, 150, 400)
"""The canary's outcomes at each step but the last, at least, before the next."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


@dataclass(frozen=True)
class Experiment:
    """What is tried, on whom and with which care.

    Attributes:
        name: Letters, digits, ``.``, ``-`` and ``_``.
        kind: One of `KINDS`.
        canary: The new policy: a shipped one's name or a path.
        control: The old one's name, for people; the server's own is what runs.
        unit: What keeps its arm: see `UNITS`.
        salt: Of the assignment; another experiment should have another.
        steps: The canary's share at each step, rising. An ``ab`` has one, of a shadow or audit it is the sampled share.
        least: The canary's outcomes at each step but the last, at least, before the next.
        guardrails: What it must not be worse in.

    Raises:
        ConfigError: For a value that is out of range.
    """

    name: str
    kind: str
    canary: str
    control: str = ""
    unit: str = "request"
    salt: str = ""
    steps: tuple[float, ...] = STEPS
    least: tuple[int, ...] = LEAST
    guardrails: tuple[Guardrail, ...] = DEFAULT

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not _NAME.fullmatch(self.name):
            raise ConfigError(f"name is {self.name!r}; expected 1 to 64 letters, digits, ., - and _")
        for what, value, valid in (("kind", self.kind, KINDS), ("unit", self.unit, UNITS)):
            if value not in valid:
                raise ConfigError(f"{what} is {value!r}; expected one of {', '.join(valid)}")
        if not isinstance(self.canary, str) or not self.canary:
            raise ConfigError(f"canary is {self.canary!r}; expected a policy's name or path")
        steps = tuple(number(share, "a step", above=0.0, high=1.0) for share in self.steps)
        object.__setattr__(self, "steps", steps)
        object.__setattr__(self, "least", tuple(integer(count, "least of a step", 1) for count in self.least))
        if self.kind == CANARIES:
            if list(steps) != sorted(set(steps)) or len(steps) < 2 or steps[-1] != 1.0:
                raise ConfigError(f"steps are {list(steps)}; expected at least two rising shares that end with 1")
            if len(self.least) != len(steps) - 1:
                raise ConfigError(f"least has {len(self.least)} numbers; expected {len(steps) - 1}, one a step but 1")
        elif len(steps) != 1 or (self.kind == AB and steps[0] == 1.0):
            raise ConfigError(f"steps of an {self.kind} are {list(steps)}; expected one share, of an ab below 1")
        object.__setattr__(self, "guardrails", tuple(self.guardrails))
        if not self.guardrails or not all(isinstance(rail, Guardrail) for rail in self.guardrails):
            raise ConfigError("guardrails are none; expected at least one Guardrail")
        object.__setattr__(self, "salt", self.salt or self.name)

    def to_dict(self) -> dict[str, Any]:
        """In plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Experiment":
        """The way back.

        Raises:
            ConfigError: For unknown or missing keys, or values out of range.
        """
        known = set(cls.__dataclass_fields__)
        if not isinstance(values, Mapping) or set(values) - known or not {"name", "kind", "canary"} <= set(values):
            raise ConfigError(
                f"the experiment has the keys {sorted(map(str, values))}; expected name, kind, canary and some of "
                f"{', '.join(sorted(known))}"
            )
        given = dict(values)
        if "guardrails" in given:
            given["guardrails"] = guardrails_from(given["guardrails"])
        for name in ("steps", "least"):
            if name in given:
                if not isinstance(given[name], list | tuple):
                    raise ConfigError(f"{name} is {given[name]!r}; expected a list of numbers")
                given[name] = tuple(given[name])
        return cls(**given)


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


Event = Outcome | Late | Pair | Missing | Command


@dataclass(frozen=True)
class Transition:
    """A change that an event brought: to which status and share, by whom and why."""

    status: str
    step: int
    share: float
    who: str
    why: str


AUTOMATIC = "adaptive-fusion"
"""Who has done what no person did."""


class Course:
    """An experiment under way."""

    def __init__(self, experiment: Experiment) -> None:
        self.experiment = experiment
        self.status, self.step = RUNNING, 0
        self.requests = dict.fromkeys(ARMS, 0)
        self._at_step = 0
        paired = experiment.kind == SHADOW
        self.watches = {rail.name: Watch(rail, paired) for rail in experiment.guardrails}
        self._ratio()

    @property
    def share(self) -> float:
        """Of units that the canary answers now."""
        if self.status == PROMOTED:
            return 1.0
        if self.status != RUNNING or self.experiment.kind in (SHADOW, AUDIT):
            return 0.0
        return self.experiment.steps[self.step]

    @property
    def sampled(self) -> float:
        """Of units that an audit or a shadow takes now."""
        return self.experiment.steps[0] if self.status == RUNNING and self.experiment.kind in (SHADOW, AUDIT) else 0.0

    def on(self, event: Event) -> Transition | None:
        """What an event makes of it; None where it stays as it is. What comes after its end is counted, no more.

        Raises:
            ConfigError: For an arm or a command that there is not.
        """
        if isinstance(event, Command):
            return self._command(event)
        if isinstance(event, Missing):
            return self._end(ROLLED_BACK, event.why) if self.status == RUNNING else None
        if isinstance(event, Pair):
            self.requests[CANARY] += 1
            touched = [name for name in self.watches if name in event.control and name in event.canary]
            for name in touched:
                self.watches[name].pair(event.control[name], event.canary[name])
        else:
            touched = self._observe(event)
        if self.status != RUNNING or self.experiment.kind == AUDIT:
            return None
        for name in touched:
            if why := self.watches[name].worse:
                return self._end(ROLLED_BACK, why)
        return self._rise()

    def _observe(self, event: Outcome | Late) -> list[str]:
        if event.arm not in ARMS:
            raise ConfigError(f"arm is {event.arm!r}; expected {' or '.join(ARMS)}")
        late = isinstance(event, Late)
        if not late:
            self.requests[event.arm] += 1
            self._at_step += event.arm == CANARY
        touched = []
        for name, watch in self.watches.items():
            if name in event.metrics or (watch.rail.required and not late):
                watch.observe(event.arm, event.metrics.get(name))
                touched.append(name)
        return touched

    def _rise(self) -> Transition | None:
        """The next step, if there is enough evidence for it."""
        experiment = self.experiment
        if experiment.kind != CANARIES or self._at_step < experiment.least[self.step]:
            return None
        following = self.step + 1
        if any(watch.doubtful for watch in self.watches.values()):
            return None
        if following + 1 == len(experiment.steps) and not all(watch.shown_good for watch in self.watches.values()):
            return None
        why = (
            f"{self._at_step} requests of the canary at {experiment.steps[self.step]:.0%} and no sign that it is worse"
        )
        self.step, self._at_step = following, 0
        if experiment.steps[following] == 1.0:
            return self._end(PROMOTED, why)
        self._ratio()
        return self._told(AUTOMATIC, why)

    def _command(self, event: Command) -> Transition | None:
        if event.what == "abort":
            # Also one that was promoted: everything goes back to the old policy.
            return None if self.status in (ABORTED, ROLLED_BACK) else self._end(ABORTED, event.why, event.who)
        if event.what != "promote":
            raise ConfigError(f"command is {event.what!r}; expected promote or abort")
        if self.status != RUNNING:
            return None
        self.step = len(self.experiment.steps) - 1
        return self._end(PROMOTED, event.why, event.who)

    def _end(self, status: str, why: str, who: str = AUTOMATIC) -> Transition:
        self.status = status
        return self._told(who, why)

    def _told(self, who: str, why: str) -> Transition:
        return Transition(self.status, self.step, self.share, who, why)

    def _ratio(self) -> None:
        for watch in self.watches.values():
            watch.ratio(self.share)

    def rows(self) -> list[dict[str, Any]]:
        """By guardrail what is known; see `Watch.row`."""
        return [watch.row() for watch in self.watches.values()]

    def state(self) -> dict[str, Any]:
        """Everything but the experiment, in plain values for JSON."""
        return {
            "status": self.status, "step": self.step, "requests": dict(self.requests), "at_step": self._at_step,
            "watches": {name: watch.state() for name, watch in self.watches.items()},
        }  # fmt: skip

    @classmethod
    def from_state(cls, experiment: Experiment, state: Mapping[str, Any]) -> "Course":
        """A course that goes on where `state` was taken."""
        course = cls(experiment)
        course.status, course.step = state["status"], int(state["step"])
        course.requests, course._at_step = dict(state["requests"]), int(state["at_step"])
        for name, watch in course.watches.items():
            watch.restore(state["watches"][name])
        return course


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
    return {name: float(value) for name, value in metrics.items() if _is_finite(value)}


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and -1e300 < value < 1e300
