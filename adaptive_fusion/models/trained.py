"""Trained fusion modules and the model they are put on: which of them it can run, and why it cannot run the others.

Knows adapters and the headers of fusion files. Must not know of policies: it is told files.
"""

from collections.abc import Iterable
from pathlib import Path

from adaptive_fusion.errors import ConfigError
from adaptive_fusion.fusion import DeepStackFusion, FusionSpec
from adaptive_fusion.models.base import Adapter
from adaptive_fusion.point import LAYERS, OperatingPoint


def add_trained(adapter: Adapter, files: Iterable[Path]) -> dict[str, str]:
    """Add the modules in `files` that the model can run; the others' names, each with the reason, are returned.

    Raises:
        ConfigError: For a file that is no fusion module.
    """
    unfit = {}
    for file in files:
        why = misfit(adapter, FusionSpec.read(file))
        if why:
            unfit[file.name] = why
        else:
            adapter.add_fusion(DeepStackFusion.from_file(file))
    return unfit


def misfit(adapter: Adapter, spec: FusionSpec) -> str:
    """Why no operating point of this model runs a module of `spec`, in words; empty if one does."""
    if not adapter.taps:
        return "the model has no DeepStack taps"
    try:
        points = [OperatingPoint.from_dict(_knobs(spec, layers)) for layers in LAYERS]
    except ConfigError as error:
        return f"no operating point has it: {error}"
    own = [found for point in points if (found := adapter.spec(point)) is not None]
    if spec in own:
        return ""
    nearest = next((found for found in own if len(found.levels) == len(spec.levels)), own[-1])
    other = [
        f"{name} {_shown(getattr(spec, name))}, here {_shown(getattr(nearest, name))}"
        for name in ("taps", "levels", "d_vision", "d_text")
        if getattr(spec, name) != getattr(nearest, name)
    ]
    return "; ".join(other)


def _knobs(spec: FusionSpec, layers: int) -> dict[str, object]:
    return {"fusion": spec.strategy, "layers": layers, "adapter_rank": spec.rank}


def _shown(value: int | tuple[int, ...]) -> str:
    return str(value) if isinstance(value, int) else ",".join(map(str, value))
