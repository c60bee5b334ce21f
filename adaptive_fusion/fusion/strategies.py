"""How the levels of one DeepStack tap become its merger's input, and what gates the merger's output.

For a tap t with level F_tap, group G_t and adapters ``A_i(F) = F + B_i C_i F``:

    F_t = F_tap + s_t * (sum over i in G_t of a_i A_i(F_i) - F_tap)      the merger's input
    g_t * merger_t(F_t)                                                  what the model injects

`sum` has a_i = s_t = g_t = 1. In `weighted`, a_i is one learned weight per level, normalised over the group, and
g_t a learned scalar, 1 at start. In `gated`, both are per image: a_i = sigmoid(W_i . GlobalPool(F_i) + b_i),
normalised over the group, and g_t = 2 sigmoid(w . GlobalPool(F_tap) + b) with w = b = 0 at start. `native` and `top`
fuse nothing and need no module: models inject their own taps, or zeros.

Identity at start: s_t starts at 0, so an untrained `weighted` or `gated` has F_t = F_tap and g_t = 1. What
gets gradient when:

- g_t's parameters: from the first step.
- s_t: from the first step, in a group of several levels. A group of one level has no s_t (it is 1): there
  it would only rescale B_i, and with both at 0 neither could ever move. So B_i gets gradient at once there.
- the weights a_i, and B_i of a larger group: as soon as s_t has left 0.
- C_i: as soon as B_i has left 0.

After the mergers, `weighted` and `gated` have a learned pooling of their own
(`adaptive_fusion.reduction.learned_pool`), which starts as plain averages; the others average.

Knows packed tensors and per-image lengths; nothing of mergers, model families or files.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from adaptive_fusion.fusion.kernels import Combine, CombineLaw, Gating, Law, global_pool, weighted_sum
from adaptive_fusion.fusion.registry import Registry
from adaptive_fusion.fusion.weights import Adapters, FixedWeights, GatedWeights, LevelWeights, UnitWeights


class TapFusion(nn.Module, ABC):
    """One tap's share of a strategy.

    Args:
        tap: position of the tap's own level among its group.
        profile: starting weights of the group's levels, ascending in depth.
        width: d_vision.
        rank: rank of the per-level adapters, 0 for none.
    """

    #: How merged tokens are pooled: by plain averages, by one learned law, or by content.
    pooling: Literal["average", "fixed", "content"] = "average"
    #: Whether it leaves the model as it is until it is trained, so that without weights it need not run at all.
    starts_native: bool = False

    def __init__(self, tap: int, profile: Sequence[float], width: int, rank: int) -> None:
        super().__init__()
        self.tap = tap
        self.combine: Combine = weighted_sum

    @abstractmethod
    def fuse(self, levels: Sequence[Tensor], lengths: Sequence[int]) -> Tensor:
        """The merger's input ``[N, width]`` from the group's levels, each ``[N, width]``."""

    @abstractmethod
    def gate(self, features: Tensor, lengths: Sequence[int]) -> Tensor | float:
        """g_t from the tap's own level: ``[n_images]``, or a float where it is the same constant for all."""

    def both(self, levels: Sequence[Tensor], lengths: Sequence[int]) -> tuple[Tensor, Tensor | float]:
        """`fuse` and `gate` of one group, which read the levels once where a kernel can."""
        return self.fuse(levels, lengths), self.gate(levels[self.tap], lengths)


STRATEGIES: Registry[TapFusion] = Registry("fusion")
"""Every way of combining levels, by the name that an operating point uses."""


