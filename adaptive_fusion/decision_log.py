"""The JSONL log of decisions, and users' ratings in it.

No image and no prompt is kept: only hashes and numbers. Knows records and its own file; nothing of decisions, models or
policies.
"""

import hashlib
import json
import math
import os
import threading
import time
from collections.abc import Mapping
from datetime import datetime
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from adaptive_fusion.checks import integer
from adaptive_fusion.errors import ConfigError
from adaptive_fusion.file_lock import appending
from adaptive_fusion.log_schema import new_record
from adaptive_fusion.times import read_moment

MAX_STRING = 2000
THUMBS = {"up": 1.0, "down": 0.0}
"""Ratings in words."""
_IN_ORDER = 16
"""Files set aside that are renamed at each rotation; with thousands of them that would take longer than a request."""
_WAIT_S = 0.5
"""Longest wait for other writers: a request must not hang on one that was stopped."""


def text_hash(text: str) -> str:
    """SHA-256 of a prompt, hex."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def feedback_record(
    request_id: str,
    rating: float | str,
    *,
    source_id: str | None = None,
    time_s: float | str | datetime = 0.0,
    comment: str | None = None,
) -> dict[str, Any]:
    """A user's opinion of one answer as a log record: ``up``, ``down``, or a rating from 0 to 1.

    Raises:
        ConfigError: For another rating, or a time that cannot be read (see `read_moment`).
    """
    value = THUMBS.get(rating) if isinstance(rating, str) else rating
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ConfigError(f"rating is {rating!r}; expected up, down or a number from 0 to 1")
    return new_record(
        "feedback",
        time_s=read_moment(time_s, "time_s of a rating").seconds,
        request_id=request_id,
        rating=float(value),
        source_id=source_id,
        **({} if comment is None else {"comment": comment}),
    )


def _clean(value: Any) -> Any:
    """JSON has no NaN or infinity; strings are bounded so that no record can flood the log; what JSON has no type for
    becomes text rather than an error in a request."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()[:MAX_STRING]
    if isinstance(value, Mapping):
        return {str(key)[:200]: _clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(item) for item in value]
    if isinstance(value, Integral):  # of NumPy
        return int(value)
    return _clean(float(value)) if isinstance(value, Real) else _clean(str(value))


def _cut_short(handle: int) -> bool:
    """Whether a file ends within a line, as after a kill or on a disk that was full."""
    if os.fstat(handle).st_size == 0:
        return False
    os.lseek(handle, -1, os.SEEK_END)
    return os.read(handle, 1) != b"\n"


class DecisionLog:
    """Appends records to a JSONL file, one ``write`` per record, rotating by size; threads and processes may share it.

    A record is one line, written by one system call under a lock that every writer of the file takes. So no line is
    torn or lost, a rotation happens once, and a kill loses at most the record under way. A full or unwritable disk
    never fails a request: such records are counted in `dropped`. Nor does a writer that hangs: after half a second a
    record is appended without the lock, and without rotating. Where files cannot be renamed the log goes on in the
    one it has, beyond `max_bytes`.

    What `written` counts stays on disk until rotation removes it with the oldest file, `keep` rotations later. To lose
    nothing at all, collect rotated files before that, or let `keep` be large enough.

    Args:
        path: The file; its folder is made if need be.
        max_bytes: Size, at least 1, beyond which the file is set aside as ``path.1`` and a new one begun.
        keep: How many files set aside are kept, at least 1: ``path.1`` is the newest, ``path.2`` the one before, up to
            ``path.16``; what is older keeps the number above that which was free. Of writers with different
            numbers the smallest decides.

    Raises:
        ConfigError: For a `max_bytes` or `keep` below 1.
    """

    def __init__(self, path: str | Path, *, max_bytes: int = 64 << 20, keep: int = 8) -> None:
        self.path = Path(path)
        self.max_bytes, self.keep = integer(max_bytes, "max_bytes", 1), integer(keep, "keep", 1)
        self._begin()

    def write(self, values: Mapping[str, Any]) -> None:
        """Append one record; see the class for what happens when that fails."""
        line = json.dumps(_clean(values), separators=(",", ":"), allow_nan=False).encode() + b"\n"
        if self._pid != os.getpid():
            self._begin()
        with self._lock:
            try:
                try:
                    self._append(line)
                except FileNotFoundError:
                    self.path.parent.mkdir(parents=True, exist_ok=True)
                    self._append(line)
                self.written += 1
            except OSError:
                self.dropped += 1

    def feedback(
        self,
        request_id: str,
        rating: float | str,
        *,
        source_id: str | None = None,
        time_s: float | str | datetime | None = None,
        comment: str | None = None,
    ) -> None:
        """Append a user's rating of the answer with that `request_id` (``reply.decision.request_id``).

        Args:
            request_id: Of the decision; learning joins the rating to it.
            rating: ``up``, ``down`` or a number from 0 to 1.
            source_id: Who rates, as a pseudonym: of each one's ratings of a request the last counts.
            time_s: Seconds since the epoch, or another form that `read_moment` reads; now, if left out.
            comment: What they wrote. It is content, which the log has none of else: only where that is wanted.

        Raises:
            ConfigError: For another rating, or a time that cannot be read.
        """
        now = time.time() if time_s is None else time_s
        self.write(feedback_record(request_id, rating, source_id=source_id, time_s=now, comment=comment))

    def _begin(self) -> None:
        """Each process counts its own, with a lock of its own: a fork may have copied one that was held."""
        self.written = 0
        self.dropped = 0
        self._next = _IN_ORDER + 1  # the first number that may be free behind those in order
        self._pid, self._lock = os.getpid(), threading.Lock()

    def _append(self, line: bytes) -> None:
        may_rotate = True
        while True:
            with appending(self.path, _WAIT_S) as file:
                size = os.fstat(file.handle).st_size
                if may_rotate and file.held and size and size + len(line) > self.max_bytes:
                    file.before_rename()
                    may_rotate = self._rotate()
                    continue
                if _cut_short(file.handle):
                    line = b"\n" + line  # else this record would be lost with the torn one
                if os.write(file.handle, line) != len(line):
                    raise OSError("short write")
                return

    def _rotate(self) -> bool:
        """Set the file aside; whether that was done. Called by its only writer.

        Names move from the last to the first, each to a free one, so that a kill in between leaves a gap and loses
        nothing; the next rotation closes it.
        """
        name = os.fspath(self.path)
        moved = min(self.keep, _IN_ORDER)
        last = 0
        while last < moved and os.path.lexists(f"{name}.{last + 1}"):
            last += 1
        try:
            if last == moved:
                last -= 1
                if self.keep > moved:
                    os.replace(f"{name}.{moved}", self._stays(name))
            for index in range(last, 0, -1):
                os.replace(f"{name}.{index}", f"{name}.{index + 1}")
            beyond = self.keep + 1  # left from a larger `keep`
            while os.path.lexists(f"{name}.{beyond}"):
                os.unlink(f"{name}.{beyond}")
                beyond += 1
            os.replace(name, f"{name}.1")
        except OSError:
            return False
        return True

    def _stays(self, name: str) -> str:
        """A free name behind those in order, or else the one there that was written to longest ago."""
        while self._next <= self.keep and os.path.lexists(f"{name}.{self._next}"):
            self._next += 1
        if self._next <= self.keep:
            return f"{name}.{self._next}"
        names = [f"{name}.{index}" for index in range(_IN_ORDER + 1, self.keep + 1)]
        return next((free for free in names if not os.path.lexists(free)), None) or min(names, key=os.path.getmtime)
