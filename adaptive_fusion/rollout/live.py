"""The hook that a server or gateway calls for a request: which arm, and what came of it.

Knows ledgers and assignment. Must not know of HTTP, of models or of how a policy decides: who calls runs what the
assignment names, and says what came of it. Nothing here fails a request: where the store cannot be read or written the
old policy answers, and `dropped` counts it.

    live = Live("rollout.db")
    given = live.assign(conversation="3f2a...")
    ...                                            # given.arm: answer by given.policy, or by the old one
    live.finished(given, request_id, {"errors": 0.0, "deadline_misses": 1.0})
"""

import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from adaptive_fusion.errors import ConfigError, RolloutFileError
from adaptive_fusion.rollout.assignment import CANARY, CONTROL, arm_of, place
from adaptive_fusion.rollout.conversations import MOST, Talks, hashed
from adaptive_fusion.rollout.events import Event, Late, Missing, Outcome, Pair, finite
from adaptive_fusion.rollout.experiment import AUDIT, RUNNING, SHADOW, Experiment
from adaptive_fusion.rollout.ledger import Ledger
from adaptive_fusion.rollout.outcomes import URGENT
from adaptive_fusion.rollout.place import FarLedger, FarStore
from adaptive_fusion.rollout.store import Store

SILENT_S = 900.0
"""After which a request of the canary that never ended counts as lost."""
LOST = 10
"""Requests of the canary in a row that may be lost."""
BLIND_S = 1.0
"""After an outcome could not be kept the old policy answers, and so often it is tried whether one can."""


class Assignment(NamedTuple):
    """What a request was given.

    Attributes:
        arm: ``control`` or ``canary``.
        policy: What answers: None is the old policy.
        experiment: Its number; 0 is none.
        unit: The key by which it was assigned.
        audit: Whether it is to be decided by the new policy, logged and run natively.
        shadow: Whether the new policy is to be run beside, later.
        candidate: The new policy.
        key: Of this request alone; empty without an experiment.
        conversation: The conversation's key, hashed with the experiment's salt; empty without one.
    """

    arm: str = CONTROL
    policy: str | None = None
    experiment: int = 0
    unit: str = ""
    audit: bool = False
    shadow: bool = False
    candidate: str = ""
    key: str = ""
    conversation: str = ""

    @property
    def observed(self) -> bool:
        """Whether anybody wants to know what comes of it."""
        return self.experiment > 0


