"""What stands before replicas: reads a request, gives it to the replica that has its image, and passes on what comes
back; a request whose replica died before it said anything goes to another.

Knows ASGI, bodies and a way to ask a replica. Must not know Ray, or what is asked.
"""

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from typing import Any, Protocol

from starlette.requests import ClientDisconnect, Request
from starlette.types import Message, Receive, Scope, Send

from adaptive_fusion.serving.affinity import key_of
from adaptive_fusion.serving.commons import merged
from adaptive_fusion.serving.http import BODIES, ELAPSED, Bodies, place_of, read_body, unless, until_gone
from adaptive_fusion.serving.refusals import Refusal, as_refusal, error_body, error_response, json_response

TRIES = 4
"""Replicas that are asked: one that dies, the one after it, and so on."""
READY_S = 2.0
"""How long a replica may take to say that it is ready."""
REPLICAS_PATH = "/v1/adaptive_fusion/replicas"
PASSED = ("method", "path", "raw_path", "query_string", "headers", "scheme", "http_version", "client")
"""What a replica is told of a request beside its body."""
OWN_ID = b"x-request-id"
"""A header that Ray's proxy puts on every response; two of them would be neither."""
log = logging.getLogger("adaptive_fusion.serving")


class Answering(Protocol):
    """Messages of one replica's answer, some at a time."""

    def __aiter__(self) -> AsyncIterator[list[Message]]: ...

    def cancel(self) -> None:
        """Nobody wants it any more."""
        ...


class Shared(Protocol):
    """What the front asks of the place that all replicas share."""

    async def replicas(self) -> list[dict[str, Any]]:
        """Those that are there."""
        ...

    async def metrics(self) -> dict[str, str]:
        """Their metrics by name."""
        ...


class Front:
    """An ASGI application that has others answer.

    Args:
        ask: Asks a replica: what it is told, the body, and the name of the request's image.
        shared: What all replicas share.
        died: Errors that say a replica is gone.
        absent: Errors that say none is there or will be soon.
        max_body_mib: Largest body.
        clock: Seconds, monotonic.
    """

    def __init__(
        self,
        ask: Callable[[dict[str, Any], bytes, str], Answering],
        shared: Shared,
        died: tuple[type[BaseException], ...],
        absent: tuple[type[BaseException], ...],
        max_body_mib: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._ask, self._shared, self._died, self._absent, self._clock = ask, shared, died, absent, clock
        self._max_mib, self._bodies = max_body_mib, Bodies(BODIES * max_body_mib << 20)
        self.draining = False
        self._open = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self.counts = dict.fromkeys(("requests", "asked_again", "cut_off", "refused"), 0)

    def refused(self, code: str) -> None:
        """Count a request that was not let in."""
        self.counts["refused"] += 1

    async def drain(self, most_s: float) -> bool:
        """Let nobody else in and wait for those who are; whether all were answered in time."""
        self.draining = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(most_s):
                await self._idle.wait()
        return self._idle.is_set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] == "lifespan":
            await _live(receive, send)
        elif scope["type"] == "http":
            try:
                with self._counted():
                    await self._answer(scope, receive, send)
            except Refusal as refusal:
                self.refused(refusal.code)
                await error_response(refusal)(scope, receive, send)
            except ClientDisconnect:
                pass

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        self._open += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._open -= 1
            if not self._open:
                self._idle.set()

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        path, arrived_s = scope["path"], self._clock()
        if path == "/health":
            await json_response({"status": "ok"})(scope, receive, send)
        elif self.draining:
            raise Refusal("the server is shutting down", 503, code="draining", retry_s=1.0)
        elif path == "/metrics" and scope["method"] == "GET":
            await self._metrics(scope, receive, send)
        elif path == REPLICAS_PATH and scope["method"] == "GET":
            await json_response({"replicas": await self._shared.replicas()})(scope, receive, send)
        else:
            limit_s = READY_S if path == "/ready" else None
            request = Request(scope, receive)
            with self._bodies.counting() as grown:
                body = await read_body(request, self._max_mib, grown) if scope["method"] == "POST" else b""
                self.counts["requests"] += 1
                try:
                    async with asyncio.timeout(limit_s):
                        await self._forward(scope, receive, send, body, arrived_s)
                except TimeoutError:
                    raise _absent() from None

    async def _metrics(self, scope: Scope, receive: Receive, send: Send) -> None:
        lines = [
            line
            for name, value in self.counts.items()
            for line in (f"# TYPE adaptive_fusion:front_{name} counter", f"adaptive_fusion:front_{name} {value}")
        ]
        text = merged(await self._shared.metrics()) + "\n".join([*lines, ""])
        response = json_response({})
        response.body = text.encode()
        response.init_headers({"content-type": "text/plain; version=1.0.0; charset=utf-8"})
        await response(scope, receive, send)

    async def _forward(self, scope: Scope, receive: Receive, send: Send, body: bytes, arrived_s: float) -> None:
        """Have a replica answer; another, while nothing was said."""
        key = key_of(body)
        for left in reversed(range(TRIES)):
            told = {name: scope.get(name) for name in PASSED} | {"elapsed_s": self._clock() - arrived_s}
            relay = _Relay(send)
            try:
                await unless(until_gone(receive), relay.all(self._ask(told, body, key)))
                return
            except self._died:
                if relay.began:
                    self.counts["cut_off"] += 1
                    await relay.cut_off(_died())
                    return
                if not left:
                    raise _died() from None
                self.counts["asked_again"] += 1
                log.warning("a replica ended before it answered; another is asked")
            except (Refusal, ClientDisconnect, TimeoutError):
                raise
            except Exception as error:  # asking again would not help
                log.error("a request failed: %s", place_of(error))
                refusal = _absent() if isinstance(error, self._absent) else as_refusal(error)
                if not relay.began:
                    raise refusal from None
                self.counts["cut_off"] += 1
                await relay.cut_off(refusal)
                return


