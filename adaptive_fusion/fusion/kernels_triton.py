"""Fusion as two Triton kernels: one gives what levels are weighed by, one weighs, adapts and adds them, each reading a
level from memory once.

In the eager form a level goes through memory once for its weight, once for the sum and once for its adapter, by some
twenty launches a tap, which cost more than the arithmetic where the host is what a request waits for. These take the
parameters as they are stored: normalising the weights and mixing happen in the kernel. A model on a GPU runs them (see
`DeepStackFusion.compile_kernels`); what they do not do (gradients, float64, levels that are not contiguous or very
wide) is handed back to the eager form, which is their oracle in the tests. Knows packed tensors only. Imported when
asked for: Triton is not on every machine.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from adaptive_fusion.fusion.kernels import Law, check_packed, expand_rows, weight_rows, weighted_sum
from adaptive_fusion.fusion.triton_programs import score_levels, sum_levels

MAX_WIDTH, MAX_RANK = 4096, 16
"""Of a level, and of its adapter."""
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_FACTORS = dict(zip(_DTYPES, (tl.bfloat16, tl.float16, tl.float32), strict=True))
_LEAST = 16
"""Rows and columns that a matrix product on tensor cores has at least."""


@dataclass(frozen=True)
class Tile:
    """How the work is cut: patches of one program, columns of one step of it, and its warps."""

    rows: int
    columns: int
    warps: int


PLAIN, ADAPTED, SCORED = Tile(8, 1024, 8), Tile(32, 128, 4), Tile(16, 1024, 8)
"""Of a sum, of a sum with adapters, and of scores, which take all columns at once."""


_INTERPRETED = not isinstance(sum_levels, triton.runtime.JITFunction)
"""Whether there is no GPU: the interpreter takes bfloat16 factors of a product for integers."""


class TritonSum:
    """`weighted_sum` by one kernel; see `CombineLaw` for what else it does.

    Where Triton cannot build or start its kernels (no C compiler, too little shared memory) it says so once, and
    everything goes the eager way.
    """

    def __init__(self) -> None:
        self.broken: str | None = None

    def __call__(self, levels: Sequence[Tensor], weights: Tensor, lengths: Sequence[int]) -> Tensor:
        """See `weighted_sum`."""
        check_packed(levels, lengths)
        found = None
        if self._takes(levels, weights):
            rows = weight_rows(weights, len(levels), len(lengths)).float()
            found = self._run(partial(_sum, levels, lengths, Law("given", rows)))
        return weighted_sum(levels, weights, lengths) if found is None else found

    def by_law(
        self, levels: Sequence[Tensor], lengths: Sequence[int], law: Law, down: Tensor | None, up: Tensor | None
    ) -> Tensor | None:
        """See `CombineLaw.by_law`."""
        check_packed(levels, lengths)
        stored = [each for each in (law.bias, law.mix, down, up) if each is not None]
        given = stored if law.scores is None else [*stored, law.scores]
        if not self._takes(levels, *given) or not all(each.is_contiguous() for each in stored):
            return None
        if down is not None and down.shape[1] > MAX_RANK:
            return None
        return self._run(partial(_sum, levels, lengths, law, down, up))

    def scores(
        self, levels: Sequence[Tensor], lengths: Sequence[int], vectors: Tensor | None, gate: Tensor, tap: int
    ) -> Tensor | None:
        """See `CombineLaw.scores`."""
        check_packed(levels, lengths)
        given = [gate] if vectors is None else [gate, vectors]
        if not self._takes(levels, *given) or not all(each.is_contiguous() for each in given):
            return None
        return self._run(partial(_scores, levels, lengths, vectors, gate, tap))

    def _takes(self, levels: Sequence[Tensor], *others: Tensor) -> bool:
        first = levels[0]
        if self.broken or first.dtype not in _DTYPES or first.shape[1] > MAX_WIDTH:
            return False
        if (first.device.type != "cuda" and not _INTERPRETED) or not all(each.is_contiguous() for each in levels):
            return False
        if any(each.dtype == torch.float64 or each.device != first.device for each in others):
            return False
        return not (torch.is_grad_enabled() and any(each.requires_grad for each in (*levels, *others)))

    def _run(self, launch: Callable[[], Tensor]) -> Tensor | None:
        try:
            return launch()
        except (torch.OutOfMemoryError, torch.AcceleratorError):
            raise  # of the device, and no fault of the kernels'
        except Exception as error:
            said = (str(error).splitlines() or [""])[0][:200]
            self.broken = f"{type(error).__name__}: {said}"
            warnings.warn(f"Triton's kernels do not run here, fusion runs without them ({self.broken})", stacklevel=2)
            return None


def _scores(levels: Sequence[Tensor], lengths: Sequence[int], vectors: Tensor | None, gate: Tensor, tap: int) -> Tensor:
    first = levels[0]
    patches, width = first.shape
    make = first.new_zeros if vectors is None else first.new_empty
    dots = make((patches, len(levels) + 1), dtype=torch.float32)
    score_levels[(triton.cdiv(patches, SCORED.rows),)](
        dots,
        tuple(levels),
        gate if vectors is None else vectors,
        gate,
        patches,
        WEIGHED=vectors is not None,
        TAP=tap,
        WIDTH=width,
        PADDED=triton.next_power_of_2(width),
        LEVELS=len(levels),
        ROWS=SCORED.rows,
        num_warps=SCORED.warps,
    )
    if len(lengths) == 1:
        return dots.mean(0, keepdim=True)
    return torch.stack([part.mean(0) for part in torch.split(dots, list(lengths))])


def _sum(
    levels: Sequence[Tensor], lengths: Sequence[int], law: Law, down: Tensor | None = None, up: Tensor | None = None
) -> Tensor:
    first = levels[0]
    patches, width = first.shape
    scores = first if law.scores is None else expand_rows(law.scores, lengths)
    out = torch.empty_like(first)
    tile = PLAIN if down is None else ADAPTED
    sum_levels[(triton.cdiv(patches, tile.rows),)](
        out,
        tuple(levels),
        scores,
        scores if law.bias is None else law.bias,
        scores if law.mix is None else law.mix,
        scores if down is None else down,
        scores if up is None else up,
        patches,
        0 if law.scores is None or scores.shape[0] == 1 else scores.stride(0),
        LAW=law.name,
        BIAS=law.bias is not None,
        MIX=law.mix is not None,
        TAP=law.tap if law.mix is not None else -1,
        WIDTH=width,
        LEVELS=len(levels),
        RANK=0 if down is None else down.shape[1],
        CODES=_LEAST,
        FACTOR=_FACTORS[torch.float32 if _INTERPRETED else first.dtype],
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        num_warps=tile.warps,
    )
    return out
