"""Folders of real images with what is known of them: one source a folder, its truth in `truth.jsonl`.

Knows the file's form (described in training/general/README.md) and file names. Must not know of shares, readers or
policies. Loads no image.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from adaptive_fusion.checks import numbers
from adaptive_fusion.errors import ConfigError
from adaptive_fusion.evaluation.folders import Failed, media_files

TRUTH = "truth.jsonl"
ILLEGIBLE = "###"


class Thing(NamedTuple):
    """An object on a photograph: what it is and the sides of its box in pixels of the file."""

    name: str
    width: float
    height: float


@dataclass(frozen=True)
class Item:
    """An image file of a source and what is known of it.

    `qa` are known questions, as (question, answer). `has_text` says that the truth has legible text, `captions` that
    there are descriptions.
    """

    source: str
    path: Path
    qa: tuple[tuple[str, str], ...] = ()
    things: tuple[Thing, ...] = ()
    has_text: bool = False
    captions: bool = False


@dataclass(frozen=True)
class Source:
    """A folder's images, in an order that only their names decide."""

    name: str
    items: tuple[Item, ...]

    @property
    def pictured(self) -> bool:
        """Whether its images are ones to describe: their truth has objects or captions, and no text."""
        seen = any(item.things or item.captions for item in self.items)
        return seen and not any(item.has_text for item in self.items)


def read_sources(folders: Iterable[str | Path]) -> tuple[list[Source], Failed]:
    """The sources in `folders`, and what cannot be used: folders, and lines of a truth, each with the reason.

    Raises:
        ConfigError: For a folder that is named twice.
    """
    found: list[Source] = []
    failed: Failed = []
    paths = [Path(folder) for folder in folders]
    for name, path in zip(_names(paths), paths, strict=True):
        items, wrong = _read(name, path)
        failed += wrong
        if items:
            found.append(Source(name, tuple(sorted(items, key=_place))))
        elif not wrong:
            failed.append((name, f"{TRUTH} names no images; expected one JSON object a line"))
    return found, failed


def _names(paths: Sequence[Path]) -> list[str]:
    """A name for each folder: its own, with the one it lies in where two are called alike."""
    places = [path.absolute() for path in paths]
    if len(set(places)) != len(places):
        twice = next(path.name for path, count in Counter(places).items() if count > 1)
        raise ConfigError(f"folder {twice!r} is named twice; expected each once")
    own = Counter(place.name for place in places)
    return [place.name if own[place.name] == 1 else f"{place.parent.name}/{place.name}" for place in places]


def _place(item: Item) -> bytes:
    return hashlib.sha256(item.path.name.encode("utf-8", "surrogateescape")).digest()


def _read(name: str, folder: Path) -> tuple[list[Item], Failed]:
    if not folder.is_dir():
        return [], [(name, "there is no such folder; expected one with images")]
    if not (folder / TRUTH).exists():
        paths, unread = media_files([folder])
        return [Item(name, path) for path in paths], [(name, why) for _, why in unread]
    try:
        lines = (folder / TRUTH).read_bytes().split(b"\n")
    except OSError as error:
        return [], [(name, f"{TRUTH} cannot be read ({error.strerror})")]
    items: dict[str, Item] = {}
    failed: Failed = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            file, item = _item(name, folder, line)
            if file in items:
                raise ConfigError(f"file {file!r} is named twice; expected each once")
            items[file] = item
        except ConfigError as error:
            failed.append((f"{name}/{TRUTH}, line {number}", str(error)))
    return list(items.values()), failed


def _item(source: str, folder: Path, line: bytes) -> tuple[str, Item]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"is not valid JSON: {error}") from error
    if not isinstance(row, Mapping):
        raise ConfigError(f"is {type(row).__name__}; expected a JSON object")
    file = row.get("file")
    if not isinstance(file, str) or not _inside(folder, file):
        raise ConfigError(f"file is {file!r}; expected the name of an image in the folder")
    boxes = [_box(box) for box in _list(row, "boxes")]
    texts = [*_list(row, "text"), *(box["text"] for box in boxes if "text" in box)]
    return file, Item(
        source,
        folder / file,
        tuple(_pair(pair) for pair in _list(row, "qa")),
        tuple(Thing(*_sides(box)) for box in boxes if "name" in box),
        any(isinstance(text, str) and text.strip() not in ("", ILLEGIBLE) for text in texts),
        bool(_list(row, "captions")),
    )


def _inside(folder: Path, file: str) -> bool:
    try:
        return (folder / file).resolve().is_relative_to(folder.resolve())
    except (OSError, ValueError, RuntimeError):  # a name that no file can have, or links in a circle
        return False


def _list(row: Mapping[str, Any], key: str) -> list[Any]:
    found = row.get(key)
    if found is not None and not isinstance(found, list):
        raise ConfigError(f"{key} is {type(found).__name__}; expected a list")
    return found or []


def _box(box: Any) -> Mapping[str, Any]:
    if not isinstance(box, Mapping):
        raise ConfigError(f"a box is {type(box).__name__}; expected an object with text or name, and box")
    return box


def _sides(box: Mapping[str, Any]) -> tuple[str, float, float]:
    corners = numbers(box.get("box"), "box", error=ConfigError)
    if len(corners) != 4 or corners[2] < corners[0] or corners[3] < corners[1]:
        raise ConfigError(f"box is {list(corners)}; expected [x0, y0, x1, y1] with x1 >= x0 and y1 >= y0")
    return str(box["name"]), corners[2] - corners[0], corners[3] - corners[1]


def _pair(pair: Any) -> tuple[str, str]:
    if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
        raise ConfigError(f"qa has {pair!r}; expected [question, answer]")
    return pair[0], pair[1]
