"""Adaptive multi-level fusion: spend a vision-language model's visual compute per request.

Importing this package does nothing but name things; each public name loads its module on first use.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adaptive_fusion.budget import Budget
    from adaptive_fusion.features.complexity import measure_complexity
    from adaptive_fusion.point import OperatingPoint
    from adaptive_fusion.policy.policy import Policy
    from adaptive_fusion.runner import AdaptiveRunner

    __version__: str

__all__ = ["AdaptiveRunner", "Budget", "OperatingPoint", "Policy", "__version__", "measure_complexity"]

_HOMES = {
    "AdaptiveRunner": "runner",
    "Budget": "budget",
    "OperatingPoint": "point",
    "Policy": "policy.policy",
    "measure_complexity": "features.complexity",
}


def __getattr__(name: str) -> Any:
    import importlib
    from importlib import metadata

    value: Any
    if name in _HOMES:
        value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    elif name == "__version__":
        try:
            value = metadata.version("adaptive-fusion")
        except metadata.PackageNotFoundError:
            value = "0+unknown"  # a bare checkout, not installed
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
