"""The work folder of an adaptation: what was planned, so that a run that was stopped goes on with the same.

Knows a JSON file of plain values and the names of the files beside it. Must not know models or fits.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from adaptive_fusion.errors import ConfigError
from adaptive_fusion.file_lock import appending, write_whole
from adaptive_fusion.policy.fitted import Fingerprint


@dataclass(frozen=True)
class Terms:
    """What answers depend on; answers had under other terms are not mixed.

    Attributes:
        model: Whose answers they are; with other limits of its processor all of the pixels are others.
        base: Name of the general policy.
        distilled: Whether fusion modules are trained first.
        max_new_tokens: Upper bound of an answer.
    """

    model: Fingerprint
    base: str
    distilled: bool
    max_new_tokens: int

    @property
    def key(self) -> str:
        """Names them in files."""
        text = json.dumps({**asdict(self), "model": self.model.to_dict()}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


class Work:
    """Files of one adaptation.

    Args:
        folder: Made if need be.
        terms: See `Terms`.
    """

    def __init__(self, folder: Path, terms: Terms) -> None:
        self.folder, self.terms = folder, terms
        if folder.exists() and not folder.is_dir():
            raise ConfigError(f"out is {folder.name!r}, a file; expected a folder")

    @property
    def labels(self) -> Path:
        """The model's answers, as labels."""
        return self.folder / f"labels-{self.terms.key}.jsonl"

    @property
    def plan(self) -> Path:
        """Which shares are run."""
        return self.folder / f"plan-{self.terms.key}.json"

    @property
    def policy(self) -> Path:
        """The finished policy."""
        return self.folder / "policy"

    def module(self, name: str) -> Path:
        """A fusion module's file."""
        return self.folder / f"modules-{self.terms.key}" / f"{name}.safetensors"

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Nobody else is at work in the folder: two would run the same questions and write one policy over the other.

        Raises:
            ConfigError: If somebody is.
            OSError: If the folder cannot be written.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with appending(self.folder / "lock", 0.0) as lock:
            if not lock.held:
                raise ConfigError(f"another run is at work in {self.folder.name!r}; expected it to end first")
            yield

    def shares(self, chosen: Sequence[float], *, begun: bool) -> list[float]:
        """The shares that an earlier run began with, else those `chosen` now, which are kept.

        Args:
            chosen: For the images at hand.
            begun: Whether any of these was answered by an earlier run, whose shares then are taken.

        Raises:
            ConfigError: If the file of an earlier run holds something else.
            OSError: If the folder cannot be written.
        """
        if begun and self.plan.exists():
            found = _read(self.plan)
            if isinstance(found, list) and all(isinstance(each, float) and 0 < each < 1 for each in found):
                return found
            raise ConfigError(f"{self.plan.name} holds {found!r}; expected shares of the pixels: remove it")
        write_whole(self.plan, json.dumps({"shares": list(chosen), "model": self.terms.model.to_dict()}, indent=1))
        return list(chosen)


def _read(file: Path) -> Any:
    try:
        values = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise ConfigError(f"{file.name} is not JSON: {error}; remove it") from error
    return values.get("shares") if isinstance(values, dict) else values
