"""Records appended to JSONL files, whatever a kill or a full disk left behind and whoever else appends to them.

Knows lines and files. Must not know what a record means.
"""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from adaptive_fusion.errors import AdaptiveFusionError, ConfigError
from adaptive_fusion.file_lock import appending

_WAIT_S = 30.0
_BLOCK = 1 << 16


def append_records(records: Iterable[Mapping[str, Any]], out: str | Path) -> int:
    """Append records to a JSONL file, made with its folder if need be; returns how many.

    All of them are made before the first is written, so that a record that is refused leaves the file as it was.
    A last line without its end, which a kill leaves behind, is ended where it is a whole record and else cut off.
    They are written as its only writer: other processes, a decision log among them, may append to the same file.

    Raises:
        ConfigError: For a file that ends in something else than a record.
        ValueError: For a number that JSON does not have.
        AdaptiveFusionError: If another process holds the file for half a minute.
    """
    out = Path(out)
    lines = [json.dumps(record, separators=(",", ":"), allow_nan=False) + "\n" for record in records]
    out.parent.mkdir(parents=True, exist_ok=True)
    with appending(out, _WAIT_S) as file:
        if not file.held:
            raise AdaptiveFusionError(f"{out.name!r} is held by another process that writes to it; nothing was written")
        _mend_tail(file.handle, out.name)
        text = memoryview("".join(lines).encode())
        while text:
            text = text[os.write(file.handle, text) :]
    return len(lines)


def _mend_tail(handle: int, name: str) -> None:
    """Let a file end in a whole line, so that what is appended begins one of its own."""
    tail, size = _last_line(handle)
    if not tail or tail.endswith(b"\n"):
        return
    if not tail.startswith(b"{"):
        raise ConfigError(f"{name!r} ends in {tail[:40]!r}; expected a file of JSON records, one a line")
    try:
        json.loads(tail)
    except ValueError:
        os.ftruncate(handle, size - len(tail))
    else:
        os.write(handle, b"\n")


def _last_line(handle: int) -> tuple[bytes, int]:
    """The last line of a file, with its end if it has one, and the size of the file."""
    place = size = os.lseek(handle, 0, os.SEEK_END)
    tail = b""
    while place > 0 and b"\n" not in tail[:-1]:
        step = min(_BLOCK, place)
        place = os.lseek(handle, place - step, os.SEEK_SET)
        tail = os.read(handle, step) + tail
    return tail[tail.rfind(b"\n", 0, -1) + 1 :], size
