"""Bodies, keys and clients that went away: what every route needs of HTTP.

Knows requests and responses. Must not know what is asked.
"""

import asyncio
import contextlib
import logging
import secrets
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from typing import Any, TypeVar

from sse_starlette import EventSourceResponse
from starlette.background import BackgroundTasks
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from adaptive_fusion.errors import AdaptiveFusionError
from adaptive_fusion.serving.refusals import Refusal, as_refusal, error_response
from adaptive_fusion.serving.schema import read_json
from adaptive_fusion.serving.settings import is_local

OPEN_PATHS = ("/health", "/ready")
"""Asked by whoever looks after the process, who has no key."""
QUIET_PATHS = (*OPEN_PATHS, "/metrics")
"""Asked every few seconds; the log says nothing of them."""
BODIES = 4
"""How many of the largest bodies there may be at a time, or as much in smaller ones."""
BODY_S = 30
"""How long a body may take, in seconds."""
SMALL = 64 << 10
"""Bytes of JSON that are read at once; more are read in a thread."""
_GONE = 499
ELAPSED = "adaptive_fusion.elapsed_s"
"""Key of a request's scope: seconds that it had been on its way when it came here, where something stands before."""
log = logging.getLogger("adaptive_fusion.serving")
T = TypeVar("T")


class Guard:
    """Lets in who has the key, before anything is read.

    Args:
        app: What is guarded.
        key: What clients present as bearer token; None asks for none.
        local: Whether only this machine can connect. Without a key, requests must then name it as host, so that no web
            page can have its own name point here.
        refused: Called with the code of each refusal.
        pages: Below which a gate of its own asks for the key, as a browser opens pages without one; the host is
            looked at here.
    """

    def __init__(
        self, app: ASGIApp, key: str | None, local: bool, refused: Callable[[str], None], pages: str | None = None
    ) -> None:
        self.app, self._local, self._count, self._pages = app, local, refused, pages
        self._expected = None if key is None else f"Bearer {key.strip()}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS:
            await self.app(scope, receive, send)
            return
        refused = self._refused(dict(scope["headers"]), self._is_page(scope["path"]))
        if refused is not None:
            self._count(refused.code)
            await error_response(refused)(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _is_page(self, path: str) -> bool:
        return self._pages is not None and (path == self._pages or path.startswith(f"{self._pages}/"))

    def _refused(self, headers: dict[bytes, bytes], page: bool) -> Refusal | None:
        if self._expected is not None:
            if page:
                return None
            given = headers.get(b"authorization", b"")
            scheme, _, token = given.partition(b" ")
            if not secrets.compare_digest(scheme.title() + b" " + token.strip(), self._expected):
                return Refusal(
                    "the key is missing or wrong; expected Authorization: Bearer KEY", 401, code="invalid_api_key"
                )
        elif self._local:
            host = headers.get(b"host", b"localhost").decode("latin-1").lower()
            if not is_local(host if host.endswith("]") else host.rpartition(":")[0] or host):
                return Refusal("the request names another host; expected localhost", 403, code="wrong_host")
        return None


class Bodies:
    """How many bytes of large bodies there are, of all requests; used on the event loop alone.

    Args:
        most: Bytes.
    """

    def __init__(self, most: int) -> None:
        self._most, self._size = most, 0

    @contextlib.contextmanager
    def counting(self) -> Iterator[Callable[[int], None]]:
        """A function to be told how large a body has become; it is forgotten at the end.

        Raises:
            Refusal: 429 if there are too many. Small bodies are always let in.
        """
        mine = 0

        def grown(size: int) -> None:
            nonlocal mine
            if size > SMALL:
                if self._size + size - mine > self._most:
                    raise Refusal("too many large bodies are here; try again later", 429, code="busy", retry_s=1.0)
                self._size += size - mine
                mine = size

        try:
            yield grown
        finally:
            self._size -= mine


def bodies_of(request: Request) -> Bodies:
    """Those of the server that the request came to."""
    found: Bodies = request.app.state.bodies
    return found


async def read_body(request: Request, max_mib: int, grown: Callable[[int], None] = lambda size: None) -> bytes:
    """The body, as it is.

    Args:
        request: Whose.
        max_mib: The largest that is read.
        grown: Told of each piece how many bytes there are now; may refuse them.

    Raises:
        Refusal: 413 if it is larger, 408 if it takes longer than `BODY_S`, 415 if it is not called JSON: a web page's
            form, or its bytes without a type, are sent without asking, JSON is not.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        raise Refusal(f"content-type is {kind[:80]!r}; expected application/json", 415, code="unsupported_media_type")
    most = max_mib << 20
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared[:20]) > most:
        raise too_large(max_mib)
    body = bytearray()  # not many pieces, whose memory the allocator would keep
    try:
        async with asyncio.timeout(BODY_S):
            async for block in request.stream():
                if len(body) + len(block) > most:
                    raise too_large(max_mib)
                grown(len(body) + len(block))
                body += block
    except TimeoutError:
        raise too_slow() from None
    return bytes(body)


def too_large(max_mib: int) -> Refusal:
    """Of a body."""
    return Refusal(f"the body is larger than {max_mib} MiB; expected less", 413, code="body_too_large")


def too_slow() -> Refusal:
    """Of a body."""
    return Refusal(f"the body took longer than {BODY_S} s; expected it sooner", 408, code="body_too_slow")


async def as_json(body: bytes) -> Any:
    """A body's JSON; a large one is read outside the event loop.

    Raises:
        Refusal: 400 if it is none.
    """
    return read_json(body) if len(body) <= SMALL else await asyncio.to_thread(read_json, body)


async def while_connected(request: Request, work: Coroutine[Any, Any, Response]) -> Response:
    """What `work` gives; it is cancelled once the client has gone. The body must have been read.

    Raises:
        ClientDisconnect: If it has.
    """
    return await unless(until_gone(request.receive), work)


async def unless(gone: Awaitable[None], work: Awaitable[T]) -> T:
    """What `work` gives; it is cancelled once `gone` is there.

    Raises:
        ClientDisconnect: If it is.
    """
    task, other = asyncio.ensure_future(work), asyncio.ensure_future(gone)
    try:
        await asyncio.wait({task, other}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
    finally:
        for each in (task, other):
            if not each.done():
                each.cancel()
                with contextlib.suppress(BaseException):
                    await each
        del task, other, each  # a task holds its error, which holds this frame and all that led to it, bodies too
    raise ClientDisconnect


async def until_gone(receive: Receive) -> None:
    """Wait until the client goes away after its body was read."""
    while (await receive())["type"] != "http.disconnect":
        pass


def afterwards(response: Response, work: Callable[[], None]) -> None:
    """Have `work` done as soon as a whole response is sent, and before anything else of the event loop: what its client
    need not wait for. Of a response in pieces it is done now."""
    if isinstance(response, StreamingResponse | EventSourceResponse):
        work()
        return

    async def at_once() -> None:
        work()

    tasks = response.background if isinstance(response.background, BackgroundTasks) else BackgroundTasks()
    tasks.add_task(at_once)
    response.background = tasks


def answering(
    handle: Callable[[Request], Awaitable[Response]],
) -> Callable[[Request], Awaitable[Response]]:
    """`handle` as a route whose errors become responses. Of an error that is not the library's own the log has the
    place, without values that may be a client's."""

    async def route(request: Request) -> Response:
        service, code = request.app.state.service, None
        began = service.runner.clock()
        try:
            response = await handle(request)
        except ClientDisconnect:
            response, code = Response(status_code=_GONE), "cancelled"
        except Exception as error:
            if not isinstance(error, AdaptiveFusionError):
                log.error("a request failed: %s", place_of(error))
            response, code = error_response(error), as_refusal(error).code
        if request.scope["path"] not in QUIET_PATHS:
            ms = (service.runner.clock() - began) * 1e3
            route_path = getattr(request.scope.get("route"), "path", None)
            told = {"route": route_path, "method": request.method, "status": response.status_code, "error": code}
            afterwards(response, lambda: service.access_log.write("request", **told, ms=ms))
        return response

    route.__name__ = getattr(handle, "__name__", "route")
    route.__doc__ = handle.__doc__
    return route


def place_of(error: BaseException) -> str:
    """An error's type and where it was raised, without its text."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = f" at {trace.tb_frame.f_globals.get('__name__')}:{trace.tb_lineno}" if trace is not None else ""
    return f"{type(error).__name__}{where}"
