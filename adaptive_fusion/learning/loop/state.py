"""Where a learning loop is: the round, the steps that are done with what came of them, and how former rounds ended.

Knows a JSON file of plain values in a folder of its own. Must not know what the steps do.

The file is replaced as a whole after every step, so that a run that was killed finds the steps before it done and its
own not begun; what a step had written by then it writes again.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from adaptive_fusion.errors import ConfigError
from adaptive_fusion.file_lock import appending, write_whole

SCHEMA = 1
STATE_FILE = "state.json"
RUNNING = "running"
REFUSED, WAITING, READY, ROLLED_BACK, RELEASED = "refused", "waiting", "ready", "rolled back", "released"
"""How a round ends: the candidate is not better; there is not enough to learn from; it is better, and somebody has to
roll it out; the rollout took it back; it has all traffic."""


@dataclass
class State:
    """A loop's state.

    Attributes:
        round: Number of the round under way, or of the last one; 0 before the first.
        status: `RUNNING`, how the last round ended, or empty before the first.
        reason: Why, in words.
        terms: What the round was begun with; another one's steps are not gone on with.
        done: What came of each step of the round that is done, by its name.
        records: How many records the logs of the last round had.
        ended_s: When it ended, in seconds since the epoch.
        history: Former rounds: candidate, folder, status, reason, and the estimate before its rollout.
    """

    round: int = 0
    status: str = ""
    reason: str = ""
    terms: str = ""
    done: dict[str, dict[str, Any]] = field(default_factory=dict)
    records: int = 0
    ended_s: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)


class Folder:
    """A loop's folder: its state, and a folder for each round.

    Args:
        path: Made when something is written.

    Raises:
        ConfigError: If it is a file, or holds files of something else.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.exists() and not path.is_dir():
            raise ConfigError(f"out is {path.name!r}, a file; expected a folder")
        if path.is_dir() and not self.file.exists() and any(path.glob("*.toml")):
            raise ConfigError(f"out is {path.name!r}, which holds a policy; expected a new folder or one of this loop")

    @property
    def file(self) -> Path:
        """The state's."""
        return self.path / STATE_FILE

    def of_round(self, number: int) -> Path:
        """A round's own folder."""
        return self.path / f"round-{number:04d}"

    def load(self) -> State:
        """The state; a new one where there is none.

        Raises:
            ConfigError: If the file holds something else.
        """
        if not self.file.exists():
            return State()
        try:
            found = json.loads(self.file.read_text("utf-8"))
            if not isinstance(found, Mapping) or found.get("schema") != SCHEMA:
                raise ValueError("another schema")
            return State(**{name: value for name, value in found.items() if name != "schema"})
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{self.file.name} is no state of a loop ({error}); remove it to begin anew") from error

    def save(self, state: State) -> None:
        """Replace the state as a whole.

        Raises:
            OSError: If the folder cannot be written.
        """
        text = json.dumps({"schema": SCHEMA, **asdict(state)}, indent=1, sort_keys=True, allow_nan=False)
        write_whole(self.file, text + "\n")

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Nobody else runs this loop meanwhile.

        Raises:
            ConfigError: If somebody does.
            OSError: If the folder cannot be written.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with appending(self.path / "lock", 0.0) as lock:
            if not lock.held:
                raise ConfigError(f"another run is at work in {self.path.name!r}; expected it to end first")
            yield
