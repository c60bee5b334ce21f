"""HTTP to the engine upstream: connections that are kept, bytes that pass unchanged, and what is said when it fails.

A piece goes to the client as soon as it is here, and the next is read once the client has taken it, so a slow reader
holds back the engine and not memory. Knows requests and bytes. Must
not know what they mean.
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable
from dataclasses import dataclass
from urllib.parse import urlsplit

import httpcore2
from starlette.types import Send

from adaptive_fusion.errors import ConfigError
from adaptive_fusion.serving.gateway.events import Whole
from adaptive_fusion.serving.refusals import Refusal, error_body

Headers = list[tuple[bytes, bytes]]
HOP_BY_HOP = frozenset(
    (
        *(b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"proxy-connection", b"te"),
        *(b"trailer", b"transfer-encoding", b"upgrade"),
    )
)
"""Of one connection alone (RFC 9110, section 7.6.1)."""
CONNECT_S = 5.0
IDLE_S = 3.0
"""How long a connection may lie idle; engines on uvicorn close theirs after 5 s, and a request must not meet that."""
MOST_CONNECTIONS = 1024
_GONE = (httpcore2.NetworkError, httpcore2.ProtocolError, httpcore2.TimeoutException)


@dataclass(frozen=True)
class Address:
    """Where the engine is.

    Attributes:
        scheme: ``http`` or ``https``.
        host: Name or address.
        port: Of it.
        base: What stands before every path; ``/v1`` at its end stands for the paths' own.
    """

    scheme: str
    host: str
    port: int
    base: str = ""

    @classmethod
    def read(cls, text: str) -> "Address":
        """An address such as ``http://127.0.0.1:8000`` or ``https://host/base/v1``.

        Raises:
            ConfigError: For another.
        """
        try:
            parts = urlsplit(text)
            port = parts.port
        except ValueError:
            parts, port = urlsplit(""), None
        plain = not (parts.query or parts.fragment or parts.username)
        if parts.scheme not in ("http", "https") or not parts.hostname or not plain:
            raise ConfigError(f"upstream is {text[:200]!r}; expected an address such as http://127.0.0.1:8000")
        base = parts.path.rstrip("/").removesuffix("/v1")
        return cls(parts.scheme, parts.hostname, port or (443 if parts.scheme == "https" else 80), base)

    @property
    def host_header(self) -> bytes:
        """As requests name it."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        usual = self.port == (443 if self.scheme == "https" else 80)
        return (host if usual else f"{host}:{self.port}").encode()

    def url(self, target: bytes) -> httpcore2.URL:
        """Of a request's own path and query."""
        return httpcore2.URL(
            scheme=self.scheme.encode(), host=self.host.encode(), port=self.port, target=self.base.encode() + target
        )


class Upstream:
    """The engine, over connections that are kept.

    Args:
        address: Where it is.
        key: Stands in place of the client's own key; None passes that on.
        timeout_s: How long it may say nothing.
    """

    def __init__(self, address: Address, key: str | None, timeout_s: float) -> None:
        self.address, self._key = address, key
        self._timeouts = {"connect": CONNECT_S, "read": timeout_s, "write": timeout_s, "pool": timeout_s}
        self._pool = httpcore2.AsyncConnectionPool(max_connections=MOST_CONNECTIONS, keepalive_expiry=IDLE_S)

    async def send(
        self,
        method: str,
        target: bytes,
        headers: Iterable[tuple[bytes, bytes]],
        body: bytes | AsyncIterable[bytes] | None,
    ) -> httpcore2.Response:
        """A response whose body has not been read; whoever has it closes it.

        Raises:
            Refusal: 502 if the engine cannot be reached or ends without an answer, 504 if it says nothing.
        """
        request = httpcore2.Request(
            method.encode(),
            self.address.url(target),
            headers=self._headers(headers, body),
            content=body,
            extensions={"timeout": self._timeouts},
        )
        try:
            return await self._pool.handle_async_request(request)
        except (httpcore2.ConnectError, httpcore2.ConnectTimeout) as error:
            raise Refusal("the engine upstream cannot be reached", 502, code="upstream_unreachable") from error
        except httpcore2.TimeoutException as error:
            raise Refusal("the engine upstream says nothing", 504, code="upstream_timeout") from error
        except httpcore2.LocalProtocolError as error:
            raise Refusal("the request cannot be sent on as it is", 400, code="invalid_http") from error
        except _GONE as error:
            raise Refusal("the engine upstream ended without an answer", 502, code="upstream_failed") from error

    def _headers(self, headers: Iterable[tuple[bytes, bytes]], body: bytes | AsyncIterable[bytes] | None) -> Headers:
        found = end_to_end(headers, b"host", b"expect", *([b"content-length"] if isinstance(body, bytes) else []))
        if self._key is not None:
            found = [pair for pair in found if pair[0].lower() != b"authorization"]
            found.append((b"authorization", b"Bearer " + self._key.encode()))
        found.insert(0, (b"host", self.address.host_header))
        if isinstance(body, bytes):
            found.append((b"content-length", b"%d" % len(body)))
        elif body is not None and not any(name.lower() == b"content-length" for name, _ in found):
            found.append((b"transfer-encoding", b"chunked"))
        return found

    async def aclose(self) -> None:
        """Close all connections."""
        await self._pool.aclose()


