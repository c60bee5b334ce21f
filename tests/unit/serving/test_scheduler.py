"""One job at a time, in order; what is late or cancelled never runs; no place and no turn is lost."""

import asyncio
import random
import threading
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from waits import MOST_S

from adaptive_fusion.serving.refusals import Refusal
from adaptive_fusion.serving.scheduler import Scheduler


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Model:
    """Jobs that end when they are told to."""

    def __init__(self) -> None:
        self.ran: list[int] = []
        self.at_once = self.most = 0
        self._lock = threading.Lock()

    def job(self, number: int, until: threading.Event | None = None) -> Any:
        def work(cancelled: threading.Event) -> int:
            with self._lock:
                self.ran.append(number)
                self.at_once += 1
                self.most = max(self.most, self.at_once)
            if until is not None:
                ends = time.monotonic() + MOST_S
                while not until.is_set() and not cancelled.is_set():
                    assert time.monotonic() < ends, "a job that nobody ends"
                    until.wait(0.001)
            with self._lock:
                self.at_once -= 1
            return number

        return work


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_jobs_run_one_at_a_time_in_the_order_of_their_coming() -> None:
    async def main() -> None:
        scheduler, model, gate = Scheduler(100), Model(), threading.Event()
        tasks = [asyncio.create_task(scheduler.run(model.job(i, gate))) for i in range(20)]
        await settle()
        gate.set()
        assert await asyncio.gather(*tasks) == list(range(20)) == model.ran
        assert model.most == 1 and not scheduler.running

    asyncio.run(main())


def test_more_than_the_queue_are_told_to_come_back_and_a_place_is_given_back_once() -> None:
    scheduler = Scheduler(2)
    places = [scheduler.admit() for _ in range(3)]
    with pytest.raises(Refusal, match="3 requests are admitted") as raised:
        scheduler.admit()
    assert raised.value.status == 429 and raised.value.retry_s
    for _ in range(2):
        places[0].release()
    assert scheduler.admitted == 2
    with scheduler.admit():
        assert scheduler.admitted == 3
    scheduler.drain()
    with pytest.raises(Refusal, match="shutting down") as raised:
        scheduler.admit()
    assert raised.value.status == 503


def test_what_is_too_late_never_runs() -> None:
    async def main() -> None:
        clock, model, gate = Clock(), Model(), threading.Event()
        scheduler = Scheduler(9, clock)
        first = asyncio.create_task(scheduler.run(model.job(0, gate)))
        await settle()
        late = asyncio.create_task(scheduler.run(model.job(1), latest_s=0.01))
        later = asyncio.create_task(scheduler.run(model.job(2), latest_s=60.0))
        with pytest.raises(Refusal, match="deadline passed") as raised:
            await late
        assert raised.value.status == 429
        clock.now = 61.0
        gate.set()
        with pytest.raises(Refusal, match="deadline passed"):
            await later
        # Nobody before it: whether it is worth it is the job's own business.
        assert await scheduler.run(model.job(3), latest_s=1.0) == 3
        assert await first == 0 and model.ran == [0, 3]

    asyncio.run(main())


def test_cancelled_while_it_runs_a_job_is_told_and_the_next_waits_for_its_end() -> None:
    async def main() -> None:
        scheduler, model = Scheduler(9), Model()
        never = threading.Event()
        first = asyncio.create_task(scheduler.run(model.job(0, never)))
        await settle()
        second = asyncio.create_task(scheduler.run(model.job(1)))
        await settle()
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        assert await second == 1 and model.most == 1

    asyncio.run(main())


def test_a_job_that_fails_frees_the_worker() -> None:
    async def main() -> None:
        scheduler, model = Scheduler(9), Model()

        def broken(cancelled: threading.Event) -> None:
            raise RuntimeError("broken")

        for _ in range(3):
            with pytest.raises(RuntimeError, match="broken"):
                await scheduler.run(broken)
        assert await scheduler.run(model.job(1)) == 1

    asyncio.run(main())


def test_the_wait_is_that_of_those_before() -> None:
    async def main() -> None:
        clock, model = Clock(), Model()
        scheduler = Scheduler(9, clock)
        first = scheduler.admit()
        assert scheduler.expected_wait_s(first) == 0.0

        def two_seconds(cancelled: threading.Event) -> None:
            clock.now += 2.0

        for _ in range(30):
            await scheduler.run(two_seconds)
        second, third = scheduler.admit(), scheduler.admit()
        gate = threading.Event()
        running = asyncio.create_task(scheduler.run(model.job(0, gate)))
        await settle()
        clock.now += 0.5
        assert scheduler.expected_wait_s(second) == pytest.approx(1.5, abs=0.05)
        assert scheduler.expected_wait_s(third) == pytest.approx(3.5, abs=0.05)
        first.release()
        assert scheduler.expected_wait_s(third) == pytest.approx(1.5, abs=0.05)
        gate.set()
        await running

    asyncio.run(main())


async def storm(rng: random.Random, count: int, model: Model) -> tuple[Scheduler, list[Any]]:
    """Requests that come, go and run out of time at random."""
    scheduler = Scheduler(count)

    async def request(number: int) -> int:
        with scheduler.admit():
            for _ in range(rng.randrange(4)):
                await asyncio.sleep(0)
            latest = scheduler._clock() + rng.choice((0.0001, 0.001, 5.0))
            return await scheduler.run(model.job(number), latest_s=rng.choice((None, latest)))

    tasks = [asyncio.create_task(request(number)) for number in range(count)]
    ends = time.monotonic() + MOST_S
    while not all(task.done() for task in tasks):
        assert time.monotonic() < ends, "tasks that never end"
        for task in rng.sample(tasks, min(len(tasks), 3)):
            if rng.random() < 0.3:
                task.cancel()
        await asyncio.sleep(0)
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert await scheduler.run(model.job(-1)) == -1
    return scheduler, outcomes


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 30))
def test_whatever_is_cancelled_no_place_and_no_turn_is_lost(seed: int, count: int) -> None:
    model = Model()
    scheduler, outcomes = asyncio.run(storm(random.Random(seed), count, model))
    assert scheduler.admitted == 0 and not scheduler.running
    assert model.most == 1 and len(model.ran) == len(set(model.ran))
    answered = [outcome for outcome in outcomes if isinstance(outcome, int)]
    assert set(answered) <= set(model.ran)
    assert all(isinstance(o, int | Refusal | asyncio.CancelledError) for o in outcomes)
