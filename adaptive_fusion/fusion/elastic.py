"""A module for few levels as a part of one for many, so that one set of weights serves several counts of levels.

What belongs to a level (its weight, its gate, its adapter) goes with it; what belongs to a tap (its mix, its gate, the
learned pooling) is shared. Level weights are normalised over those that take part, so that every part is a module as
any other (slimmable networks, arXiv:1812.08928, have widths in the place of levels). Knows modules and specs; nothing
of models.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from adaptive_fusion.errors import ConfigError
from adaptive_fusion.fusion.levels import select_levels
from adaptive_fusion.fusion.module import DeepStackFusion, FusionSpec

BY_LEVEL = ("weights.raw", "weights.weight", "weights.bias", "adapters.down", "adapters.up")
"""Parameters of a tap whose first dimension is its group's levels."""


def cut(module: DeepStackFusion, levels: Sequence[int]) -> DeepStackFusion:
    """The part of `module` that fuses `levels` alone; it shares the parameters, and gradient reaches them through it.

    Raises ConfigError where a level is not the module's, or a tap is missing.
    """
    spec = replace(module.spec, levels=tuple(levels), elastic=())
    if unknown := sorted(set(spec.levels) - set(module.spec.levels)):
        raise ConfigError(f"levels {unknown} are not among the module's {list(module.spec.levels)}")
    with torch.device("meta"):
        part = DeepStackFusion(spec)
    for own, small, group, chosen in zip(part.taps, module.taps, spec.groups, module.spec.groups, strict=True):
        index = torch.tensor([chosen.index(level) for level in group])
        own.combine = small.combine
        for name, value in small.named_parameters():
            _share(own, name, value[index.to(value.device)] if name in BY_LEVEL else value.view_as(value))
    for name, value in module.pools.named_parameters():
        _share(part.pools, name, value.view_as(value))
    part.home = module.device
    return part.train(module.training)


def served(spec: FusionSpec) -> set[FusionSpec]:
    """The spec and those of the parts that a module of it was trained to serve as well."""
    depth = max(spec.levels) + 1  # whoever serves several counts has all levels
    return {spec, *(replace(spec, levels=select_levels(depth, spec.taps, n), elastic=()) for n in spec.elastic)}


def _share(module: nn.Module, name: str, value: Tensor) -> None:
    """Put `value` in the place of a parameter, as a buffer: a tensor of somebody else's, which `save` writes too."""
    path, _, last = name.rpartition(".")
    holder = module.get_submodule(path)
    # A level alone needs no weight beside others; the tap's mix is kept, for its adapter goes through it.
    if getattr(holder, last) is None and last != "mix":
        return
    holder._parameters.pop(last, None)
    if last in holder.__dict__:
        del holder.__dict__[last]
    holder.register_buffer(last, value)
