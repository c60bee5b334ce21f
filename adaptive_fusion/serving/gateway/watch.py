"""What an answer took as its client sees it, from the bytes that pass by and are not changed.

Of streams the time to the first piece that says something, of all the time to the end; lengths from the engine's own
usage where it is told, else by counting events. Knows bytes and times. Must not know of plans or HTTP.
"""

import math
import re
import zlib
from collections.abc import Callable, Iterator
from typing import Any

from adaptive_fusion.control.upstream import measured_from_outside
from adaptive_fusion.decisions import Measurement

_SAYS = re.compile(rb'"(?:content|reasoning_content|reasoning|text|arguments)"\s*:\s*"(?!")')
_USAGE = {
    name: re.compile(rb'"' + name.encode() + rb'"\s*:\s*(\d{1,9})')
    for name in ("completion_tokens", "prompt_tokens", "image_tokens")
}
_FINISH = re.compile(rb'"finish_reason"\s*:\s*"(\w{1,20})"')
_ZLIB_OR_GZIP = 47
"""zlib's number for either, told apart by how it begins."""
MOST_PLAIN = 64 << 10
"""Bytes that are unpacked at a time, however many a packed piece stands for."""
TAIL = 16 << 10
"""Bytes of the end of an answer in which its usage is looked for."""


class Watch:
    """Watches one answer.

    Args:
        clock: Seconds, monotonic.
        arrived_s: When the request came.
        stream: Whether it comes in events.
    """

    def __init__(self, clock: Callable[[], float], arrived_s: float, stream: bool) -> None:
        self._clock, self._arrived_s, self.stream = clock, arrived_s, stream
        self.first_ms = math.nan
        self.last_ms = math.nan
        self.pieces = self.size = self._events = 0
        self._tail = b""
        self._packed: Any = None
        self.is_readable = True

    def encoded(self, how: bytes) -> None:
        """Its bytes are packed, as the header ``content-encoding`` says; empty where they are not. Of what cannot be
        unpacked here nothing but the times is known, and its end is taken for one."""
        self.is_readable = how in (b"", b"gzip", b"x-gzip", b"deflate")
        self._packed = zlib.decompressobj(_ZLIB_OR_GZIP) if how and self.is_readable else None

    @property
    def elapsed_ms(self) -> float:
        """Milliseconds since the request came."""
        return (self._clock() - self._arrived_s) * 1e3

    def saw(self, piece: bytes) -> None:
        """A piece passed by."""
        self.pieces += 1
        self.size += len(piece)
        for part in self._plain(piece):
            self._heard(part)

    def _plain(self, piece: bytes) -> Iterator[bytes]:
        """A piece unpacked, no more of it at a time than is looked at."""
        if self._packed is None:
            yield piece
            return
        while piece:
            try:
                plain = self._packed.decompress(piece, MOST_PLAIN)
            except zlib.error:
                self._packed, self.is_readable = None, False
                yield piece
                return
            yield plain
            piece = self._packed.unconsumed_tail

    def _heard(self, piece: bytes) -> None:
        if self.stream and not self.is_readable:
            self.first_ms = self.elapsed_ms if math.isnan(self.first_ms) else self.first_ms
        elif self.stream:
            said = len(_SAYS.findall(piece))
            self._events += said
            if said and math.isnan(self.first_ms):
                self.first_ms = self.elapsed_ms
        self._tail = piece[-TAIL:] if len(piece) >= TAIL else (self._tail + piece)[-TAIL:]

    def ended(self) -> None:
        """The last piece has passed."""
        self.last_ms = self.elapsed_ms

    def count(self, name: str) -> int | None:
        """A number of the usage by its name; None where it was not told."""
        found = _USAGE[name].findall(self._tail)
        return int(found[-1]) if found else None

    @property
    def finish_reason(self) -> str | None:
        """Why the answer ended, as the engine says."""
        found = _FINISH.findall(self._tail)
        return found[-1].decode() if found else None

    @property
    def is_done(self) -> bool:
        """Whether the engine said that the answer is over; of what cannot be read it is believed."""
        return not self.is_readable or self.finish_reason is not None or self._tail.rstrip().endswith(b"[DONE]")

    def measured(self, visual_tokens: int, prompt_tokens: int, expected_tokens: float) -> Measurement:
        """What it took; what the engine did not tell is as it was predicted."""
        new = self.count("completion_tokens") or self._events or max(1, round(expected_tokens))
        prompt, shown = self.count("prompt_tokens"), self.count("image_tokens")
        return measured_from_outside(
            self.first_ms,
            self.last_ms,
            visual_tokens if shown is None else shown,
            prompt_tokens if prompt is None else prompt,
            new,
        )
