"""The process: listen, say when it is ready, and on a signal answer who was admitted before it ends.

Knows uvicorn and signals. Must not know what is served.
"""

import asyncio
import gc
import logging
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Protocol

import uvicorn
from fastapi import FastAPI
from sse_starlette.sse import AppStatus

from adaptive_fusion.runner import AdaptiveRunner
from adaptive_fusion.serving.app import create_app
from adaptive_fusion.serving.connection import BACKLOG, MAX_HEAD, Connection
from adaptive_fusion.serving.settings import KEEP_ALIVE_S, Settings
from adaptive_fusion.serving.trials import Trials

LAST_BYTES_S = 5
"""How long clients may take to read the end of their answers once the server ends."""
SWITCH_S = 0.0005
"""How long a thread of this process may keep others from running Python. At the interpreter's 5 ms a refusal waits that
long for the model's thread at each of its steps."""


class Drains(Protocol):
    """What is served, as far as its end goes."""

    async def drain(self) -> None:
        """Let nobody else in, and wait for those who are."""
        ...


class DrainingServer(uvicorn.Server):
    """Ends after those who were admitted are answered; a second Ctrl-C ends at once."""

    def __init__(self, config: uvicorn.Config, service: Drains, before_exit: Callable[[], None] = lambda: None) -> None:
        super().__init__(config)
        self.before_exit = before_exit
        # Left on, streams would be cut off at the signal.
        AppStatus.enable_automatic_graceful_drain = False
        self.service, self.failed = service, False
        self._drain: asyncio.Task[None] | None = None
        self._signalled = False
        self.loop: asyncio.AbstractEventLoop | None = None

    def run(self, sockets: list[object] | None = None) -> None:  # type: ignore[override]
        """Serve until a signal comes; sets how long threads of this process keep others waiting."""
        before = sys.getswitchinterval()
        sys.setswitchinterval(SWITCH_S)
        try:
            super().run(sockets)  # type: ignore[arg-type]
        finally:
            sys.setswitchinterval(before)
            gc.unfreeze()  # what `ready` froze

    async def startup(self, sockets: list[object] | None = None) -> None:  # type: ignore[override]
        """Listen."""
        self.loop = asyncio.get_running_loop()
        await super().startup(sockets)  # type: ignore[arg-type]

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self.servers[0].sockets[0].getsockname()[1])

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal came; called by the interpreter, between any two instructions."""
        if self.loop is None:
            self.should_exit = True
        elif self._signalled and sig == signal.SIGINT:
            self.should_exit = self.force_exit = True
        else:
            self.loop.call_soon_threadsafe(self.stop)
        self._signalled = True

    def stop(self) -> None:
        """Begin to drain; on the event loop."""
        if self._drain is None:
            self._drain = asyncio.get_running_loop().create_task(self._end())

    async def _end(self) -> None:
        await self.service.drain()
        self.before_exit()  # pages in browsers keep connections for as long as they are open
        self.should_exit = True


def server_for(
    runner: AdaptiveRunner,
    settings: Settings,
    announce: Callable[[str], None] = lambda line: None,
    trials: Trials | None = None,
) -> DrainingServer:
    """A server that is not listening yet; ``run()`` listens until a signal comes.

    Args:
        runner: Answers.
        settings: How.
        announce: Called with one line once the first request can come.
        trials: Experiments with policies.
    """
    found: list[DrainingServer] = []

    def ready(notes: list[str]) -> None:
        # What is there now stays: looking through it for garbage again would hold everybody up for half a second.
        gc.collect()
        gc.freeze()
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        pages = f", pages at http://{host}:{found[0].port}/ui" if settings.ui else ""
        announce(
            f"ready: {settings.model} at http://{host}:{found[0].port}/v1{pages} ({settings.mode}, "
            f"policy {runner.policy.name}, {'; '.join(notes)})"
        )

    def failed(error: Exception) -> None:
        announce(f"the model cannot be made ready: {type(error).__name__}: {error}")
        found[0].failed = found[0].should_exit = True

    app: FastAPI = create_app(runner, settings, ready, failed, trials)
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        http=Connection,
        backlog=BACKLOG,
        h11_max_incomplete_event_size=MAX_HEAD,
        ws="none",
        access_log=False,
        log_level=logging.WARNING,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=LAST_BYTES_S,
    )
    ending = app.state.ui.close if settings.ui else lambda: None
    found.append(DrainingServer(config, app.state.service, ending))
    return found[0]
