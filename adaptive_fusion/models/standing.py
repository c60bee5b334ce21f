"""A Qwen3-VL vision tower on the patches that are encoded for others as well, while it runs and only while it runs.

The tower takes the positions and the lengths of what it is given as arguments, so patches can be left out without a
change to it. What is attended to counts as often as it stands for something: an attention function that is registered
with transformers adds the weights, and the tower's configuration names it for the time of one forward.

Knows a tower's attributes and `Standing`; nothing of language models and points.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from adaptive_fusion.models.flash import flash_first
from adaptive_fusion.models.unwrap import called, uncompiled
from adaptive_fusion.reduction.blanks import Standing

ATTENTION = "adaptive_fusion_weighted"
"""The name of the attention function, as transformers knows it."""
MORE = 8
"""Columns that queries and keys are widened by: flash kernels take widths in steps of eight."""
_ASKED = ("pos_embed", "rotary_pos_emb", "num_grid_per_side", "interpolation_mode", "interpolation_align_corners")
_POSITIONS = ("get_vision_position_ids", "get_vision_interpolation_indices_and_weights")


def why_not(tower: nn.Module) -> str:
    """Why patches of this tower cannot be left out, in words; empty where they can."""
    host: Any = called(tower)
    if not all(hasattr(host, name) for name in (*_ASKED, "blocks")) or hasattr(host, "fullatt_block_indexes"):
        return f"{type(host).__name__} does not take the positions of its patches, as Qwen3-VL's encoder does"
    if not all(hasattr(_positions(), name) for name in _POSITIONS):
        return f"transformers {transformers.__version__} does not let an encoder be told its patches' positions"
    return ""


def encode(tower: nn.Module, pixels: Tensor, thw: Tensor, standing: Standing) -> Any:
    """The tower's output for the patches of what is encoded alone, in their order.

    Args:
        tower: For which `why_not` has nothing to say.
        pixels: Of all patches.
        thw: Their grids ``[media, 3]``.
        standing: Who stands for whom.
    """
    host: Any = called(tower)
    merge = host.spatial_merge_size
    rows = standing.patches(merge)
    how = {"mode": host.interpolation_mode, "align_corners": host.interpolation_align_corners}
    indices, shares = _positions().get_vision_interpolation_indices_and_weights(
        thw, num_grid_per_side=host.num_grid_per_side, spatial_merge_size=merge, **how
    )
    lengths = [merge * merge * count for count in standing.frames if count]
    ends = torch.tensor([0, *lengths], device=thw.device).cumsum(0, dtype=torch.int32)
    weights = standing.counts.log().repeat_interleave(merge * merge)
    with _weighted(tower), flash_first(pixels.device):
        return tower(
            pixels[rows],
            grid_thw=thw,
            interp_indices=indices[rows],
            interp_weights=shares[rows],
            position_ids=_positions().get_vision_position_ids(thw, merge)[rows],
            cu_seqlens=ends,
            # Every block goes through the images and frames in order, so it comes to each with its own weights.
            patch_weights=cycle(map(Weights, torch.split(weights, lengths))),
            return_dict=True,
        )


@contextmanager
def _weighted(tower: nn.Module) -> Iterator[None]:
    """Inside this context the tower's attention is `_attend`."""
    host: Any = called(tower)
    transformers.AttentionInterface.register(ATTENTION, _attend)
    native = host.config._attn_implementation
    host.config._attn_implementation = ATTENTION
    try:
        with uncompiled(tower, host, *host.blocks):
            yield
    finally:
        host.config._attn_implementation = native


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    patch_weights: "Iterator[Weights]",
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention of one image or frame, ``[1, heads, patches, width]`` each, in which patches count as they weigh.

    On a CPU by a mask. Elsewhere flash kernels take none, and those that do are slower.
    """
    weights = next(patch_weights)
    attend = masked if query.device.type == "cpu" else widened
    found = attend(query, key, value, weights, query.shape[-1] ** -0.5 if scaling is None else scaling)
    return found.transpose(1, 2).contiguous(), None


@dataclass
class Weights:
    """Logarithms of how often the patches of an image or frame count, ``[patches]``; what follows of them is made once
    for all blocks."""

    logs: Tensor
    made: dict[tuple[Any, ...], Tensor] = field(default_factory=dict, repr=False)

    def mask(self, query: Tensor) -> Tensor:
        """``[1, 1, 1, patches]``, to be added to scores."""
        key = (query.dtype, query.device)
        if key not in self.made:
            self.made[key] = self.logs.to(query).view(1, 1, 1, -1)
        return self.made[key]

    def columns(self, key: Tensor, scaling: float) -> Tensor:
        """``[patches, MORE]``, whose product with ones, scaled, is what the mask adds: in two parts, of which the
        second is what half precision leaves of the first."""
        name = (key.dtype, key.device, scaling)
        if name not in self.made:
            logs = (self.logs.to(key.device, torch.float32) / scaling)[:, None]
            high = logs.to(key.dtype)
            self.made[name] = F.pad(torch.cat([high, (logs - high.float()).to(key.dtype)], 1), (0, MORE - 2))
        return self.made[name]


def masked(query: Tensor, key: Tensor, value: Tensor, weights: Weights, scaling: float) -> Tensor:
    """Attention with the weights in a mask: ``[1, heads, patches, width]``."""
    mask = weights.mask(query).expand(1, 1, query.shape[2], key.shape[2])
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)


def widened(query: Tensor, key: Tensor, value: Tensor, weights: Weights, scaling: float) -> Tensor:
    """The same with the weights as columns of the keys, for kernels that take no mask and need all widths alike."""
    heads, width = query.shape[1], query.shape[-1]
    own = weights.columns(key, scaling).expand(1, heads, -1, -1)
    key = torch.cat([key, own], -1)
    found = F.scaled_dot_product_attention(
        F.pad(query, (0, MORE), value=1.0), key, F.pad(value, (0, MORE)), scale=scaling
    )
    return found[..., :width]


def _positions() -> Any:
    """The module of transformers that makes the positions of patches; something without them where there is none."""
    try:
        from transformers import vision_utils
    except ImportError:
        return None
    return vision_utils
