"""The server's own log: one JSON object a line, with names and numbers and nothing that a caller wrote.

A line is ASCII: line breaks, terminal codes and halves of characters in a value are escaped, so that no value can begin
a line of its own. Only the fields named here can be logged; there is none for prompts, media, their addresses or keys.
Writing never fails a request. Knows names and numbers. Must not know of HTTP or decisions.
"""

import json
import math
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, TextIO

from adaptive_fusion.errors import ConfigError

FIELDS = (
    "request_id", "route", "method", "status", "error", "finish_reason", "stream", "ms", "queue_ms", "ttft_ms",
    "latency_ms", "predicted_ms", "lane", "plan", "policy", "feasible", "met", "escalated", "batch", "media",
    "prompt_tokens", "new_tokens", "visual_tokens", "visual_tokens_native", "would_plan", "would_save_tokens",
    "waiting", "reason", "model", "version", "host", "port", "seconds",
)  # fmt: skip
"""What a line may say, beside its time and event."""
_KNOWN = frozenset(FIELDS)
_LONGEST = 200


class AccessLog:
    """Writes a line per event to a stream; thread-safe.

    Args:
        stream: Where to; None is standard error.
        clock: Seconds since the epoch.
    """

    def __init__(self, stream: TextIO | None = None, *, clock: Callable[[], float] = time.time) -> None:
        self._stream, self._clock, self._lock = stream, clock, threading.Lock()
        self.lost = 0

    def write(self, event: str, /, **fields: Any) -> None:
        """One line: the time, what happened, and fields of `FIELDS` (None is left out).

        A line that cannot be written, the disk being full, is counted in `lost`.

        Raises:
            ConfigError: For a field that no line has.
        """
        if unknown := sorted(fields.keys() - _KNOWN):
            raise ConfigError(f"log fields {unknown} are not known; expected some of {', '.join(FIELDS)}")
        line = json.dumps({"time_s": round(self._clock(), 3), "event": _plain(event), **_all_plain(fields)}) + "\n"
        with self._lock:
            try:
                stream = self._stream if self._stream is not None else sys.stderr
                stream.write(line)
                stream.flush()
            except (OSError, ValueError):  # a full disk; a stream that was closed
                self.lost += 1


def _all_plain(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _plain(value) for name, value in fields.items() if value is not None}


def _plain(value: Any) -> Any:
    """A number, a truth value or a short text; a number that JSON has not is null."""
    if isinstance(value, bool):
        return value
    if isinstance(value, int):
        return value if abs(value) < 1 << 63 else None
    if isinstance(value, float):
        return round(value, 3) if math.isfinite(value) else None
    return str(value)[:_LONGEST]
