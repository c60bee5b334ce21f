"""The arms of an experiment on one model: for each a runner with its own policy and its own controller.

Arms that shared prices, drifts and answer lengths would hide a canary's faults: the control would pay for them. The
canary begins with what the control had learned, so that it does not pay for being new. What it learned itself is kept
in the store over a restart.

Knows runners, policies and the hook. Must not know of HTTP or of evidence.
"""

import logging
import threading
import time
from collections.abc import Mapping
from typing import Any, Protocol

from adaptive_fusion.control.controller import Controller
from adaptive_fusion.errors import ConfigError, RolloutFileError
from adaptive_fusion.policy.policy import Policy
from adaptive_fusion.reply import Reply
from adaptive_fusion.rollout import outcomes
from adaptive_fusion.rollout.assignment import CANARY
from adaptive_fusion.rollout.conversations import conversation_key
from adaptive_fusion.rollout.live import Assignment, Live
from adaptive_fusion.runner import AdaptiveRunner

log = logging.getLogger("adaptive_fusion.rollout")
AGAIN_S = 60.0
"""After which a policy that could not be loaded is tried again: of one that was promoted nothing else is there."""


class Learner(Protocol):
    """What decides by a policy and learns: a runner, or a gateway's side."""

    @property
    def controller(self) -> Controller: ...
    def with_policy(self, policy: Policy, *, apart: bool) -> "Learner": ...
    def state(self) -> dict[str, Any]: ...
    def restore(self, state: Mapping[str, Any]) -> None: ...


class Beside(Protocol):
    """What judges the canary beside answered requests, and makes room for those that are live."""

    canary: Any

    def arrive(self) -> None: ...
    def leave(self) -> None: ...
    def offer(self, messages: Any, prompt: str | None, reply: Reply) -> None: ...
    def close(self) -> None: ...


class Arms:
    """What decides in each arm, and what comes of requests told to the hook.

    Args:
        runner: The control: the server's own runner, or the gateway's side.
        live: The hook.
    """

    def __init__(self, runner: Learner, live: Live) -> None:
        self.runner, self.live = runner, live
        self._lock = threading.Lock()
        self._experiment = 0
        self._canary: Learner | None = None
        self._failed_s: float | None = None  # when it could not be loaded
        self._beside: Beside | None = None

    def runner_for(self, given: Assignment) -> Learner:
        """The runner of an assignment. A canary that cannot be loaded is taken back, and the control answers. Reads
        files at the first request of an experiment: not for the event loop."""
        if given.shadow:
            self._shadow_of(given)
        if given.policy is None:
            return self.runner
        return self._canary_of(given) or self.runner

    def _canary_of(self, given: Assignment) -> Learner | None:
        with self._lock:
            new = self._experiment != given.experiment
            again = self._failed_s is not None and time.monotonic() - self._failed_s >= AGAIN_S
            if new or again or (self._canary is None and self._failed_s is None):
                self._canary, self._experiment, self._failed_s = None, given.experiment, None
                try:
                    self._canary = self._loaded(given)
                except Exception as error:  # whatever a policy's files do: the old policy answers
                    self._failed_s = time.monotonic()
                    log.error("the canary cannot be used: %s", type(error).__name__)
                    self.live.broken(given, f"the canary cannot be loaded: {error}"[:500])
            return self._canary

    def _shadow_of(self, given: Assignment) -> None:
        """Have the experiment's shadow ready."""
        canary, before = self._canary_of(given), self._beside
        if canary is None or (before is not None and before.canary is canary):
            return

        def tell(request_id: str, control: Mapping[str, float], new: Mapping[str, float]) -> None:
            self.live.pair(given, request_id, control, new)

        try:
            self._beside = self._shadow_by(canary, tell)
        except ConfigError as error:
            self.live.broken(given, f"the canary cannot be run beside: {error}"[:500])
        if before is not None:
            before.close()

    def _shadow_by(self, canary: Learner, tell: Any) -> "Beside":
        if not isinstance(self.runner, AdaptiveRunner):  # a gateway asks its engine
            found: Beside = self.runner.beside(canary, tell)  # type: ignore[attr-defined]
            return found
        from adaptive_fusion.rollout.shadow import PairedShadow  # only where one runs: it brings what labels need

        assert isinstance(canary, AdaptiveRunner)
        return PairedShadow(self.runner, canary, tell)

    def _loaded(self, given: Assignment) -> Learner:
        found = self.runner.with_policy(Policy.load(given.candidate or given.policy or ""), apart=True)
        state = self.live.store.learned(given.experiment, given.arm)
        if state is not None:
            try:
                found.restore(state)
            except ConfigError:
                log.warning("what the canary had learned belongs to another model or profile; it begins anew")
        return found

    def begin(self, messages: Any = (), *, user: str = "", session: str = "", fixed: bool = False) -> "Trial":
        """A request that comes in: which arm it has.

        Args:
            messages: The conversation in OpenAI's form.
            user: Key of the user.
            session: Key of the session.
            fixed: Whether the request says itself how it is to be decided: it has no arm, but what runs beside waits.
        """
        if self._beside is not None:
            self._beside.arrive()
        if fixed:
            return Trial(self, Assignment(), self._beside)
        conversation, follows = conversation_key(messages)
        given = self.live.assign(conversation=conversation, follows=follows, user=user, session=session)
        return Trial(self, given, self._beside)

    def shadow(self, messages: Any, reply: Reply) -> None:
        """Judge the canary beside an answer, once no request is live."""
        if self._beside is not None:
            self._beside.offer(messages, None, reply)

    def rated(self, request_id: str, rating: float | str) -> bool:
        """Somebody's rating of an answer joins the evidence; whether it is the first one of it."""
        return self.live.late(request_id, outcomes.of_rating(rating))

    def served(self, request_id: str) -> bool:
        """Whether that request was answered within an experiment."""
        return self.live.served(request_id)

    def status(self) -> dict[str, Any]:
        """See `Live.status`."""
        return self.live.status()

    def command(self, what: str, who: str, why: str) -> bool:
        """``promote`` or ``abort``; whether that changed anything."""
        return self.live.ledger.command(what, who, why)

    def save(self) -> None:
        """Keep what the canary has learned."""
        with self._lock:
            canary, number = self._canary, self._experiment
        if canary is not None:
            try:
                self.live.store.keep_learned(number, CANARY, canary.state())
            except RolloutFileError:
                self.live.dropped += 1


