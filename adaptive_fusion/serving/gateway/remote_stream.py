"""The stream that `Remote.stream` gives back: pieces of text, and the reply once they have ended.

Knows texts and when they end. Must not know of requests or engines.
"""

import threading
from collections.abc import Callable, Generator, Iterator

from adaptive_fusion.reply import Reply


class RemoteStream:
    """Pieces of an answer as they come; `reply` once it has ended. Closing it ends the request.

    Args:
        pieces: Texts; closing it ends the request.
        finish: Makes the reply, once all have come.
    """

    def __init__(self, pieces: Generator[str, None, None], finish: Callable[[], Reply]) -> None:
        self._pieces, self._finish = pieces, finish
        self._reply: Reply | None = None
        self._lock = threading.Lock()

    def __iter__(self) -> Iterator[str]:
        yield from self._pieces
        with self._lock:
            if self._reply is None:
                self._reply = self._finish()

    @property
    def reply(self) -> Reply:
        """The finished reply; reads what is left of the stream.

        Raises:
            UpstreamError: If the stream broke off or was closed before its end.
        """
        for _ in self:
            pass
        assert self._reply is not None
        return self._reply

    def close(self) -> None:
        """End the request, whatever of it is left."""
        self._pieces.close()