class Live:
    """The hook; thread-safe, one a process.

    Args:
        store: The file of the experiments, a `Store`, or that of a place elsewhere.
        clock: Seconds since the epoch.
        steady: Seconds that no setting of the clock moves.
        ledger: That of a place elsewhere; else one of the file.
    """

    def __init__(
        self,
        store: Store | FarStore | str | Path,
        clock: Callable[[], float] = time.time,
        steady: Callable[[], float] = time.monotonic,
        ledger: FarLedger | None = None,
    ) -> None:
        self.store: Store | FarStore = Store(store) if isinstance(store, str | Path) else store
        self._steady = steady
        self.ledger: Ledger | FarLedger
        if isinstance(self.store, Store):
            self.ledger = Ledger(self.store, clock)
        elif ledger is not None:
            self.ledger = ledger
        else:
            raise ConfigError("ledger is None; expected that of the place whose store is given")
        self.dropped = 0
        self._lock = threading.Lock()
        self._talks = Talks(self.store)
        self._counted: OrderedDict[tuple[int, str], int] = OrderedDict()
        self._open: OrderedDict[str, tuple[float, int]] = OrderedDict()  # the canary's, by when they began
        self._lost = 0, 0  # of which experiment, and how many in a row
        self._blind_s: float | None = None  # since when outcomes cannot be kept, or when that was last tried

    # A request

    def assign(
        self, *, conversation: str = "", follows: bool = False, user: str = "", session: str = "", key: str = ""
    ) -> Assignment:
        """The arm of a request.

        Args:
            conversation: Key of its conversation: the same for all requests of one.
            follows: Whether it goes on with a conversation that had an answer: then it keeps the arm that answered.
            user: Key of the user, where experiments are by user.
            session: Key of the session.
            key: Of the request; a random one if left out.
        """
        try:
            self.ledger.refresh()
        except Exception:  # whatever is wrong with the file: another version's experiment, a broken page, no room
            self.dropped += 1
            return Assignment()
        control, course = self.ledger.control, self.ledger.course
        if course is None or control.experiment == 0:
            return Assignment()
        if control.status == RUNNING and not self._sees():
            self.dropped += 1
            return Assignment()
        experiment, number = course.experiment, control.experiment
        key = key or os.urandom(16).hex()
        own = {"user": user, "session": session, "conversation": conversation}.get(experiment.unit, "")
        unit = own or key
        if control.status == RUNNING and experiment.kind in (AUDIT, SHADOW):
            taken = place(experiment.salt, unit) < experiment.steps[0]
            audit = taken and experiment.kind == AUDIT
            return Assignment(
                CANARY if audit else CONTROL, experiment.canary if audit else None, number, unit, audit,
                taken and experiment.kind == SHADOW, experiment.canary, key,
            )  # fmt: skip
        arm, talk = arm_of(experiment.salt, unit, control.share), ""
        if control.status == RUNNING and conversation:
            talk = hashed(experiment.salt, conversation)
            arm, unit = self._talks.kept(number, talk, follows, arm, unit)
        policy = experiment.canary if arm == CANARY else None
        given = Assignment(arm, policy, number, unit, candidate=experiment.canary, key=key, conversation=talk)
        if arm == CANARY and control.status == RUNNING:
            self._began(given)
        return given

    def _sees(self) -> bool:
        """Whether outcomes can be kept: what nobody watches answers nobody."""
        if self._blind_s is None:
            return True
        if self._steady() - self._blind_s < BLIND_S:
            return False
        try:
            self.store.probe()
        except RolloutFileError:
            self._blind_s = self._steady()
            return False
        self._blind_s = None
        return True

    def _began(self, given: Assignment) -> None:
        now = self._steady()
        with self._lock:
            self._open[given.key] = now, given.experiment
            while self._open:
                oldest, (began, number) = next(iter(self._open.items()))
                if now - began < SILENT_S:
                    break
                del self._open[oldest]
                if number == given.experiment:
                    self._lost = number, (self._lost[1] if self._lost[0] == number else 0) + 1
            lost = self._lost[1] if self._lost[0] == given.experiment else 0
        if lost >= LOST:
            self._keep(given.experiment, Missing(f"{lost} requests of the canary never came to an end"), None)

    def finished(self, given: Assignment, request_id: str | None, metrics: Mapping[str, float] | None) -> None:
        """What came of a request.

        Args:
            given: What it was given.
            request_id: Of its decision, by which it is rated later; None if it had none.
            metrics: By name, in the guardrails' units (see `outcomes`); None if it says nothing of its arm.
        """
        with self._lock:
            self._open.pop(given.key, None)
        running = self.ledger.control.status == RUNNING and self.ledger.control.experiment == given.experiment
        if metrics is None or not running or not given.observed:
            return
        course = self.ledger.course
        if course is not None and course.experiment.kind == SHADOW:
            return  # it goes by pairs
        if given.arm == CANARY:
            self._lost = 0, 0
        known = finite(metrics)
        if self._again(given):
            self._keep(given.experiment, Late(given.arm, {n: v for n, v in known.items() if n in URGENT}), None)
        else:
            self._keep(given.experiment, Outcome(given.arm, known), request_id, given.conversation or None)

    def _again(self, given: Assignment) -> bool:
        """Whether another request of the unit has had its say. Requests of one user are alike, which chance is not: so
        of each unit one counts, the first, or a later one for some, by its hash, so that later ones are looked at."""
        if given.unit == given.key:
            return False
        name = given.experiment, given.unit
        with self._lock:
            count = self._counted.pop(name, 0) + 1
            self._counted[name] = count
            while len(self._counted) > MOST:
                self._counted.popitem(last=False)
        drawn = place("which request of a unit", given.unit)
        return count != (1 if drawn < 0.5 else 2 if drawn < 0.75 else 3)

    def cancelled(self, given: Assignment) -> None:
        """Nobody waits for the request any more: that says nothing of its arm."""
        self.finished(given, None, None)

    def late(self, request_id: str, metrics: Mapping[str, float]) -> bool:
        """What became known of an answered request later, such as a rating or a shadow label; whether that was new. Of
        each metric one value of a request counts."""
        try:
            found = self.store.served(request_id)
        except RolloutFileError:
            self.dropped += 1
            return False
        if found is None:
            return False
        new = [
            self._keep(found[0], Late(found[1], {name: value}), f"{request_id} {name}")
            for name, value in finite(metrics).items()
        ]
        return any(new)

    def pair(
        self, given: Assignment, request_id: str, control: Mapping[str, float], canary: Mapping[str, float]
    ) -> None:
        """What both policies came to on the same request."""
        self._keep(given.experiment, Pair(finite(control), finite(canary)), request_id)

    def broken(self, given: Assignment, why: str) -> None:
        """The canary cannot be run at all: it is taken back."""
        self._keep(given.experiment, Missing(why), None)

    def served(self, request_id: str) -> bool:
        """Whether a request of that id was answered within an experiment."""
        try:
            return self.store.served(request_id) is not None
        except RolloutFileError:
            return False

    def _keep(self, experiment: int, event: Event, request: str | None, conversation: str | None = None) -> bool:
        try:
            return self.ledger.append(experiment, event, request, conversation)
        except Exception:  # of the file, as in `assign`: no request fails by it
            self.dropped += 1
            self._blind_s = self._steady()
            return False

    # People

    def start(self, experiment: Experiment, who: str = "", why: str = "") -> int:
        """See `Ledger.start`."""
        return self.ledger.start(experiment, who, why)

    def promote(self, who: str = "", why: str = "") -> bool:
        """Give everything to the new policy; whether that changed anything."""
        return self.ledger.command("promote", who, why)

    def abort(self, who: str = "", why: str = "") -> bool:
        """Give everything back to the old policy; whether that changed anything."""
        return self.ledger.command("abort", who, why)

    def status(self, *, series: bool = True) -> dict[str, Any]:
        """See `Ledger.status`."""
        return {**self.ledger.status(series=series), "dropped": self.dropped}

    def history(self) -> list[dict[str, Any]]:
        """Who changed what and why, of all experiments."""
        return self.store.history()
