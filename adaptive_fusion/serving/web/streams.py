"""What Gradio tells a page, past the page's connections.

A page closes its stream of events when the last answer that it waits for is there, and opens another for the next
call. Gradio takes the end of a connection for the end of the page and drops the calls that came meanwhile, so that a
page on a busy machine now and then waits for ever. Here Gradio sees one stream for as long as the page lives, and what
it says waits for the page's next connection.

Knows ASGI and names of pages. Must not know of sessions or what is said.
"""

import asyncio
from collections import deque
from contextlib import suppress

from starlette.types import ASGIApp, Message, Receive, Scope, Send

AWAY_S = 15.0
"""How long a page may be without a connection before Gradio is told that it has gone."""


class Streams:
    """The streams of all pages; used on the event loop alone.

    Args:
        app: Gradio's.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._streams: dict[str, _Stream] = {}

    async def serve(self, page: str, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a connection of `page` with what there is and what comes, until either side ends it."""
        stream = self._streams.get(page)
        if stream is None or stream.ended:
            stream = self._streams[page] = _Stream(self._app, scope)
        await stream.deliver(receive, send)
        if stream.ended and self._streams.get(page) is stream:
            del self._streams[page]

    def leave(self, page: str) -> None:
        """The page was closed."""
        if (stream := self._streams.pop(page, None)) is not None:
            stream.end()

    def close(self) -> None:
        """All pages are."""
        for page in list(self._streams):
            self.leave(page)


class _Stream:
    """One stream of Gradio's, and the connection that it is delivered to, of several the last."""

    def __init__(self, app: ASGIApp, scope: Scope) -> None:
        self.ended = False
        self._waiting: deque[Message] = deque()
        self._start: Message | None = None
        self._news, self._gone = asyncio.Event(), asyncio.Event()
        self._asked = False
        self._reader: object | None = None
        self._task = asyncio.create_task(self._run(app, {**scope}))
        self._task.add_done_callback(lambda done: done.cancelled() or done.exception())  # looked at

    async def deliver(self, receive: Receive, send: Send) -> None:
        """Send what there is to a connection until it ends, or another takes its place."""
        me = self._reader = object()
        self._news.set()
        away = asyncio.ensure_future(_until_gone(receive))
        away.add_done_callback(lambda _: self._news.set())
        begun = complete = False
        try:
            while self._reader is me and not away.done() and not complete:
                if self._start is not None and not begun:
                    begun = True
                    await send(self._start)
                elif begun and self._waiting:
                    message = self._waiting.popleft()
                    complete = not message.get("more_body")
                    await send(message)
                elif self.ended:
                    break
                else:
                    self._news.clear()
                    await self._news.wait()
            if begun and not complete and not away.done():
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            away.cancel()
            with suppress(asyncio.CancelledError):
                await away
            if self._reader is me:
                self._reader = None
                asyncio.get_running_loop().call_later(AWAY_S, self._end_if_alone)

    def end(self) -> None:
        """Tell Gradio that the page has gone."""
        self._gone.set()

    def _end_if_alone(self) -> None:
        if self._reader is None:
            self.end()

    async def _run(self, app: ASGIApp, scope: Scope) -> None:
        try:
            await app(scope, self._receive, self._send)
        finally:
            self.ended = True
            self._news.set()

    async def _receive(self) -> Message:
        if not self._asked:
            self._asked = True
            return {"type": "http.request", "body": b"", "more_body": False}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._start = message
        else:
            self._waiting.append(message)
        self._news.set()


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
