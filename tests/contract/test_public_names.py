"""Names that users import, and former places that stored files name: they stay, whatever moves inside."""

import importlib

import pytest

PUBLIC = {
    "adaptive_fusion": ("AdaptiveRunner", "Budget", "OperatingPoint", "Policy", "measure_complexity"),
    "adaptive_fusion.policy": ("Policy",),
    "adaptive_fusion.decisions": ("DecisionLog",),
    "adaptive_fusion.reference.screens": ("make_scene", "PROMPTS"),
    # Routers stored as .joblib name their classes by these paths.
    "adaptive_fusion.learning.calibrate": ("CalibratedEstimator",),
    "adaptive_fusion.calibration": ("Platt", "Isotonic"),
}
HOMES = {
    "DecisionLog": "adaptive_fusion.decision_log",
    "CalibratedEstimator": "adaptive_fusion.learning.fitting.calibration",
    "Platt": "adaptive_fusion.policy.calibration",
    "Isotonic": "adaptive_fusion.policy.calibration",
    "Policy": "adaptive_fusion.policy.policy",
}


@pytest.mark.parametrize(("module", "name"), [(m, name) for m, names in PUBLIC.items() for name in names])
def test_a_public_name_stays_where_it_is(module: str, name: str) -> None:
    found = getattr(importlib.import_module(module), name)
    if name in HOMES:
        assert found is getattr(importlib.import_module(HOMES[name]), name)
