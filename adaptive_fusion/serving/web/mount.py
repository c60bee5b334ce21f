"""The web UI below ``/ui`` of an application: built, guarded, and ended with it.

Knows Gradio and the application's life. Must not know of runners or of what the pages show.
"""

import contextlib
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read where gradio is imported; nothing is told to anybody

import gradio as gr
from fastapi import FastAPI
from starlette.responses import RedirectResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from adaptive_fusion.serving.web.gate import Gate
from adaptive_fusion.serving.web.page import blocks_of, script, style, theme
from adaptive_fusion.serving.web.sessions import Sessions
from adaptive_fusion.serving.web.texts import LANGUAGES
from adaptive_fusion.serving.web.web import Web

PATH = "/ui"


class Pages:
    """The pages as an ASGI application.

    Args:
        app: Has the public endpoints: a server's or a gateway's.
        max_file_bytes: Most bytes of an upload.
        path: Below which they are found.
    """

    def __init__(self, app: ASGIApp, max_file_bytes: int = 32 << 20, path: str = PATH) -> None:
        self._path, self.sessions = path, Sessions()
        self._pages = _gradio(app, self.sessions, max_file_bytes)
        self._gate = Gate(self._pages, app, self.sessions, max_file_bytes)

    def has(self, path: str) -> bool:
        """Whether a path of the application is one of the pages'."""
        return path == self._path or path.startswith(f"{self._path}/")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request whose path is the application's."""
        below = scope.get("root_path", "") + self._path
        if scope["path"] == below:
            await RedirectResponse(f"{below}/", 307)(scope, receive, send)
        else:
            await self._gate({**scope, "root_path": below}, receive, send)

    @contextlib.asynccontextmanager
    async def life(self) -> AsyncIterator[None]:
        """They live as long as this context."""
        async with self._pages.router.lifespan_context(self._pages):
            try:
                yield
            finally:
                self.close()

    def close(self) -> None:
        """Let go of browsers, which would stay for ever."""
        self._gate.close()


def mount_ui(app: FastAPI, max_file_bytes: int = 32 << 20, path: str = PATH) -> Pages:
    """Put the pages below `path` of an application that has the public endpoints; they live as long as it does.

    Args:
        app: FastAPI's or Starlette's.
        max_file_bytes: Most bytes of an upload.
        path: Where.
    """
    pages = Pages(app, max_file_bytes, path)
    before = app.router.lifespan_context

    @contextlib.asynccontextmanager
    async def life(outer: FastAPI) -> AsyncIterator[Any]:
        async with before(outer) as state, pages.life():
            yield state

    app.router.lifespan_context = life
    app.router.routes += [Route(path, pages), Route(path + "/{below:path}", pages)]
    return pages


def _gradio(app: ASGIApp, sessions: Sessions, max_file_bytes: int) -> FastAPI:
    """Gradio's own applications, one a language, in one."""
    pages = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    with _temporary(sessions.folder):
        for language in LANGUAGES:
            blocks = blocks_of(Web(app, sessions, language))
            blocks.queue(default_concurrency_limit=8, max_size=256, api_open=False)
            gr.mount_gradio_app(
                pages, blocks, f"/{language}", theme=theme(), css=style(), head=script(), footer_links=[],
                run_history=False, show_error=False, ssr_mode=False, enable_monitoring=False, mcp_server=False,
                max_file_size=max_file_bytes, allowed_paths=[], pwa=False,
            )  # fmt: skip
    return pages


@contextlib.contextmanager
def _temporary(folder: Path) -> Iterator[None]:
    """Gradio's own folder for files, which it reads from the environment as its parts are made."""
    before = os.environ.get("GRADIO_TEMP_DIR")
    os.environ["GRADIO_TEMP_DIR"] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ["GRADIO_TEMP_DIR"]
        else:
            os.environ["GRADIO_TEMP_DIR"] = before
