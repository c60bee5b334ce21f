"""One writer at a time to a file that is appended to and renamed, among threads, processes and forks of them; and files
that are written whole or not at all.

Knows files and locks. Must not know what is written.

Where the system has it, the lock is an advisory one (`flock`) on the file itself: it ends with its holder, however
that dies, and leaves nothing behind. Elsewhere, or on a file system without such locks, a file ``NAME.lock`` made
exclusively beside it stands for the lock; one older than `STALE_S` seconds is taken for a dead process's.
Nobody waits for ever: who does not get the lock in time is told so.
"""

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None

STALE_S = 10.0
"""Age in seconds from which a ``NAME.lock`` is nobody's: it is held for milliseconds."""
_FLAGS = os.O_RDWR | os.O_APPEND | os.O_CREAT | getattr(os, "O_BINARY", 0)
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 20e-6, 1e-3


@dataclass
class Appending:
    """A file open for reading and appending.

    Attributes:
        handle: Its descriptor.
        held: Whether this is its only writer, and the file still the one of that name.
        claim: The file that stands for the lock, where there is no `flock`.
    """

    handle: int
    held: bool
    claim: str | None = None

    def before_rename(self) -> None:
        """Close the file where an open one may not be renamed, which is where there is no `flock`."""
        if self.claim is not None:
            os.close(self.handle)
            self.handle = -1


def write_whole(path: Path, text: str) -> Path:
    """Replace a file's text and return its path; its folder is made if need be. A reader sees the old file or the new
    one, never half of one, whenever the process dies.

    Raises:
        OSError: If the folder cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=path.suffix)
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return path


@contextmanager
def appending(path: str | Path, wait_s: float) -> Iterator[Appending]:
    """Open a file for appending, made if need be, as its only writer.

    Args:
        path: The file. Its folder must be there.
        wait_s: How long to wait for other writers; afterwards it is opened all the same, with `held` false.

    Raises:
        OSError: If it cannot be opened.
    """
    name, until = os.fspath(path), time.monotonic() + wait_s
    found = _flocked(name, until) or _claimed(name, until)
    try:
        yield found
    finally:
        if found.claim is None:
            _unlock(found.handle)
        if found.handle >= 0:
            os.close(found.handle)
        if found.claim is not None and found.held:
            _remove(found.claim)


def settled_size(handle: int, wait_s: float) -> int:
    """Size in bytes of an open file at a moment when no writer was in the middle of a record."""
    if fcntl is None:
        return os.fstat(handle).st_size
    shared = fcntl.LOCK_SH | fcntl.LOCK_NB
    with suppress(OSError):  # without locks the size of any moment has to do
        _wait(lambda: fcntl.flock(handle, shared), time.monotonic() + wait_s)
    size = os.fstat(handle).st_size
    _unlock(handle)
    return size


def _flocked(name: str, until: float) -> Appending | None:
    """The file with its own lock; None where there is no such lock."""
    if fcntl is None:
        return None
    exclusive = fcntl.LOCK_EX | fcntl.LOCK_NB
    while True:
        handle = os.open(name, _FLAGS, 0o600)
        try:
            held = _wait(lambda handle=handle: fcntl.flock(handle, exclusive), until)  # type: ignore[misc]
        except OSError:
            os.close(handle)
            return None
        if not held or _is_at(handle, name):
            return Appending(handle, held)
        _unlock(handle)
        if time.monotonic() >= until:  # renamed again and again; what is appended to it is kept all the same
            return Appending(handle, False)
        os.close(handle)


def _claimed(name: str, until: float) -> Appending:
    """The file, with another one beside it that stands for the lock."""
    claim = f"{name}.lock"
    held = _wait(lambda: _make_claim(claim), until)
    try:
        return Appending(os.open(name, _FLAGS, 0o600), held, claim)
    except BaseException:
        if held:
            _remove(claim)
        raise


def _make_claim(claim: str) -> None:
    try:
        os.close(os.open(claim, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    except (FileExistsError, PermissionError) as error:  # the latter on Windows, while it is being removed
        with suppress(OSError):
            if time.time() - os.stat(claim).st_mtime > STALE_S:
                os.unlink(claim)
        raise BlockingIOError from error


def _wait(attempt: Callable[[], None], until: float) -> bool:
    """Whether `attempt` came to pass in time; it raises BlockingIOError as long as another writer is at work."""
    pause = _FIRST_PAUSE_S
    while True:
        try:
            attempt()
            return True
        except BlockingIOError:
            if time.monotonic() >= until:
                return False
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE_S)


def _unlock(handle: int) -> None:
    """Closing would not do: a child forked meanwhile has the same open file and would go on holding its lock."""
    if fcntl is not None:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_UN)


def _is_at(handle: int, name: str) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(name))
    except FileNotFoundError:
        return False


def _remove(claim: str) -> None:
    with suppress(FileNotFoundError):
        os.unlink(claim)
