"""Learned parts that all fusion strategies share: level weights, fixed or gated per image, and low-rank
adapters.

Knows packed levels ``[N, width]`` with per-image lengths; nothing of taps, mergers or files.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from adaptive_fusion.fusion.kernels import expand_rows, global_pool


class LevelWeights(nn.Module, ABC):
    """Weights of a group of levels: ``[1, L]`` for all images alike, or ``[n_images, L]``."""

    @abstractmethod
    def forward(self, levels: Sequence[Tensor], lengths: Sequence[int]) -> Tensor: ...

    def __call__(self, levels: Sequence[Tensor], lengths: Sequence[int]) -> Tensor:
        weights: Tensor = super().__call__(levels, lengths)
        return weights


class UnitWeights(LevelWeights):
    """Weight 1 for every level; not normalised."""

    def forward(self, levels: Sequence[Tensor], lengths: Sequence[int]) -> Tensor:
        return torch.ones(1, len(levels), device=levels[0].device)


class FixedWeights(LevelWeights):
    """One learned weight per level, the same for every image: positive (softplus), divided by their sum.

    Normalised without a softmax, as in EfficientDet's fast normalised fusion (arXiv:1911.09070); softplus
    takes the place of its ReLU so that no weight can die. Starts at `profile` over its sum. A single level
    has weight 1.
    """

    def __init__(self, profile: Sequence[float]) -> None:
        super().__init__()
        raw = torch.tensor([math.log(math.expm1(p)) for p in profile])
        self.raw = nn.Parameter(raw) if len(profile) > 1 else None

    def forward(self, levels: Sequence[Tensor], lengths: Sequence[int]) -> Tensor:
        """Weights ``[1, L]``, each row of sum 1."""
        if self.raw is None:
            return torch.ones(1, 1, device=levels[0].device)
        positive = nn.functional.softplus(self.raw.float())
        return (positive / positive.sum())[None]


class GatedWeights(LevelWeights):
    """Weights per image, ``sigmoid(W_i . GlobalPool(F_i) + b_i)``, divided by their sum over the levels.

    Every level has its own W_i and b_i. W starts at 0 and b so that the weights start at `profile` over its
    sum, the largest gate half open. A single level has weight 1.
    """

    def __init__(self, profile: Sequence[float], width: int) -> None:
        super().__init__()
        self.weight, self.bias = None, None
        if len(profile) > 1:
            gates = [0.5 * p / max(profile) for p in profile]
            self.weight = nn.Parameter(torch.zeros(len(profile), width))
            self.bias = nn.Parameter(torch.tensor([math.log(g / (1 - g)) for g in gates]))

    def forward(self, levels: Sequence[Tensor], lengths: Sequence[int]) -> Tensor:
        """Weights ``[n_images, L]``, each row of sum 1."""
        if self.weight is None or self.bias is None:
            return torch.ones(1, 1, device=levels[0].device)
        pooled = global_pool(levels, lengths)
        scores = (pooled * self.weight).sum(2) + self.bias
        # softmax of log-sigmoids is sigmoid over the sum of sigmoids, and stays finite where all of them
        # underflow.
        return torch.softmax(nn.functional.logsigmoid(scores), dim=1)


class Adapters(nn.Module):
    """Low-rank adapters ``A_i(F) = F + B_i C_i F`` of L levels, of which this computes the second term.

    C_i is random and B_i is 0 at start, so an untrained adapter is the identity (LoRA, arXiv:2106.09685).
    """

    def __init__(self, levels: int, width: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(levels, rank, width) / math.sqrt(width))
        self.up = nn.Parameter(torch.zeros(levels, width, rank))

    def add_to(self, fused: Tensor, levels: Sequence[Tensor], weights: Tensor, lengths: Sequence[int]) -> Tensor:
        """``fused + sum of weights[image, i] * B_i C_i F_i``, as one product of the L rank-r codes."""
        rows = expand_rows(weights, lengths).to(fused.dtype)
        codes = [
            nn.functional.linear(level, down) * rows[:, i : i + 1]
            for i, (level, down) in enumerate(zip(levels, self.down.to(fused.dtype), strict=True))
        ]
        up = self.up.to(fused.dtype).transpose(1, 2).flatten(0, 1)
        return torch.addmm(fused, torch.cat(codes, dim=1), up)
