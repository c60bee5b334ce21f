"""What was measured so far, in one file that a later run goes on with, and how long the rest may take.

Every row is written as soon as it is there; one that fails or for which no time is left is kept with its reason, and
tried again by the next run. Knows rows as plain values. Must not know what they are about.
"""

import gc
import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from adaptive_fusion.file_lock import write_whole

Row = dict[str, Any]
KINDS = ("rows", "skipped", "failed")


class Skip(Exception):
    """Raised while a row is made: it cannot be had here, and why."""


class Book:
    """The results: a header that says what was measured on what, and for each part its rows by name.

    Args:
        path: JSON file; None keeps nothing.
        header: Card, versions and the like. A file with other values of `same` is refused: its rows do not go together
            with new ones.
        same: Keys of the header that must not differ.

    Raises:
        SystemExit: For a file that is not of this form, or was measured on something else.
    """

    def __init__(self, path: Path | None, header: Mapping[str, Any], same: tuple[str, ...]) -> None:
        self.path = path
        self.found: dict[str, Any] = {"header": dict(header), "parts": {}}
        if path is None or not path.exists():
            return
        try:
            kept = json.loads(path.read_text())
            differs = {key: (kept["header"].get(key), header.get(key)) for key in same}
            parts = {name: {kind: dict(part[kind]) for kind in KINDS} for name, part in kept["parts"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise SystemExit(f"{path.name} is not a file of results: {error!r}; --fresh begins anew") from None
        told = [f"{key} {was!r} is now {now!r}" for key, (was, now) in differs.items() if was != now]
        if told:
            raise SystemExit(f"{path.name} was measured on something else ({'; '.join(told)}); --fresh begins anew")
        self.found["parts"] = parts

    def part(self, name: str) -> dict[str, dict[str, Any]]:
        """The rows of a part, and what was skipped and failed, by name."""
        made: dict[str, dict[str, Any]] = self.found["parts"].setdefault(name, {kind: {} for kind in KINDS})
        return made

    def put(self, part: str, kind: str, key: str, value: Any) -> None:
        """Keep a row, or the reason why there is none."""
        kinds = self.part(part)
        for each in KINDS:
            kinds[each].pop(key, None)
        kinds[kind][key] = value
        if self.path is not None:
            write_whole(self.path, json.dumps(self.found, indent=1))


class Desk:
    """One part at work: asks for its rows one by one.

    Args:
        book: Where they go.
        part: Its name.
        deadline_s: On `clock`; no row is begun that would end after it.
        hurry: What `needs_s` is multiplied by: 0 at a tiny shape, where nothing takes long.
    """

    def __init__(
        self,
        book: Book,
        part: str,
        deadline_s: float,
        *,
        hurry: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.book, self.name, self.deadline_s, self.hurry, self.clock = book, part, deadline_s, hurry, clock
        self._began = clock()

    @property
    def left_s(self) -> float:
        """Seconds left to this part."""
        return self.deadline_s - self.clock()

    def row(self, key: str, make: Callable[[], Row], *, needs_s: float = 1.0) -> Row | None:
        """The row of that name: from the file, or made now; None if it was skipped or failed.

        Args:
            make: Measures it. `Skip` says that it cannot be had; any other exception is its failure, and the part goes
                on.
            needs_s: About how long that takes.
        """
        known = self.book.part(self.name)["rows"].get(key)
        if known is not None:
            self.say(f"{key}: measured before")
            return dict(known)
        if self.left_s < needs_s * self.hurry:
            self._none("skipped", key, f"no time: about {needs_s:.0f} s needed, {max(0.0, self.left_s):.0f} s left")
            return None
        began = self.clock()
        try:
            made = make()
        except Skip as reason:
            self._none("skipped", key, str(reason))
            return None
        except Exception as error:
            said = (str(error).splitlines() or [""])[0][:300]
            self._none("failed", key, f"{type(error).__name__}: {said}")
            # The frames of the failed row hold its tensors.
            del error
            tidy()
            return None
        made["took_s"] = round(self.clock() - began, 2)
        self.book.put(self.name, "rows", key, made)
        self.say(f"{key}: {made['took_s']:.1f} s")
        return made

    def _none(self, kind: str, key: str, reason: str) -> None:
        self.book.put(self.name, kind, key, reason)
        self.say(f"{key}: {kind}, {reason}")

    def say(self, text: str) -> None:
        """A line of progress."""
        print(f"[{self.clock() - self._began:6.1f} s] {self.name} {text}", file=sys.stderr, flush=True)


def tidy() -> None:
    """Give back what nothing holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
