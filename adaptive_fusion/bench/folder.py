"""A folder of images with captions in COCO's form, as questions for a benchmark.

Names files inside the folder only. Must not know of models, operating points or times.
"""

from pathlib import Path

from adaptive_fusion.errors import ConfigError
from adaptive_fusion.evaluation.questions import SLICE, Question
from adaptive_fusion.learning.references import read_coco

CAPTIONS = "captions"


def folder_items(folder: Path, captions: Path, prompt: str, limit: int | None = None) -> list[Question]:
    """One item per captioned image, in the file's order, the first `limit` of them.

    Raises:
        ConfigError: If `captions` is refused by `read_coco`, an image lies outside the folder or is missing, or
            `limit` or the number of images with captions is below 2: a shuffled pair needs two.
    """
    if limit is not None and limit < 2:
        raise ConfigError(f"limit is {limit} images; expected at least 2")
    chosen = list(read_coco(captions).items())[:limit]
    items = [
        Question(_inside(folder, name), prompt, tuple(texts), None, slices={SLICE: CAPTIONS}) for name, texts in chosen
    ]
    if len(items) < 2:
        raise ConfigError(f"{len(items)} images have captions; expected at least 2")
    return items


def _inside(folder: Path, name: str) -> Path:
    root = Path(folder).resolve()
    path = (root / name).resolve()
    if not path.is_relative_to(root) or not path.is_file():
        raise ConfigError(f"image {name!r} is not a file inside the data folder")
    return path
