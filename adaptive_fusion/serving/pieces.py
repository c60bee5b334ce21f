"""An answer's text up to its stop strings, whole or in pieces.

Knows strings. Must not know of tokens, models or HTTP.
"""

from collections.abc import Sequence


def until_stop(text: str, stops: Sequence[str]) -> str:
    """`text` up to the first place where one of `stops` begins."""
    found = [place for stop in stops if (place := text.find(stop)) >= 0]
    return text[: min(found)] if found else text


class StopFilter:
    """Passes pieces of text on, up to the first of `stops`; what may be the beginning of one is kept back."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.ended = False

    def feed(self, piece: str) -> str:
        """What can be shown, now that `piece` has come."""
        if self.ended:
            return ""
        self._held += piece
        shown = until_stop(self._held, self._stops)
        if len(shown) < len(self._held):
            self.ended, self._held = True, ""
            return shown
        keep = self._may_begin(self._held)
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return shown

    def flush(self) -> str:
        """What was kept back, at the end."""
        rest, self._held = self._held, ""
        return rest

    def _may_begin(self, text: str) -> int:
        """Characters at the end of `text` that a stop string begins with; of several the most."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0
