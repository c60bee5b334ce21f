"""The last decisions, without content, and whether one of them may be rated.

Knows plain values. Must not know of HTTP or models.
"""

import threading
from collections import OrderedDict
from typing import Any

from adaptive_fusion.serving.refusals import Refusal


class Records:
    """The last `keep` decisions by request id, newest last; thread-safe."""

    def __init__(self, keep: int) -> None:
        self._keep = keep
        self._lock = threading.Lock()
        self._rows: OrderedDict[str, dict[str, Any]] = OrderedDict()
        self._beside: dict[str, dict[str, Any]] = {}
        self._ratings: dict[str, dict[str | None, float | str]] = {}

    def add(self, request_id: str, row: dict[str, Any], beside: dict[str, Any] | None = None) -> None:
        """Keep a decision, and beside it what only `whole` tells; the oldest makes room."""
        with self._lock:
            self._rows[request_id] = row
            self._beside[request_id] = beside or {}
            while len(self._rows) > self._keep:
                gone, _ = self._rows.popitem(last=False)
                self._ratings.pop(gone, None)
                self._beside.pop(gone, None)

    async def last(self, count: int) -> list[dict[str, Any]]:
        """The newest `count`, newest first."""
        with self._lock:
            return list(reversed(self._rows.values()))[:count]

    async def whole(self, request_id: str) -> dict[str, Any]:
        """All that is kept of a decision.

        Raises:
            Refusal: 404 for a request that is not among those kept.
        """
        await self.require(request_id)
        with self._lock:
            return {**self._rows[request_id], **self._beside[request_id]}

    async def require(self, request_id: str) -> None:
        """Raises a Refusal, 404, for a request that is not among those kept."""
        with self._lock:
            if request_id not in self._rows:
                raise unknown(request_id, self._keep)

    async def rated(self, request_id: str, source_id: str | None, rating: float | str) -> bool:
        """Note a rating; whether it is another than that source's last one of the request."""
        with self._lock:
            of_request = self._ratings.setdefault(request_id, {})
            new = of_request.get(source_id) != rating
            of_request[source_id] = rating
            return new


def unknown(request_id: str, keep: int) -> Refusal:
    """What is said of a request that is not among the last `keep`."""
    said = f"request {request_id[:80]!r} is not known; expected one of the last {keep} answers"
    return Refusal(said, 404, code="unknown_request", param="request_id")