def _absent() -> Refusal:
    return Refusal("no replica is ready", 503, code="not_ready", retry_s=1.0)


def _died() -> Refusal:
    return Refusal("the replica ended while it answered; try again", 503, code="replica_died", retry_s=1.0)


class _Relay:
    """Passes messages on; knows whether any was."""

    def __init__(self, send: Send) -> None:
        self._send, self.began, self._kind = send, False, b""

    async def all(self, answering: Answering) -> None:
        """Every message of an answer; cancelled, the answer is too."""
        try:
            async for messages in answering:
                for message in messages:
                    if message["type"] == "http.response.start":
                        headers = [row for row in message["headers"] if row[0].lower() != OWN_ID]
                        self._kind = dict(headers).get(b"content-type", b"")
                        message = {**message, "headers": headers}
                    self.began = True
                    await self._send(message)
        except BaseException:
            answering.cancel()
            raise

    async def cut_off(self, refusal: Refusal) -> None:
        """Nothing more comes: a stream says so, anything else ends short of its length."""
        if not self._kind.startswith(b"text/event-stream"):
            raise ConnectionResetError("a replica ended in the middle of an answer")
        event = b"data: " + json.dumps(error_body(refusal), separators=(",", ":")).encode() + b"\n\n"
        await self._send({"type": "http.response.body", "body": event, "more_body": False})


async def _live(receive: Receive, send: Send) -> None:
    while (message := await receive())["type"] != "lifespan.shutdown":
        if message["type"] == "lifespan.startup":
            await send({"type": "lifespan.startup.complete"})
    await send({"type": "lifespan.shutdown.complete"})


def scope_of(told: Mapping[str, Any]) -> Scope:
    """A request as the replica's application takes it, from what it was told."""
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "root_path": "",
        "server": None,
        **{name: told[name] for name in PASSED},
        ELAPSED: told["elapsed_s"],
    }
