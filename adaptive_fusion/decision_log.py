"""The JSONL log of decisions, and its records.

No image and no prompt is kept: only hashes and numbers. Knows decisions and its own file; nothing of models or
policies.
"""

import hashlib
import json
import math
import os
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from adaptive_fusion.decisions import SCHEMA, Decision, Measurement
from adaptive_fusion.errors import ConfigError
from adaptive_fusion.features.prompts import PROMPT_VERSION

MAX_STRING = 2000
THUMBS = {"up": 1.0, "down": 0.0}
"""Ratings in words."""


def text_hash(text: str) -> str:
    """SHA-256 of a prompt, hex."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def record(
    decision: Decision,
    measurement: Measurement | None,
    *,
    time_s: float,
    content_hash: str | None = None,
    prompt_hash: str | None = None,
    error: str | None = None,
    finish_reason: str | None = None,
) -> dict[str, Any]:
    """One flat JSON record of the decision log (schema version 1)."""
    return {
        "schema": SCHEMA,
        "time_s": time_s,
        "request_id": decision.request_id,
        "content_hash": content_hash,
        "prompt_hash": prompt_hash,
        "kind": decision.kind,
        "complexity": decision.complexity.score if decision.complexity else None,
        "features": dict(decision.complexity.features) if decision.complexity else {},
        "features_version": decision.complexity.version if decision.complexity else None,
        "prompt_features": dict(decision.prompt_features),
        "prompt_version": PROMPT_VERSION if decision.prompt_features else None,
        "p_complex": decision.p_complex,
        "lane": decision.lane,
        "point": decision.point.to_dict(),
        "rung": decision.rung,
        "propensity": decision.propensity,
        "policy": decision.policy,
        "budget": dict(decision.budget),
        "feasible": decision.feasible,
        "predicted": asdict(decision.predicted) if decision.predicted else None,
        "p_late": decision.p_late,
        "reason": decision.reason,
        "measurement": asdict(measurement) if measurement else None,
        "finish_reason": finish_reason,
        "error": error,
    }


def feedback_record(
    request_id: str, rating: float | str, *, source_id: str | None = None, time_s: float = 0.0
) -> dict[str, Any]:
    """A user's opinion of one answer as a log record: ``up``, ``down``, or a rating from 0 to 1.

    Raises:
        ConfigError: For another rating.
    """
    value = THUMBS.get(rating) if isinstance(rating, str) else rating
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ConfigError(f"rating is {rating!r}; expected up, down or a number from 0 to 1")
    return {
        "schema": SCHEMA,
        "event": "feedback",
        "time_s": time_s,
        "request_id": request_id,
        "rating": float(value),
        "source_id": source_id,
    }


def _clean(value: Any) -> Any:
    """JSON has no NaN or infinity; strings are bounded so that no record can flood the log."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()[:MAX_STRING]
    if isinstance(value, Mapping):
        return {str(key)[:200]: _clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(item) for item in value]
    return value


def _cut_short(handle: int) -> bool:
    """Whether a file ends within a line, as after a kill or on a disk that was full."""
    if os.fstat(handle).st_size == 0:
        return False
    os.lseek(handle, -1, os.SEEK_END)
    return os.read(handle, 1) != b"\n"


class DecisionLog:
    """Appends records to a JSONL file, one ``write`` per record, rotating by size.

    A record is one line written by one system call to a file opened for appending, so threads and processes do not
    tear each other's lines and a kill loses at most the record under way. A full or unwritable disk never fails a
    request: such records are counted in `dropped`.

    Args:
        path: The file; its folder is made if need be.
        max_bytes: Size, at least 1, beyond which the file is set aside as ``path.1`` and a new one begun.
        keep: How many files set aside are kept, at least 1.

    Raises:
        ConfigError: For a `max_bytes` or `keep` below 1.
    """

    def __init__(self, path: str | Path, *, max_bytes: int = 64 << 20, keep: int = 8) -> None:
        for name, value in (("max_bytes", max_bytes), ("keep", keep)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} is {value!r}; expected an integer of at least 1")
        self.path = Path(path)
        self.max_bytes, self.keep = max_bytes, keep
        self.written = 0
        self.dropped = 0
        self._whole = False  # whether the file is known to end with a whole line
        self._lock = threading.Lock()

    def write(self, values: Mapping[str, Any]) -> None:
        """Append one record; see the class for what happens when that fails."""
        line = json.dumps(_clean(values), separators=(",", ":"), allow_nan=False).encode() + b"\n"
        with self._lock:
            try:
                self._rotate(len(line))
                handle = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
                try:
                    if not self._whole and _cut_short(handle):
                        line = b"\n" + line  # else this record would be lost with the torn one
                    if os.write(handle, line) != len(line):
                        raise OSError("short write")
                finally:
                    os.close(handle)
                self.written += 1
                self._whole = True
            except OSError:
                self.dropped += 1
                self._whole = False

    def feedback(
        self, request_id: str, rating: float | str, *, source_id: str | None = None, time_s: float | None = None
    ) -> None:
        """Append a user's rating of the answer with that `request_id` (``reply.decision.request_id``).

        Args:
            request_id: Of the decision; learning joins the rating to it.
            rating: ``up``, ``down`` or a number from 0 to 1.
            source_id: Who rates, as a pseudonym: of each one's ratings of a request the last counts.
            time_s: Seconds since the epoch; now, if left out.

        Raises:
            ConfigError: For another rating.
        """
        now = time.time() if time_s is None else time_s
        self.write(feedback_record(request_id, rating, source_id=source_id, time_s=now))

    def _rotate(self, incoming: int) -> None:
        try:
            size = self.path.stat().st_size
        except FileNotFoundError:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            return
        if size + incoming <= self.max_bytes:
            return
        for index in range(self.keep - 1, 0, -1):
            older = self.path.with_name(f"{self.path.name}.{index}")
            if older.exists():
                older.replace(self.path.with_name(f"{self.path.name}.{index + 1}"))
        self.path.replace(self.path.with_name(f"{self.path.name}.1"))
        extra = self.path.with_name(f"{self.path.name}.{self.keep + 1}")
        extra.unlink(missing_ok=True)
