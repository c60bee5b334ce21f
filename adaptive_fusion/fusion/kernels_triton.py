"""A weighted sum of levels with low-rank adapters as one Triton kernel, which reads every level once.

The other forms read a level again for its adapter and go through float32 copies of whole levels. It takes the place of
`weighted_sum` where asked for (`DeepStackFusion.compile_kernels` with the backend ``triton``), and hands on to it what
it does not do: gradients, float64, levels that are not contiguous or very wide. Knows packed tensors only. Imported
when asked for: Triton is not on every machine.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from adaptive_fusion.fusion.kernels import check_packed, expand_rows, weight_rows, weighted_sum

MAX_WIDTH = 4096
_TILE = 8192
"""Values of a block's sum, kept in registers: 32 a thread with eight warps."""
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@triton.jit  # type: ignore[untyped-decorator]
def _sum_kernel(  # type: ignore[no-untyped-def]
    out,
    levels,
    weights,
    mixed,
    down,
    up,
    patches,
    weight_stride,
    mixed_stride,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    LEVELS: tl.constexpr,
    RANK: tl.constexpr,
    ROWS: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, PADDED)
    inside, wide = rows < patches, columns < WIDTH
    places = rows[:, None] * WIDTH + columns[None, :]
    mask = inside[:, None] & wide[None, :]
    total = tl.zeros((ROWS, PADDED), tl.float32)
    for i in tl.static_range(LEVELS):
        level = tl.load(levels[i] + places, mask=mask, other=0.0).to(tl.float32)
        weight = tl.load(weights + rows * weight_stride + i, mask=inside, other=0.0)
        total += weight[:, None] * level
        if RANK > 0:
            share = tl.load(mixed + rows * mixed_stride + i, mask=inside, other=0.0)
            for r in tl.static_range(RANK):
                place = (i * RANK + r) * WIDTH + columns
                into = tl.load(down + place, mask=wide, other=0.0).to(tl.float32)
                back = tl.load(up + place, mask=wide, other=0.0).to(tl.float32)
                code = tl.sum(level * into[None, :], axis=1) * share
                total += code[:, None] * back[None, :]
    tl.store(out + places, total.to(out.dtype.element_ty), mask=mask)


class TritonSum:
    """`weighted_sum` by one kernel; `adapted` with the adapters' share in the same pass."""

    def __call__(self, levels: Sequence[Tensor], weights: Tensor, lengths: Sequence[int]) -> Tensor:
        """See `weighted_sum`."""
        check_packed(levels, lengths)
        if not _takes(levels, weights):
            return weighted_sum(levels, weights, lengths)
        rows = weight_rows(weights, len(levels), len(lengths))
        return _launch(levels, rows, rows, None, None, lengths)

    def adapted(
        self,
        levels: Sequence[Tensor],
        weights: Tensor,
        lengths: Sequence[int],
        mixed: Tensor,
        down: Tensor,
        up: Tensor,
    ) -> Tensor | None:
        """Sum of ``weights[image, i] * levels[i] + mixed[image, i] * up[i] @ down[i] @ levels[i]``.

        Args:
            mixed: As `weights`, of the adapters.
            down: ``[L, rank, D]``.
            up: ``[L, D, rank]``.

        Returns ``[N, D]``, accumulated in float32 and rounded once, or None for what this kernel does not do.
        Raises ConfigError if shapes do not fit.
        """
        check_packed(levels, lengths)
        if not _takes(levels, weights, mixed, down, up):
            return None
        rows, shares = (weight_rows(each, len(levels), len(lengths)) for each in (weights, mixed))
        dtype = levels[0].dtype
        return _launch(levels, rows, shares, down.to(dtype), up.transpose(1, 2).to(dtype).contiguous(), lengths)


def _takes(levels: Sequence[Tensor], *others: Tensor) -> bool:
    first = levels[0]
    if first.dtype not in _DTYPES or first.shape[1] > MAX_WIDTH or not all(each.is_contiguous() for each in levels):
        return False
    return not (torch.is_grad_enabled() and any(each.requires_grad for each in (*levels, *others)))


def _launch(
    levels: Sequence[Tensor],
    weights: Tensor,
    mixed: Tensor,
    down: Tensor | None,
    up: Tensor | None,
    lengths: Sequence[int],
) -> Tensor:
    first = levels[0]
    patches, width = first.shape
    weights, mixed = (expand_rows(each.float(), lengths).contiguous() for each in (weights, mixed))
    out = torch.empty_like(first)
    padded = triton.next_power_of_2(width)
    rows = max(1, _TILE // padded)
    _sum_kernel[(triton.cdiv(patches, rows),)](
        out,
        tuple(levels),
        weights,
        mixed,
        weights if down is None else down.contiguous(),
        weights if up is None else up,
        patches,
        0 if weights.shape[0] == 1 else len(levels),
        0 if mixed.shape[0] == 1 else len(levels),
        WIDTH=width,
        PADDED=padded,
        LEVELS=len(levels),
        RANK=0 if down is None else down.shape[1],
        ROWS=rows,
        num_warps=8,
    )
    return out
