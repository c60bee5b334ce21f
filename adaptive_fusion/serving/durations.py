"""How long errands took lately, how much that varied, and what follows for who waits behind some.

Knows seconds. Must not know of queues or errands.
"""

import math
from collections import deque

_MEMORY = 0.2
"""Weight of the newest errand in the mean time of errands."""
_SURE = 2.0
"""Mean deviations on top of the mean wait: what it is to exceed in one case of twenty."""
_RECENT = 32
"""Jobs of which the shortest says what one takes at least."""


class Durations:
    """Times of errands, of those done together each one's part."""

    def __init__(self) -> None:
        self.mean_s, self._spread_s = 0.0, 0.0
        self._recent: deque[float] = deque(maxlen=_RECENT)

    @property
    def least_s(self) -> float:
        """What the shortest of the last errands took; 0 before there was one."""
        return min(self._recent, default=0.0)

    def observe(self, took_s: float, errands: int) -> None:
        """So many `errands` took `took_s` each."""
        self._recent.append(took_s)
        for _ in range(errands):
            weight = _MEMORY if self.mean_s else 1.0
            off = abs(took_s - self.mean_s) if self.mean_s else 0.0
            self.mean_s += weight * (took_s - self.mean_s)
            self._spread_s += weight * (off - self._spread_s)

    def ahead_s(self, errands: int, running: int, done_s: float) -> float:
        """How long so many `errands` will take, `running` of which began together `done_s` ago."""
        past = min(done_s, running * self.mean_s)
        return max(errands * self.mean_s + _SURE * math.sqrt(errands) * self._spread_s - past, 0.0)
