"""One place for the experiments of processes on several hosts: it has the file, they ask it from afar.

Knows ledgers, and two ways to reach a place: to ask and wait, and to tell and wait for nothing. Plain values go both
ways. Must not know what carries them (for replicas it is an actor), nor requests or policies.
"""

import math
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from adaptive_fusion.errors import AdaptiveFusionError, ConfigError, RolloutFileError
from adaptive_fusion.rollout.course import Course
from adaptive_fusion.rollout.events import Event, Late, from_event, to_event
from adaptive_fusion.rollout.experiment import Experiment
from adaptive_fusion.rollout.ledger import Ledger
from adaptive_fusion.rollout.store import Store
from adaptive_fusion.rollout.tables import NOTHING, Control

EVERY_S = 0.4
"""How often a process looks: what is decided in the place holds everywhere within a second."""
OLD_S = 5.0
"""A look that is older says nothing: the old policy answers."""
Ask = Callable[..., Any]
Tell = Callable[..., None]


class Place:
    """What runs in the one place. Its methods take and give plain values.

    Args:
        file: Of the experiments, there.
    """

    def __init__(self, file: str) -> None:
        self._ledger = Ledger(Store(file))

    def view(self) -> dict[str, Any]:
        """The control record and the experiment that it names."""
        self._ledger.refresh()
        control, course = self._ledger.control, self._ledger.course
        return {"control": list(control), "experiment": None if course is None else course.experiment.to_dict()}

    def append(self, experiment: int, kind: str, arm: str, data: Mapping[str, Any], *of: str | None) -> bool:
        """See `Ledger.append`; `of` are request and conversation. What carries it may do so twice; an outcome that is
        there is not taken again."""
        self._ledger.refresh()
        if kind == "outcome" and of and of[0] is not None and self._ledger.store.served(of[0]) is not None:
            return False
        return self._ledger.append(experiment, to_event(kind, arm, data), *of)

    def start(self, experiment: Mapping[str, Any], who: str, why: str) -> int:
        """See `Ledger.start`."""
        return self._ledger.start(Experiment.from_dict(experiment), who, why)

    def command(self, what: str, who: str, why: str) -> bool:
        """See `Ledger.command`."""
        return self._ledger.command(what, who, why)

    def status(self, series: bool) -> dict[str, Any]:
        """See `Ledger.status`."""
        return self._ledger.status(series=series)

    def stored(self, method: str, *arguments: Any) -> Any:
        """What the store says."""
        if method not in ("served", "talked", "history", "learned", "keep_learned", "probe"):
            raise ConfigError(f"method is {method!r}; expected one of a store's that can be asked from afar")
        return getattr(self._ledger.store, method)(*arguments)


class FarStore:
    """The store of a place, as far as processes elsewhere need it; see `Store`."""

    def __init__(self, ask: Ask) -> None:
        self._ask = _safely(ask)

    def served(self, request: str) -> tuple[int, str] | None:
        """See `Store.served`."""
        found = self._ask("stored", "served", request)
        return None if found is None else (int(found[0]), str(found[1]))

    def talked(self, experiment: int, conversation: str) -> str | None:
        """See `Store.talked`."""
        found: str | None = self._ask("stored", "talked", experiment, conversation)
        return found

    def history(self, experiment: int | None = None) -> list[dict[str, Any]]:
        """See `Store.history`."""
        return list(self._ask("stored", "history", experiment))

    def learned(self, experiment: int, arm: str) -> Mapping[str, Any] | None:
        """See `Store.learned`."""
        found: Mapping[str, Any] | None = self._ask("stored", "learned", experiment, arm)
        return found

    def keep_learned(self, experiment: int, arm: str, state: Mapping[str, Any]) -> None:
        """See `Store.keep_learned`."""
        self._ask("stored", "keep_learned", experiment, arm, state)

    def probe(self) -> None:
        """See `Store.probe`."""
        self._ask("stored", "probe")


class FarLedger:
    """The ledger of a place, seen from elsewhere: a thread looks at it every `EVERY_S`, a request at what that saw.

    Args:
        ask: Calls a method of the place and gives what it says.
        tell: Calls one and waits for nothing.
    """

    def __init__(self, ask: Ask, tell: Tell) -> None:
        self._ask, self._tell = _safely(ask), tell
        self._lock, self._ended = threading.Lock(), threading.Event()
        self.course: Course | None = None
        self._control: Control = NOTHING
        self._seen_s = -math.inf
        with suppress(RolloutFileError):  # a place that is still being made is seen soon, and until then says nothing
            self._look()
        self._thread = threading.Thread(target=self._watch, name="adaptive-fusion-rollout", daemon=True)
        self._thread.start()

    @property
    def control(self) -> Control:
        """As it was last seen."""
        return self._control

    def refresh(self) -> None:
        """Asks nobody.

        Raises:
            RolloutFileError: If the place has not been seen for `OLD_S`.
        """
        if time.monotonic() - self._seen_s > OLD_S:
            raise RolloutFileError("the place of experiments cannot be reached")

    def append(
        self, experiment: int, event: Event, request: str | None = None, conversation: str | None = None
    ) -> bool:
        """See `Ledger.append`; waits only where the answer is what is wanted, of what became known later."""
        call = self._ask if isinstance(event, Late) else self._tell
        said = call("append", experiment, *from_event(event), request, conversation)
        return said is not False

    def start(self, experiment: Experiment, who: str = "", why: str = "") -> int:
        """See `Ledger.start`."""
        number = int(self._ask("start", experiment.to_dict(), who, why))
        self._look()
        return number

    def command(self, what: str, who: str = "", why: str = "") -> bool:
        """See `Ledger.command`."""
        changed = bool(self._ask("command", what, who, why))
        self._look()
        return changed

    def status(self, *, series: bool = True) -> dict[str, Any]:
        """See `Ledger.status`."""
        return dict(self._ask("status", series))

    def close(self) -> None:
        """Look no more."""
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(EVERY_S):
            try:
                self._look()
            except AdaptiveFusionError:
                continue  # `refresh` says so once it has lasted

    def _look(self) -> None:
        asked_s = time.monotonic()
        found = self._ask("view")
        control, spec = Control(*found["control"]), found["experiment"]
        with self._lock:
            if asked_s < self._seen_s:
                return  # another look was later
            if spec is None:
                self.course = None
            elif self.course is None or control.experiment != self._control.experiment:
                self.course = Course(Experiment.from_dict(spec))
            self._control, self._seen_s = control, asked_s


def _safely(ask: Ask) -> Ask:
    """What carries a question may fail in its own ways; the library's own errors come through."""

    def asked(*arguments: Any) -> Any:
        try:
            return ask(*arguments)
        except Exception as error:
            cause = getattr(error, "cause", error)  # Ray's own error has it
            if isinstance(cause, AdaptiveFusionError):
                raise cause from None
            raise RolloutFileError(f"the place of experiments cannot be asked ({type(error).__name__})") from error

    return asked
