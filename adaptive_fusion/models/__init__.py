"""Ways of reaching a model. `adapter_for` picks the one that fits."""

from typing import Any

from torch import nn

from adaptive_fusion.errors import UnsupportedModelError
from adaptive_fusion.models.base import Adapter, Encoded, Size, VisualPlan
from adaptive_fusion.models.grid import GridAdapter
from adaptive_fusion.models.recorded import Recorded
from adaptive_fusion.models.square import SquareAdapter
from adaptive_fusion.models.unwrap import unwrap

ADAPTERS: tuple[type[Adapter], ...] = (GridAdapter, SquareAdapter)


def adapter_for(model: nn.Module, processor: Any) -> Adapter:
    """The adapter that drives `model`, which may be wrapped by PEFT, ``torch.compile`` or accelerate.

    Raises:
        UnsupportedModelError: If its forward takes no ``mm_encoder_outputs``, its features form no known grid, or it
            is in a wrapper that cannot be followed.
    """
    inner = unwrap(model)
    for kind in ADAPTERS:
        if kind.matches(inner):
            return kind(model, processor)
    raise UnsupportedModelError(
        f"{type(inner).__name__} cannot be driven: expected a transformers model whose forward takes "
        "mm_encoder_outputs and whose visual tokens form a grid (Qwen2.5-VL, Qwen3-VL, Qwen3-VL-MoE, Qwen3.5, Gemma 3)"
    )


__all__ = [
    "ADAPTERS",
    "Adapter",
    "Encoded",
    "GridAdapter",
    "Recorded",
    "Size",
    "SquareAdapter",
    "VisualPlan",
    "adapter_for",
]
