"""A tap's weighted sum with adapters by products and sums alone, without tensor cores: a level is read once, and stays
in registers while its codes are made. Timed by `tiles` beside the kernel that fusion has, which reads levels twice."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from adaptive_fusion.fusion.packed import back
from adaptive_fusion.fusion.triton_programs import _at, _shares


@triton.jit(do_not_specialize=["patches"])  # type: ignore[untyped-decorator]
def _program(  # type: ignore[no-untyped-def]
    out,
    levels,
    weights,
    mix,
    into,
    back,
    patches,
    TAP: tl.constexpr,
    WIDTH: tl.constexpr,
    LEVELS: tl.constexpr,
    PADDED: tl.constexpr,
    RANK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    wide = columns < WIDTH
    places = rows[:, None] * WIDTH + columns[None, :]
    mask = (rows < patches)[:, None] & wide[None, :]
    read = ()
    for i in tl.static_range(LEVELS):
        read = read + (tl.load(levels[i] + places, mask=mask, other=0.0),)  # type: ignore[assignment]  # noqa: RUF005
    ranks = tl.arange(0, PADDED)
    mixed = tl.load(mix)
    shares = _shares(weights, 0, ranks, mixed, "softplus", LEVELS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for i in tl.static_range(LEVELS):
        own = _at(shares, ranks, i)
        level = read[i].to(tl.float32)  # type: ignore[var-annotated]
        share = own
        if i == TAP:
            share += 1.0 - mixed
        total += share * level
        for k in tl.static_range(RANK):
            vector = tl.load(into + (i * RANK + k) * WIDTH + columns, mask=wide, other=0.0).to(tl.float32)
            code = tl.sum(level * vector[None, :], axis=1) * own
            vector = tl.load(back + (i * RANK + k) * WIDTH + columns, mask=wide, other=0.0).to(tl.float32)
            total += code[:, None] * vector[None, :]
    tl.store(out + places, total.to(out.dtype.element_ty), mask=mask)


def by_products(tap: Any, levels: Sequence[Tensor], rows: int, warps: int) -> Callable[[], Tensor]:
    """The call for a trained ``weighted`` tap of several levels ``[N, D]`` with adapters."""
    dtype = levels[0].dtype
    with torch.no_grad():
        into = tap.adapters.down.to(dtype).flatten(0, 1).contiguous()
        wide = back(tap.adapters.up, dtype).contiguous()
    return partial(_launch, tap, levels, into, wide, rows, warps)


def _launch(tap: Any, levels: Sequence[Tensor], into: Tensor, wide: Tensor, rows: int, warps: int) -> Tensor:
    patches, width = levels[0].shape
    out = torch.empty_like(levels[0])
    _program[(-(-patches // rows),)](
        out,
        tuple(levels),
        tap.weights.raw,
        tap.mix,
        into,
        wide,
        patches,
        TAP=tap.tap,
        WIDTH=width,
        LEVELS=len(levels),
        PADDED=1 << len(levels).bit_length(),
        RANK=len(into) // len(levels),
        ROWS=rows,
        COLUMNS=1 << (width - 1).bit_length(),
        num_warps=warps,
    )
    return out
