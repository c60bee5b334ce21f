"""Average pooling of packed visual tokens on their grid, after the encoder's mergers.

Knows grids and tensors only: the caller says how many merged tokens each image or clip has, and puts the
reduced grid into positions and placeholders.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from adaptive_fusion.checks import is_number
from adaptive_fusion.errors import ConfigError

Grid = tuple[int, int, int]
"""Frames, rows and columns, in merged tokens."""

MAX_WINDOW = 64


def window(ratio: float) -> int:
    """Side k of the pooling window for a linear `ratio`; raises ConfigError unless the ratio is 1/k."""
    side = round(1 / ratio) if is_number(ratio) and 1 / MAX_WINDOW <= ratio <= 1 else 0
    if side == 0 or abs(side * ratio - 1) > 1e-6:
        raise ConfigError(
            f"downsample is {ratio!r}; expected 1/k for a whole k up to {MAX_WINDOW}, such as 0.5 or 0.25"
        )
    return side


def pooled_grid(t: int, h: int, w: int, ratio: float) -> Grid:
    """Grid after pooling: frames stay, rows and columns shrink by `ratio`, rounded up (5x7 at 0.5 is 3x4)."""
    side = window(ratio)
    if min(t, h, w) < 1:
        raise ConfigError(f"grid is {(t, h, w)!r}; expected at least one frame, row and column")
    return t, -(-h // side), -(-w // side)


def downsample(features: Tensor, grids: Sequence[Grid], ratio: float) -> Tensor:
    """Average-pool packed tokens with a k x k window, k = 1/ratio, frame by frame.

    Args:
        features: ``[N, D]``, the images' tokens one after the other, each frame in row-major order.
        grids: ``(t, h, w)`` per image or clip in merged tokens; their products sum to N.
        ratio: 1/k. At 1.0 the same tensor is returned.

    Returns ``[M, D]``, M the sum over the pooled grids. A window cut by the edge averages the tokens it
    really holds.
    Raises ConfigError if ratio or grids do not fit.
    """
    side = window(ratio)
    for grid in grids:
        pooled_grid(*grid, ratio)
    counts = [t * h * w for t, h, w in grids]
    if features.ndim != 2 or sum(counts) != features.shape[0]:
        raise ConfigError(
            f"features have shape {tuple(features.shape)}, grids {list(grids)!r} hold {sum(counts)} tokens; "
            "expected [tokens, width] with as many tokens"
        )
    if side == 1 or not counts:
        return features
    pooled = []
    for tokens, (t, h, w) in zip(torch.split(features, counts), grids, strict=True):
        # The permuted view is channels-last in memory, so neither this nor the way back copies.
        frames = tokens.reshape(t, h, w, -1).permute(0, 3, 1, 2)
        cells = F.avg_pool2d(frames, side, ceil_mode=True, count_include_pad=False)
        pooled.append(cells.permute(0, 2, 3, 1).reshape(-1, features.shape[1]))
    return pooled[0] if len(pooled) == 1 else torch.cat(pooled)
