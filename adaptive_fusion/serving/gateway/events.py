"""Server-sent events in the pieces in which they come: put together, and passed on whole.

Lines end with LF, CR or CRLF, as the standard has it (WHATWG HTML, section 9.2). Knows bytes. Must not know what events
say.
"""

import re
from collections.abc import Iterator

MOST_HELD = 1 << 20
"""Bytes of an event that are kept until its end comes."""
_LINE_END = rb"(?:\r\n|\n|\r(?!\n))"
_END = re.compile(_LINE_END + _LINE_END)
_SILENT = re.compile(rb"(?:(?::[^\r\n]*)?" + _LINE_END + rb")*")
"""Comments and empty lines, which are no part of any event."""
_ENDINGS = (b"\n\n", b"\n\r\n", b"\n\r", b"\r\r")


class Events:
    """Server-sent events put together from the pieces in which they come."""

    def __init__(self) -> None:
        self._rest = b""

    @property
    def rest(self) -> bytes:
        """The beginning of an event whose end has not come."""
        return self._rest

    def feed(self, piece: bytes) -> Iterator[bytes]:
        """Whole events with their ends."""
        data = self._rest + piece
        at = 0
        for found in _END.finditer(data, max(0, len(self._rest) - 3)):
            yield data[at : found.end()]
            at = found.end()
        self._rest = data[at:]


class Whole:
    """Lets a stream pass up to the end of an event, so that one whose end never comes was never begun.

    Nobody can use half an event, so nothing is late by it. Every byte passes in its order; a piece that ends with an
    event passes as it is. Of an event beyond `MOST_HELD` the beginning passes too, and from there on every piece.
    """

    def __init__(self) -> None:
        self._held = b""
        self._gave_up = False

    @property
    def is_open(self) -> bool:
        """Whether what has passed may end within an event."""
        return self._gave_up

    def feed(self, piece: bytes) -> bytes:
        """What may pass now that a piece has come."""
        if self._gave_up or (not self._held and piece.endswith((b"\n\n", b"\n\r\n"))):
            return piece
        data, begin = self._held + piece, max(0, len(self._held) - 3)
        at = max(found + len(mark) if (found := data.rfind(mark, begin)) >= 0 else 0 for mark in _ENDINGS)
        silent = _SILENT.match(data, at)
        at = silent.end() if silent is not None else at
        self._gave_up = len(data) - at > MOST_HELD
        if self._gave_up:
            at = len(data)
        self._held = data[at:]
        return data[:at]

    def rest(self) -> bytes:
        """What is left of a stream that ended as it should."""
        held, self._held = self._held, b""
        return held


def data_of(event: bytes) -> bytes | None:
    """The data of an event that has it in one line; None for others."""
    lines = [line for line in event.splitlines() if line.startswith(b"data:")]
    return lines[0][5:].strip() if len(lines) == 1 else None
