"""The server's public endpoints as the web UI calls them: one request, one method.

Requests go to the application in this process, through its middleware, as a client's from outside would: the same
checks, keys and limits hold. Knows HTTP and the endpoints' paths. Must not know of runners, services or pages.
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from typing import Any

import httpx
from starlette.types import ASGIApp, Message

OWN = "/v1/adaptive_fusion"
ENDPOINTS = {
    "models": ("GET", "/v1/models"),
    "chat": ("POST", "/v1/chat/completions"),
    "decide": ("POST", f"{OWN}/decide"),
    "points": ("POST", f"{OWN}/points"),
    "decisions": ("GET", f"{OWN}/decisions"),
    "policy": ("GET", f"{OWN}/policy"),
    "feedback": ("POST", f"{OWN}/feedback"),
    "metrics": ("GET", "/metrics"),
    "rollout": ("GET", f"{OWN}/rollout"),
    "promote": ("POST", f"{OWN}/rollout/promote"),
    "abort": ("POST", f"{OWN}/rollout/abort"),
}
"""All that the pages ask for, by method and path."""
REQUEST_ID = "x-adaptive-fusion-request-id"
_ENDS_S = 30.0
"""How long a request that nobody reads any more may take to end."""


class ApiError(Exception):
    """What an endpoint refused: its words, its code and its status."""

    def __init__(self, message: str, code: str, status: int) -> None:
        super().__init__(message)
        self.code, self.status = code, status


class Api:
    """The endpoints, asked with one key.

    Args:
        app: The application that has them.
        key: The bearer token; None sends none.
    """

    def __init__(self, app: ASGIApp, key: str | None = None) -> None:
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        self._client = httpx.AsyncClient(
            transport=InProcess(app), base_url="http://localhost", headers=headers, timeout=None
        )

    async def call(
        self, name: str, body: Mapping[str, Any] | None = None, *, below: str = "", **query: Any
    ) -> dict[str, Any]:
        """The JSON that the endpoint `name` of `ENDPOINTS` answers, or of the path `below` it.

        Raises:
            ApiError: For a refusal.
        """
        response = await self._send(name, body, below, query)
        try:
            found = response.json()
        except ValueError:
            raise ApiError("the answer is no JSON", "invalid_json", response.status_code) from None
        if not isinstance(found, dict):
            raise ApiError("the answer is no object", "invalid_json", response.status_code)
        return found

    async def text(self, name: str) -> str:
        """What the endpoint answers, as it is; raises ApiError for a refusal."""
        return (await self._send(name, None, "", {})).text

    async def stream(
        self, body: Mapping[str, Any], named: Callable[[str], None] = lambda request_id: None
    ) -> AsyncGenerator[dict[str, Any], None]:
        """The chunks of an answer in pieces. Closing the iterator ends the generation.

        Args:
            body: The request.
            named: Called with the request's id as soon as it is known, where there is one.

        Raises:
            ApiError: For a refusal, also one in the middle.
        """
        method, path = ENDPOINTS["chat"]
        async with self._client.stream(method, path, json={**body, "stream": True}) as response:
            if response.status_code >= 400:
                await response.aread()
                raise _refused(response)
            if REQUEST_ID in response.headers:
                named(response.headers[REQUEST_ID])
            async for line in response.aiter_lines():
                if not line.startswith("data:") or (data := line[5:].strip()) == "[DONE]":
                    continue
                chunk = json.loads(data)
                if "error" in chunk:
                    raise _refusal(chunk, response.status_code)
                yield chunk

    async def _send(
        self, name: str, body: Mapping[str, Any] | None, below: str, query: Mapping[str, Any]
    ) -> httpx.Response:
        method, path = ENDPOINTS[name]
        if below:
            path = f"{path}/{below}"
        response = await self._client.request(method, path, json=body, params=query or None)
        if response.status_code >= 400:
            raise _refused(response)
        return response


def _refused(response: httpx.Response) -> ApiError:
    try:
        return _refusal(response.json(), response.status_code)
    except ValueError:
        return ApiError(f"HTTP {response.status_code}", "unknown", response.status_code)


def _refusal(values: Any, status: int) -> ApiError:
    """What went wrong, in any of the forms that engines have for it."""
    found: Any = values.get("error", values) if isinstance(values, dict) else {}
    found = found if isinstance(found, dict) else {"message": found}
    message = found.get("message") or found.get("detail") or f"HTTP {status}"
    return ApiError(str(message), str(found.get("code") or found.get("type") or "unknown"), status)


class InProcess(httpx.AsyncBaseTransport):
    """Requests to an application in this process and event loop, whose answers can be read while they are made; httpx's
    own transport waits for their end. Closing an answer tells the application that its client has gone."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send `request`; the response is there once its headers are."""
        exchange = _Exchange(await request.aread())
        task: asyncio.Task[None] = asyncio.create_task(self._run(request, exchange))
        task.add_done_callback(lambda done: exchange.ended())
        body = _Body(exchange, task)
        try:
            start = await exchange.messages.get()
            if start is None:
                task.result()
                raise httpx.RemoteProtocolError("the application ended without an answer")
        except BaseException:
            await body.aclose()
            raise
        return httpx.Response(start["status"], headers=start["headers"], stream=body, request=request)

    async def _run(self, request: httpx.Request, exchange: "_Exchange") -> None:
        await self._app(_scope(request), exchange.receive, exchange.send)


class _Exchange:
    """What goes to the application and what comes from it."""

    def __init__(self, body: bytes) -> None:
        self.messages: asyncio.Queue[Message | None] = asyncio.Queue(64)
        self.gone = asyncio.Event()
        self._body: bytes | None = body

    async def receive(self) -> Message:
        """The request's body, then nothing until its client has gone."""
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        """A piece of the response; nobody waits for it once its client has gone."""
        if not self.gone.is_set():
            await self.messages.put(message)

    def ended(self) -> None:
        """The application is done."""
        with contextlib.suppress(asyncio.QueueFull):  # then whoever reads sees the task's end
            self.messages.put_nowait(None)


class _Body(httpx.AsyncByteStream):
    """The response's body, as it is made."""

    def __init__(self, exchange: _Exchange, task: "asyncio.Task[None]") -> None:
        self._exchange, self._task = exchange, task

    async def __aiter__(self) -> AsyncIterator[bytes]:
        messages = self._exchange.messages
        while not (self._task.done() and messages.empty()):
            message = await messages.get()
            if message is None:
                break
            if message["type"] == "http.response.body":
                if message.get("body"):
                    yield message["body"]
                if not message.get("more_body"):
                    break

    async def aclose(self) -> None:
        """Tell the application that its client has gone, and wait for its end."""
        self._exchange.gone.set()
        while not self._exchange.messages.empty():  # a sender may wait for room
            self._exchange.messages.get_nowait()
        done, _ = await asyncio.wait({self._task}, timeout=_ENDS_S)
        if not done:
            self._task.cancel()
        elif not self._task.cancelled():
            self._task.exception()  # looked at; what the client was told is in the response


def _scope(request: httpx.Request) -> dict[str, Any]:
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": request.method,
        "headers": [(name.lower(), value) for name, value in request.headers.raw],
        "scheme": request.url.scheme,
        "path": request.url.path,
        "raw_path": request.url.raw_path.split(b"?")[0],
        "query_string": request.url.query,
        "root_path": "",
        "server": ("localhost", 80),
        "client": ("127.0.0.1", 0),
    }
