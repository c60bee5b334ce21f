"""The encoder cache: what the vision encoder made of media, least recently used out first, within a bound of bytes.

Knows entries, their sizes and `cachetools`. Must not know what a key is made of or what is decided with it.
"""

import threading
from dataclasses import dataclass

from adaptive_fusion.checks import integer
from adaptive_fusion.errors import MissingExtraError
from adaptive_fusion.models.reuse import Entry

MIB = 1 << 20
MAX_MIB = 1 << 20
OVERHEAD = 1024
"""Bytes that an entry is taken to need beside its tensors: its key, its place, its objects."""


@dataclass(frozen=True, slots=True)
class CacheCounts:
    """What a cache has done and holds: media found and not found when they were to be encoded, entries that made room
    for others, entries too large for the whole cache, and bytes and entries that are there."""

    hits: int
    misses: int
    evicted: int
    too_large: int
    nbytes: int
    entries: int


class EncoderCache:
    """A bounded store of `Entry`; thread-safe. See `adaptive_fusion.models.reuse.Store`.

    Args:
        mib: Most MiB that it may hold, at least 1.

    Raises:
        ConfigError: For another number.
        MissingExtraError: If cachetools is not installed.
    """

    def __init__(self, mib: int) -> None:
        integer(mib, "encoder_cache_mb", 1, MAX_MIB)
        try:
            from cachetools import LRUCache
        except ImportError as error:
            raise MissingExtraError("cachetools is missing; expected pip install 'adaptive-fusion[serve]'") from error
        self.max_bytes = mib * MIB
        self._kept: LRUCache[str, Entry] = LRUCache(self.max_bytes, lambda entry: entry.nbytes + OVERHEAD)
        self._lock = threading.Lock()
        self._hits = self._misses = self._evicted = self._too_large = 0

    def get(self, key: str) -> Entry | None:
        """The entry, which becomes the most recently used; None if it is not there."""
        with self._lock:
            return self._kept.get(key)

    def __contains__(self, key: str) -> bool:
        """Whether it is there; being asked about does not make it recently used."""
        with self._lock:
            return key in self._kept

    def put(self, key: str, entry: Entry) -> None:
        """Keep an entry; those least recently used make room. One larger than the whole cache is counted, not kept."""
        with self._lock:
            before = len(self._kept) - (key in self._kept)
            if entry.nbytes + OVERHEAD > self.max_bytes:
                self._too_large += 1
                self._kept.pop(key, None)
                return
            self._kept[key] = entry
            self._evicted += before + 1 - len(self._kept)

    def count(self, hits: int, misses: int) -> None:
        """So many media were there, and so many were not, when they were to be encoded."""
        with self._lock:
            self._hits += hits
            self._misses += misses

    def clear(self) -> None:
        """Forget everything; what it did stays counted."""
        with self._lock:
            self._kept.clear()

    @property
    def nbytes(self) -> int:
        """Bytes that it holds."""
        with self._lock:
            return int(self._kept.currsize)

    def counts(self) -> CacheCounts:
        """What it has done and holds."""
        with self._lock:
            held = int(self._kept.currsize), len(self._kept)
            return CacheCounts(self._hits, self._misses, self._evicted, self._too_large, *held)
