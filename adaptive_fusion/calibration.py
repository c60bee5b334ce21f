"""Where `Isotonic` and `Platt` were: routers stored as ``.joblib`` name this path."""

from adaptive_fusion.policy.calibration import Isotonic, Platt

__all__ = ["Isotonic", "Platt"]
