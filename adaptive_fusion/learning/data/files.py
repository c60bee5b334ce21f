"""Which files a log has, and how they are read beside those who write them.

Knows names, handles and locks. Must not know what is in a line.

A log that rotates while it is read moves its files up by one number, so files are taken in the order of their numbers,
each once whatever it is called by then, and looked for again at the end. Of a file that grows meanwhile what it held
when no writer was in the middle of a record is read.
"""

import glob
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from adaptive_fusion.errors import ConfigError
from adaptive_fusion.file_lock import settled_size

_PASSES = 4
"""How often rotated files are looked for: a log that rotates faster than that is followed no further."""
_WAIT_S = 0.5


def log_files(paths: Iterable[str | Path]) -> list[Path]:
    """The files that `paths` name, each once, sorted by name and rotated ones by number.

    A path is a file of any name, a folder (its ``*.jsonl``, rotated ``*.jsonl.N`` and ``*.parquet``, at any
    depth) or a glob pattern.

    Raises:
        ConfigError: For a path that names nothing, or no paths at all.
    """
    found: set[Path] = set()
    given = [Path(path) for path in paths]
    for path in given:
        if path.is_dir():
            inside = {file for file in path.rglob("*") if file.is_file() and _is_log(file)}
        elif path.is_file():
            inside = {path}
        else:
            inside = {Path(file) for file in glob.glob(str(path), recursive=True) if Path(file).is_file()}
        if not inside:
            raise ConfigError(f"no logs at {path.name!r}; expected a file, a folder with logs or a pattern")
        found |= inside
    if not found:
        raise ConfigError("no logs were named; expected files, folders or patterns")
    return sorted(found, key=_in_order)


def _is_log(file: Path) -> bool:
    return file.suffix in (".jsonl", ".parquet") or _number(file) > 0


def _number(file: Path) -> int:
    """Of a rotated file; 0 for any other."""
    stem, _, number = file.name.rpartition(".")
    return int(number) if stem.endswith(".jsonl") and number.isdecimal() else 0


def _in_order(file: Path) -> tuple[Path, int]:
    number = _number(file)
    return (file.with_suffix("") if number else file), number


@dataclass(frozen=True)
class LogFile:
    """An open file of a log.

    Attributes:
        path: The name it was found by.
        handle: It, open for reading.
    """

    path: Path
    handle: BinaryIO

    @property
    def source(self) -> Path:
        """A name that stays that of this file when it is renamed, where the system has one."""
        fixed = Path(f"/proc/self/fd/{self.handle.fileno()}")
        # By the ending of other names the reader knows how to unpack them.
        return fixed if (self.path.suffix == ".jsonl" or _number(self.path)) and fixed.exists() else self.path

    def size(self) -> int:
        """Bytes now."""
        return os.fstat(self.handle.fileno()).st_size

    def settled_size(self) -> int:
        """Bytes at a moment when no writer was in the middle of a record."""
        return settled_size(self.handle.fileno(), _WAIT_S)

    def copy(self, size: int, to: Path) -> None:
        """Write the first `size` bytes to another file."""
        self.handle.seek(0)
        with to.open("wb") as target:
            while size > 0 and (block := self.handle.read(min(size, 1 << 20))):
                target.write(block)
                size -= len(block)


def open_each(paths: Iterable[str | Path]) -> Iterator[LogFile]:
    """Every file that `paths` name (see `log_files`), open, each once though it be renamed by a rotation meanwhile.

    Raises:
        ConfigError: For a path that names nothing, or a file that cannot be opened.
    """
    paths = list(paths)
    seen: set[tuple[int, int]] = set()
    for step in range(_PASSES):
        try:
            files = log_files(paths)
        except ConfigError:
            if step:
                return
            raise
        found = 0
        for path in files:
            try:
                handle = path.open("rb")
            except FileNotFoundError:  # renamed since it was listed: the next pass meets it
                continue
            except OSError as error:
                raise ConfigError(f"cannot read {path.name}: {error.strerror}") from error
            with handle:
                status = os.fstat(handle.fileno())
                if (status.st_dev, status.st_ino) in seen:
                    continue
                seen.add((status.st_dev, status.st_ino))
                found += 1
                yield LogFile(path, handle)
        if not found:
            return
