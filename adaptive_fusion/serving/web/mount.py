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
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from adaptive_fusion.serving.web.gate import Gate
from adaptive_fusion.serving.web.page import blocks_of, script, style, theme
from adaptive_fusion.serving.web.sessions import Sessions
from adaptive_fusion.serving.web.texts import LANGUAGES
from adaptive_fusion.serving.web.web import Web

PATH = "/ui"


def mount_ui(app: FastAPI, max_file_bytes: int = 32 << 20, path: str = PATH) -> Gate:
    """Put the pages below `path` of an application that has the public endpoints; they live as long as it does.

    Args:
        app: A server's or a gateway's.
        max_file_bytes: Most bytes of an upload.
        path: Where.
    """
    sessions = Sessions()
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
    gate = Gate(pages, app, sessions, max_file_bytes)
    before = app.router.lifespan_context

    @contextlib.asynccontextmanager
    async def life(outer: FastAPI) -> AsyncIterator[Any]:
        async with before(outer) as state, pages.router.lifespan_context(pages):
            try:
                yield state
            finally:
                gate.close()

    app.router.lifespan_context = life
    app.add_route(path, _to_pages, include_in_schema=False)
    app.mount(path, gate)
    return gate


async def _to_pages(request: Request) -> Response:
    return RedirectResponse(f"{request.url.path}/", 307)


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
