"""What stands between a browser and Gradio: sessions, the few of Gradio's paths that the pages need, uploads and files.

Gradio has many more paths (files of any session, proxies, recordings, code); none of them is reached. Files are taken
and given back here, to the session that brought them and nobody else. Without a session there is no data, and a session
takes the key where the server has one: it is asked for by a request to a public endpoint, as anybody could.

Knows HTTP, sessions and Gradio's paths. Must not know what the pages show.
"""

import asyncio
import contextlib
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from adaptive_fusion.serving.web.client import Api, ApiError
from adaptive_fusion.serving.web.enter import entrance
from adaptive_fusion.serving.web.sessions import Session, Sessions
from adaptive_fusion.serving.web.streams import Streams
from adaptive_fusion.serving.web.texts import LANGUAGES, preferred
from adaptive_fusion.serving.web.uploads import give_file, take_files

COOKIE = "adaptive_fusion_ui"
LANGUAGE_COOKIE = "adaptive_fusion_language"
MAX_CALL_BYTES = 8 << 20
"""Of what a page sends beside files."""
_STATIC = re.compile(r"(static|assets|svelte)/.+|theme\.css|gradio_api/theme\.css|favicon\.ico")
_CALLS = re.compile(
    r"gradio_api/(queue/join|queue/data|cancel|reset|startup-events|heartbeat/[A-Za-z0-9]{1,64})|config"
)
_HEADERS = {
    "content-security-policy": "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; media-src 'self' data: blob:; "
    "font-src 'self' data:; "
    "connect-src 'self' data: blob:; worker-src 'self' blob:; object-src 'none'; base-uri 'self'; form-action 'self'; "
    "frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "x-frame-options": "DENY",
}
_ICON = '<link rel="icon" href="data:,">'
"""A browser would ask for one at the root, where there are no pages."""
_OUTSIDE = re.compile(r'<link rel="manifest"[^>]*>|<meta\s[^>]*https?://[^>]*>', re.S)


class Gate:
    """An ASGI application that lets browsers with a session through to the pages.

    Args:
        pages: Gradio's applications below ``/en`` and the like, in one.
        app: The server's, for its public endpoints.
        sessions: Who is there.
        max_file_bytes: The largest file that may be uploaded, and the most in one upload.
    """

    def __init__(self, pages: ASGIApp, app: ASGIApp, sessions: Sessions, max_file_bytes: int) -> None:
        self._pages, self._app, self.sessions, self._max = pages, app, sessions, max_file_bytes
        self._streams = Streams(pages)
        self._open: set[asyncio.Task[Any]] = set()
        self._closing = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or pass it on."""
        if scope["type"] != "http":
            return
        scope = {**scope, "headers": [row for row in scope["headers"] if row[0] != b"x-gradio-server"]}
        request = Request(scope, receive)
        root = scope.get("root_path", "")
        path = scope["path"].removeprefix(root).lstrip("/")
        language, _, below = path.partition("/")
        if language not in LANGUAGES:
            response: Response | None = await self._beside(request, path, root)
        elif not path[len(language) :]:
            response = RedirectResponse(f"{root}/{language}/", 307)
        else:
            response = await self._below(request, language, below)
        if response is not None:
            await response(scope, receive, _with_headers(send))
            return
        await self._pass_on(request, language, below, send)

    def close(self) -> None:
        """Let go of those who would stay for ever, and of what they brought; again does nothing."""
        self._closing = True
        self._streams.close()
        for task in self._open:
            task.cancel()
        self.sessions.close()

    def session_of(self, cookies: Mapping[str, str]) -> Session | None:
        """Whose request it is."""
        return self.sessions.get(cookies.get(COOKIE))

    # What is answered here.

    async def _beside(self, request: Request, path: str, root: str) -> Response | None:
        """Paths that belong to no language."""
        if path == "" and request.method in ("GET", "HEAD"):
            chosen = request.cookies.get(LANGUAGE_COOKIE, "")
            if chosen not in LANGUAGES:
                chosen = preferred(request.headers.get("accept-language", ""))
            headers = {"vary": "accept-language, cookie", "cache-control": "no-store"}
            return RedirectResponse(f"{root}/{chosen}/", 307, headers=headers)
        if path == "enter" and request.method == "POST":
            return await self._enter(request, root)
        if path == "leave" and request.method == "POST":
            return self._leave(request, root)
        return _not_here()

    async def _below(self, request: Request, language: str, below: str) -> Response | None:
        """Paths of a language; None for those that are Gradio's."""
        if below == "" and request.method in ("GET", "HEAD"):
            return await self._page(request, language)
        if _STATIC.fullmatch(below) and request.method in ("GET", "HEAD"):
            return None
        session = self.session_of(request.cookies)
        if session is None:
            return JSONResponse({"error": "the session has ended; load the page again"}, 401)
        if below == "gradio_api/upload" and request.method == "POST":
            return await take_files(request, session, self._max)
        if below == "gradio_api/upload_progress" and request.method == "GET":
            return PlainTextResponse('data: {"msg": "done"}\n\n', media_type="text/event-stream")
        if below.startswith("gradio_api/file=") and request.method in ("GET", "HEAD"):
            return give_file(below.partition("=")[2], session) or _not_here()
        if _CALLS.fullmatch(below):
            return self._other_tab(request, session, below)
        return _not_here()

    async def _page(self, request: Request, language: str) -> Response | None:
        """The entrance where a key is missing; None with a session, which is made where none is needed."""
        session = self.session_of(request.cookies)
        if session is None and await self._fits(None):
            session = self.sessions.new(None)
        if session is None:
            return HTMLResponse(entrance(language), headers={"cache-control": "no-store"})
        request.state.session = session
        return None

    async def _enter(self, request: Request, root: str) -> Response:
        """Begin a session with a key. The header is one that no other site's page may send."""
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not await self._fits(key.strip()):
            return JSONResponse({"entered": False})
        response = JSONResponse({"entered": True})
        _set_cookie(response, COOKIE, self.sessions.new(key.strip()).token, request, root)
        return response

    def _leave(self, request: Request, root: str) -> Response:
        session = self.session_of(request.cookies)
        if session is not None:
            self.sessions.end(session)
        response = RedirectResponse(f"{root}/", 303)
        response.delete_cookie(COOKIE, path=root or "/")
        return response

    async def _fits(self, key: str | None) -> bool:
        """Whether data can be had with that key."""
        if key == "" or (key is not None and not (key.isascii() and key.isprintable())):
            return False
        try:
            await Api(self._app, key).call("models")
        except ApiError as error:
            if error.status in (401, 403):
                return False
        return True

    # What is Gradio's.

    async def _pass_on(self, request: Request, language: str, below: str, send: Send) -> None:
        scope, receive = request.scope, request.receive
        root = scope.get("root_path", "")  # as it is now: what is below changes the scope
        if request.method == "POST":
            body, refused = await self._call_body(request)
            if refused is not None:
                await refused(scope, receive, _with_headers(send))
                return
            receive = _again(body, receive)
        if below == "":
            changed = _Page(request, language)
            await self._pages(scope, receive, changed.collect)
            response = changed.response()
            session: Session = request.state.session
            _set_cookie(response, COOKIE, session.token, request, root)
            _set_cookie(response, LANGUAGE_COOKIE, language, request, root)
            await response(scope, request.receive, _with_headers(send))
            return
        cached = {"cache-control": "public, max-age=86400"} if below.startswith("assets/") else {}
        task = asyncio.current_task()
        assert task is not None
        self._open.add(task)
        try:
            if below == "gradio_api/queue/data":
                page = request.query_params.get("session_hash", "")
                await self._streams.serve(page, scope, receive, _with_headers(send))
            else:
                await self._pages(scope, receive, _with_headers(send, cached))
        except asyncio.CancelledError:
            if not self._closing:
                raise
            with contextlib.suppress(Exception):  # where the response has not begun, there is none
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            self._open.discard(task)
            if below.startswith("gradio_api/heartbeat/"):
                self._streams.leave(below.rpartition("/")[2])

    def _other_tab(self, request: Request, session: Session, below: str) -> Response | None:
        """Refuse what belongs to a page of another session; None where it is this one's."""
        tab = below.partition("heartbeat/")[2] or request.query_params.get("session_hash", "")
        return None if not tab or self.sessions.claim(tab, session) else _not_here()

    async def _call_body(self, request: Request) -> tuple[bytes, Response | None]:
        """What a page sends, or why it is not passed on: too large, no JSON, another's page or file."""
        session, body = self.session_of(request.cookies), bytearray()
        async for block in request.stream():
            body += block
            if len(body) > MAX_CALL_BYTES:
                return b"", JSONResponse({"error": "larger than expected"}, 413)
        try:
            values = json.loads(body)
        except (ValueError, RecursionError):
            return b"", JSONResponse({"error": "expected JSON"}, 400)
        if session is None or not isinstance(values, dict):
            return b"", JSONResponse({"error": "expected an object"}, 400)
        tab = values.get("session_hash")
        if not isinstance(tab, str) or not self.sessions.claim(tab, session):
            return b"", _not_here()
        if any(path not in session.files for path in _paths(values)):
            return b"", JSONResponse({"error": "the file is not here any more; upload it again"}, 400)
        return bytes(body), None


