"""What batches take beside their requests alone, by what both were seen to take.

A profile that nobody measured, or that was measured on another day, may be wrong, and wrong in another way for each
stage: where decoding takes ten times as long as predicted and encoding does not, a batch that spares decoding is worth
far more than it seems. So measured and predicted time are kept of each stage of requests alone, and of batches, from
when all is encoded, beside what the corrected predictions say of that: a machine that is slow today is slow for both.
Long requests count for more than short ones, as what is asked is time in all. Where batches are refused only because of
what was seen of them, that is forgotten bit by bit, so that one is tried again.

Knows milliseconds. Must not know of requests or of how either is predicted.
"""

import math
import threading
from collections.abc import Sequence
from dataclasses import replace

from adaptive_fusion.decisions import Prediction

_MEMORY = 0.2
"""Weight of the newest time."""
_FORGET = 0.02
"""Share of what is known against batches that each refusal for that reason forgets."""
_CLIP = 4.0
"""Most by which one measurement can be off what is known, either way."""


class _Ratio:
    """Measured to predicted time, of late; 1 until something was seen."""

    def __init__(self) -> None:
        self.measured = self.predicted = 0.0

    @property
    def value(self) -> float:
        return self.measured / self.predicted if self.predicted else 1.0

    def observe(self, measured_ms: float, predicted_ms: float) -> None:
        """One more; nothing if it says nothing."""
        if not (0.0 < measured_ms < math.inf and 0.0 < predicted_ms < math.inf):
            return
        if not self.predicted:
            if 0.0 < measured_ms / predicted_ms < math.inf:
                self.measured, self.predicted = measured_ms, predicted_ms
            return
        measured_ms = min(max(measured_ms, self.value * predicted_ms / _CLIP), self.value * predicted_ms * _CLIP)
        measured = self.measured + _MEMORY * (measured_ms - self.measured)
        predicted = self.predicted + _MEMORY * (predicted_ms - self.predicted)
        if predicted > 0.0 and 0.0 < measured / predicted < math.inf:
            self.measured, self.predicted = measured, predicted


class Gain:
    """What is known of batches; thread-safe, always finite."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stages = (_Ratio(), _Ratio(), _Ratio())
        self._alone, self._together = _Ratio(), _Ratio()

    @property
    def factor(self) -> float:
        """By what a batch's `corrected` prefill and decoding are to be multiplied before it is set against its
        requests' own; 1 until both have been seen. Encoding is the same for both."""
        with self._lock:
            if not self._alone.predicted or not self._together.predicted:
                return 1.0
            found = self._together.value / self._alone.value
            return found if 0.0 < found < math.inf else 1.0

    def corrected(self, predicted: Prediction) -> Prediction:
        """A prediction by what each stage was seen to take."""
        with self._lock:
            return self._corrected(predicted)

    def ran_alone(self, measured_ms: Sequence[float], predicted: Prediction) -> None:
        """A request ran alone, and its encoding, prefill and decoding took so long."""
        said = predicted.encode_ms, predicted.prefill_ms, predicted.decode_ms
        with self._lock:
            for stage, took, expected in zip(self._stages, measured_ms, said, strict=True):
                stage.observe(took, expected)
            self._alone.observe(sum(measured_ms[1:]), _rest_ms(self._corrected(predicted)))

    def ran_together(self, measured_ms: float, corrected: Prediction) -> None:
        """A batch ran, and took so long from when all was encoded until its last row ended."""
        with self._lock:
            self._together.observe(measured_ms, _rest_ms(corrected))

    def refused(self) -> None:
        """A batch was not made because of what was seen of others."""
        with self._lock:
            if self._alone.predicted and self._together.predicted:
                known = self._together
                known.measured += _FORGET * (self._alone.value * known.predicted - known.measured)

    def _corrected(self, predicted: Prediction) -> Prediction:
        encode, prefill, decode = (stage.value for stage in self._stages)
        return replace(
            predicted,
            encode_ms=encode * predicted.encode_ms,
            prefill_ms=prefill * predicted.prefill_ms,
            decode_ms=decode * predicted.decode_ms,
        )


def _rest_ms(predicted: Prediction) -> float:
    return predicted.prefill_ms + predicted.decode_ms
