"""What processors with a patch grid give: which tensors belong to images and clips, their grids, and the way back to
pixels.

Knows tensors and their names. Must not know of models or points.
"""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from adaptive_fusion.errors import ConfigError
from adaptive_fusion.models.reuse import Reuse
from adaptive_fusion.reduction.pool import Grid

KINDS = {
    "image": ("pixel_values", "image_grid_thw", "image_token_id"),
    "video": ("pixel_values_videos", "video_grid_thw", "video_token_id"),
}
THUMBNAIL = 640
"""Longest side, in pixels, of what is put back together from patches for measuring complexity."""


def unpatched(
    pixels: Tensor | None, grids: list[Grid], processor: Any, merge: int, kind: str
) -> list[npt.NDArray[np.uint8]]:
    """Images ``[H, W, 3]`` or clips ``[T, H, W, 3]`` put back together from a processor's tensors, subsampled."""
    if pixels is None:
        return []
    mean, std = (torch.tensor(getattr(processor, k)).view(3, 1, 1) * 255 for k in ("image_mean", "image_std"))
    p, m, temporal = int(processor.patch_size), merge, int(processor.temporal_patch_size)
    found = []
    for part, (t, h, w) in zip(torch.split(pixels, [t * h * w for t, h, w in grids]), grids, strict=True):
        stride = min(p, max(1, -(-max(h, w) * p // THUMBNAIL)))
        # [t, h/m, w/m, m, m, channel, frame of the pair, y, x] -> [t, y, x, channel], first frame of each pair.
        cells = part.view(t, h // m, w // m, m, m, 3, temporal, p, p)[..., 0, ::stride, ::stride]
        # Scaled where they lie and put in order as bytes: a quarter of the memory to move.
        bytes_ = (cells.float().cpu() * std).add_(mean).round_().clamp_(0, 255).to(torch.uint8)
        image = bytes_.permute(0, 1, 3, 6, 2, 4, 7, 5).reshape(t, h * cells.shape[-2], w * cells.shape[-1], 3)
        found.append(cast(npt.NDArray[np.uint8], image.numpy() if kind == "video" else image[0].numpy()))
    return found


def known(reuse: Reuse | None, kind: str, about: Sequence[Any] = ()) -> list[dict[str, Any] | None]:
    """What the processor would say of each medium of a kind whose pixels nobody needs; None of the others."""
    if reuse is None:
        return []
    pixel_key, grid_key, _ = KINDS[kind]
    found: list[dict[str, Any] | None] = []
    for index, one in enumerate(reuse.of(kind)):
        features: dict[str, Any] | None = None
        if one is not None:
            features = {pixel_key: torch.empty(0), grid_key: torch.tensor([one.grid])}
        if features is not None and about:
            features["video_metadata"] = [about[index]]
        found.append(features)
    return found


def grids_of(inputs: Mapping[str, Any], kind: str, *, seen: bool = False) -> list[Grid]:
    """Frames, rows and columns, in patches, of each image or clip; the pixels of those `seen` already may be gone."""
    pixel_key, grid_key, _ = KINDS[kind]
    pixels, grid = inputs.get(pixel_key), inputs.get(grid_key)
    found = [] if grid is None else [(int(t), int(h), int(w)) for t, h, w in grid.tolist()]
    rows, patches = 0 if pixels is None else len(pixels), sum(t * h * w for t, h, w in found)
    if rows != patches and not seen:
        raise ConfigError(
            f"{pixel_key} has {rows} rows and {grid_key} stands for {patches} patches; "
            "expected as many, both as the processor gives them"
        )
    return found
