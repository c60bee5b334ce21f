"""What is known of a request before it is decided.

Knows sizes, features and limits of one request as numbers. Must not know policies, costs or how it is decided.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from adaptive_fusion.budget import Budget
from adaptive_fusion.control.escalating import Asking
from adaptive_fusion.control.staying import Plan
from adaptive_fusion.cost.model import Work
from adaptive_fusion.features.complexity import Complexity
from adaptive_fusion.models.base import Size
from adaptive_fusion.point import OperatingPoint

HIT, PART, MISS = "hit", "part", "miss"
"""How many of a request's media need no encoder: all, some, none."""
TEMPLATE_TOKENS = 16
"""What a chat template adds around a question, roughly; the prefill's share of it does not matter."""


@dataclass(frozen=True)
class RequestInfo:
    """What the planner needs to know of a request; times in milliseconds."""

    kind: str
    sizes: Sequence[Size]
    complexities: Sequence[Complexity]
    prompt: str
    max_new_tokens: int
    text_tokens: int
    durations_s: Sequence[float] = ()  # of the media, in order
    frame_times_s: Sequence[Sequence[float]] = ()  # the same, of their frames; without them clips keep their frames
    batch: int = 1
    elapsed_ms: float = 0.0
    free_memory_gb: float | None = None
    pixels_fixed: bool = False  # preprocessing is over: the knobs before the encoder no longer apply
    full_detail: bool = False  # the caller wants all pixels and tokens while the budget allows
    asking: Asking | None = None  # whether the model may be asked if it is sure of a cheap plan's answer
    beside: Sequence[Work] = ()  # what others make the model do that are in one batch with it
    seen: Callable[[OperatingPoint], Sequence[bool]] | None = None  # media whose encoder outputs are there at a point
    cached_gb: float = 0.0  # device memory that such outputs take, which counts against the budget
    kept: Plan | None = None  # what the conversation's media had before
    request_id: str = ""  # of the decision; without one it is only asked what would be done, and nothing is explored


def found_in_cache(info: RequestInfo, point: OperatingPoint) -> str:
    """How far what the encoder makes of the media at `point` is there; empty where nobody knows."""
    if info.seen is None or not info.sizes:
        return ""
    there = info.seen(point)
    return HIT if all(there) else PART if any(there) else MISS


def with_cache_counted(info: RequestInfo, budget: Budget) -> RequestInfo:
    """`info` with the memory that cached encoder outputs take counted against the budget's."""
    if not info.cached_gb or budget.vram_gb is None:
        return info
    left = max(0.0, budget.vram_gb - info.cached_gb)
    return replace(info, free_memory_gb=left if info.free_memory_gb is None else min(left, info.free_memory_gb))