class Mixed(TapFusion):
    """The law above with s_t learned; a child brings its level weights and its gate."""

    def __init__(
        self,
        tap: int,
        profile: Sequence[float],
        width: int,
        rank: int,
        weights: LevelWeights,
        learn_mix: bool = True,
    ) -> None:
        super().__init__(tap, profile, width, rank)
        self.weights = weights
        self.mix = nn.Parameter(torch.zeros(())) if learn_mix and len(profile) > 1 else None
        self.adapters = Adapters(len(profile), width, rank) if rank else None

    def fuse(self, levels: Sequence[Tensor], lengths: Sequence[int]) -> Tensor:
        law = self._law()
        alone = len(levels) == 1 and self.mix is None
        if law is not None and isinstance(self.combine, CombineLaw) and not (alone and self.adapters is None):
            found = self.combine.by_law(levels, lengths, law, *self._adapted())
            if found is not None:
                return found
        return self._eagerly(levels, lengths)

    def _law(self) -> Law | None:
        """How these levels are weighed where that is the same for all images; None where it is not."""
        return Law("unit", mix=self.mix, tap=self.tap)

    def _adapted(self) -> tuple[Tensor | None, Tensor | None]:
        return (None, None) if self.adapters is None else (self.adapters.down, self.adapters.up)

    def _eagerly(self, levels: Sequence[Tensor], lengths: Sequence[int]) -> Tensor:
        mixed = self.weights(levels, lengths)
        if self.mix is None:
            weights = mixed
        else:
            mixed = mixed * self.mix
            own = torch.zeros_like(mixed[:1])
            own[0, self.tap] = 1.0
            weights = mixed + own * (1 - self.mix)
        alone = len(levels) == 1 and self.mix is None
        fused = levels[0] if alone else self.combine(levels, weights, lengths)
        return fused if self.adapters is None else self.adapters.add_to(fused, levels, mixed, lengths)


@STRATEGIES.register("sum")
class Sum(Mixed):
    """All levels of the group, added: a fusion that changes the model's output before it is trained."""

    def __init__(self, tap: int, profile: Sequence[float], width: int, rank: int) -> None:
        super().__init__(tap, profile, width, rank, UnitWeights(), learn_mix=False)

    def gate(self, features: Tensor, lengths: Sequence[int]) -> Tensor | float:
        return 1.0


@STRATEGIES.register("weighted")
class Weighted(Mixed):
    """One learned weight per level and one learned gate per tap, the same for every image."""

    pooling = "fixed"
    starts_native = True

    def __init__(self, tap: int, profile: Sequence[float], width: int, rank: int) -> None:
        super().__init__(tap, profile, width, rank, FixedWeights(profile))
        self.gate_scale = nn.Parameter(torch.ones(()))

    def _law(self) -> Law | None:
        raw = self.weights.raw
        if not isinstance(raw, Tensor):  # of one level
            return super()._law()
        return Law("softplus", raw, mix=self.mix, tap=self.tap)

    def gate(self, features: Tensor, lengths: Sequence[int]) -> Tensor | float:
        return self.gate_scale.expand(len(lengths))


@STRATEGIES.register("gated")
class Gated(Mixed):
    """Weights and gate computed per image from its globally pooled features."""

    pooling = "content"
    starts_native = True

    def __init__(self, tap: int, profile: Sequence[float], width: int, rank: int) -> None:
        super().__init__(tap, profile, width, rank, GatedWeights(profile, width))
        self.gate_weight = nn.Parameter(torch.zeros(width))
        self.gate_bias = nn.Parameter(torch.zeros(()))

    def fuse(self, levels: Sequence[Tensor], lengths: Sequence[int]) -> Tensor:
        found = self._gated(levels, lengths)
        return self._eagerly(levels, lengths) if found is None else found[0]

    def gate(self, features: Tensor, lengths: Sequence[int]) -> Tensor | float:
        pooled = global_pool([features], lengths)[:, 0]
        return 2 * torch.sigmoid((pooled * self.gate_weight).sum(1) + self.gate_bias)

    def both(self, levels: Sequence[Tensor], lengths: Sequence[int]) -> tuple[Tensor, Tensor | float]:
        found = self._gated(levels, lengths)
        return (self._eagerly(levels, lengths), self.gate(levels[self.tap], lengths)) if found is None else found

    def _law(self) -> Law | None:
        return None

    def _gated(self, levels: Sequence[Tensor], lengths: Sequence[int]) -> tuple[Tensor, Tensor] | None:
        """Both by a kernel; None where the one in use does not do it."""
        if not isinstance(self.combine, CombineLaw):
            return None
        stored = [each if isinstance(each, Tensor) else None for each in (self.weights.weight, self.weights.bias)]
        gating = Gating(*stored, self.gate_weight, self.gate_bias, self.mix, self.tap)
        return self.combine.gated(levels, lengths, gating, *self._adapted())
