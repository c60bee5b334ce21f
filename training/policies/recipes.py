"""What is asked of each shipped policy, and the rungs that its lanes may have."""

from dataclasses import dataclass, replace

from adaptive_fusion.point import NATIVE, Layers, OperatingPoint
from adaptive_fusion.policy.policy import COMPLEX, SIMPLE, VIDEO
from adaptive_fusion.policy.rungs import Rung


def w(downsample: float, share: float, blanks: int | None = None) -> Rung:
    return Rung(OperatingPoint("weighted", 6, downsample, adapter_rank=4, blanks=blanks), pixel_share=share)


def g(
    downsample: float, share: float, fps: float | None = None, layers: Layers = 12, blanks: int | None = None
) -> Rung:
    return Rung(OperatingPoint("gated", layers, downsample, None, 8, fps, blanks), pixel_share=share)


def n(share: float = 1.0, blanks: int | None = None) -> Rung:
    return Rung(replace(NATIVE, blanks=blanks), pixel_share=share)


FULL = n()
"""Nothing is better than the model as it was trained: at full tokens a fusion module can only come near."""
FEW_FRAMES, FEWEST = g(0.5, 0.25, 1), g(0.25, 0.25, 0.5)


@dataclass(frozen=True)
class Recipe:
    """What is asked of a policy, and the rungs that its lanes may have, dearest first."""

    description: str
    tolerance: float
    objective: str
    lanes: dict[str, tuple[Rung, ...]]


RECIPES: dict[str, Recipe] = {
    "reference-balanced": Recipe(
        "The cheapest points for what loses next to nothing by them, everything for the rest while the budget holds.",
        0.01,
        "cost",
        {
            SIMPLE: (w(0.5, 0.5, 2), w(0.25, 0.125)),
            COMPLEX: (FULL, n(1, 2), g(0.5, 1, blanks=2), g(1, 0.5, blanks=2), g(0.5, 0.25), g(0.25, 0.25)),
            VIDEO: (FULL, n(1, 2), g(0.5, 0.25), FEW_FRAMES),
        },
    ),
    "reference-latency": Recipe(
        "The fewest tokens that still answer: for tight budgets and bulk captioning.",
        0.05,
        "cost",
        {
            SIMPLE: (w(0.5, 0.35, 2), w(0.5, 0.25, 2), w(0.5, 0.125), w(0.25, 0.125)),
            COMPLEX: (n(1, 2), g(0.5, 1, blanks=2), g(1, 0.5, blanks=2), g(0.5, 0.25), g(0.25, 0.25)),
            VIDEO: (n(0.5, 2), g(0.5, 0.25), FEW_FRAMES, FEWEST),
        },
    ),
    "reference-quality": Recipe(
        "Saves only where nothing is lost: for documents, dense screens and small text.",
        0.01,
        "cost",
        {
            SIMPLE: (w(1, 0.5), w(0.5, 0.5, 2)),
            COMPLEX: (FULL, n(1, 2), g(0.5, 1, blanks=2), g(1, 0.5, blanks=2)),
            VIDEO: (FULL, n(1, 2)),
        },
    ),
}
