"""A folder of images with captions in COCO's form, as questions for a benchmark.

Reads ``captions.json`` (``images`` with ``id`` and ``file_name``, ``annotations`` with ``image_id`` and
``caption``) and names files inside the folder only. Must not know of models, operating points or times.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adaptive_fusion.bench.scenes import Item
from adaptive_fusion.errors import ConfigError

SLICE = "captions"


def folder_items(folder: Path, captions: Path, prompt: str, limit: int | None = None) -> list[Item]:
    """One item per captioned image, in the file's order, the first `limit` of them.

    Raises:
        ConfigError: If the file is not in COCO's caption format, an annotation names an unknown image, an
            image lies outside the folder or is missing, or fewer than 2 images have captions.
    """
    try:
        values = json.loads(Path(captions).read_bytes())
    except OSError as error:
        raise ConfigError(f"captions file {Path(captions).name!r} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"captions file {Path(captions).name!r} is not valid JSON: {error}") from error
    names = {_get(row, "id", (int, str)): _get(row, "file_name", (str,)) for row in _rows(values, "images")}
    found: dict[Any, list[str]] = {}
    for row in _rows(values, "annotations"):
        image = _get(row, "image_id", (int, str))
        if image not in names:
            raise ConfigError(f"an annotation has image_id {image!r}; expected the id of one of {len(names)} images")
        found.setdefault(image, []).append(_get(row, "caption", (str,)))
    chosen = [image for image in names if image in found][:limit]
    if len(chosen) < 2:
        raise ConfigError(f"{len(chosen)} images have captions; expected at least 2")
    return [Item(SLICE, _inside(folder, names[image]), prompt, tuple(found[image])) for image in chosen]


def _rows(values: Any, key: str) -> list[Any]:
    rows = values.get(key) if isinstance(values, Mapping) else None
    if not isinstance(rows, list):
        raise ConfigError(
            f"captions file has {key} {type(rows).__name__}; expected COCO's lists images and annotations"
        )
    return rows


def _get(row: Any, key: str, kinds: tuple[type, ...]) -> Any:
    value = row.get(key) if isinstance(row, Mapping) else None
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise ConfigError(f"captions file has {key} {value!r}; expected {' or '.join(k.__name__ for k in kinds)}")
    return value


def _inside(folder: Path, name: str) -> Path:
    root = Path(folder).resolve()
    path = (root / name).resolve()
    if not path.is_relative_to(root) or not path.is_file():
        raise ConfigError(f"image {name!r} is not a file inside the data folder")
    return path
