"""A client's side of a request: its body as it comes, and whether the client is still there.

A client that goes away ends what is done for it. Knows ASGI's messages. Must not know of engines.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive, Send

from adaptive_fusion.serving.http import BODY_S, too_large, too_slow, unless, until_gone


class Incoming:
    """A request's body as it comes, and whether its client is still there."""

    def __init__(self, receive: Receive) -> None:
        self._receive, self._read, self._answered = receive, asyncio.Event(), False

    def answering(self, send: Send) -> Send:
        """`send`, such that a client which goes away once it has all of its answer goes away too late to matter."""

        async def sending(message: Message) -> None:
            self._answered |= message["type"] == "http.response.body" and not message.get("more_body", False)
            await send(message)

        return sending

    async def pieces(self) -> AsyncIterator[bytes]:
        """The body, not gathered.

        Raises:
            ClientDisconnect: If the client goes away before its end.
        """
        more = True
        while more:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            more = message.get("more_body", False)
            if message.get("body"):
                yield message["body"]
        self._read.set()

    async def whole(self, max_mib: int, grown: Callable[[int], None]) -> bytes:
        """The body, gathered.

        Args:
            max_mib: The largest that is read.
            grown: Told of each piece how many bytes there are now; may refuse them.

        Raises:
            Refusal: 413 if it is larger, 408 if it takes longer than `BODY_S`.
            ClientDisconnect: If the client goes away.
        """
        body = bytearray()
        try:
            async with asyncio.timeout(BODY_S):
                async for piece in self.pieces():
                    if len(body) + len(piece) > max_mib << 20:
                        raise too_large(max_mib)
                    grown(len(body) + len(piece))
                    body += piece
        except TimeoutError:
            raise too_slow() from None
        return bytes(body)

    async def gone(self) -> None:
        """Wait until the client goes away after its body was read."""
        await self._read.wait()
        await until_gone(self._receive)
        if self._answered:  # what is left to be done is not the client's
            await asyncio.get_running_loop().create_future()

    async def while_there(self, work: Awaitable[Any]) -> None:
        """Do `work`; it is cancelled once the client has gone.

        Raises:
            ClientDisconnect: If it has.
        """
        await unless(self.gone(), work)
