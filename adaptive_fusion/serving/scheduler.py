"""Who waits for the one model, in which order, how long at most, and who is not let in.

Knows places in a queue, a clock and callables. Must not know of HTTP, models or what a job does. All of it but the jobs
themselves runs on one event loop, so that no lock is needed.
"""

import asyncio
import contextlib
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from adaptive_fusion.serving.refusals import Refusal

T = TypeVar("T")
_MEMORY = 0.2
"""Weight of the newest job in the mean time of jobs."""
_SURE = 2.0
"""Mean deviations on top of the mean wait: what it is to exceed in one case of twenty."""
_RECENT = 32
"""Jobs of which the shortest says what one takes at least."""
_RETRY_S = 1.0
"""When to try again while nothing is known."""


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
    """A bounded queue, first come first served, in front of one worker thread.

    Args:
        queue: Most admitted requests beside the one that runs.
        clock: Seconds, monotonic.
        changed: Called with the number of admitted requests whenever it changes.
    """

    def __init__(
        self,
        queue: int,
        clock: Callable[[], float] = time.monotonic,
        changed: Callable[[int], None] = lambda depth: None,
    ) -> None:
        self.queue, self._clock, self._changed = queue, clock, changed
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self.draining = False
        self._places: dict[int, None] = {}
        self._next = 0
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._busy_since: float | None = None
        self._mean_s, self._spread_s = 0.0, 0.0
        self._recent: deque[float] = deque(maxlen=_RECENT)
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def admitted(self) -> int:
        """Requests that were let in and are not yet answered."""
        return len(self._places)

    @property
    def running(self) -> bool:
        """Whether a job has the worker."""
        return self._busy_since is not None

    def admit(self) -> Place:
        """A place for a request that just came.

        Raises:
            Refusal: 429 if all places are taken, 503 while draining.
        """
        if self.draining:
            raise Refusal("the server is shutting down", 503, code="draining", retry_s=_RETRY_S)
        if self.admitted > self.queue:
            raise Refusal(
                f"{self.admitted} requests are admitted, the most there may be; try again later",
                429,
                code="queue_full",
                retry_s=max(self._mean_s, 0.1) if self._mean_s else _RETRY_S,
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
        """What the shortest of the last jobs took; 0 before there was one."""
        return min(self._recent, default=0.0)

    def expected_wait_s(self, place: Place) -> float:
        """How long those before `place` will keep the worker, by what jobs took lately and how much that varied."""
        ahead = 0
        for number in self._places:
            if number == place.number:
                break
            ahead += 1
        if not ahead:
            return 0.0
        done = self._clock() - self._busy_since if self._busy_since is not None else 0.0
        return max(ahead * self._mean_s + _SURE * math.sqrt(ahead) * self._spread_s - min(done, self._mean_s), 0.0)

    async def run(self, work: Callable[[threading.Event], T], *, latest_s: float | None = None) -> T:
        """Wait for the worker, do `work` in it, and return its result.

        Cancelled while it waits, the job never runs; cancelled while it runs, the event that `work` was given is set,
        and the worker is free again once `work` has returned.

        Args:
            work: Called in the worker's thread.
            latest_s: When, on the clock, it is too late to begin for a job that had to wait; of one that need not wait
                that is its own business.

        Raises:
            Refusal: 429 if it is too late.
        """
        await self._turn(latest_s)
        cancelled = threading.Event()
        try:
            job = asyncio.get_running_loop().run_in_executor(self.thread, work, cancelled)
        except BaseException:
            self._next_turn()
            raise
        started = self._clock()
        job.add_done_callback(lambda done: self._finished(started, done))
        try:
            return await asyncio.shield(job)
        except asyncio.CancelledError:
            cancelled.set()
            raise
        finally:
            del job  # it holds its error, which holds this frame and those that wait for it

    def drain(self) -> None:
        """Let nobody else in."""
        self.draining = True

    async def until_idle(self) -> None:
        """Wait until every admitted request was answered."""
        await self._idle.wait()

    async def _turn(self, latest_s: float | None) -> None:
        if self._busy_since is None:
            self._busy_since = self._clock()
            return
        mine: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(mine)
        try:
            # Not `wait_for`, which in Python 3.11 may swallow a cancellation.
            async with asyncio.timeout(None if latest_s is None else latest_s - self._clock()):
                await mine
            if latest_s is not None and self._clock() >= latest_s:
                raise TimeoutError
        except BaseException as error:
            # The turn may have come in the same moment: then it is the next one's.
            if mine.done() and not mine.cancelled():
                self._next_turn()
            else:
                with contextlib.suppress(ValueError):
                    self._waiting.remove(mine)
            if isinstance(error, TimeoutError):
                raise too_late() from None
            raise

    def _finished(self, started: float, done: "asyncio.Future[T]") -> None:
        took = self._clock() - started
        if not done.cancelled() and done.exception() is None:
            weight = _MEMORY if self._mean_s else 1.0
            off = abs(took - self._mean_s) if self._mean_s else 0.0
            self._recent.append(took)
            self._mean_s += weight * (took - self._mean_s)
            self._spread_s += weight * (off - self._spread_s)
        self._next_turn()

    def _next_turn(self) -> None:
        while self._waiting:
            following = self._waiting.popleft()
            if not following.done():
                self._busy_since = self._clock()
                following.set_result(None)
                return
        self._busy_since = None


def too_late() -> Refusal:
    """What a request is told whose deadline passed while others were before it."""
    return Refusal(
        "the deadline passed while the request waited for the model", 429, code="deadline_passed", retry_s=_RETRY_S
    )
