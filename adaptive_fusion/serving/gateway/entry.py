"""Where one request to a gateway is: at the gateway, or at the engine.

Knows the gauges. Must not know what a request says.
"""

from collections.abc import Callable

from adaptive_fusion.serving.metrics import Metrics


class Entry:
    """A request that was let in. Until it is `sent` it waits for the gateway, which reads, measures and plans it; from
    then on the engine has it, streams included, until it has `left`."""

    def __init__(self, metrics: Metrics, clock: Callable[[], float]) -> None:
        self._metrics, self._clock, self._began_s, self._sent = metrics, clock, clock(), False

    def sent(self) -> None:
        """It goes to the engine, now or for the second time."""
        if not self._sent:
            self._sent = True
            self._metrics.started(self._clock() - self._began_s)

    def left(self) -> None:
        """It is answered, or given up."""
        if self._sent:
            self._metrics.ended()