class Trial:
    """A request's part in an experiment, from its arm to its outcome, which is told once.

    Args:
        arms: Of the experiment.
        given: What it was given.
        beside: The shadow that waits for its end.
    """

    def __init__(self, arms: Arms, given: Assignment, beside: Beside | None = None) -> None:
        self._arms, self.given, self._waits = arms, given, beside
        self._runner = arms.runner
        self._told = False
        self._messages: Any = None
        course = arms.live.ledger.course if given.observed else None
        self.unit = course.experiment.unit if course is not None else ""
        self.name = course.experiment.name if course is not None else ""

    @property
    def audit(self) -> bool:
        """Whether it is decided and logged, and run natively."""
        return self.given.audit

    def runner(self, messages: Any = None) -> Any:
        """Who answers it. May read files. What runs beside gets the `messages`, as `chat` takes them, afterwards."""
        self._messages = messages if self.given.shadow else None
        self._runner = self._arms.runner_for(self.given)
        return self._runner

    def said(self) -> dict[str, Any]:
        """For the answer: experiment and arm; empty without one."""
        return {"rollout": {"experiment": self.name, "arm": self.given.arm}} if self.name else {}

    def answered(self, reply: Reply, e2e_ms: float) -> None:
        """It was answered, `e2e_ms` after it came."""
        metrics = outcomes.of_reply(reply, self._runner.controller, e2e_ms=e2e_ms)
        if self._tell(reply.decision.request_id, metrics) and self.given.shadow and self._messages is not None:
            self._arms.shadow(self._messages, reply)

    def failed(self, error: BaseException, budget: Mapping[str, Any]) -> None:
        """It ended in an error, or was cancelled."""
        self._tell(None, outcomes.of_error(error, budget))

    def turned_away(self) -> None:
        """Its deadline could not be met, so it did not run."""
        self._tell(None, outcomes.missed())

    def left_out(self) -> None:
        """It says nothing of its arm."""
        self._tell(None, None)

    def _tell(self, request_id: str | None, metrics: Mapping[str, float] | None) -> bool:
        if self._told:
            return False
        self._told = True
        self._arms.live.finished(self.given, request_id, metrics)
        if self._waits is not None:
            self._waits.leave()
        return True
