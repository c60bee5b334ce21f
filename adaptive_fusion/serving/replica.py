"""One replica: the server's application with its own runner and controller, asked by messages; its decisions, ratings
and what it learns go to the place that all replicas share.

Knows the application and a way to reach that place. Must not know Ray.
"""

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from starlette.types import Message

from adaptive_fusion.errors import AdaptiveFusionError, ConfigError
from adaptive_fusion.runner import AdaptiveRunner
from adaptive_fusion.serving.app import create_app
from adaptive_fusion.serving.commons import kind_of
from adaptive_fusion.serving.front import scope_of
from adaptive_fusion.serving.gently import gently
from adaptive_fusion.serving.http import place_of
from adaptive_fusion.serving.records import Records, unknown
from adaptive_fusion.serving.replica_options import ReplicaOptions
from adaptive_fusion.serving.service import Service
from adaptive_fusion.serving.settings import Settings
from adaptive_fusion.serving.trials import Trials

PUBLISH_S = 2.0
"""Seconds between two publications of what was learned and counted, so the age of what a new replica starts from."""
KNOWN_S = 1.0
"""How long a decision may be on its way to the shared place before a rating of it is refused."""
END_S = 5.0
log = logging.getLogger("adaptive_fusion.serving")

Tell = Callable[..., None]
"""Calls a method of the shared place, by name, and waits for nothing."""
Ask = Callable[..., Awaitable[Any]]
"""Calls one and gives its answer."""


class SharedRecords(Records):
    """Decisions and ratings of all replicas.

    Args:
        replica: Whose decisions are added here.
        keep: How many are kept.
        tell, ask: Reach the shared place.
    """

    def __init__(self, replica: str, keep: int, tell: Tell, ask: Ask) -> None:
        super().__init__(keep)
        self._replica, self._tell, self._ask = replica, tell, ask

    def add(self, request_id: str, row: dict[str, Any], beside: dict[str, Any] | None = None) -> None:
        """Keep a decision."""
        self._tell("add", self._replica, request_id, row, beside)

    async def last(self, count: int) -> list[dict[str, Any]]:
        """The newest `count` of all replicas, newest first."""
        found: list[dict[str, Any]] = await self._ask("last", count)
        return found

    async def whole(self, request_id: str) -> dict[str, Any]:
        """All that is kept of a decision, whichever replica made it."""
        await self.require(request_id)
        found: dict[str, Any] = await self._ask("whole", request_id)
        return found

    async def require(self, request_id: str) -> None:
        """Raises a Refusal, 404, for a request that no replica has answered lately."""
        loop = asyncio.get_running_loop()
        ends = loop.time() + KNOWN_S
        while not await self._ask("knows", request_id):
            if loop.time() >= ends:
                raise unknown(request_id, self._keep)
            await asyncio.sleep(0.05)

    async def rated(self, request_id: str, source_id: str | None, rating: float | str) -> bool:
        """Note a rating; whether it is another than that source's last one of the request."""
        return bool(await self._ask("rated", request_id, source_id, rating))


class PublishedState:
    """What a runner has learned, published for others to start from; has the methods of a state file.

    Args:
        replica: Whose.
        runner: Whose state it is.
        tell: Reaches the shared place.
        snapshot: What the shared place had for replicas of this kind when this one began; None for nothing.
        metrics: This replica's, as text.
    """

    every_s = PUBLISH_S

    def __init__(
        self,
        replica: str,
        runner: AdaptiveRunner,
        tell: Tell,
        snapshot: Mapping[str, Any] | None,
        metrics: Callable[[], str],
    ) -> None:
        self._replica, self._runner, self._tell, self._snapshot = replica, runner, tell, snapshot
        self._metrics = metrics

    def restore(self) -> str:
        """Go on with what a healthy replica of this kind has learned; a sentence that says what was found."""
        if self._snapshot is None:
            return "no other replica of this kind has learned anything yet"
        try:
            self._runner.restore(self._snapshot)
        except ConfigError as error:
            return f"what others learned is not used: {error}"
        return "goes on with what a replica of this kind has learned"

    def save(self) -> str | None:
        """Publish what was learned and counted."""
        about = {"pid": os.getpid(), "host": socket.gethostname(), "policy": self._runner.policy.name}
        self._tell("publish", self._replica, about, self._runner.state(), self._metrics())
        return None


