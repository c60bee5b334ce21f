"""The course of an experiment: what every event makes of it.

A pure state machine: events in, transitions out, the same for the same events, whoever has them. It has no clock, no
file and no random numbers. Knows guardrails and shares. Must not know of requests, stores or runners.
"""

from collections.abc import Mapping
from typing import Any

from adaptive_fusion.errors import ConfigError
from adaptive_fusion.rollout.assignment import ARMS, CANARY
from adaptive_fusion.rollout.events import Command, Event, Late, Missing, Outcome, Pair, Transition
from adaptive_fusion.rollout.experiment import (
    ABORTED,
    AUDIT,
    CANARIES,
    PROMOTED,
    ROLLED_BACK,
    RUNNING,
    SHADOW,
    Experiment,
)
from adaptive_fusion.rollout.watch import Watch

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
            touched = []
            for name, watch in self.watches.items():
                if name in event.control and name in event.canary:
                    watch.pair(event.control[name], event.canary[name])
                    touched.append(watch)
        else:
            touched = self._observe(event)
        if self.status != RUNNING or self.experiment.kind == AUDIT:
            return None
        for watch in touched:
            if why := watch.worse:
                return self._end(ROLLED_BACK, why)
        return self._rise()

    def _observe(self, event: Outcome | Late) -> list[Watch]:
        if event.arm not in ARMS:
            raise ConfigError(f"arm is {event.arm!r}; expected {' or '.join(ARMS)}")
        arm, metrics, late = event.arm, event.metrics, isinstance(event, Late)
        if not late:
            self.requests[arm] += 1
            self._at_step += arm == CANARY
        touched = []
        for name, watch in self.watches.items():
            if name in metrics or (not late and watch.rail.required):
                watch.observe(arm, metrics.get(name))
                touched.append(watch)
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

    def compared(self) -> dict[str, Any] | None:
        """The estimate from before beside what was measured of the canary since, by shadow labels where there are any,
        else by ratings; whether that lies in the stated interval. None without an estimate."""
        before = self.experiment.estimate
        if before is None:
            return None
        found: dict[str, Any] = {"before": dict(before), "metric": None, "after": None, "agrees": None}
        for name in ("quality", "ratings"):
            if name in self.watches and (row := self.watches[name].row()["canary"])["n"]:
                agrees = before["low"] <= row["mean"] <= before["high"]
                return {**found, "metric": name, "after": row, "agrees": agrees}
        return found

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
