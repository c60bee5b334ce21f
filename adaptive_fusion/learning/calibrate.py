"""Where `CalibratedEstimator` was: routers stored as ``.joblib`` name this path."""

from adaptive_fusion.learning.fitting.calibration import CalibratedEstimator

__all__ = ["CalibratedEstimator"]
