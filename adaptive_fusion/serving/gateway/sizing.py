"""Media of requests, measured once and made smaller once: what is kept between requests that show the same.

Both are found by a hash of the encoded bytes, so the same image at the same plan has the same bytes in every turn of a
conversation; what was forgotten is made again, and comes out the same. Knows bytes, sizes and budgets. Must not know of
requests, policies or HTTP.
"""

import base64
import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

from adaptive_fusion.features.complexity import Complexity, measure_complexity
from adaptive_fusion.media.clips import Video
from adaptive_fusion.media.load import load_media, read_header
from adaptive_fusion.media.pixels import DEFAULT, decoding
from adaptive_fusion.models.base import Size
from adaptive_fusion.serving.gateway import reencode
from adaptive_fusion.serving.gateway.processors import ImageGrid
from adaptive_fusion.serving.gateway.stills import NotPlanned, Still, decoded

T = TypeVar("T")
MOST_MEASURED = 8192
MOST_MIB = 128
"""Of media that were made smaller."""
MOST_DECODED_MIB = 96
"""Of pictures that were measured and wait for what is decided; beyond it they are decoded again."""
_LABELS = {b"\xff\xd8\xff": "image/jpeg", b"\x89PNG": "image/png", b"RIFF": "image/webp"}


@dataclass(frozen=True, slots=True)
class Measured:
    """What is known of a medium whose bytes are there.

    Attributes:
        name: Hash of its bytes.
        size: Upright.
        complexity: What was measured.
        duration_s: Of a clip.
        times_s: Of the frames of a clip that were looked at.
    """

    name: str
    size: Size
    complexity: Complexity
    duration_s: float = 0.0
    times_s: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Given:
    """What a medium is given: pixels of an image or of each frame, and frames a second; None leaves what it has."""

    max_pixels: int | None = None
    max_fps: float | None = None


class Kept(Generic[T]):
    """The last values by key, least recently used out first, within a size; thread-safe.

    Args:
        most: The sum of sizes that is kept.
        size_of: Of a value.
    """

    def __init__(self, most: int, size_of: Callable[[T], int] = lambda value: 1) -> None:
        self._most, self._size_of = most, size_of
        self._values: OrderedDict[Any, T] = OrderedDict()
        self._lock, self.size = threading.Lock(), 0

    def get(self, key: Any) -> T | None:
        """The value of a key, which counts as used."""
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
            return self._values.get(key)

    def keep(self, key: Any, value: T) -> T:
        """Keep a value; what is larger than all may be is not kept."""
        with self._lock:
            if key in self._values:
                self.size -= self._size_of(self._values.pop(key))
            if self._size_of(value) <= self._most:
                self._values[key] = value
                self.size += self._size_of(value)
            while self.size > self._most:
                self.size -= self._size_of(self._values.popitem(last=False)[1])
        return value

    def take(self, key: Any) -> T | None:
        """The value of a key, which is kept no longer."""
        with self._lock:
            value = self._values.pop(key, None)
            if value is not None:
                self.size -= self._size_of(value)
            return value


class Sizing:
    """Measures media and makes them smaller.

    Args:
        grid: How the model upstream resizes.
        max_megapixels: Of a picture or frame that is looked at, in 10^6 pixels.
        most_mib: Of smaller media that are kept.
    """

    def __init__(self, grid: ImageGrid, max_megapixels: float, most_mib: int = MOST_MIB) -> None:
        self.grid, self._limits = grid, replace(DEFAULT, max_megapixels=max_megapixels)
        self._measured: Kept[Measured] = Kept(MOST_MEASURED)
        self._smaller: Kept[tuple[bytes | None]] = Kept(most_mib << 20, lambda made: len(made[0] or b"") + 256)
        self._stills: Kept[Still] = Kept(MOST_DECODED_MIB << 20, lambda still: still.pixels.nbytes)

    def measure(self, data: bytes, kind: str) -> Measured:
        """What is known of a medium that is called an ``image`` or a ``video``.

        Raises:
            NotPlanned: If it is to be left as it is.
            MediaError: If it cannot be read.
        """
        name = hashlib.sha256(data).hexdigest()
        if (known := self._measured.get((kind, name))) is not None:
            return known
        measured = self._still(name, data) if kind == "image" else self._clip(name, data)
        if max(measured.size.height, measured.size.width) > 200 * min(measured.size.height, measured.size.width):
            raise NotPlanned("it is too narrow for the model upstream")
        return self._measured.keep((kind, name), measured)

    def _still(self, name: str, data: bytes) -> Measured:
        still, rgb = decoded(data, limits=self._limits)
        self._stills.keep(name, still)
        return Measured(name, Size(1, *rgb.shape[:2]), measure_complexity(rgb))

    def _clip(self, name: str, data: bytes) -> Measured:
        if read_header(data, limits=self._limits).kind != "video":
            raise NotPlanned("it is a still image")
        clip = load_media(data, limits=self._limits)
        if not isinstance(clip, Video):
            raise NotPlanned("it is a clip of one frame")
        frames, height, width = clip.frames.shape[:3]
        size = Size(frames, height, width, clip=True)
        return Measured(name, size, measure_complexity(clip), clip.duration_s, clip.timestamps_s)

    def smaller(self, measured: Measured, data: bytes, given: Given, frames: int | None) -> bytes | None:
        """The bytes that stand for a medium at what it is given; None where it stays as it is."""
        if given == Given():
            return None
        key = (measured.name, given.max_pixels, frames)
        if (known := self._smaller.get(key)) is None:
            known = self._smaller.keep(key, (self._made(measured, data, given, frames),))
        return known[0]

    def _made(self, measured: Measured, data: bytes, given: Given, frames: int | None) -> bytes | None:
        with decoding("the medium"):  # whatever writing it can raise
            if measured.size.clip:
                made = reencode.clip(data, frames, given.max_pixels, side=self.grid.side, limits=self._limits)
                return None if made is None else made.data
            if given.max_pixels is None:
                return None
            still = self._stills.take(measured.name) or decoded(data, limits=self._limits)[0]
            return reencode.smaller(still, given.max_pixels, self.grid)


def as_data_url(data: bytes, before: str) -> str:
    """Bytes as a data URL, labelled as they were before where that was said, as what they are else."""
    label = before.partition(",")[0].strip()[5:].partition(";")[0] if before[:5].lower() == "data:" else ""
    if data[4:8] == b"ftyp":  # whatever a clip was, it is written as this
        return f"data:video/mp4;base64,{base64.b64encode(data).decode()}"
    if not label or not label.isascii() or not label.isprintable() or '"' in label or "\\" in label:
        label = next((kind for magic, kind in _LABELS.items() if data.startswith(magic)), "application/octet-stream")
    return f"data:{label};base64,{base64.b64encode(data).decode()}"
