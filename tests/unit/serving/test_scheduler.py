"""One job at a time, in order, with those that fit; what is late or cancelled never runs; no place or turn is lost."""

import asyncio
import random
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from waits import MOST_S

from adaptive_fusion.serving.errands import Errand
from adaptive_fusion.serving.refusals import Refusal
from adaptive_fusion.serving.scheduler import Scheduler

KINDS = ("", "a", "b")


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Doing(Errand[Any]):
    """A job that does `work`, and that fits those of its `kind`."""

    def __init__(self, work: Callable[[threading.Event], Any], kind: str = "") -> None:
        super().__init__()
        self.work, self.kind = work, kind

    def fits(self, other: Errand[Any]) -> bool:
        return isinstance(other, Doing) and self.kind == other.kind != ""

    def do(self, company: Sequence["Doing"]) -> None:
        for job in (self, *company):
            job.result.set_result(job.work(job.cancelled))


class Model:
    """Jobs that end when they are told to."""

    def __init__(self) -> None:
        self.ran: list[int] = []
        self.at_once = self.most = 0
        self._lock = threading.Lock()

    def job(self, number: int, until: threading.Event | None = None, kind: str = "") -> Doing:
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

        return Doing(work, kind)


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def free(scheduler: Scheduler) -> None:
    """Wait until the worker has put its last job away: a result is there a moment before."""
    async with asyncio.timeout(MOST_S):
        while scheduler.running:
            await asyncio.sleep(0)


def test_jobs_run_one_at_a_time_in_the_order_of_their_coming() -> None:
    async def main() -> None:
        scheduler, model, gate = Scheduler(100), Model(), threading.Event()
        tasks = [asyncio.create_task(scheduler.run(model.job(i, gate))) for i in range(20)]
        await settle()
        gate.set()
        assert await asyncio.gather(*tasks) == list(range(20)) == model.ran
        await free(scheduler)
        assert model.most == 1

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
                await scheduler.run(Doing(broken))
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
            await scheduler.run(Doing(two_seconds))
            await free(scheduler)
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
    scheduler = Scheduler(count, batch=rng.choice((1, 3)))

    async def request(number: int) -> int:
        with scheduler.admit():
            for _ in range(rng.randrange(4)):
                await asyncio.sleep(0)
            latest = scheduler._clock() + rng.choice((0.0001, 0.001, 5.0))
            return await scheduler.run(model.job(number, kind=rng.choice(KINDS)), latest_s=rng.choice((None, latest)))

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
    await free(scheduler)
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


def test_a_job_takes_along_those_that_wait_and_fit_up_to_the_batch() -> None:
    together: list[list[int]] = []

    class Noted(Doing):
        def do(self, company: Sequence[Doing]) -> None:
            together.append([job.work(job.cancelled) for job in (self, *company)])
            super().do(company)

    async def main() -> None:
        scheduler, gate = Scheduler(100, batch=3), threading.Event()

        def job(number: int, kind: str) -> Noted:
            return Noted(lambda cancelled: gate.wait(MOST_S) and number, kind)

        kinds = "a" + "abaacab"
        tasks = [asyncio.create_task(scheduler.run(job(i, kind))) for i, kind in enumerate(kinds)]
        await settle()
        gate.set()
        assert await asyncio.gather(*tasks) == list(range(len(kinds)))

    asyncio.run(main())
    # The first found nobody; the next took two of its kind along, past one that does not fit.
    assert together == [[0], [1, 3, 4], [2, 7], [5], [6]]


def test_nobody_goes_before_one_who_does_not_fit_and_must_begin_in_time() -> None:
    async def main() -> None:
        for latest_s, order in ((None, [0, 1, 3, 2]), (time.monotonic() + MOST_S, [0, 1, 2, 3])):
            scheduler, gate, model = Scheduler(9, batch=4), threading.Event(), Model()
            jobs = [model.job(0, gate), model.job(1, kind="a"), model.job(2, kind="b"), model.job(3, kind="a")]
            limits = (None, None, latest_s, None)
            tasks = [
                asyncio.create_task(scheduler.run(job, latest_s=limit)) for job, limit in zip(jobs, limits, strict=True)
            ]
            await settle()
            gate.set()
            await asyncio.gather(*tasks)
            assert model.ran == order

    asyncio.run(main())


def test_the_wait_for_a_batch_is_that_for_its_last() -> None:
    async def main() -> None:
        clock, model = Clock(), Model()
        scheduler, early, last = Scheduler(9, clock, batch=4), threading.Event(), threading.Event()

        class Four(Doing):
            def do(self, company: Sequence[Doing]) -> None:
                for job in company:
                    job.result.set_result(0)
                early.set()
                last.wait(MOST_S)
                super().do(())

        for _ in range(30):  # a job takes two seconds

            def two_seconds(cancelled: threading.Event) -> None:
                clock.now += 2.0

            await scheduler.run(Doing(two_seconds))
            await free(scheduler)
        gate, places = threading.Event(), [scheduler.admit() for _ in range(5)]
        before = asyncio.create_task(scheduler.run(model.job(9, gate)))
        tasks = [asyncio.create_task(scheduler.run(Four(lambda cancelled: 1, "a"))) for _ in range(4)]
        await settle()
        gate.set()
        await before
        assert await asyncio.gather(*tasks[1:]) == [0, 0, 0] and await asyncio.to_thread(early.wait, MOST_S)
        for place in places[1:4]:
            place.release()
        clock.now += 5.0
        # Four at two seconds each, five of which have passed; three are answered already.
        assert scheduler.expected_wait_s(places[4]) == pytest.approx(3.0, abs=0.2)
        last.set()
        await tasks[0]

    asyncio.run(main())


def test_one_of_several_is_there_before_the_others_and_none_is_left_without_a_result() -> None:
    async def main() -> None:
        scheduler, gate, last = Scheduler(9, batch=4), threading.Event(), threading.Event()

        class Bad(Doing):
            def do(self, company: Sequence[Doing]) -> None:
                jobs = [self, *company]
                if len(jobs) == 1:
                    gate.wait(MOST_S)
                    return super().do(company)
                jobs[1].result.set_result("early")
                last.wait(MOST_S)
                raise RuntimeError("broken")

        tasks = [asyncio.create_task(scheduler.run(Bad(lambda cancelled: "alone", "a"))) for _ in range(4)]
        await settle()
        gate.set()
        assert await tasks[0] == "alone" and await tasks[2] == "early"
        assert not tasks[1].done() and not tasks[3].done()
        last.set()
        for task in (tasks[1], tasks[3]):
            with pytest.raises(RuntimeError, match="broken"):
                await task
        assert await scheduler.run(Doing(lambda cancelled: "next")) == "next"

    asyncio.run(main())


def test_cut_off_nothing_more_begins_and_what_runs_is_told() -> None:
    async def run() -> None:
        scheduler, model, never = Scheduler(9, batch=2), Model(), threading.Event()
        jobs = [model.job(number, never, kind) for number, kind in enumerate("aab")]
        first = asyncio.create_task(scheduler.run(model.job(9, never, "b")))
        await settle()
        rest = [asyncio.create_task(scheduler.run(job)) for job in jobs]
        await settle()
        scheduler.cut_off()
        assert await first == 9
        for each in (*rest, asyncio.create_task(scheduler.run(model.job(8)))):
            with pytest.raises(Refusal) as refused:
                await each
            assert (refused.value.status, refused.value.code) == (503, "draining")
        with pytest.raises(Refusal):
            scheduler.admit()
        await free(scheduler)
        assert model.ran == [9]

    asyncio.run(run())
