"""How a fusion module is distilled: steps, rates, shares, seeds. Knows numbers; nothing of models or questions."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from adaptive_fusion.errors import ConfigError
from adaptive_fusion.point import LAYERS, Layers


@dataclass(frozen=True)
class Settings:
    """How a module is trained.

    Attributes:
        steps: Optimizer steps.
        batch: Questions per step.
        lr: AdamW's rate after a short warm-up; it falls to 0 along a half cosine.
        ratios: How often each downsampling ratio is trained, in any unit.
        layers: How often each count of levels is trained, in any unit: the point's own, and smaller ones, which the
            module then serves as well (see `adaptive_fusion.fusion.elastic`). Empty: the point's own alone.
        max_new_tokens: Upper bound of the teacher's answers.
        pixel_shares: How often a question is seen at each share of its native pixels; the teacher always sees all.
        holdout: Share of the images, by content hash, that are only judged on.
        judged: At most this many held-out questions.
        every: Steps between two looks at the held-out questions, each with a checkpoint.
        patience: Looks without a better one after which training stops.
        seed: Of the order and the module's start.
        cache_gb: Memory for the vision tower's levels of questions seen before.

    Raises:
        ConfigError: For a value out of range.
    """

    steps: int = 600
    batch: int = 8
    lr: float = 3e-3
    ratios: Mapping[float, float] = field(default_factory=lambda: {1.0: 1.0, 0.5: 2.0, 0.25: 2.0})
    pixel_shares: Mapping[float, float] = field(default_factory=lambda: {1.0: 1.0})
    layers: Mapping[Layers, float] = field(default_factory=dict)
    max_new_tokens: int = 160
    holdout: float = 0.15
    judged: int = 64
    every: int = 50
    patience: int = 6
    seed: int = 0
    cache_gb: float = 1.0

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "max_new_tokens", "judged", "every", "patience"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} is {value!r}; expected an integer of at least 1")
        for name, high in (("lr", 1.0), ("holdout", 0.9), ("cache_gb", math.inf)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= high:
                raise ConfigError(f"{name} is {value!r}; expected a number above 0, at most {high}")
        for name in ("ratios", "pixel_shares"):
            found = getattr(self, name)
            if not found or not all(0 < key <= 1 and value > 0 for key, value in found.items()):
                raise ConfigError(f"{name} is {dict(found)!r}; expected values in (0, 1] with weights above 0")
        if not all(key in LAYERS and value > 0 for key, value in self.layers.items()):
            raise ConfigError(f"layers is {dict(self.layers)!r}; expected counts among {LAYERS} with weights above 0")
