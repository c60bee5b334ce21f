"""A rollout's file as SQLite has it: opened by each process for itself, used by one thread at a time, changed whole.

Knows SQLite, its settings and its errors. Must not know what is read or written.
"""

import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from adaptive_fusion.errors import ConfigError, RolloutFileError
from adaptive_fusion.rollout.tables import SCHEMA, to_newest, version_of

BUSY_MS = 2000
"""How long a write waits for another process's."""
PAGE_BYTES = 1024
"""Of a new file. What is written of a page, that is little, is written as a whole page, so small ones are quick."""
CHECKPOINT_PAGES = 8_000
"""Of the log before they go into the file, where a page that was written often goes once: 8 MiB."""


class Turn:
    """A thread's turn with the connection, for ``with``; who has it may take it again. Each request takes a few, so it
    is a class: a generator would cost more than what is done inside.

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


class Connection:
    """A process's connection to the file; threads share it.

    Args:
        path: The file; its folder is made if need be.

    Raises:
        ConfigError: If it cannot be opened, or is of another version.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._turn = Turn(self.path.name)
        self._connect()

    def _connect(self) -> None:
        name = self.path.name
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._pid = os.getpid()
            self._db = sqlite3.connect(
                self.path, timeout=BUSY_MS / 1e3, isolation_level=None, check_same_thread=False, cached_statements=64
            )
            self._db.execute(f"PRAGMA page_size={PAGE_BYTES}")
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute(f"PRAGMA wal_autocheckpoint={CHECKPOINT_PAGES}")
            self._db.execute("PRAGMA synchronous=NORMAL")
            if (version := version_of(self._db)) not in range(SCHEMA + 1):
                raise ConfigError(f"{name} is of version {version}; expected {SCHEMA}")
            if version < SCHEMA:
                with self.changing():
                    to_newest(self._db)
        except (OSError, sqlite3.Error) as error:
            raise ConfigError(f"{name} cannot be used as a rollout's file ({error}); expected one to write") from error
        self._version = -1

    @contextmanager
    def changing(self) -> Iterator[None]:
        """A transaction that nobody else writes in; what is done inside holds together, and is on the disk after.

        Raises:
            RolloutFileError: If it cannot be; then nothing was done.
        """
        with self._turn:
            if self._db.in_transaction:  # inside another
                yield
                return
            self._db.execute("PRAGMA synchronous=FULL")
            try:
                self._db.execute("BEGIN IMMEDIATE")
                try:
                    yield
                    self._db.execute("COMMIT")
                except BaseException:
                    if self._db.in_transaction:  # SQLite itself ends some of them, as on a full disk
                        self._db.execute("ROLLBACK")
                    raise
            finally:
                self._db.execute("PRAGMA synchronous=NORMAL")

    def changed(self) -> bool:
        """Whether another process has written since the last look."""
        with self._turn:
            if self._pid != os.getpid():  # a fork must not use its parent's connection
                self._connect()
            version = self._db.execute("PRAGMA data_version").fetchone()[0]
            before, self._version = self._version, version
            return bool(version != before)

    def close(self) -> None:
        """Let the file go."""
        with self._turn:
            self._db.close()
