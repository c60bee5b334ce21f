"""Blank parts of an image, encoded once for a window of the grid in place of once for every patch.

A merged token is blank where its patches, and those around it, hold one shade each. Of the blank ones in a window of
`side` x `side` tokens the most central is encoded for all that look like it; the others are left out of the encoder and
get a copy of what it made of that one. What is encoded for n tokens counts n times wherever it is attended to: log(n)
is added to its attention scores, so that the rest of the image is told of as much ground as there is (proportional
attention, Bolya et al. 2023, "Token Merging", section 3). The grid, the prompt and every position stay as they are.

Where next to nothing is blank nothing is left out. Knows packed patches and grids; nothing of model families.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from adaptive_fusion.reduction.pool import Grid

SHADES = 16.0
"""Most that the values within a blank part, and the means of two that are taken for one, may differ, of 255: people see
hardly anything there."""
GRAIN, CELL, CELLS_DIFFER, CELL_HOLDS = 40.0, 4, 8.0, 4.0
"""Grain, such as a scan's, counts as one shade as well: its values differ by at most the first of these, its means over
cells of 4 x 4 pixels by at most the third, and it is in every cell: values differ by the last at least there. Faint
strokes on clean ground leave cells clean."""


LEAST_SPARED = 0.1
"""Share of the tokens of an image or clip below which none is left out: attention with weights takes slower kernels
than without, and what hardly has any blank parts is then as it is natively, to the last bit."""


AT_ONCE = 1024
"""Tokens that are looked at for grain together."""


@dataclass(frozen=True)
class Standing:
    """Which merged tokens are encoded, and for which others.

    Attributes:
        kept: Of those that are encoded, their places among all, ascending, ``[K]``.
        source: Of every token the one of `kept` that stands for it, ``[N]``.
        counts: How many each of `kept` stands for, itself included, ``[K]``.
        frames: How many of `kept` there are in each image or frame.
        media: The same of each image or clip.
    """

    kept: Tensor
    source: Tensor
    counts: Tensor
    frames: tuple[int, ...]
    media: tuple[int, ...]

    @property
    def all(self) -> bool:
        """Whether every token is encoded for itself."""
        return len(self.kept) == len(self.source)

    @classmethod
    def alone(cls, grid: Grid, device: torch.device) -> "Standing":
        """Every token of an image or clip for itself."""
        t, h, w = grid
        places = torch.arange(t * h * w, device=device)
        return cls(places, places, torch.ones_like(places), (h * w,) * t, (t * h * w,))

    def patches(self, merge: int) -> Tensor:
        """Places of the patches of `kept` among all patches, which are packed by token: ``[K * merge ** 2]``."""
        return _patches(self.kept, merge)

    def spread(self, features: Tensor, merge: int = 1) -> Tensor:
        """Features of what is encoded ``[K * merge ** 2, D]`` as those of all, ``[N * merge ** 2, D]``."""
        return features[_patches(self.source, merge).to(features.device)]  # of a tower that is split, the last one

    @classmethod
    def joined(cls, parts: "Sequence[Standing]") -> "Standing":
        """Those of several images or clips as that of all of them, packed in this order."""
        kept, source, tokens, encoded = [], [], 0, 0
        for part in parts:
            kept.append(part.kept + tokens)
            source.append(part.source + encoded)
            tokens, encoded = tokens + len(part.source), encoded + len(part.kept)
        return cls(
            torch.cat(kept),
            torch.cat(source),
            torch.cat([part.counts for part in parts]),
            tuple(each for part in parts for each in part.frames),
            tuple(each for part in parts for each in part.media),
        )


def expected_share(edge_density: float, side: int) -> float:
    """The share of tokens that are encoded, as far as an image's share of edge pixels tells it before it is seen: all
    without edges are 1 / side^2, and one in ten pixels leaves next to nothing blank.

    Fitted with windows of 2 to 180 screens of the reference model and 120 real images of eight kinds, whose shares it
    missed by .06 on average before those with less than `LEAST_SPARED` to spare were left as they are.
    """
    share = 1.0 - (1.0 - 1.0 / side**2) * math.exp(-10.0 * edge_density)
    return share if share <= 1.0 - LEAST_SPARED else 1.0


def _patches(tokens: Tensor, merge: int) -> Tensor:
    cells = torch.arange(merge * merge, device=tokens.device)
    return (tokens[:, None] * (merge * merge) + cells).flatten()


def standing(
    pixels: Tensor, scale: Tensor, grids: Sequence[Grid], merge: int, shape: tuple[int, int, int], side: int
) -> Standing:
    """Who stands for whom. Takes memory for a few numbers a patch, not for another copy of pixels in float32.

    Args:
        pixels: Patches ``[patches, channels * frames * size * size]``, packed by merged token.
        scale: By what values of each channel are multiplied to differ as those of 0 to 255 do, ``[channels]``.
        grids: Frames, rows and columns in merged tokens of each image or clip.
        merge: Patches on a token's side.
        shape: Channels, frames and pixels on a patch's side.
        side: Of a window, in merged tokens.
    """
    sizes = [t * h * w for t, h, w in grids]
    each = torch.split(pixels, [merge * merge * size for size in sizes])
    return Standing.joined(
        [_of_one(part, scale, grid, merge, shape, side) for part, grid in zip(each, grids, strict=True)]
    )


def _of_one(pixels: Tensor, scale: Tensor, grid: Grid, merge: int, shape: tuple[int, int, int], side: int) -> Standing:
    t, h, w = grid
    channels = shape[0]
    values = pixels.view(t, h, w, merge * merge, channels, -1)
    blank = _blank(values, scale, merge, shape)
    means = values.mean((3, 5), dtype=torch.float32) * scale
    free = _windows(blank[..., None].float(), side)[..., 0] > 0
    shade = _windows(means, side)
    # The most central of a window's blank tokens, the first of several.
    places = torch.arange(side, device=pixels.device) - (side - 1) / 2
    far = (places[:, None].square() + places.square()).flatten()
    central = torch.where(free, far, torch.inf).argmin(-1, keepdim=True)
    own = shade.gather(-2, central[..., None].expand(*central.shape, channels))
    alike = free & ((shade - own).abs().amax(-1) <= SHADES)
    # A window without a blank token has none that is alike.
    order = torch.arange(t * h * w, device=pixels.device).view(t, h, w, 1)
    numbers = _windows(order.float(), side)[..., 0].long()
    instead = torch.where(alike, numbers.gather(-1, central), numbers)
    by = _grid(instead, grid, side).flatten()
    counts = by.bincount(minlength=t * h * w)
    kept = counts.nonzero()[:, 0]
    if len(kept) > (1.0 - LEAST_SPARED) * t * h * w:
        return Standing.alone(grid, pixels.device)
    source = ((counts > 0).cumsum(0) - 1)[by]
    frames = (kept // (h * w)).bincount(minlength=t)
    return Standing(kept, source, counts[kept], tuple(frames.tolist()), (len(kept),))


def _blank(values: Tensor, scale: Tensor, merge: int, shape: tuple[int, int, int]) -> Tensor:
    """Which tokens hold one shade or grain, and have no patch beside them that does not: ``[t, h, w]`` of the patches'
    `values` ``[t, h, w, merge * merge, channels, rest]``."""
    t, h, w = values.shape[:3]
    high, low = values.amax(-1).float() * scale, values.amin(-1).float() * scale
    plain = (high - low).amax(-1) <= SHADES
    # By token: two patches of one shade each need not be of the same.
    differ = (high.amax(3) - low.amin(3)).amax(-1)
    one = differ <= SHADES
    perhaps = (differ <= GRAIN) & ~one
    grainy = perhaps.view(-1).nonzero()[:, 0]
    for begin in range(0, len(grainy), AT_ONCE):
        some = grainy[begin : begin + AT_ONCE]
        one.view(-1)[some] = _is_grain(values.flatten(0, 2)[some].float() * scale[:, None], shape)
    busy = ~(plain | one[..., None])
    busy = busy.view(t, h, w, merge, merge).transpose(2, 3).reshape(t, 1, h * merge, w * merge).float()
    near = F.max_pool2d(F.max_pool2d(busy, 3, 1, 1), merge)[:, 0] > 0
    return one & ~near


def _is_grain(values: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Of tokens `values` ``[n, patches, channels, rest]`` which hold nothing but grain."""
    channels, _, size = shape
    pixels = values.reshape(-1, 1, size, size)
    cell = min(CELL, size)
    high, low = F.max_pool2d(pixels, cell), -F.max_pool2d(-pixels, cell)
    by_channel = (len(values), values.shape[1], channels, -1)
    means = F.avg_pool2d(pixels, cell).view(by_channel)
    even = (means.amax((1, 3)) - means.amin((1, 3))).amax(-1) <= CELLS_DIFFER
    return even & ((high - low).view(by_channel).amax(2).amin((1, 2)) >= CELL_HOLDS)


def _windows(values: Tensor, side: int) -> Tensor:
    """``[t, h, w, D]`` cut into windows, filled up with 0: ``[t, rows, columns, side * side, D]``."""
    t, h, w, d = values.shape
    rows, columns = -(-h // side), -(-w // side)
    filled = F.pad(values, (0, 0, 0, columns * side - w, 0, rows * side - h))
    cut = filled.view(t, rows, side, columns, side, d).transpose(2, 3)
    return cut.reshape(t, rows, columns, side * side, d)


def _grid(values: Tensor, grid: Grid, side: int) -> Tensor:
    """Windows ``[t, rows, columns, side * side]`` put together again: ``[t, h, w]``."""
    t, h, w = grid
    rows, columns = values.shape[1:3]
    whole = values.view(t, rows, columns, side, side).transpose(2, 3).reshape(t, rows * side, columns * side)
    return whole[:, :h, :w]
