"""The gateway as an ASGI application: which path leads where; what it does not know goes to the engine as it is.

Knows routes and the gateway's life. Must not know what routes do.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from adaptive_fusion.errors import AdaptiveFusionError
from adaptive_fusion.serving import own as shared
from adaptive_fusion.serving import rollouts
from adaptive_fusion.serving.document import DECISION_PATH
from adaptive_fusion.serving.gateway import own
from adaptive_fusion.serving.gateway.chat import chat_completions
from adaptive_fusion.serving.gateway.exchange import target_of
from adaptive_fusion.serving.gateway.incoming import Incoming
from adaptive_fusion.serving.gateway.proxy import Cut, relay
from adaptive_fusion.serving.gateway.service import Gateway
from adaptive_fusion.serving.http import QUIET_PATHS, Guard, place_of
from adaptive_fusion.serving.refusals import Refusal, as_refusal, error_response
from adaptive_fusion.serving.service import log

CHAT = "/v1/chat/completions"
UI = "/ui"
OWN = "/v1/adaptive_fusion"
ROUTES: dict[tuple[str, str], Callable[[Request], Awaitable[Response]]] = {
    ("POST", f"{OWN}/decide"): own.decide,
    ("POST", f"{OWN}/points"): own.points,
    ("GET", f"{OWN}/decisions"): shared.decisions,
    ("GET", f"{OWN}/policy"): own.policy,
    ("POST", f"{OWN}/feedback"): shared.feedback,
    ("GET", f"{OWN}/rollout"): rollouts.status,
    ("POST", f"{OWN}/rollout/promote"): rollouts.promote,
    ("POST", f"{OWN}/rollout/abort"): rollouts.abort,
    ("GET", "/health"): own.health,
    ("GET", "/ready"): own.ready,
    ("GET", "/metrics"): own.metrics,
}


class Application:
    """Answers requests to a gateway.

    Args:
        gateway: With all that stands around them.
    """

    def __init__(self, gateway: Gateway) -> None:
        self.state = SimpleNamespace(service=gateway)
        settings = gateway.settings
        self.ui: Any = None
        if settings.ui:
            from adaptive_fusion.serving.web.mount import Pages

            self.ui = Pages(self, gateway.limits.max_medium_bytes, UI)
        self._guarded = Guard(
            self._answer, settings.api_key, settings.is_local, gateway.metrics.rejected, UI if settings.ui else None
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request, or the application's life."""
        if scope["type"] == "lifespan":
            await self._live(receive, send)
        elif scope["type"] == "http":
            await self._guarded(scope, receive, send)

    async def _live(self, receive: Receive, send: Send) -> None:
        gateway: Gateway = self.state.service
        await receive()
        saving = asyncio.create_task(gateway.keep_saving())
        async with self.ui.life() if self.ui is not None else contextlib.nullcontext():
            await send({"type": "lifespan.startup.complete"})
            await receive()
        saving.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await saving
        await gateway.close()
        await send({"type": "lifespan.shutdown.complete"})

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.ui is not None and self.ui.has(scope["path"]):
            await self.ui(scope, receive, send)
            return
        gateway: Gateway = self.state.service
        began_s, status, code = gateway.clock(), 0, None

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._routed(gateway, scope, receive, noted)
        except (ClientDisconnect, asyncio.CancelledError):
            code = "cancelled"
        except Cut:
            code = "upstream_failed"
            raise  # the connection is closed: a length that was promised is not kept
        except Exception as error:
            code = as_refusal(error).code
            if not isinstance(error, AdaptiveFusionError):
                log.error("a request failed: %s", place_of(error))
            (gateway.metrics.failed if as_refusal(error).status >= 500 else gateway.metrics.rejected)(code)
            if status:
                raise
            await error_response(error)(scope, receive, noted)
        finally:
            if scope["path"] not in QUIET_PATHS:
                ms = (gateway.clock() - began_s) * 1e3
                gateway.access_log.write(
                    "request", route=_route(scope), method=scope["method"], status=status or None, error=code, ms=ms
                )

    async def _routed(self, gateway: Gateway, scope: Scope, receive: Receive, send: Send) -> None:
        path, method = scope["path"], scope["method"]
        if (handler := ROUTES.get((method, path))) is not None:
            response = await handler(Request({**scope, "app": self}, receive))
            await response({**scope, "app": self}, receive, send)
        elif method == "GET" and (named := path.removeprefix(f"{OWN}/decisions/")) != path:
            found = {**scope, "app": self, "path_params": {"request_id": named}}
            await (await shared.one_decision(Request(found, receive)))(found, receive, send)
        elif path.startswith(f"{OWN}/"):
            raise Refusal("there is no such path here", 404, code="not_found")
        elif method == "POST" and path == CHAT:
            await chat_completions(gateway, scope, receive, send)
        else:
            await passed_on(gateway, scope, receive, send)


def _route(scope: Scope) -> str:
    """A request's path for the log, without what a client may have put there."""
    path: str = scope["path"]
    if path.startswith(f"{OWN}/decisions/"):
        return DECISION_PATH
    return path if path == CHAT or (scope["method"], path) in ROUTES else "other"


async def passed_on(gateway: Gateway, scope: Scope, receive: Receive, send: Send) -> None:
    """A request that goes to the engine as it is, and its answer."""
    names = {name.lower() for name, _ in scope["headers"]}
    incoming = Incoming(receive)
    has_body = bool(names & {b"content-length", b"transfer-encoding"})

    async def both() -> None:
        body = incoming.pieces() if has_body else None
        response = await gateway.upstream.send(scope["method"], target_of(scope), scope["headers"], body)
        await relay(response, incoming.answering(send))

    with gateway.admitted(counted=False):
        if not has_body:
            async for _ in incoming.pieces():
                pass
        await incoming.while_there(both())
