"""Fused DeepStack on a Qwen3-VL vision tower, while it runs and only while it runs.

The tower's list of tap indices is emptied for the time of one forward, so it runs no tap merger itself; hooks on the
blocks in use take the levels, and as soon as a group is complete it is fused, sent through the tap's own pretrained
merger once, gated, and its levels are freed. Both are undone in ``finally``. Knows a tower's ``blocks`` and
``deepstack_merger_list``; nothing of language models.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from adaptive_fusion.errors import UnsupportedModelError
from adaptive_fusion.fusion import DeepStackFusion, apply_gate
from adaptive_fusion.models.unwrap import called, uncompiled


@contextmanager
def fused_taps(tower: nn.Module, fusion: DeepStackFusion | None, lengths: Sequence[int]) -> Iterator[list[Tensor]]:
    """Run the tower inside this context; the list then holds one ``[tokens, d_text]`` per tap, in order.

    Args:
        tower: A Qwen3-VL vision model, dense or MoE; compiled code of it runs as it is written.
        fusion: The module that fuses; None turns every tap off (the list stays empty, no merger runs).
        lengths: Patches per image or clip, in packed order.

    Raises:
        UnsupportedModelError: If the tower ran without its blocks' forward hooks.
    """
    groups = fusion.spec.groups if fusion is not None else ()
    merged: list[Tensor | None] = [None] * len(groups)
    result: list[Tensor] = []
    levels: dict[int, Tensor] = {}
    closes = {group[-1]: tap for tap, group in enumerate(groups)}

    def take(level: int, output: Tensor) -> None:
        levels[level] = output
        if fusion is not None and level in closes:
            tap = closes[level]
            merged[tap] = merge_tap(tower, fusion, tap, levels, lengths)
            for used in groups[tap]:
                del levels[used]

    with _watched(tower, [level for group in groups for level in group], take):
        yield result
        found = [tensor for tensor in merged if tensor is not None]
        if len(found) < len(groups):
            # Fewer taps would pass for a plan that turns them off, and cost quality unseen.
            raise UnsupportedModelError(
                f"{type(tower).__name__} ran {len(found)} of {len(groups)} taps' blocks where they can be seen; "
                "expected a tower that runs the forward hooks of its blocks"
            )
        result.extend(found)
    levels.clear()


@contextmanager
def captured_levels(tower: nn.Module, wanted: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """Run the tower inside this context without its taps; the mapping then holds the blocks' outputs asked for."""
    levels: dict[int, Tensor] = {}
    with _watched(tower, wanted, levels.__setitem__):
        yield levels


def merge_tap(
    tower: nn.Module, fusion: DeepStackFusion, tap: int, levels: Mapping[int, Tensor], lengths: Sequence[int]
) -> Tensor:
    """Tap `tap` (0 is the first) from its group's levels: fused, through the tower's own merger, gated."""
    host: Any = called(tower)
    group = {level: levels[level] for level in fusion.spec.groups[tap]}
    device = fusion.device
    if device is not None and any(each.device != device for each in group.values()):
        # A tower may be spread over devices; the fusion module is on one.
        group = {level: each.to(device) for level, each in group.items()}
    fused, gate = fusion.fuse_and_gate(tap, group, lengths)
    merged = host.deepstack_merger_list[tap](fused)
    if isinstance(gate, Tensor):
        gate = gate.to(merged.device)
    return apply_gate(merged, gate, [length // host.spatial_merge_size**2 for length in lengths])


@contextmanager
def _watched(tower: nn.Module, wanted: Sequence[int], take: Callable[[int, Tensor], None]) -> Iterator[None]:
    """No taps, and `take(block, output)` for every block in `wanted`."""
    host: Any = called(tower)
    native = host.deepstack_visual_indexes
    handles = []

    def hook(level: int) -> Callable[[nn.Module, object, Tensor], None]:
        return lambda _module, _args, output: take(level, output)

    host.deepstack_visual_indexes = []
    try:
        for level in wanted:
            handles.append(host.blocks[level].register_forward_hook(hook(level)))
        with uncompiled(tower, host, *host.blocks):
            yield
    finally:
        host.deepstack_visual_indexes = native
        for handle in handles:
            handle.remove()
