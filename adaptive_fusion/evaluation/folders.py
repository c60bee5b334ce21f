"""Questions and the right answers to them, from files, folders, COCO captions or a table.

Knows file names and texts. Must not know models, rungs or how an answer is scored.
"""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adaptive_fusion.errors import ConfigError
from adaptive_fusion.evaluation.questions import SLICE, Question
from adaptive_fusion.evaluation.tables import read_table
from adaptive_fusion.evaluation.text import METRICS

SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".mp4", ".mov", ".webm", ".mkv", ".avi"}
)
"""What is taken from a folder; a file named by itself may have any name."""

Failed = list[tuple[str, str]]
"""Names of inputs that are left out, each with the reason."""
Asked = tuple[str, str]
"""A prompt and the metric of its answers."""
References = dict[str, dict[Asked, list[str]]]
"""By file name, the right answers to each question."""

CAPTIONS = "captions"


def media_files(inputs: Iterable[str | Path]) -> tuple[list[Path], Failed]:
    """The files that `inputs` name: files as they are, folders by their images and clips at any depth, sorted; and the
    folders that have none or cannot be read.

    A name that no file can have counts as a file: whoever loads it says what is wrong.
    """
    found: dict[Path, None] = {}
    failed: Failed = []
    for path in map(Path, inputs):
        if not _is_folder(path):
            found[path] = None
            continue
        unread: list[OSError] = []
        walk = os.walk(path, onerror=unread.append)
        inside = [Path(folder, name) for folder, _, names in walk for name in names]
        media = sorted(file for file in inside if file.suffix.lower() in SUFFIXES)
        found |= dict.fromkeys(media)
        failed += [
            (Path(error.filename).name, f"the folder cannot be read ({error.strerror}); expected one that can be")
            for error in unread
        ]
        if not media and not unread:
            expected = ", ".join(sorted(SUFFIXES))
            failed.append((path.name, f"the folder has no images or clips; expected {expected}"))
    return list(found), failed


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def questions(
    files: Iterable[Path], prompt: str, references: References | None = None
) -> tuple[list[Question], Failed]:
    """One question per file and question; with `references`, also the files that have none and why.

    Files are matched by their name, without folders.
    """
    if references is None:
        return [Question(path, prompt) for path in files], []
    found: list[Question] = []
    failed: Failed = []
    for path in files:
        known = references.get(path.name, {})
        found += [Question(path, asked, tuple(texts), metric) for (asked, metric), texts in known.items()]
        if not known:
            failed.append((path.name, "the references name no answer for it"))
    return found, failed


def read_references(file: str | Path, prompt: str, metric: str = "words") -> References:
    """Right answers from COCO captions (``.json``) or a table (``.csv``).

    A table has the columns ``path`` and ``reference``, one answer a row, and may have ``prompt`` and ``metric``,
    which are `prompt` and `metric` where they are left out. Several rows of one path and prompt are answers of
    which any is right; another prompt is another question about the same file.

    Raises:
        ConfigError: For a file that cannot be read or is of another form, a metric that there is not, or two
            paths that end in the same name.
    """
    file = Path(file)
    if file.suffix.lower() == ".json":
        rows = [{"path": name, "reference": text} for name, texts in read_coco(file).items() for text in texts]
    else:
        rows = _table(file)
    found: References = {}
    paths: dict[str, str] = {}
    for row in rows:
        path, asked, scored = row["path"], row.get("prompt") or prompt, row.get("metric") or metric
        name = Path(path).name
        if paths.setdefault(name, path) != path:
            raise ConfigError(f"references name both {paths[name]!r} and {path!r}; expected each file name once")
        if scored not in METRICS:
            raise ConfigError(f"metric is {scored!r}; expected one of {', '.join(sorted(METRICS))}")
        found.setdefault(name, {}).setdefault((asked, scored), []).append(row["reference"])
    return found


def read_coco(file: str | Path) -> dict[str, list[str]]:
    """Captions in COCO's form, by `file_name`: of the images that have any, in the order of the file's images.

    ``images`` have ``id`` and ``file_name``, ``annotations`` have ``image_id`` and ``caption``.

    Raises:
        ConfigError: For a file that cannot be read or is of another form, or an annotation of an unknown image.
    """
    file = Path(file)
    try:
        values = json.loads(file.read_bytes())
    except OSError as error:
        raise ConfigError(f"captions file {file.name!r} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"captions file {file.name!r} is not valid JSON: {error}") from error
    names = {_of(row, "id", int, str): _of(row, "file_name", str) for row in _list(values, "images")}
    found: dict[str, list[str]] = {name: [] for name in names.values()}
    for row in _list(values, "annotations"):
        image = _of(row, "image_id", int, str)
        if image not in names:
            raise ConfigError(f"an annotation has image_id {image!r}; expected the id of one of {len(names)} images")
        found[names[image]].append(_of(row, "caption", str))
    return {name: texts for name, texts in found.items() if texts}


def _table(file: Path) -> list[dict[str, Any]]:
    columns, rows = read_table(file)
    if not {"path", "reference"} <= set(columns):
        raise ConfigError(f"{file.name} has columns {columns}; expected path and reference")
    for number, row in enumerate(rows, 2):
        if not row["path"] or row["reference"] is None:
            raise ConfigError(f"{file.name} has no path or no reference in row {number}")
    return rows


def _list(values: Any, key: str) -> list[Any]:
    rows = values.get(key) if isinstance(values, Mapping) else None
    if not isinstance(rows, list):
        raise ConfigError(
            f"captions file has {key} {type(rows).__name__}; expected COCO's lists images and annotations"
        )
    return rows


def _of(row: Any, key: str, *kinds: type) -> Any:
    value = row.get(key) if isinstance(row, Mapping) else None
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise ConfigError(f"captions file has {key} {value!r}; expected {' or '.join(k.__name__ for k in kinds)}")
    return value


def folder_questions(folder: Path, captions: Path, prompt: str, limit: int | None = None) -> list[Question]:
    """One question per captioned image, in the file's order, the first `limit` of them.

    An image that lies outside the folder or is missing is refused when the question is loaded.

    Raises:
        ConfigError: If `captions` is refused by `read_coco`, or `limit` or the number of images that are there and have
            captions is below 2: a shuffled pair needs two.
    """
    if limit is not None and limit < 2:
        raise ConfigError(f"limit is {limit} images; expected at least 2")
    chosen = list(read_coco(captions).items())[:limit]
    found = [
        Question(_inside(folder, name), prompt, tuple(texts), None, slices={SLICE: CAPTIONS}) for name, texts in chosen
    ]
    there = [one for one in found if not isinstance(one.media, _Absent)]
    if len(there) < 2:
        absent = next((f"; {one.media}" for one in found if isinstance(one.media, _Absent)), "")
        raise ConfigError(f"{len(there)} images have captions; expected at least 2{absent}")
    return found


def _inside(folder: Path, name: str) -> "Path | _Absent":
    root = Path(folder).resolve()
    try:
        path = (root / name).resolve()
        return path if path.is_relative_to(root) and path.is_file() else _Absent(name)
    except (OSError, ValueError, RuntimeError):  # a name that no file can have, or links in a circle
        return _Absent(name)


@dataclass(frozen=True)
class _Absent:
    """An image that is not there to be loaded."""

    name: str

    def __str__(self) -> str:
        return f"image {self.name[-80:]!r} is not a file inside the data folder"

    def __call__(self) -> Any:
        raise ConfigError(str(self))
