"""Connections: how many there may be, how long a request's head may take and an answer may lie unread, and what is no
HTTP gets an answer like all others.

Knows uvicorn's protocol. Must not know of routes, bodies (`http`) or what is served.
"""

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from adaptive_fusion.serving.refusals import Refusal, error_response

MAX_CONNECTIONS = 800
"""Below the 1,024 files that a process may have open by default."""
BACKLOG = 128
"""Connections that are taken from the kernel at a time; the others wait there. More would count here long before it is
seen that their clients have gone."""
HEAD_S = 10.0
"""How long a request's head may take from the moment it is waited for."""
MAX_HEAD = 64 << 10
"""Bytes of a head."""
UNREAD_S, UNREAD_RATE = 30.0, 16 << 10
"""How long what was sent may lie unread: so many seconds, and one more for each so many bytes."""


class Connection(H11Protocol):
    """One connection. Between two requests uvicorn's time for idle ones holds; in a request those of `http` do."""

    _late: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None
    _begun = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Somebody came."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(0)  # whoever sends waits until all that it sent before has gone
        if len(self.connections) > MAX_CONNECTIONS:
            refusal = f"there are {MAX_CONNECTIONS} connections, the most there may be; try again later"
            self._refuse(Refusal(refusal, 503, code="too_many_connections", retry_s=1.0))
        else:
            self._await_head()

    def data_received(self, data: bytes) -> None:
        """A piece came."""
        if self.transport.is_closing():
            return
        self._begun = True
        super().data_received(data)
        if self.cycle is None or self.cycle.response_complete:
            self._await_head()
        else:
            self._forget()

    def connection_lost(self, exc: Exception | None) -> None:
        """It is over."""
        self._forget()
        self.resume_writing()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """The client's side takes no more for now."""
        super().pause_writing()
        if self._unread is None:
            most = UNREAD_S + self.transport.get_write_buffer_size() / UNREAD_RATE
            # Also a closed connection stays until it is empty. Cut off, whoever sends is told that the client has gone.
            self._unread = self.loop.call_later(most, self.transport.abort)

    def resume_writing(self) -> None:
        """All has gone."""
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None
        super().resume_writing()

    def on_response_complete(self) -> None:
        """A response is out; the next head may take as long as the first."""
        super().on_response_complete()
        self._begun = False

    def send_400_response(self, msg: str) -> None:
        """What came is no HTTP."""
        self._refuse(Refusal("the request is no HTTP that can be read", code="invalid_http"))

    def _await_head(self) -> None:
        if self._late is None and not self.transport.is_closing():
            self._late = self.loop.call_later(HEAD_S, self._too_slow)

    def _forget(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _too_slow(self) -> None:
        self._late = None
        if self._begun:
            said = f"the head of the request took longer than {HEAD_S:g} s; expected it sooner"
            self._refuse(Refusal(said, 408, code="head_too_slow"))
        else:  # who said nothing is told nothing
            self.transport.close()

    def _refuse(self, refusal: Refusal) -> None:
        """Answer and hang up; in the middle of a response only the latter."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            response = error_response(refusal)
            headers = [*response.raw_headers, (b"connection", b"close")]
            for event in (
                h11.Response(status_code=response.status_code, headers=headers),
                h11.Data(data=bytes(response.body)),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
