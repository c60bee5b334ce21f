"""A connection's turn: one thread at a time, and whatever SQLite says becomes the library's own error.

Knows SQLite's errors. Must not know what is read or written in a turn.
"""

import sqlite3
import threading
from types import TracebackType

from adaptive_fusion.errors import RolloutFileError


class Turn:
    """To be used with ``with``; a thread that has it may take it again. Each request takes a few, so it is a class and
    no generator, which would cost more than what is done inside.

    Args:
        name: Of the file, for people.

    Raises:
        RolloutFileError: At its end, for whatever SQLite says inside.
    """

    __slots__ = ("_lock", "_name")

    def __init__(self, name: str) -> None:
        self._lock, self._name = threading.RLock(), name

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()
        if isinstance(error, sqlite3.Error):
            raise RolloutFileError(f"{self._name} cannot be read or written ({error})") from error
