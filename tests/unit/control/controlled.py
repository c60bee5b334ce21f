"""Candidates, measurements and settled controllers for the tests of the controller."""

import math
import random
from typing import Any

from adaptive_fusion.budget import Budget
from adaptive_fusion.control.candidates import Candidate
from adaptive_fusion.control.controller import Controller
from adaptive_fusion.decisions import Measurement, Prediction
from adaptive_fusion.point import OperatingPoint

LOOSE = Budget()


def candidate(ms: float, quality: float, gb: float = 0.5, key: str = "") -> Candidate:
    """A point that is predicted to take `ms`, 40 % of it to the first token."""
    return Candidate(
        OperatingPoint(max_pixels=1024 + int(ms)), quality, Prediction(0.2 * ms, 0.2 * ms, 0.6 * ms, gb), key
    )


LADDER = [
    candidate(200, 0.9, 2.0),
    candidate(100, 0.8, 1.0),
    candidate(50, 0.6, 0.5),
    candidate(25, 0.4, 0.25),
]


def took(latency: float, *, ttft: float | None = None, gb: float = 0.0) -> Measurement:
    return Measurement(0, 0, 0, 0, 0.4 * latency if ttft is None else ttft, latency, 0, 0, 0, 0, gb)


def settled(load: float = 1.0, attainment: float = 0.95, n: int = 300, noise: float = 0.0) -> Controller:
    """A controller that has seen a steady load, with log-normal noise or without."""
    controller = Controller(clock=lambda: 0.0)
    budget = Budget(latency_ms=150, ttft_ms=60, attainment=attainment)
    rng = random.Random(0)
    for _ in range(n):
        choice = controller.choose(LADDER, budget)
        factor = load * math.exp(rng.gauss(0.0, noise))
        controller.update(choice, took(factor * choice.candidate.predicted.latency_ms))
    return controller


def finite(value: Any) -> bool:
    if isinstance(value, dict):
        return all(finite(item) for item in value.values())
    if isinstance(value, list):
        return all(finite(item) for item in value)
    return not isinstance(value, float) or math.isfinite(value)
