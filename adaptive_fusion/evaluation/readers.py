"""What is written on an image, found by an OCR engine, and how much of it two readings share.

Knows pixels, lines of text and where readings are kept. Must not know of shares, policies or where images come from.
A reader stands in for a vision-language model where labels are made: it says what is still legible, needs no
accelerator and answers the same every time.
"""

import hashlib
import json
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from adaptive_fusion.errors import ConfigError, MediaError, MissingExtraError

Bytes = np.ndarray[Any, np.dtype[np.uint8]]
Corners = tuple[tuple[float, float], ...]

_WORD = re.compile(r"[^\W_]+")
_LARGEST_SIDE = 1 << 15  # the engine shrinks what is larger; its own limit is 2,000 pixels
_ENGINE_OPTIONS = {
    "EngineConfig.onnxruntime.intra_op_num_threads": 1,
    "EngineConfig.onnxruntime.inter_op_num_threads": 1,
    "Global.max_side_len": _LARGEST_SIDE,
    "Global.use_cls": False,  # upside-down lines are rarer than lines that it takes for upside down
    "Global.log_level": "critical",
}


@dataclass(frozen=True)
class Line:
    """A line of text: what it says, how sure the reader is in [0, 1], its corners in pixels, clockwise."""

    text: str
    score: float
    corners: Corners

    @property
    def height(self) -> float:
        """Pixels from the top edge to the bottom edge, along the sides; 0 where the reader gives no corners."""
        if len(self.corners) != 4:
            return 0.0
        top_left, top_right, bottom_right, bottom_left = map(np.asarray, self.corners)
        sides = np.linalg.norm(bottom_left - top_left), np.linalg.norm(bottom_right - top_right)
        return float(sum(sides) / 2)


class Reader(Protocol):
    """Finds the lines of text on an image."""

    @property
    def name(self) -> str:
        """What tells its readings from another reader's: engine, version and options."""

    def read(self, image: Bytes) -> tuple[Line, ...]:
        """The lines on (H, W, 3) uint8 RGB, in the reader's order; none where it finds none."""


class RapidReader:
    """PP-OCR by onnxruntime, on one thread; the weights come with the package.

    Source: RapidOCR (github.com/RapidAI/RapidOCR), PP-OCRv6 small detection and recognition.

    Raises:
        MissingExtraError: Without rapidocr or onnxruntime.
    """

    def __init__(self) -> None:
        try:
            from rapidocr import RapidOCR

            self._engine = RapidOCR(params=dict(_ENGINE_OPTIONS))
            self.name = f"rapidocr {version('rapidocr')}, onnxruntime {version('onnxruntime')}, {_ENGINE_OPTIONS}"
        except ImportError as error:
            raise MissingExtraError(
                "reading text needs rapidocr and onnxruntime, which are not installed: "
                "pip install adaptive-fusion[readers]"
            ) from error

    def read(self, image: Bytes) -> tuple[Line, ...]:
        """See `Reader.read`. Raises MediaError for another shape or dtype."""
        found = self._engine(np.ascontiguousarray(_checked(image)[:, :, ::-1]))  # the engine takes BGR
        if not getattr(found, "txts", None):
            return ()
        return tuple(
            Line(str(text), float(score), tuple((float(x), float(y)) for x, y in corners))
            for text, score, corners in zip(found.txts, found.scores, found.boxes, strict=True)
        )


class CachedReader:
    """A reader that keeps each reading in a folder, by the content of the pixels and the name of the reader.

    Args:
        reader: Asked where the folder has no reading.
        folder: Made if need be. It then holds what is written on the images: keep it where they may be kept.
    """

    def __init__(self, reader: Reader, folder: str | Path) -> None:
        self._reader, self._folder = reader, Path(folder)

    @property
    def name(self) -> str:
        return self._reader.name

    def read(self, image: Bytes) -> tuple[Line, ...]:
        """See `Reader.read`. Raises ConfigError for a kept reading that is damaged."""
        path = self._path(image)
        if path.exists():
            return _parsed(path)
        lines = self._reader.read(image)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        rows = [[line.text, line.score, line.corners] for line in lines]
        partial.write_text(json.dumps(rows, separators=(",", ":"), allow_nan=False), "utf-8")
        os.replace(partial, path)
        return lines

    def _path(self, image: Bytes) -> Path:
        digest = hashlib.sha256(f"{self.name} {_checked(image).shape} ".encode())
        digest.update(np.ascontiguousarray(image).tobytes())
        key = digest.hexdigest()
        return self._folder / key[:2] / f"{key}.json"


def words(texts: Iterable[str]) -> Counter[str]:
    """Runs of letters and digits, lower-cased, with how often each occurs; wide and composed forms alike (NFKC)."""
    return Counter(_WORD.findall(unicodedata.normalize("NFKC", " ".join(texts)).lower()))


def characters(counted: Counter[str]) -> Counter[str]:
    """The characters of words, each as often as it occurs in all of them."""
    found: Counter[str] = Counter()
    for word, count in counted.items():
        for character in word:
            found[character] += count
    return found


def text_kept(before: Counter[str], after: Counter[str]) -> float:
    """Share of the characters of the words `before` that the words `after` still have, in [0, 1]; 1.0 without any.

    A character that occurs twice must be found twice. Where words begin and end does not count, nor does their order:
    a reader that joins two words or reads lines in another order has lost nothing. On a long text some wrong
    characters pass for others that were lost, so `words_kept` is the stricter figure.
    """
    return _share(characters(before), characters(after))


def words_kept(before: Counter[str], after: Counter[str]) -> float:
    """Share of the words `before`, weighed by their length, that are whole among those `after`; 1.0 without any.

    One wrong character loses the word. A reader's own noise costs some 2 to 10 percent of a dense page at any size.
    """
    total = sum(len(word) * count for word, count in before.items())
    return sum(len(word) * count for word, count in (before & after).items()) / total if total else 1.0


def is_legible(answer: str, found: Counter[str]) -> bool:
    """Whether all words of an answer are among those found; an answer without words is not."""
    needed = words([answer])
    return bool(needed) and not needed - found


def _share(before: Counter[str], after: Counter[str]) -> float:
    return (before & after).total() / before.total() if before else 1.0


def _checked(image: Bytes) -> Bytes:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise MediaError(f"image has shape {image.shape} and dtype {image.dtype}; a reader takes (H, W, 3) of uint8")
    return image


def _parsed(path: Path) -> tuple[Line, ...]:
    try:
        rows = json.loads(path.read_text("utf-8"))
        return tuple(
            Line(str(text), float(score), tuple((float(x), float(y)) for x, y in box)) for text, score, box in rows
        )
    except (ValueError, TypeError) as error:
        raise ConfigError(f"kept reading {path.name!r} is damaged; delete it and read again") from error