def end_to_end(headers: Iterable[tuple[bytes, bytes]], *without: bytes) -> Headers:
    """The headers that are not of one connection alone, nor among those to be left out."""
    found = list(headers)
    named = {
        each.strip().lower() for name, value in found if name.lower() == b"connection" for each in value.split(b",")
    }
    gone = HOP_BY_HOP | named | set(without)
    return [(name, value) for name, value in found if name.lower() not in gone]


def is_stream(headers: Iterable[tuple[bytes, bytes]]) -> bool:
    """Whether a response comes in server-sent events."""
    kind = next((value for name, value in headers if name.lower() == b"content-type"), b"")
    return kind.partition(b";")[0].strip().lower() == b"text/event-stream"


def encoding_of(headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """How the bytes of a response's body are packed; empty where they are not."""
    found = b",".join(value for name, value in headers if name.lower() == b"content-encoding").strip().lower()
    return b"" if found == b"identity" else found


class Cut(Exception):
    """The engine went away in the middle of an answer that has no place for an error."""


async def relay(
    response: httpcore2.Response,
    send: Send,
    *,
    added: Headers | None = None,
    saw: Callable[[bytes], None] = lambda piece: None,
    pieces: AsyncIterator[bytes] | None = None,
    resized: bool = False,
    is_done: Callable[[], bool] = lambda: True,
) -> None:
    """Pass a response on to a client, piece by piece. A stream of events that breaks off ends with one that says so;
    of the event that was under way nothing has passed then (`events.Whole`).

    Args:
        response: Of the engine.
        send: The client's.
        added: Headers beside the engine's own, in place of those of the same names.
        saw: Told of each piece before it goes on.
        pieces: What to pass on in place of the response's own.
        resized: Whether these have another length.
        is_done: Of a stream whose end nothing marks: whether all of it was said.

    Raises:
        Cut: If the engine goes away in the middle of something that is no stream of events, or a packed one.
    """
    without = [*([b"content-length"] if resized else ()), *(name for name, _ in added or ())]
    names = {name.lower() for name, _ in response.headers}
    marked = b"content-length" in names or b"transfer-encoding" in names
    headers = [*end_to_end(response.headers, *without), *(added or [])]
    whole = Whole() if is_stream(response.headers) and not encoding_of(response.headers) else None
    try:
        await send({"type": "http.response.start", "status": response.status, "headers": headers})
        try:
            async for piece in pieces if pieces is not None else response.aiter_stream():
                saw(piece)
                if passing := piece if whole is None else whole.feed(piece):
                    await send({"type": "http.response.body", "body": passing, "more_body": True})
            cut = is_stream(response.headers) and response.status == 200 and not marked and not is_done()
            if cut and whole is None:
                raise Cut
        except _GONE as error:
            if whole is None:
                raise Cut from error
            cut = True
        last = b"" if whole is None else broken_event(after_half=whole.is_open) if cut else whole.rest()
        await send({"type": "http.response.body", "body": last, "more_body": False})
    finally:
        await closed(response)


def broken_event(*, after_half: bool) -> bytes:
    """An event that says that the engine went away; an event that may have been begun before is ended first."""
    refusal = Refusal("the engine upstream ended in the middle of its answer", 502, code="upstream_failed")
    return (b"\n\n" if after_half else b"") + b"data: " + json.dumps(error_body(refusal)).encode() + b"\n\n"


async def closed(response: httpcore2.Response) -> None:
    """Close a response; one that was not read to its end ends its request upstream."""
    closing = asyncio.ensure_future(response.aclose())
    await asyncio.shield(closing)


async def given_up(under_way: "asyncio.Future[httpcore2.Response] | None") -> None:
    """End a request upstream whose answer nobody wants any more."""
    if under_way is None:
        return
    under_way.cancel()
    with contextlib.suppress(asyncio.CancelledError, Exception):
        await closed(await under_way)
