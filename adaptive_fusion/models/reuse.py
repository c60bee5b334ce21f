"""What the vision encoder made of media before, in place of running it again.

Kept is what comes after the mergers, medium by medium, before the grid is pooled: every `downsample` follows from it.
The merged tokens and the taps are kept apart, since the first are the same for every fusion. `Seen` knows which media
of one request are there at a point, `Reuse` takes them and keeps the rest. Knows keys and tensors; must not know how
a key is made (`encoder_keys`) or how much may be kept.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from adaptive_fusion.point import OperatingPoint
from adaptive_fusion.reduction.pool import Grid

REUSE = "adaptive_fusion_reuse"
"""The entry of prepared inputs that holds the `Reuse` of their media, for ``Adapter.encode``, which takes it out."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A part of what the encoder made of one medium.

    Attributes:
        form: The encoder's class of outputs.
        grid: Frames, rows and columns in patches.
        tensors: ``[tokens, width]`` each: the merged tokens, or every tap's.
    """

    form: type
    grid: Grid
    tensors: tuple[Tensor, ...]

    @property
    def nbytes(self) -> int:
        """Memory that the tensors take."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @classmethod
    def owned(cls, form: type, grid: Grid, tensors: Sequence[Tensor]) -> "Entry":
        """An entry that holds no more memory than its tensors: one that is a part of a larger is copied."""
        own = [each.detach() for each in tensors]
        return cls(form, grid, tuple(t if t.untyped_storage().nbytes() <= t.nbytes else t.clone() for t in own))


class Store(Protocol):
    """Where entries are kept, by key."""

    def get(self, key: str) -> Entry | None:
        """The entry, if it is there."""
        ...

    def put(self, key: str, entry: Entry) -> None:
        """Keep an entry, at the cost of others."""
        ...

    def __contains__(self, key: str) -> bool: ...

    def count(self, hits: int, misses: int) -> None:
        """So many media were there, and so many were not, when they were to be encoded."""
        ...


@dataclass(frozen=True, slots=True)
class Keys:
    """The keys of one medium at a point: of its merged tokens, and of its taps where the point has any."""

    merged: str
    taps: str | None

    @property
    def all(self) -> tuple[str, ...]:
        """Every key without which the encoder has to run."""
        return (self.merged,) if self.taps is None else (self.merged, self.taps)


@dataclass(frozen=True, slots=True)
class Medium:
    """One medium after the mergers: its merged tokens and taps, both before pooling."""

    form: type
    grid: Grid
    merged: Tensor
    taps: tuple[Tensor, ...]


class Reuse:
    """The media of one request at one point. What is found is held, so that it cannot be lost before it is used.

    Args:
        store: Where it is kept.
        kinds: ``image`` or ``video`` of each medium, in order.
        keys: Of each medium.
    """

    def __init__(self, store: Store, kinds: Sequence[str], keys: Sequence[Keys]) -> None:
        self._store, self._kinds, self._keys = store, kinds, keys
        self._found = [_found(store, each) for each in keys]

    @property
    def hits(self) -> int:
        """How many media are there."""
        return sum(each is not None for each in self._found)

    def of(self, kind: str) -> list[Medium | None]:
        """What is there of the media of one kind, in order."""
        return [found for found, each in zip(self._found, self._kinds, strict=True) if each == kind]

    def keep(self, kind: str, made: Sequence[Medium]) -> list[Medium]:
        """Keep what was `made` of those media of a kind that were not there; all of that kind, in order."""
        rest, whole = iter(made), list[Medium]()
        for found, keys, each in zip(self._found, self._keys, self._kinds, strict=True):
            if each != kind:
                continue
            if found is None:
                found = next(rest)
                self._store.put(keys.merged, Entry.owned(found.form, found.grid, [found.merged]))
                if keys.taps is not None:
                    self._store.put(keys.taps, Entry.owned(found.form, found.grid, found.taps))
            whole.append(found)
        return whole

    def count(self) -> None:
        """The request is being encoded."""
        self._store.count(self.hits, len(self._found) - self.hits)


def _found(store: Store, keys: Keys) -> Medium | None:
    merged = store.get(keys.merged)
    taps = store.get(keys.taps) if keys.taps is not None else None
    if merged is None or (taps is None and keys.taps is not None):
        return None
    return Medium(merged.form, merged.grid, merged.tensors[0], taps.tensors if taps is not None else ())


class Seen:
    """Which media of a request the encoder need not run for, at any point.

    Args:
        store: Where what was made is kept.
        kinds: ``image`` or ``video`` of each medium, in order.
        keys: Gives the keys of each medium at a point.
    """

    def __init__(self, store: Store, kinds: Sequence[str], keys: Callable[[OperatingPoint], Sequence[Keys]]) -> None:
        self._store, self._kinds, self._keys = store, kinds, keys

    def __call__(self, point: OperatingPoint) -> tuple[bool, ...]:
        """Of each medium whether it is there."""
        return tuple(all(key in self._store for key in each.all) for each in self._keys(point))

    def at(self, point: OperatingPoint) -> Reuse:
        """Take what is there for a run at `point`."""
        return Reuse(self._store, self._kinds, self._keys(point))


def taken(inputs: dict[str, Any]) -> Reuse | None:
    """Take the `Reuse` out of prepared inputs."""
    found: Reuse | None = inputs.pop(REUSE, None)
    return found
