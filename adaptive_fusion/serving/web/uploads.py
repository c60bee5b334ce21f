"""Files that a browser brings, and gives back to the same session only.

Knows multipart bodies, sessions and files. Must not know what the files show.
"""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response

from adaptive_fusion.serving.web.sessions import Session

MAX_FILES = 32
UPLOAD_S = 60.0
"""How long an upload may take."""
SHOWN = (
    "image/png",
    "image/jpeg",
    "image/webp",
    "image/gif",
    "image/bmp",
    "video/mp4",
    "video/webm",
    "video/quicktime",
)
"""Kinds of files that a browser may show; others are given back as bytes to keep."""
_BESIDE = 1 << 16
"""Bytes of a body that are no file's."""


async def take_files(request: Request, session: Session, most: int) -> Response:
    """Keep the files of an upload of at most `most` bytes; the response lists the names by which the page knows them.

    Which kinds may be asked about is the server's to say, when they are.
    """
    try:
        async with asyncio.timeout(UPLOAD_S):
            form = await MultiPartParser(request.headers, _limited(request, most), max_files=MAX_FILES).parse()
            try:
                files = [file for _, file in form.multi_items() if not isinstance(file, str)]
                return JSONResponse([await _kept(file, session) for file in files])
            finally:
                await form.close()
    except TimeoutError:
        return PlainTextResponse(f"the upload took longer than {UPLOAD_S:g} s; expected it sooner", 408)
    except _TooLarge:
        return PlainTextResponse(f"the upload is larger than {most >> 20} MiB; expected less", 413)
    except (MultiPartException, KeyError):
        return PlainTextResponse(f"the upload cannot be read; expected at most {MAX_FILES} files", 400)
    except ClientDisconnect:
        return Response(status_code=499)


def give_file(path: str, session: Session) -> Response | None:
    """A file that the session brought; None for anything else."""
    known = next((name for name in (path, f"/{path}") if name in session.files), None)
    if known is None:
        return None
    response = FileResponse(known)
    if response.media_type not in SHOWN:
        response = FileResponse(known, media_type="application/octet-stream", filename=known.rpartition("/")[2])
    response.headers["cache-control"] = "private, no-store"
    return response


class _TooLarge(Exception):
    pass


async def _limited(request: Request, most: int) -> AsyncGenerator[bytes, None]:
    size = 0
    async for block in request.stream():
        size += len(block)
        if size > most + _BESIDE:
            raise _TooLarge
        yield block


async def _kept(file: Any, session: Session) -> str:
    path = session.new_file(file.filename or "file")
    with path.open("wb") as out:
        while block := await file.read(1 << 20):
            out.write(block)
    session.add(path)
    return str(path)
