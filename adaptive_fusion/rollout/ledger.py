"""The experiment of a store under way: events are kept and folded, and what follows from them is put in force.

Knows stores and courses. Must not know of requests, policies or runners. All processes that share a store fold the
same events in the same order, so each comes to the same course, and whoever is first writes down what follows.
"""

import getpass
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from adaptive_fusion.errors import ConfigError, RolloutFileError
from adaptive_fusion.rollout.course import Course
from adaptive_fusion.rollout.events import Command, Event, Transition, from_event, to_event
from adaptive_fusion.rollout.experiment import RUNNING, Experiment
from adaptive_fusion.rollout.store import Store
from adaptive_fusion.rollout.tables import Control

COMMANDS = ("promote", "abort")
SNAPSHOT = 250
"""Events after which a course is kept whole: what a process that starts has to fold at most."""
AGAIN_S = 1.0
"""After which it is tried again to write what could not be written."""
_UNKNOWN = Control(-1, 0, "", 0, 0.0)


class Ledger:
    """The running, or the last, experiment of a store; thread-safe.

    Args:
        store: Where it is.
        clock: Seconds since the epoch.
    """

    def __init__(self, store: Store, clock: Callable[[], float] = time.time) -> None:
        self.store, self._clock = store, clock
        self._lock = threading.RLock()
        self.course: Course | None = None
        self._seen = 0  # the newest event that is folded
        self._control = _UNKNOWN
        self._unwritten: list[tuple[int, Transition]] = []
        self._trouble: RolloutFileError | None = None
        self._tried_s = 0.0
        self._behind = False
        self.refresh()

    @property
    def control(self) -> Control:
        """The control record as it is known here; `refresh` looks for a newer one. What could not be written yet holds
        here already: a canary that was taken back serves nobody because a disk is full."""
        return self._control

    def refresh(self) -> None:
        """See what others have changed. Costs one pragma while they have not."""
        with self._lock:
            if self._unwritten:
                self._try_again()
            elif self.store.changed() or self._behind:
                self._behind = True  # until it was followed: what failed once is seen at the next look
                if self.store.control() != self._control:
                    self._follow()
                self._behind = False

    def _follow(self) -> None:
        """Go on from the control record as it is: another experiment, or the events since."""
        control = self.store.control()
        if control.experiment and control.experiment != self._control.experiment:
            spec, _, _ = self.store.experiment(control.experiment)
            self.course, self._seen = Course(Experiment.from_dict(spec)), 0
        self._control = control
        if control.experiment:
            self._fold()

    def _fold(self) -> None:
        """Fold what was written since, by whomever; what follows is put in force if nobody has. A newer snapshot is
        what folding would come to, also of events that are not kept any more."""
        if self.store.newest_snapshot(self._control.experiment) > self._seen and not self._unwritten:
            self._go_on_from_snapshot()
        for row in self.store.after(self._control.experiment, self._seen):
            self._step(row.id, to_event(row.kind, row.arm, row.data))

    def _go_on_from_snapshot(self) -> None:
        kept = self.store.last_snapshot(self._control.experiment)
        if kept is not None and self.course is not None:
            self.course, self._seen = Course.from_state(self.course.experiment, kept[1]), kept[0]

    def _step(self, number: int, event: Event) -> Transition | None:
        course = self.course
        assert course is not None
        found = course.on(event)
        self._seen = number
        if found is not None:
            self._unwritten.append((number, found))
            self._put_in_force()
        if (number % SNAPSHOT == 0 or found is not None) and not self._unwritten:
            self._keep_whole(number, course)
        return found

    def _keep_whole(self, number: int, course: Course) -> None:
        rows = {"requests": dict(course.requests), "share": course.share, "guardrails": course.rows()}
        self.store.snapshot(self._control.experiment, number, course.state(), rows, self._clock())
        self.store.list_to(number)
        self.store.prune(number, self._clock())

    def _try_again(self) -> None:
        if time.monotonic() - self._tried_s < AGAIN_S:
            return
        self._tried_s = time.monotonic()
        with suppress(RolloutFileError):
            self.store.probe()
            self._put_in_force()

    def _put_in_force(self) -> None:
        """Write what follows from events. Where that fails it holds here, and is tried again at the next request."""
        while self._unwritten:
            number, found = self._unwritten[0]
            try:
                self.store.change(
                    self._control.experiment, number, found.status, found.step, found.share, found.who, found.why,
                    self._clock(),
                )  # fmt: skip
                self._control = self.store.control()
            except RolloutFileError as error:
                self._trouble = error
                _, last = self._unwritten[-1]
                self._control = self._control._replace(status=last.status, step=last.step, share=last.share)
                return
            del self._unwritten[0]

    def append(
        self, experiment: int, event: Event, request: str | None = None, conversation: str | None = None
    ) -> bool:
        """Keep an event of the running experiment and do what follows; whether it is new.

        Args:
            experiment: The number of the one that the event belongs to. Of one that is over it is only kept.
            event: What happened.
            request: Whose: of each kind one is taken of a request.
            conversation: Whose request it was, hashed.

        Raises:
            RolloutFileError: If it cannot be kept.
        """
        kind, arm, data = from_event(event)
        with self._lock:
            number = self.store.add(experiment, kind, arm, data, self._clock(), request, conversation)
            if number is None:
                return False
            if experiment == self._control.experiment:
                if number == self._seen + 1:
                    self._step(number, event)
                else:
                    self._fold()
            return True

    def start(self, experiment: Experiment, who: str = "", why: str = "") -> int:
        """Begin an experiment; its number.

        Raises:
            ConfigError: While another runs, or if there was one of that name.
            RolloutFileError: If the file cannot be written.
        """
        by = who or _user()
        with self._alone():
            if self.course is not None and self.course.status == RUNNING:
                name = self.course.experiment.name
                raise ConfigError(f"experiment {name!r} is running; expected it to be promoted or aborted first")
            number = self.store.begin(experiment.name, experiment.to_dict(), by, self._clock())
            share, said = Course(experiment).share, why or f"started as {experiment.kind}"
            self.store.change(number, 0, RUNNING, 0, share, by, said, self._clock())
            self._follow()
        return number

    def command(self, what: str, who: str = "", why: str = "") -> bool:
        """``promote`` or ``abort`` the experiment; whether that changed anything.

        Raises:
            ConfigError: If there is none, or for another word.
            RolloutFileError: If the file cannot be written.
        """
        if what not in COMMANDS:
            raise ConfigError(f"command is {what!r}; expected {' or '.join(COMMANDS)}")
        with self._alone():
            if self.course is None:
                raise ConfigError("there is no experiment; expected one to be started first")
            before = self._control.generation
            self.append(self._control.experiment, Command(what, who or _user(), why or "by hand"))
            return self._control.generation != before

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Nobody else writes inside, all that was written is folded, and what is done holds together or not at all."""
        with self._lock:
            try:
                with self.store.changing():
                    self._put_in_force()
                    self._follow()
                    yield
                    if self._unwritten and self._trouble is not None:
                        raise self._trouble
            except BaseException:
                self._control, self.course, self._seen = _UNKNOWN, None, 0  # may be ahead of the store
                self._unwritten = []
                with suppress(RolloutFileError):  # else at the next look
                    self._follow()
                raise

    def status(self, *, series: bool = True) -> dict[str, Any]:
        """Everything about the running or last experiment, plain values for JSON.

        Args:
            series: Whether to add the guardrails as they were at the newest 200 snapshots.
        """
        with self._lock:
            self.refresh()
            if self.course is None:
                return {"experiment": None, "status": "none", "history": []}
            self._fold()
            course, control = self.course, self._control
            _, created_s, who = self.store.experiment(control.experiment)
            found: dict[str, Any] = {
                "experiment": course.experiment.to_dict(), "number": control.experiment, "status": course.status,
                "generation": control.generation, "step": course.step, "share": course.share,
                "sampled": course.sampled, "started_s": created_s, "started_by": who,
                "arms": {
                    "control": {"policy": course.experiment.control, "requests": course.requests["control"]},
                    "canary": {"policy": course.experiment.canary, "requests": course.requests["canary"]},
                },
                "guardrails": course.rows(), "estimate": course.compared(),
                "history": self.store.history(control.experiment),
            }  # fmt: skip
            if series:
                found["series"] = self.store.series(control.experiment)
            return found


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "unknown"
