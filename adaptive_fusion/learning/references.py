"""Inputs to label and the right answers to them, from files, folders, COCO captions or a table.

Knows file names and texts. Must not know models, rungs or how an answer is scored.
"""

import csv
import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from adaptive_fusion.errors import ConfigError
from adaptive_fusion.learning.scoring import METRICS, Example

SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".mp4", ".mov", ".webm", ".mkv", ".avi"}
)
"""What is taken from a folder; a file named by itself may have any name."""

Question = tuple[str, str]
"""A prompt and the metric of its answers."""
References = dict[str, dict[Question, list[str]]]
"""By file name, the right answers to each question."""


def media_files(inputs: Iterable[str | Path]) -> list[Path]:
    """The files that `inputs` name: files as they are, folders by their images and clips at any depth, sorted.

    Raises:
        ConfigError: For a folder without any.
    """
    found: dict[Path, None] = {}
    for path in map(Path, inputs):
        inside = [path]
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
            if not inside:
                raise ConfigError(
                    f"folder {path.name!r} has no images or clips; expected {', '.join(sorted(SUFFIXES))}"
                )
        found |= dict.fromkeys(inside)
    return list(found)


def examples(
    files: Iterable[Path], prompt: str, references: References | None = None
) -> tuple[list[Example], list[tuple[str, str]]]:
    """One example per file and question; with `references`, also the files that have none and why.

    Files are matched by their name, without folders.
    """
    if references is None:
        return [Example(path, prompt) for path in files], []
    found, failed = [], []
    for path in files:
        known = references.get(path.name, {})
        found += [Example(path, asked, tuple(texts), metric) for (asked, metric), texts in known.items()]
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
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"references {file.name!r} cannot be read: {error}") from error
    rows = _coco(text, file.name) if file.suffix.lower() == ".json" else _table(text, file.name)
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


def _table(text: str, name: str) -> list[dict[str, str]]:
    reader = csv.DictReader(io.StringIO(text, newline=""))
    if not {"path", "reference"} <= set(reader.fieldnames or ()):
        raise ConfigError(f"{name} has columns {list(reader.fieldnames or ())}; expected path and reference")
    rows = list(reader)
    for number, row in enumerate(rows, 2):
        if not row["path"] or row["reference"] is None:
            raise ConfigError(f"{name} has no path or no reference in row {number}")
    return rows


def _coco(text: str, name: str) -> list[dict[str, str]]:
    try:
        values = json.loads(text)
        images = {_of(row, "id", int | str): _of(row, "file_name", str) for row in values["images"]}
        return [
            {"path": images[_of(row, "image_id", int | str)], "reference": _of(row, "caption", str)}
            for row in values["annotations"]
        ]
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{name} is not valid JSON: {error}") from error
    except (KeyError, TypeError) as error:
        raise ConfigError(
            f"{name} is not in COCO's caption format ({type(error).__name__}: {error}); expected images with id and "
            "file_name, annotations with image_id and caption"
        ) from error


def _of(row: Mapping[str, Any], key: str, kind: Any) -> Any:
    value = row[key]
    if isinstance(value, bool) or not isinstance(value, kind):
        raise TypeError(f"{key} is {value!r}")
    return value
