"""Fused DeepStack on a Qwen3-VL vision tower, while it runs and only while it runs.

The tower's list of tap indices is emptied for the time of one forward, so it runs no tap merger itself; hooks on the
blocks in use take the levels, and as soon as a group is complete it is fused, sent through the tap's own pretrained
merger once, gated, and its levels are freed. Both are undone in ``finally``. Knows a tower's ``blocks`` and
``deepstack_merger_list``; nothing of language models.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from adaptive_fusion.fusion import DeepStackFusion, apply_gate


@contextmanager
def fused_taps(tower: nn.Module, fusion: DeepStackFusion | None, lengths: Sequence[int]) -> Iterator[list[Tensor]]:
    """Run the tower inside this context; the list then holds one ``[tokens, d_text]`` per tap, in order.

    Args:
        tower: A Qwen3-VL vision model, dense or MoE.
        fusion: The module that fuses; None turns every tap off (the list stays empty, no merger runs).
        lengths: Patches per image or clip, in packed order.
    """
    host: Any = tower
    native = host.deepstack_visual_indexes
    merged: list[Tensor | None] = [None] * len(native) if fusion is not None else []
    result: list[Tensor] = []
    levels: dict[int, Tensor] = {}
    handles = []
    merge_unit = host.spatial_merge_size**2
    tokens = [length // merge_unit for length in lengths]

    def capture(level: int, closes: int | None) -> Any:
        def hook(_module: nn.Module, _args: object, output: Tensor) -> None:
            levels[level] = output
            if closes is None or fusion is None:
                return
            gate = fusion.gate(closes, levels[fusion.spec.taps[closes]], lengths)
            fused = fusion.fuse(closes, levels, lengths)
            for used in fusion.spec.groups[closes]:
                del levels[used]
            merged[closes] = apply_gate(host.deepstack_merger_list[closes](fused), gate, tokens)

        return hook

    host.deepstack_visual_indexes = []
    try:
        if fusion is not None:
            for tap, group in enumerate(fusion.spec.groups):
                for level in group:
                    closes = tap if level == group[-1] else None
                    handles.append(host.blocks[level].register_forward_hook(capture(level, closes)))
        yield result
        result.extend(tensor for tensor in merged if tensor is not None)
    finally:
        host.deepstack_visual_indexes = native
        for handle in handles:
            handle.remove()
        levels.clear()
