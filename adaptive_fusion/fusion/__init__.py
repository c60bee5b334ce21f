"""Multi-level fusion and downsampling of vision features: pure tensor modules that know no model family."""

from adaptive_fusion.fusion.elastic import cut, served
from adaptive_fusion.fusion.levels import group_levels, select_levels
from adaptive_fusion.fusion.module import DeepStackFusion, FusionSpec, apply_gate
from adaptive_fusion.fusion.strategies import STRATEGIES
from adaptive_fusion.reduction.pool import downsample, pooled_grid

__all__ = [
    "STRATEGIES",
    "DeepStackFusion",
    "FusionSpec",
    "apply_gate",
    "cut",
    "downsample",
    "group_levels",
    "pooled_grid",
    "select_levels",
    "served",
]
