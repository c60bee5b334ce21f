"""What a request will cost at an operating point, and the profiles that say so."""

from adaptive_fusion.cost.lengths import LengthModel
from adaptive_fusion.cost.model import CostModel, Profile, Work

__all__ = [
    "CostModel",
    "LengthModel",
    "Profile",
    "Work",
]