class _Page:
    """Gradio's page, changed: its language is said, and nothing in it names another site."""

    def __init__(self, request: Request, language: str) -> None:
        session: Session = request.state.session
        self._status, self._body, self._language = 200, bytearray(), language
        self._key = "no" if session.key is None else "yes"

    async def collect(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._status = message["status"]
        else:
            self._body += message.get("body", b"")

    def response(self) -> Response:
        text = _OUTSIDE.sub("", self._body.decode()).replace("</head>", _ICON + "</head>", 1)
        tag = LANGUAGES[self._language]
        said = f'<meta name="af-key" content="{self._key}"><meta name="af-language" content="{tag}">'
        text = text.replace("<head>", "<head>" + said, 1)
        text = text.replace('lang="en"', f'lang="{tag}"', 1)
        return HTMLResponse(text, self._status, headers={"cache-control": "no-store"})


def _paths(values: Any) -> Iterator[Any]:
    """All that a call names as files."""
    left = [values]
    while left:
        value = left.pop()
        if isinstance(value, dict):
            if value.get("path") is not None:
                yield value["path"]
            left += value.values()
        elif isinstance(value, list):
            left += value


def _again(body: bytes, receive: Receive) -> Receive:
    """`receive` of a request whose body was read."""
    left: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive_again() -> Message:
        return left.pop() if left else await receive()

    return receive_again


def _set_cookie(response: Response, name: str, value: str, request: Request, root: str) -> None:
    secure = request.headers.get("x-forwarded-proto", request.url.scheme) == "https"
    response.set_cookie(name, value, path=root or "/", httponly=True, samesite="strict", secure=secure)


def _with_headers(send: Send, more: Mapping[str, str] | None = None) -> Send:
    headers = {**_HEADERS, **(more or {})}

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            given = [row for row in message.get("headers", []) if row[0].decode("latin-1").lower() not in headers]
            message = {**message, "headers": [*given, *((k.encode(), v.encode()) for k, v in headers.items())]}
        await send(message)

    return sending


def _not_here() -> Response:
    return JSONResponse({"error": "there is no such path here"}, 404)
