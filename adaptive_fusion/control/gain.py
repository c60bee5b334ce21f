"""Whether batches take as long as they are predicted to, beside what the same predictions say of requests alone.

A profile that nobody measured, or that was measured on another day, may be wrong about batches in particular. So the
ratio of what was measured to what was predicted is kept for each, and the first is set off against the second: a
machine that is slow today is slow for both. Where batches are refused only because of what was seen of them, that is
forgotten bit by bit, so that one is tried again.

Knows milliseconds. Must not know of requests or of how either is predicted.
"""

import math
import threading

_MEMORY = 0.25
"""Weight of the newest ratio."""
_FORGET = 0.02
"""Share of what is known against batches that each refusal for that reason forgets."""
_CLIP = math.log(4.0)
"""Most that one measurement can say, either way."""


class Gain:
    """What is known of batches; thread-safe, always finite."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._alone: float | None = None
        self._together: float | None = None

    @property
    def factor(self) -> float:
        """By what a batch's predicted time is to be multiplied before it is set against its requests' own; 1 until
        both have been seen."""
        with self._lock:
            if self._alone is None or self._together is None:
                return 1.0
            return math.exp(self._together - self._alone)

    def ran_alone(self, measured_ms: float, predicted_ms: float) -> None:
        """A request ran alone."""
        with self._lock:
            self._alone = _moved(self._alone, measured_ms, predicted_ms)

    def ran_together(self, measured_ms: float, predicted_ms: float) -> None:
        """A batch ran, and took so long until its last row ended."""
        with self._lock:
            self._together = _moved(self._together, measured_ms, predicted_ms)

    def refused(self) -> None:
        """A batch was not made because of what was seen of others."""
        with self._lock:
            if self._alone is not None and self._together is not None:
                self._together += _FORGET * (self._alone - self._together)


def _moved(known: float | None, measured_ms: float, predicted_ms: float) -> float | None:
    """The mean logarithm of ratios after one more; the same after one that says nothing."""
    if not (0.0 < measured_ms < math.inf and 0.0 < predicted_ms < math.inf):
        return known
    ratio = math.log(measured_ms) - math.log(predicted_ms)
    if known is None:
        return ratio
    return known + _MEMORY * min(max(ratio - known, -_CLIP), _CLIP)
