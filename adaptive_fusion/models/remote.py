"""A model that somebody else runs, as far as a plan needs it: how many pixels and tokens it makes of media, by numbers.

Only what happens before the engine can be chosen for it: pixels and frames. Knows sizes, and a grid that says how the
model upstream resizes. Must not know of addresses, requests or policies.
"""

from collections.abc import Sequence
from typing import Protocol

from adaptive_fusion.models.base import Planned, Size, VisualPlan
from adaptive_fusion.point import OperatingPoint

_WHY = "the engine upstream runs the model, where only pixels and frames can be chosen before it"


class Grid(Protocol):
    """How a model resizes what it is shown."""

    @property
    def patch(self) -> int: ...

    @property
    def merge(self) -> int: ...

    @property
    def temporal(self) -> int: ...

    def size(self, width: int, height: int, max_pixels: int | None = None) -> tuple[int, int]:
        """Width and height at which the model sees an image that is first brought to `max_pixels`."""
        ...


class RemoteAdapter(Planned):
    """Plans for a model behind an address.

    Args:
        grid: How it resizes.
        name: The model's, for messages.
    """

    knobs = frozenset({"max_pixels", "max_fps"})
    refusals = dict.fromkeys(("fusion", "layers", "adapter_rank", "downsample", "blanks"), _WHY)

    def __init__(self, grid: Grid, name: str) -> None:
        self.grid, self._name = grid, name

    @property
    def name(self) -> str:
        return self._name

    def sides(self, size: Size, max_pixels: int | None) -> tuple[int, int]:
        """Width and height, of a frame, at which the model sees a medium. A limit that the caller asked for holds
        beside `max_pixels`."""
        limits = [each for each in (max_pixels, size.most_pixels, size.max_pixels) if each is not None]
        return self.grid.size(size.width, size.height, min(limits, default=None))

    def native_pixels(self, size: Size) -> int:
        width, height = self.sides(size, None)
        return width * height

    def plan(self, sizes: Sequence[Size], point: OperatingPoint) -> VisualPlan:
        segments, tokens, patch = list[int](), 0, self.grid.patch
        for size in sizes:
            width, height = self.sides(size, point.max_pixels)
            frames = -(-size.frames // self.grid.temporal)
            patches = (width // patch) * (height // patch)
            segments += [patches] * frames
            tokens += frames * patches // self.grid.merge**2
        return VisualPlan(tuple(segments), tokens)
