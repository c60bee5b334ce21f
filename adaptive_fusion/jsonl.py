"""Records appended to JSONL files, whatever a kill or a full disk left behind.

Knows lines and files. Must not know what a record means.
"""

import json
from collections import deque
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from adaptive_fusion.errors import ConfigError


def append_records(records: Iterable[Mapping[str, Any]], out: str | Path) -> int:
    """Append records to a JSONL file, made with its folder if need be; returns how many.

    All of them are made before the first is written, so that a record that is refused leaves the file as it was.

    Raises:
        ConfigError: For a file that ends in something else than a record.
        ValueError: For a number that JSON does not have.
    """
    out = Path(out)
    lines = [json.dumps(record, separators=(",", ":"), allow_nan=False) + "\n" for record in records]
    out.parent.mkdir(parents=True, exist_ok=True)
    mend_tail(out)
    with out.open("a", encoding="utf-8") as handle:
        handle.writelines(lines)
    return len(lines)


def mend_tail(out: Path) -> None:
    """Let a JSONL file end in a whole line, if it is there, so that what is appended begins one of its own.

    A last line without its end is ended where it is a whole record, and cut off where it is a torn one.

    Raises:
        ConfigError: If it is neither: the file is not ours to cut.
    """
    if not out.exists():
        return
    with out.open("rb+") as handle:
        tail = deque(handle, maxlen=1).pop() if out.stat().st_size else b""
        if not tail or tail.endswith(b"\n"):
            return
        if not tail.startswith(b"{"):
            raise ConfigError(f"{out.name!r} ends in {tail[:40]!r}; expected a file of JSON records, one a line")
        try:
            json.loads(tail)
        except ValueError:
            handle.truncate(handle.tell() - len(tail))
        else:
            handle.write(b"\n")
