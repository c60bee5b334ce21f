"""Fusion as Triton kernels that read a level from memory as often as the arithmetic needs it: once, and once more where
its weight is the image's own.

In the eager form a level goes through memory once for its weight, once for the sum and once for its adapter, by some
twenty launches a tap, which cost more than the arithmetic where the host is what a request waits for. Here an adapter's
codes are made where the level is read anyway: with the scores (`gated`), or in the sum itself (`weighted`). A model on
a GPU runs them (see `DeepStackFusion.compile_kernels`); what they do not do (gradients, float64, levels that are not
contiguous or very wide) is handed back to the eager form, which is their oracle in the tests. Knows packed tensors
only. Imported when asked for: Triton is not on every machine.
"""

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from adaptive_fusion.fusion.kernels import CombineLaw, Gating, Law, check_packed, weight_rows, weighted_sum
from adaptive_fusion.fusion.packed import Packed, back, scored, spread
from adaptive_fusion.fusion.triton_launch import DTYPES, INTERPRETED, Scores, adapt, padded, score, weigh

MAX_WIDTH, MAX_RANK = 4096, 16
"""Of a level, and of its adapter."""
ONE_PASS = 64
"""Codes of a patch that are made in the sum itself; more are made apart, from levels that are read once more."""
Made = TypeVar("Made")


class TritonSum(CombineLaw):
    """`weighted_sum` by one kernel; see `CombineLaw` for what else it does.

    Where Triton cannot build or start its kernels (no C compiler, too little shared memory) it says so once, and
    everything goes the eager way.
    """

    def __init__(self) -> None:
        self.broken: str | None = None
        self.packed = Packed()

    def __call__(self, levels: Sequence[Tensor], weights: Tensor, lengths: Sequence[int]) -> Tensor:
        """See `weighted_sum`."""
        check_packed(levels, lengths)
        found = None
        if self._takes(levels, weights):
            rows = weight_rows(weights, len(levels), len(lengths)).float().contiguous()
            several = lengths if rows.shape[0] > 1 else [sum(lengths)]
            found = self._run(levels, lambda: weigh(levels, several, "given", rows))
        return weighted_sum(levels, weights, lengths) if found is None else found

    def by_law(
        self, levels: Sequence[Tensor], lengths: Sequence[int], law: Law, down: Tensor | None, up: Tensor | None
    ) -> Tensor | None:
        """See `CombineLaw.by_law`."""
        check_packed(levels, lengths)
        if not self._takes(levels, law.weights, law.mix, down, up):
            return None
        whole = [sum(lengths)]  # no image is weighed differently from another
        if down is None or up is None:
            return self._run(levels, lambda: weigh(levels, whole, law.name, law.weights, law.mix, law.tap))
        return self._run(levels, lambda: self._adapted(levels, whole, law, down, up))

    def gated(
        self, levels: Sequence[Tensor], lengths: Sequence[int], gating: Gating, down: Tensor | None, up: Tensor | None
    ) -> tuple[Tensor, Tensor] | None:
        """See `CombineLaw.gated`."""
        check_packed(levels, lengths)
        stored = gating.vectors, gating.bias, gating.gate, gating.gate_bias, gating.mix
        if not self._takes(levels, *stored, down, up):
            return None
        return self._run(levels, lambda: self._both(levels, lengths, gating, down, up))

    def _takes(self, levels: Sequence[Tensor], *others: Tensor | None) -> bool:
        first, given = levels[0], [each for each in others if each is not None]
        if self.broken or first.dtype not in DTYPES or first.shape[1] > MAX_WIDTH:
            return False
        if (first.device.type != "cuda" and not INTERPRETED) or not all(each.is_contiguous() for each in levels):
            return False
        if any(each.dtype == torch.float64 or each.device != first.device for each in given):
            return False
        if any(each.ndim == 3 and min(each.shape[1:]) > MAX_RANK for each in given):
            return False
        if any(each.ndim == 1 and not each.is_contiguous() for each in given):
            return False
        if torch.is_grad_enabled() and any(each.requires_grad for each in (*levels, *given)):
            self.packed.clear()
            return False
        return True

    def _run(self, levels: Sequence[Tensor], launch: Callable[[], Made]) -> Made | None:
        try:
            # Triton launches on the current device, which need not be the one that the levels are on.
            with torch.cuda.device_of(levels[0]):  # type: ignore[no-untyped-call]
                return launch()
        except (torch.OutOfMemoryError, torch.AcceleratorError):
            raise  # of the device, and no fault of the kernels'
        except Exception as error:
            said = (str(error).splitlines() or [""])[0][:200]
            self.broken = f"{type(error).__name__}: {said}"
            warnings.warn(f"Triton's kernels do not run here, fusion runs without them ({self.broken})", stacklevel=2)
            return None

    def _adapted(self, levels: Sequence[Tensor], whole: Sequence[int], law: Law, down: Tensor, up: Tensor) -> Tensor:
        first, rank = levels[0], down.shape[1]
        wide = self._back(up, first)
        if len(levels) * rank > ONE_PASS:
            _, codes = score(levels, whole, self._scored(levels, down, None, None, law.tap), law.tap, rank)
            return weigh(levels, whole, law.name, law.weights, law.mix, law.tap, codes, wide)
        into = self.packed(
            ("spread", first.dtype), [down], lambda: spread(down, padded(len(levels) * rank), first.dtype)
        )
        return adapt(levels, law, into, wide)

    def _both(
        self, levels: Sequence[Tensor], lengths: Sequence[int], gating: Gating, down: Tensor | None, up: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        into = self._scored(levels, down, gating.vectors, gating.gate, gating.tap)
        sums, codes = score(levels, lengths, into, gating.tap, 0 if down is None else down.shape[1])
        gates = gating.gate.new_empty(len(lengths), dtype=torch.float32)
        wide = None if up is None else self._back(up, levels[0])
        scores = Scores(sums, gating.gate_bias, gates)
        return weigh(levels, lengths, "sigmoid", gating.bias, gating.mix, gating.tap, codes, wide, scores), gates

    def _back(self, up: Tensor, like: Tensor) -> Tensor:
        return self.packed(("back", like.dtype), [up], lambda: back(up, like.dtype))

    def _scored(
        self, levels: Sequence[Tensor], down: Tensor | None, vectors: Tensor | None, gate: Tensor | None, tap: int
    ) -> Tensor:
        like, slots = levels[0], padded((0 if down is None else down.shape[1]) + 4)
        make = partial(scored, down, vectors, gate, tap, like, len(levels), slots)
        return self.packed(("scored", tap, like.dtype), [down, vectors, gate], make)
