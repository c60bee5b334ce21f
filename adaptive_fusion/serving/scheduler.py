"""Who waits for the one model, in which order, how long at most, who is not let in, and who goes in together.

Knows places in a queue, a clock and errands. Must not know of HTTP, models or what an errand does. All of it but the
errands themselves runs on one event loop, so that no lock is needed.
"""

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from adaptive_fusion.serving.durations import Durations
from adaptive_fusion.serving.errands import Errand, do_together
from adaptive_fusion.serving.refusals import Refusal

T = TypeVar("T")
_RETRY_S = 1.0
"""When to try again while nothing is known."""


@dataclass
class _Waiter:
    """One errand that waits: `turn` tells it that it has the worker (True), or that another took it along (False)."""

    latest_s: float | None
    errand: Errand[Any]
    turn: "asyncio.Future[bool]" = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Place:
    """One admitted request's place; given back once, by `release` or the end of ``with``."""

    def __init__(self, scheduler: "Scheduler") -> None:
        self._scheduler: Scheduler | None = scheduler
        self.number = scheduler.take()

    def release(self) -> None:
        """Give the place back; again does nothing."""
        scheduler, self._scheduler = self._scheduler, None
        if scheduler is not None:
            scheduler.give_back(self.number)

    def __enter__(self) -> "Place":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class Scheduler:
    """A bounded queue, first come first served, in front of one worker thread. An errand whose turn has come takes
    along those that wait and may be done with it; nobody waits for others to come.

    Args:
        queue: Most admitted requests beside the one that runs.
        batch: Most errands that are done together.
        clock: Seconds, monotonic.
        changed: Called with the number of admitted requests whenever it changes.
    """

    def __init__(
        self,
        queue: int,
        clock: Callable[[], float] = time.monotonic,
        changed: Callable[[int], None] = lambda depth: None,
        batch: int = 1,
    ) -> None:
        self.queue, self.batch, self._clock, self._changed = queue, batch, clock, changed
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self.draining = self._cut = False
        self._places: dict[int, None] = {}
        self._next = 0
        self._waiting: deque[_Waiter] = deque()
        self._busy_since: float | None = None
        self._running: tuple[Errand[Any], ...] = ()
        self._durations = Durations()
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def admitted(self) -> int:
        """Requests that were let in and are not yet answered."""
        return len(self._places)

    @property
    def running(self) -> bool:
        """Whether an errand has the worker."""
        return self._busy_since is not None

    def admit(self) -> Place:
        """A place for a request that just came.

        Raises:
            Refusal: 429 if all places are taken, 503 while draining.
        """
        if self.draining:
            raise shutting_down()
        if self.admitted > self.queue:
            raise Refusal(
                f"{self.admitted} requests are admitted, the most there may be; try again later",
                429,
                code="queue_full",
                retry_s=max(self._durations.mean_s, 0.1) if self._durations.mean_s else _RETRY_S,
            )
        return Place(self)

    def take(self) -> int:
        """Used by `Place`."""
        self._next += 1
        self._places[self._next] = None
        self._idle.clear()
        self._changed(self.admitted)
        return self._next

    def give_back(self, number: int) -> None:
        """Used by `Place`."""
        del self._places[number]
        if not self._places:
            self._idle.set()
        self._changed(self.admitted)

    @property
    def least_s(self) -> float:
        """See `Durations.least_s`."""
        return self._durations.least_s

    def expected_wait_s(self, place: Place) -> float:
        """How long those before `place` will keep the worker, by what errands took lately and how much that varied.

        Those that are done together keep it until all are done, whoever of them was answered before.
        """
        ahead = 0
        for number in self._places:
            if number == place.number:
                break
            ahead += 1
        if not ahead:
            return 0.0
        done = self._clock() - self._busy_since if self._busy_since is not None else 0.0
        gone = sum(errand.result.done() for errand in self._running)
        ahead += gone  # they have left their places, but not yet the worker
        together = min(max(len(self._running), 1), ahead)
        return self._durations.ahead_s(ahead, together, done)

    async def run(self, errand: Errand[T], *, latest_s: float | None = None) -> T:
        """Wait for the worker, let it do `errand` with all that it takes along, and return the errand's result.

        Cancelled while it waits, the errand never runs; cancelled while it runs, its event is set, and the worker is
        free again once it and its company are done.

        Args:
            errand: What is to be done.
            latest_s: When, on the clock, it is too late to begin for an errand that had to wait; of one that need not
                wait that is its own business.

        Raises:
            Refusal: 429 if it is too late.
        """
        if await self._turn(_Waiter(latest_s, errand)):
            self._start(errand)
        result = asyncio.wrap_future(errand.result)
        try:
            return await asyncio.shield(result)
        except asyncio.CancelledError:
            errand.cancelled.set()
            raise
        finally:
            del result  # it holds its error, which holds this frame and those that wait for it

    def _start(self, errand: Errand[Any]) -> None:
        """Have the worker do what has its turn."""
        if self._cut:
            errand.cancelled.set()
        company = self._company(errand)
        self._running = (errand, *company)
        started = self._clock()
        loop = asyncio.get_running_loop()
        try:
            work = self.thread.submit(do_together, errand, company)
        except BaseException as error:
            self._next_turn()
            for each in (errand, *company):
                each.result.set_exception(error)
            return

        def finished(done: "Future[None]") -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits for a turn any more
                loop.call_soon_threadsafe(self._finished, started, done, 1 + len(company))

        work.add_done_callback(finished)

    def _company(self, errand: Errand[Any]) -> list[Errand[Any]]:
        """Those that wait and may be done with `errand`, in the order of their coming; they wait no longer. Nobody goes
        before one who does not fit and must begin in time."""
        found: list[Errand[Any]] = []
        now = self._clock()
        for waiter in list(self._waiting):
            if len(found) + 1 >= self.batch:
                break
            in_time = waiter.latest_s is None or now < waiter.latest_s
            if not in_time or waiter.turn.done():
                continue
            if errand.fits(waiter.errand):
                self._waiting.remove(waiter)
                waiter.turn.set_result(False)
                found.append(waiter.errand)
            elif waiter.latest_s is not None:
                break
        return found

    def drain(self) -> None:
        """Let nobody else in."""
        self.draining = True

    def cut_off(self) -> None:
        """Begin nothing more: who waits is refused, and who runs is told that nobody wants it any more."""
        self.draining = self._cut = True
        for errand in self._running:
            errand.cancelled.set()
        while self._waiting:
            waiter = self._waiting.popleft()
            if not waiter.turn.done():
                waiter.turn.set_exception(shutting_down())

    async def until_idle(self) -> None:
        """Wait until every admitted request was answered."""
        await self._idle.wait()

    async def _turn(self, mine: _Waiter) -> bool:
        """Wait for the worker; whether it is there, or another has taken the errand along."""
        if self._cut:
            raise shutting_down()
        if self._busy_since is None:
            self._busy_since = self._clock()
            return True
        latest_s = mine.latest_s
        self._waiting.append(mine)
        try:
            # Not `wait_for`, which in Python 3.11 may swallow a cancellation.
            async with asyncio.timeout(None if latest_s is None else latest_s - self._clock()):
                leads = await mine.turn
            if leads and latest_s is not None and self._clock() >= latest_s:
                raise TimeoutError
            return leads
        except BaseException as error:
            # The turn may have come in the same moment: then it is the next one's.
            if mine.turn.done() and not mine.turn.cancelled() and mine.turn.exception() is None:
                if mine.turn.result():
                    self._next_turn()
                else:
                    mine.errand.cancelled.set()
            else:
                with contextlib.suppress(ValueError):
                    self._waiting.remove(mine)
            if isinstance(error, TimeoutError):
                raise too_late() from None
            raise

    def _finished(self, started: float, done: "Future[None]", errands: int) -> None:
        took = (self._clock() - started) / errands
        if not done.cancelled() and done.exception() is None:
            self._durations.observe(took, errands)
        self._next_turn()

    def _next_turn(self) -> None:
        self._running = ()
        while self._waiting:
            following = self._waiting.popleft()
            if not following.turn.done():
                self._busy_since = self._clock()
                following.turn.set_result(True)
                return
        self._busy_since = None


def shutting_down() -> Refusal:
    """What a request is told that comes, or still waits, when the server ends."""
    return Refusal("the server is shutting down", 503, code="draining", retry_s=_RETRY_S)


def too_late() -> Refusal:
    """What a request is told whose deadline passed while others were before it."""
    return Refusal(
        "the deadline passed while the request waited for the model", 429, code="deadline_passed", retry_s=_RETRY_S
    )
