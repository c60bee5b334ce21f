"""What a vision tower made of media, kept for several uses. Knows tensors only: no model, no operating point."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from adaptive_fusion.reduction.blanks import Standing


@dataclass(frozen=True)
class Recorded:
    """What a vision tower made of some media, so that any point can follow without running the tower again.

    `outputs` are its results by kind (``image``, ``video``), `levels` its blocks' outputs ``[patches, d_vision]``
    by kind and block. Where some patches were encoded for others as well, `levels` have those alone, and `standing`
    says by kind for which.
    """

    outputs: Mapping[str, Any]
    levels: Mapping[str, Mapping[int, Tensor]]
    standing: Mapping[str, Standing] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Memory that the tensors take."""
        found = [level for kind in self.levels.values() for level in kind.values()]
        found += [part for out in self.outputs.values() for part in out.pooler_output]
        return sum(tensor.nbytes for tensor in found)

    @classmethod
    def joined(cls, parts: "Sequence[Recorded]") -> "Recorded":
        """The recordings of several requests as that of one batch with their media in this order."""
        outputs: dict[str, Any] = {}
        levels: dict[str, dict[int, Tensor]] = {}
        for kind in dict.fromkeys(kind for part in parts for kind in part.outputs):
            holders = [part for part in parts if kind in part.outputs]
            outputs[kind] = type(holders[0].outputs[kind])(
                pooler_output=tuple(one for part in holders for one in part.outputs[kind].pooler_output)
            )
            levels[kind] = {
                level: torch.cat([part.levels[kind][level] for part in holders]) for level in holders[0].levels[kind]
            }
        standing = {
            kind: Standing.joined([part.standing[kind] for part in parts if kind in part.standing])
            for kind in dict.fromkeys(kind for part in parts for kind in part.standing)
        }
        return cls(outputs, levels, standing)
