"""Policies: a router's score, its threshold, each lane's ladder, and their files.

The names below load their module on first use, so that the light modules in here stay light.
"""

import importlib
from typing import TYPE_CHECKING, Any

__all__ = [
    "COMPLEX",
    "LANES",
    "SIMPLE",
    "TEXT",
    "VIDEO",
    "Policy",
    "Route",
]

if TYPE_CHECKING:
    from adaptive_fusion.policy.policy import COMPLEX, LANES, SIMPLE, TEXT, VIDEO, Policy, Route
else:

    def __getattr__(name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module("adaptive_fusion.policy.policy"), name)
