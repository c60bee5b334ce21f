"""Read real images at native size and at smaller shares of their pixels, and record how much of the text is kept.

    python training/general/label.py DIR... --cache DIR --out labels.jsonl [--images 60] [--shares all]

Each DIR is a source: a folder with `truth.jsonl` (see README.md) or just images. An image is shrunk from its file to
each share by the size rule and the kind of resampling of the released models' processor, scaled back up to its native
size, and read. Readings are kept in the cache by content, so that a run that was stopped goes on where it was.

By default only the shares are read that a bisection for the smallest sufficient one needs: about 4 readings an image.
`--shares all` reads the rest as well. Sources take turns, each in an order of its own that has nothing to do with size
or content, so that a part of the labels is a fair sample of the whole.
"""

import argparse
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from adaptive_fusion.errors import ConfigError
from adaptive_fusion.evaluation.folders import media_files
from adaptive_fusion.evaluation.readers import (
    CachedReader,
    RapidReader,
    Reader,
    characters,
    is_legible,
    text_kept,
    words,
    words_kept,
)
from adaptive_fusion.jsonl import append_records
from adaptive_fusion.media.hashes import content_hash
from adaptive_fusion.media.load import load_media
from adaptive_fusion.models.base import Size
from adaptive_fusion.models.resize import resized

SHARES = (1.0, 0.71, 0.5, 0.35, 0.25, 0.18, 0.125, 0.09, 0.0625)
"""Steps of the general ladder, as shares of native pixels."""

ENOUGH = 0.98
"""Text kept from which on a share counts as sufficient."""

LEAST_CHARACTERS = 21
"""An image with fewer is left out: one word more or less would decide."""

RELEASED = SimpleNamespace(
    patch_size=16, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 65_536, "longest_edge": 16_777_216}
)
"""Limits of the released models' image processors."""


@dataclass(frozen=True)
class Item:
    """An image file of a source and its known questions, as (question, answer)."""

    source: str
    path: Path
    qa: tuple[tuple[str, str], ...] = ()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "sources", type=Path, nargs="+", metavar="DIR", help="a folder of images, with truth or without"
    )
    parser.add_argument("--cache", type=Path, required=True, help="folder of readings")
    parser.add_argument("--out", type=Path, required=True, help="labels, one JSON object a line; appended to")
    parser.add_argument("--images", type=int, default=60, help="most images of a source with text on them")
    parser.add_argument("--shares", choices=("bisect", "all"), default="bisect", help="which shares to read")
    options = parser.parse_args()
    reader = CachedReader(RapidReader(), options.cache)
    known = read_labels(options.out)
    queues = {folder.name: iter(items(folder)) for folder in options.sources}
    done: Counter[str] = Counter()
    with tqdm(total=options.images * len(queues), unit="image", smoothing=0) as progress:
        while queues:
            for source in list(queues):
                item = next(queues[source], None)
                if item is None or done[source] == options.images:
                    del queues[source]
                    continue
                record = label(item, reader, known.get((source, item.path.name)), options.shares)
                if record != known.get((source, item.path.name)):
                    append_records([record], options.out)
                if record["characters"] >= LEAST_CHARACTERS:
                    done[source] += 1
                    progress.update()
                    progress.set_postfix(done, refresh=False)


def items(folder: Path) -> list[Item]:
    """Images of a source, in an order that only their names decide.

    Raises:
        ConfigError: For a folder without images.
    """
    truth = folder / "truth.jsonl"
    if truth.exists():
        rows = [json.loads(line) for line in truth.read_text("utf-8").splitlines() if line]
    else:
        found, failed = media_files([folder])
        if failed:
            raise ConfigError("; ".join(why for _, why in failed))
        rows = [{"file": str(path.relative_to(folder))} for path in found]
    named = [Item(folder.name, folder / row["file"], tuple((q, a) for q, a in row.get("qa", ()))) for row in rows]
    return sorted(named, key=lambda item: hashlib.sha256(item.path.name.encode()).digest())


def read_labels(path: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """Labels by source and file name, the newest of each; none where there is no file."""
    if not path.exists():
        return {}
    rows = map(json.loads, path.read_text("utf-8").splitlines())
    return {(row["source"], row["file"]): row for row in rows}


def label(item: Item, reader: Reader, known: Mapping[str, Any] | None, shares: str) -> dict[str, Any]:
    """The record of one image: `known` and what it lacks. README.md says what is in it."""
    if known and (known["characters"] < LEAST_CHARACTERS or next(missing(known["kept"], shares), None) is None):
        return dict(known)
    image = load_media(item.path)
    native = sized(image, 1.0)
    lines = reader.read(at_share(image, 1.0))
    found = words(line.text for line in lines)
    legible = [answer for _, answer in item.qa if is_legible(answer, found)]
    record = {
        "source": item.source,
        "file": item.path.name,
        "content_hash": content_hash(item.path),
        "size": image.size,
        "native": native,
        "characters": characters(found).total(),
        "lines": [[characters(words([line.text])).total(), round(line.height, 1)] for line in lines],
        "kept": {"1.0": 1.0},
        "words_kept": {"1.0": 1.0},
        "answers": {"1.0": len(legible)},
        "pixels": {str(share): int(np.prod(sized(image, share))) for share in SHARES},
        **(known or {}),
    }
    if record["characters"] < LEAST_CHARACTERS:
        return record
    record |= {key: dict(record[key]) for key in ("kept", "words_kept", "answers")}
    for share in missing(record["kept"], shares):
        again = words(line.text for line in reader.read(at_share(image, share)))
        record["kept"][str(share)] = round(text_kept(found, again), 4)
        record["words_kept"][str(share)] = round(words_kept(found, again), 4)
        record["answers"][str(share)] = sum(is_legible(answer, again) for answer in legible)
    return record


def missing(kept: Mapping[str, float], shares: str) -> Iterator[float]:
    """Shares to read next, while `kept` grows: all that lack, or those of a bisection for the smallest sufficient one.

    The bisection takes it that a larger share keeps no less.
    """
    if shares == "all":
        yield from [share for share in SHARES if str(share) not in kept]
        return
    low, high = 0, len(SHARES)  # SHARES[low] is known to be sufficient, SHARES[high] not to be
    while high - low > 1:
        middle = (low + high) // 2
        if str(SHARES[middle]) not in kept:
            yield SHARES[middle]
        low, high = (middle, high) if kept[str(SHARES[middle])] >= ENOUGH else (low, middle)


def sized(image: Image.Image, share: float) -> tuple[int, int]:
    """Width and height that the processor gives an image with a share of its native pixels."""
    size = Size(1, image.height, image.width)
    height, width = resized(RELEASED, size, None)
    if share < 1:
        height, width = resized(RELEASED, size, int(share * width * height))
    return width, height


def at_share(image: Image.Image, share: float) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """(H, W, 3) uint8 RGB of native size that shows no more than a share of the pixels does."""
    small = image.resize(sized(image, share), Image.Resampling.BICUBIC)
    return np.asarray(small.resize(sized(image, 1.0), Image.Resampling.BICUBIC))


if __name__ == "__main__":
    main()
