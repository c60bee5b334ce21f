"""What was learned from requests, kept over a restart.

Knows a state and one file. A file that cannot be used is never an error: the server starts anew and says why.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from adaptive_fusion.errors import ConfigError
from adaptive_fusion.file_lock import write_whole

SCHEMA = 1
MAX_BYTES = 16 << 20
SAVE_S = 30.0


class Kept(Protocol):
    """Where what was learned is kept.

    Attributes:
        every_s: Seconds between two looks whether something was learned that is worth keeping.
    """

    every_s: float

    def restore(self) -> str:
        """Go on with what is there; a sentence that says what was found."""
        ...

    def save(self) -> str | None:
        """Keep what was learned; why it could not be, or None."""
        ...


class Learns(Protocol):
    """What has a state: a runner, or what decides for an engine."""

    def state(self) -> dict[str, Any]: ...

    def restore(self, state: Mapping[str, Any]) -> None: ...


class StateFile:
    """The file of one server.

    Args:
        path: Where it is; its folder is made if need be. None keeps nothing.
        runner: Whose state it has.
    """

    every_s = SAVE_S

    def __init__(self, path: Path | None, runner: Learns) -> None:
        self.path, self.runner = path, runner
        self._last = ""

    def restore(self) -> str:
        """Go on with what the file has; a sentence that says what was found."""
        if self.path is None:
            return "what is learned is not kept"
        try:
            with self.path.open("rb") as file:
                raw = file.read(MAX_BYTES + 1)
            if len(raw) > MAX_BYTES:
                return f"the state is not used: its file is larger than {MAX_BYTES} bytes"
            values = json.loads(raw)
            if not isinstance(values, dict) or values.get("schema") != SCHEMA:
                return f"the state is not used: its file is not of schema {SCHEMA}"
            self.runner.restore(values)
        except FileNotFoundError:
            return "no state yet"
        except OSError as error:
            return f"the state is not used: its file cannot be read ({error.strerror})"
        except ConfigError as error:
            return f"the state is not used: {error}"
        except (ValueError, RecursionError):
            return "the state is not used: its file is not valid JSON"
        return "goes on with what was learned before"

    def save(self) -> str | None:
        """Write what was learned, if it is other than what was written last; why it could not be, or None."""
        if self.path is None:
            return None
        text = json.dumps({"schema": SCHEMA, **self.runner.state()}, allow_nan=False)
        if text == self._last:
            return None
        try:
            write_whole(self.path, text)
        except OSError as error:
            return f"what was learned cannot be kept ({error.strerror})"
        self._last = text
        return None
