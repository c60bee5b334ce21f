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
import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

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
from adaptive_fusion.evaluation.shares import LEAST_CHARACTERS, SHARES, shares_to_read, shown, sized
from adaptive_fusion.evaluation.truth import Item, read_sources
from adaptive_fusion.jsonl import append_records
from adaptive_fusion.media.hashes import content_hash
from adaptive_fusion.media.load import load_media


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
    sources, failed = read_sources(options.sources)
    for name, why in failed:
        print(f"{name}: {why}", file=sys.stderr)
    queues = {source.name: iter(source.items) for source in sources}
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


def read_labels(path: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """Labels by source and file name, the newest of each; none where there is no file."""
    if not path.exists():
        return {}
    rows = map(json.loads, path.read_text("utf-8").splitlines())
    return {(row["source"], row["file"]): row for row in rows}


def label(item: Item, reader: Reader, known: Mapping[str, Any] | None, shares: str) -> dict[str, Any]:
    """The record of one image: `known` and what it lacks. README.md says what is in it."""
    kept = {float(share): value for share, value in known["kept"].items()} if known else {1.0: 1.0}
    if known and (known["characters"] < LEAST_CHARACTERS or next(missing(kept, shares), None) is None):
        return dict(known)
    image = load_media(item.path)
    native = sized(image.size, 1.0)
    lines = reader.read(shown(image, native))
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
        "pixels": {str(share): int(np.prod(sized(image.size, share))) for share in SHARES},
        **(known or {}),
    }
    if record["characters"] < LEAST_CHARACTERS:
        return record
    record |= {key: dict(record[key]) for key in ("kept", "words_kept", "answers")}
    for share in missing(kept, shares):
        again = words(line.text for line in reader.read(shown(image, sized(image.size, share))))
        kept[share] = record["kept"][str(share)] = round(text_kept(found, again), 4)
        record["words_kept"][str(share)] = round(words_kept(found, again), 4)
        record["answers"][str(share)] = sum(is_legible(answer, again) for answer in legible)
    return record


def missing(kept: Mapping[float, float], shares: str) -> Iterator[float]:
    """Shares to read next, while `kept` grows: all that lack, or those of a bisection for the smallest sufficient."""
    return iter([share for share in SHARES if share not in kept]) if shares == "all" else shares_to_read(kept)


if __name__ == "__main__":
    main()
