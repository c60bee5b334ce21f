"""Plans that stay: within a conversation an image keeps the plan that it had, so that caches go on serving it.

It rises where a question needs more than the plan gives, and falls only where the budget cannot be met otherwise; its
steps are the ladder's. Knows plans, candidates and hashes of conversations. Must not know of messages or media, or how
the controller weighs.
"""

import math
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from adaptive_fusion.checks import integer
from adaptive_fusion.control.candidates import Candidate
from adaptive_fusion.point import OperatingPoint

STAYS, RISES, FALLS, SHIFTS = "stays", "rises", "falls", "shifts"
MOST = 4096
"""Conversations that are remembered; about 1 KiB each."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What the media of a conversation ran at: the ladder's step by name, and the point that it was for them."""

    rung: str
    point: OperatingPoint


class Conversations:
    """The plan of each conversation, least recently used out first; thread-safe.

    Args:
        most: How many are remembered.
    """

    def __init__(self, most: int = MOST) -> None:
        self._most = integer(most, "most", 1)
        self._plans: OrderedDict[str, Plan] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._plans)

    def find(self, hashes: Sequence[str]) -> Plan | None:
        """The plan under the first of these that is known."""
        with self._lock:
            for each in hashes:
                if each in self._plans:
                    self._plans.move_to_end(each)
                    return self._plans[each]
        return None

    def keep(self, own: str, plan: Plan) -> None:
        """Remember what the media of a conversation ran at last."""
        with self._lock:
            self._plans[own] = plan
            self._plans.move_to_end(own)
            while len(self._plans) > self._most:
                self._plans.popitem(last=False)


@dataclass(frozen=True, slots=True)
class Staying:
    """What a request of a conversation may choose from, tried in this order until something fits.

    Attributes:
        offers: First the plan that it has, where that is enough for the question, then it and all that give the media
            no less. If none of these fits, anything may be taken.
        plan: What it has, for the media that there are now.
        had: What the earlier media ran at. A share of pixels is one of the largest medium's, so that the same step
            gives them more once a larger one has come.
    """

    offers: tuple[tuple[Candidate, ...], ...]
    plan: Candidate
    had: OperatingPoint

    def changed(self, to: Candidate) -> str:
        """What becomes of the plan of the earlier media."""
        if to.point == self.had:
            return STAYS
        if below(to.point, self.had):
            return FALLS
        return RISES if below(self.had, to.point) else SHIFTS

    def said(self, to: Candidate) -> dict[str, Any]:
        """For the decision and the log: the plan before, and what becomes of it."""
        return {"from": self.plan.key, "to": to.key, "change": self.changed(to)}

    def in_words(self, to: Candidate) -> str:
        """For a decision's reason."""
        changed = self.changed(to)
        if changed == RISES and to.point == self.plan.point:
            return f"the conversation's plan {self.plan.key} rises with the size of the largest image"
        return {
            STAYS: f"the conversation's plan {self.plan.key} stays",
            RISES: f"the conversation's plan rises from {self.plan.key}, which is not enough for the question",
            SHIFTS: f"the conversation's plan changes from {self.plan.key}, which is not enough for the question",
            FALLS: f"the conversation's plan falls from {self.plan.key}: the budget cannot be met otherwise",
        }[changed]


def staying(candidates: Sequence[Candidate], plan: Candidate, tolerance: float, had: OperatingPoint) -> Staying:
    """What there is for a request whose conversation has `plan`.

    Args:
        candidates: All that are on offer for it.
        plan: With the quality expected of it for this question.
        tolerance: Qualities that differ by this little count as equal.
        had: What the media of the conversation ran at last.
    """
    no_less = [c for c in candidates if c.point != plan.point and not below(c.point, plan.point)]
    enough = all(c.quality - plan.quality <= tolerance for c in no_less)
    both = (plan, *no_less)
    return Staying(((plan,), both) if enough else (both,), plan, had)


def below(point: OperatingPoint, other: OperatingPoint) -> bool:
    """Whether media get less of something at `point` than at the `other`: pixels, tokens or frames, or with as much of
    these, patches for blank parts."""
    own, others = _given(point), _given(other)
    return any(a < b for a, b in zip(own, others, strict=True)) or (
        own == others and (point.blanks or 1) > (other.blanks or 1)
    )


def _given(point: OperatingPoint) -> tuple[float, float, float]:
    return point.max_pixels or math.inf, point.downsample, point.max_fps or math.inf
