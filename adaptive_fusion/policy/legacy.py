"""The older JSON form of a configuration, ``{"vision_tower": {...}}``: one operating point under other names.

Knows both forms' names. Must not know of policies or files.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from adaptive_fusion.checks import check_keys
from adaptive_fusion.errors import ConfigError, PolicyError
from adaptive_fusion.point import NATIVE, OperatingPoint

_KNOBS = {
    "num_fused_layers": "layers",
    "fusion_strategy": "fusion",
    "adapter_r": "adapter_rank",
    "downsample_ratio": "downsample",
}


def point_from_legacy(values: Any) -> OperatingPoint:
    """The operating point of the older form, with or without its outer ``vision_tower`` key.

    ``fusion_strategy`` is required; ``adapter_r`` counts only where ``use_adapter`` is true.

    Raises:
        PolicyError: For unknown keys, and values out of range under the names they have in that form.
    """
    if isinstance(values, Mapping) and set(values) == {"vision_tower"}:
        values = values["vision_tower"]
    table = check_keys(values, "vision_tower", ("fusion_strategy",), (*_KNOBS, "use_adapter"))
    point = NATIVE
    for key, knob in _KNOBS.items():
        if key in table:
            try:
                point = replace(point, **{knob: table[key]})
            except ConfigError as error:
                raise PolicyError(str(error).replace(knob, key, 1)) from error
    uses = table.get("use_adapter", False)
    if not isinstance(uses, bool):
        raise PolicyError(f"use_adapter is {uses!r}; expected true or false")
    if uses and not point.adapter_rank:
        raise PolicyError("use_adapter is true and adapter_r is 0; expected 4, 8 or 16")
    return point if uses else replace(point, adapter_rank=0)


def point_to_legacy(point: OperatingPoint) -> dict[str, Any]:
    """The older form of `point`.

    Raises:
        PolicyError: If the point limits pixels or frames, for which that form has no name.
    """
    if point.max_pixels is not None or point.max_fps is not None:
        raise PolicyError(f"{point.name} limits pixels or frames; the vision_tower form holds {', '.join(_KNOBS)}")
    values = {key: getattr(point, knob) for key, knob in _KNOBS.items()}
    return {"vision_tower": {**values, "use_adapter": point.adapter_rank > 0}}