class Replica:
    """The application of one replica, warm.

    Args:
        name: Of the replica.
        options: What it was told.
        tell, ask: Reach the shared place.
        trials_of: Makes experiments with policies of their file and the runner.
    """

    def __init__(
        self,
        name: str,
        options: ReplicaOptions,
        tell: Tell,
        ask: Ask,
        trials_of: Callable[[Path, AdaptiveRunner], Trials] | None = None,
    ) -> None:
        self.name, self.options, self._tell, self._ask = name, options, tell, ask
        self._trials_of = trials_of
        self.app: FastAPI | None = None
        self.notes: list[str] = []
        self._stack = contextlib.AsyncExitStack()

    async def begin(self) -> None:
        """Load and warm up the model, with what others have learned.

        Raises:
            AdaptiveFusionError: If the model cannot be loaded or made ready.
        """
        runner = await gently(self.options.runner, self.name)
        snapshot = await self._ask("snapshot", kind_of(runner.state()))
        ready: asyncio.Future[list[str]] = asyncio.get_running_loop().create_future()

        def service(runner: AdaptiveRunner, settings: Settings, trials: Trials | None) -> Service:
            records = SharedRecords(self.name, settings.keep_decisions, self._tell, self._ask)
            state = PublishedState(self.name, runner, self._tell, snapshot, lambda: _metrics(made))
            made = Service(runner, settings, trials, records, state)
            return made

        settings, file = self.options.settings(), self.options.rollout
        trials = self._trials_of(Path(file), runner) if file is not None and self._trials_of is not None else None
        self.app = create_app(runner, settings, ready.set_result, ready.set_exception, trials, service)
        await self._stack.enter_async_context(self.app.router.lifespan_context(self.app))
        try:
            self.notes = await ready
        except AdaptiveFusionError:
            raise
        except Exception as error:
            raise ConfigError(f"the model cannot be made ready: {type(error).__name__}: {error}") from error
        await self.app.state.service.save()

    async def end(self) -> None:
        """Publish for the last time and let go."""
        if self.app is not None:
            await self._stack.aclose()
            self._tell("ended", self.name)

    async def answer(self, told: Mapping[str, Any], body: bytes) -> AsyncIterator[list[Message]]:
        """The messages of an answer, those that are there together."""
        assert self.app is not None
        messages: asyncio.Queue[Message | None] = asyncio.Queue()
        gone, given = asyncio.Event(), False

        async def receive() -> Message:
            nonlocal given
            if not given:
                given = True
                return {"type": "http.request", "body": body, "more_body": False}
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            messages.put_nowait(dict(message))

        task = asyncio.ensure_future(self.app(scope_of(told), receive, send))
        task.add_done_callback(lambda done: messages.put_nowait(None))
        try:
            ended = False
            while not ended:
                found = [await messages.get()]
                while not messages.empty():
                    found.append(messages.get_nowait())
                ended = found[-1] is None
                if some := [message for message in found if message is not None]:
                    yield some
        finally:
            gone.set()
            if not task.done():
                await asyncio.wait({task}, timeout=END_S)
            if not task.done():
                task.cancel()
            elif not task.cancelled() and (error := task.exception()) is not None:
                log.error("a request failed: %s", place_of(error))


def _metrics(service: Service) -> str:
    service.metrics.observe_controller(service.runner.controller)
    if service.runner.encoder_cache is not None:
        service.metrics.observe_cache(service.runner.encoder_cache.counts())
    return service.metrics.render()[0].decode()
