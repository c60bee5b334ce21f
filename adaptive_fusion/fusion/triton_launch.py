"""Starting the Triton programs: how the work is cut, and what of it a program is told as a constant.

Knows packed tensors and `triton_programs`; who asks for what is `kernels_triton`'s.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from adaptive_fusion.fusion.kernels import Law
from adaptive_fusion.fusion.triton_programs import adapt_levels, score_levels, sum_levels

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_FACTORS = dict(zip(DTYPES, (tl.bfloat16, tl.float16, tl.float32), strict=True))
_LEAST = 16
"""Rows and columns that a matrix product on tensor cores has at least."""
_SCALE = 2.0**24
"""Of the whole numbers that scores are added up in."""
INTERPRETED = not isinstance(sum_levels, triton.runtime.JITFunction)
"""Whether there is no GPU: the interpreter takes bfloat16 factors of a product for integers."""


@dataclass(frozen=True)
class Tile:
    """How the work is cut: patches of one program, columns of one step of it, its warps, and steps read ahead."""

    rows: int
    columns: int
    warps: int
    stages: int = 3


PLAIN, CODED, SCORED, ADAPTED = Tile(4, 1024, 8), Tile(32, 64, 4), Tile(64, 128, 4), Tile(16, 256, 4)
"""Of a sum, of one with codes, of scores and codes, and of a sum that makes its codes itself: of those tried on an H200
the quickest at four megapixels and one together (``python benchmarks/cuda.py --only tiles``)."""


@dataclass(frozen=True)
class Scores:
    """What `sum_levels` makes the images' own weights and gates of, and where the gates go."""

    sums: Tensor
    gate_bias: Tensor
    gates: Tensor


def padded(count: int) -> int:
    """Rows or columns of a matrix product that has to have so many."""
    return max(_LEAST, _power(count))


# Triton's own of these two are for its programs, and slow outside of them.
def _power(count: int) -> int:
    return 1 << (count - 1).bit_length()


def _ceil(count: int, by: int) -> int:
    return -(-count // by)


@lru_cache(maxsize=64)
def _images(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """The lengths where the device can read them; not waited for, since that would end all that is queued."""
    with torch.inference_mode(False):
        return torch.tensor(lengths, dtype=torch.int32).to(device, non_blocking=True)


def _cut(lengths: Sequence[int], like: Tensor) -> tuple[Tensor, int]:
    """What programs find their image by."""
    several = len(lengths) if len(lengths) > 1 else 0
    return _images(tuple(lengths) if several else (0,), like.device), several


def _blocks(lengths: Sequence[int], rows: int) -> int:
    return sum(_ceil(length, rows) for length in lengths)


def score(
    levels: Sequence[Tensor], lengths: Sequence[int], into: Tensor, tap: int, rank: int
) -> tuple[Tensor, Tensor | None]:
    """One launch of `score_levels`.

    Args:
        into: `packed.scored`.

    Returns the sums of scores by image, ``[n_images, PADDED]`` in whole numbers, see `sum_levels`, and codes
    ``[N, L * rank]`` in float32, None without adapters.
    """
    first, (images, several) = levels[0], _cut(lengths, levels[0])
    blocks = _blocks(lengths, SCORED.rows)
    places = _power(len(levels) + 3)
    sums = first.new_zeros((len(lengths), places), dtype=torch.int64)
    codes = first.new_empty((first.shape[0], len(levels) * rank), dtype=torch.float32) if rank else None
    score_levels[(blocks, len(levels))](
        sums,
        first if codes is None else codes,
        tuple(levels),
        into,
        images,
        several,
        first.shape[0],
        TAP=tap,
        WIDTH=first.shape[1],
        LEVELS=len(levels),
        PADDED=places,
        RANK=rank,
        SLOTS=into.shape[1],
        FACTOR=_FACTORS[torch.float32 if INTERPRETED else first.dtype],
        SCALE=_SCALE,
        ROWS=SCORED.rows,
        COLUMNS=SCORED.columns,
        num_warps=SCORED.warps,
        num_stages=SCORED.stages,
    )
    return sums, codes


def weigh(
    levels: Sequence[Tensor],
    lengths: Sequence[int],
    law: str,
    weights: Tensor | None,
    mix: Tensor | None = None,
    tap: int = 0,
    codes: Tensor | None = None,
    wide: Tensor | None = None,
    scores: Scores | None = None,
) -> Tensor:
    """One launch of `sum_levels`.

    Args:
        law: ``given``, with `weights` ``[n_images, L]``; ``unit``; ``softplus``, with raw ones ``[L]``; or ``sigmoid``,
            with biases ``[L]`` and `scores`.
        codes: Of `score`; with `wide`, which is `packed.back`.
    """
    first, (images, several) = levels[0], _cut(lengths, levels[0])
    patches, width = first.shape
    out = torch.empty_like(first)
    tile = PLAIN if codes is None else CODED
    made = (out, out, out) if scores is None else (scores.sums, scores.gate_bias, scores.gates)
    across = _ceil(width, tile.columns)
    sum_levels[(_blocks(lengths, tile.rows) * across,)](
        out,
        made[2],
        tuple(levels),
        first if weights is None else weights,
        made[0],
        made[1],
        first if mix is None else mix,
        first if codes is None else codes,
        first if wide is None else wide,
        images,
        several,
        patches,
        LAW=law,
        BIAS=weights is not None,
        MIX=mix is not None,
        TAP=tap if mix is not None else -1,
        WIDTH=width,
        LEVELS=len(levels),
        PADDED=_power(len(levels) + 3),
        RANK=0 if codes is None else codes.shape[1] // len(levels),
        CODES=_LEAST if codes is None else padded(codes.shape[1]),
        FACTOR=_FACTORS[torch.float32 if INTERPRETED else first.dtype],
        SCALE=_SCALE,
        ACROSS=across,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return out


def adapt(levels: Sequence[Tensor], law: Law, into: Tensor, wide: Tensor) -> Tensor:
    """One launch of `adapt_levels`, with `packed.spread` and `packed.back`."""
    first, (images, several) = levels[0], _cut([levels[0].shape[0]], levels[0])
    patches, width = first.shape
    out = torch.empty_like(first)
    adapt_levels[(_ceil(patches, ADAPTED.rows),)](
        out,
        tuple(levels),
        first if law.weights is None else law.weights,
        first if law.mix is None else law.mix,
        into,
        wide,
        images,
        several,
        patches,
        LAW=law.name,
        MIX=law.mix is not None,
        TAP=law.tap if law.mix is not None else -1,
        WIDTH=width,
        LEVELS=len(levels),
        PADDED=_power(len(levels) + 3),
        RANK=wide.shape[0] // len(levels),
        CODES=into.shape[1],
        FACTOR=_FACTORS[torch.float32 if INTERPRETED else first.dtype],
        ROWS=ADAPTED.rows,
        COLUMNS=ADAPTED.columns,
        CHUNKS=_ceil(width, ADAPTED.columns),
        num_warps=ADAPTED.warps,
        num_stages=ADAPTED.stages,
    )
    return out
