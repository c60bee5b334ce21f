"""The fusion strategies as plain modules over the levels of any vision encoder.

Levels come as ``list[Tensor[B, N_i, D_i]]``, shallowest first; each is brought to the deepest level's grid
by bilinear interpolation, projected to one width and combined into ``[B, N, D]``. Knows no encoder, and
nothing of DeepStack.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor, nn

from adaptive_fusion.checks import integer, is_integer
from adaptive_fusion.errors import ConfigError
from adaptive_fusion.fusion.kernels import weighted_sum
from adaptive_fusion.fusion.levels import depth_profile
from adaptive_fusion.fusion.registry import Registry
from adaptive_fusion.fusion.weights import Adapters, FixedWeights, GatedWeights, LevelWeights, UnitWeights

Grid = tuple[int, int]
"""Rows and columns of a level's tokens, in row-major order, without class or register tokens."""


class LevelFusion(nn.Module, ABC):
    """Aligns, projects and combines levels.

    Args:
        widths: D_i of each level, shallowest first.
        width: D of the result; the deepest level's where it is not given.

    Levels of another width than D pass through a learned projection, the others are left as they are.
    Raises ConfigError for no levels or a width below 1.
    """

    def __init__(self, widths: Sequence[int], width: int | None = None) -> None:
        super().__init__()
        sizes = [*widths, width] if width is not None else [*widths]
        if not widths or any(not is_integer(d) or d < 1 for d in sizes):
            raise ConfigError(f"widths are {list(widths)!r}, width is {width!r}; expected integers of at least 1")
        self.widths = tuple(widths)
        self.width = widths[-1] if width is None else width
        self.projections = nn.ModuleList(
            nn.Identity() if d == self.width else nn.Linear(d, self.width, bias=False) for d in widths
        )

    @abstractmethod
    def combine(self, levels: Sequence[Tensor], lengths: Sequence[int]) -> Tensor:
        """``[B * N, D]`` from aligned levels, each ``[B * N, D]``; `lengths` is N for each of B images."""

    def forward(self, levels: Sequence[Tensor], grids: Sequence[Grid] | None = None) -> Tensor:
        """Fuse one batch.

        Args:
            levels: ``[B, N_i, D_i]`` each, shallowest first.
            grids: rows and columns of each level; square where not given.

        Returns ``[B, N, D]`` on the deepest level's grid. Raises ConfigError if levels, widths and grids do
        not fit.
        """
        batch = levels[-1].shape[0] if levels else 0
        found = [tuple(level.shape) for level in levels]
        if len(found) != len(self.widths) or any(
            len(shape) != 3 or shape[0] != batch or 0 in shape or shape[2] != d
            for shape, d in zip(found, self.widths, strict=True)
        ):
            raise ConfigError(f"levels have shapes {found}; expected [batch, tokens, width], widths {self.widths}")
        grids = [_square(level.shape[1]) for level in levels] if grids is None else list(grids)
        if [h * w for h, w in grids] != [level.shape[1] for level in levels]:
            raise ConfigError(f"grids are {grids!r}; expected rows x columns of the levels {found}")
        aligned = [
            project(_align(level, grid, grids[-1])).flatten(0, 1)
            for level, grid, project in zip(levels, grids, self.projections, strict=True)
        ]
        tokens = levels[-1].shape[1]
        return self.combine(aligned, [tokens] * batch).view(batch, tokens, self.width)


STANDALONE: Registry[LevelFusion] = Registry("standalone fusion")
"""The stand-alone strategies by name."""


@STANDALONE.register("top")
class TopFusion(LevelFusion):
    """The deepest level alone."""

    def combine(self, levels: Sequence[Tensor], lengths: Sequence[int]) -> Tensor:
        return levels[-1]


class MixedFusion(LevelFusion):
    """A weighted sum of adapted levels, ``A_i(F) = F + B_i C_i F`` of rank `rank` with B_i = 0 at start."""

    def __init__(self, widths: Sequence[int], width: int | None = None, rank: int = 0) -> None:
        super().__init__(widths, width)
        integer(rank, "rank", 0)
        self.weights = self.level_weights(depth_profile(len(self.widths)))
        self.adapters = Adapters(len(self.widths), self.width, rank) if rank else None

    @abstractmethod
    def level_weights(self, profile: Sequence[float]) -> LevelWeights:
        """The module that weights the levels, starting at `profile`."""

    def combine(self, levels: Sequence[Tensor], lengths: Sequence[int]) -> Tensor:
        weights = self.weights(levels, lengths)
        fused = weighted_sum(levels, weights, lengths)
        return fused if self.adapters is None else self.adapters.add_to(fused, levels, weights, lengths)


@STANDALONE.register("sum")
class SumFusion(MixedFusion):
    """All levels, added."""

    def level_weights(self, profile: Sequence[float]) -> LevelWeights:
        return UnitWeights()


@STANDALONE.register("weighted")
class WeightedFusion(MixedFusion):
    """One learned weight per level, starting at the depth profile."""

    def level_weights(self, profile: Sequence[float]) -> LevelWeights:
        return FixedWeights(profile)


@STANDALONE.register("gated")
class GatedFusion(MixedFusion):
    """Weights per image from globally pooled features, starting at the depth profile for every image."""

    def level_weights(self, profile: Sequence[float]) -> LevelWeights:
        return GatedWeights(profile, self.width)


def _square(tokens: int) -> Grid:
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise ConfigError(f"a level has {tokens} tokens, no square; give its grid, and drop class tokens before")
    return side, side


def _align(level: Tensor, grid: Grid, target: Grid) -> Tensor:
    if grid == target:
        return level
    image = level.reshape(level.shape[0], *grid, -1).permute(0, 3, 1, 2)
    resized = nn.functional.interpolate(image, size=target, mode="bilinear", align_corners=False)
    return resized.permute(0, 2, 3, 1).flatten(1, 2)
