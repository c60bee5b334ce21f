"""How long answers are, by kind of prompt, learned online.

Knows counts of tokens. Must not know of prompts' texts, models, files or clocks.
"""

import math
import threading
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from adaptive_fusion.checks import number
from adaptive_fusion.errors import ConfigError

VERSION = 1
"""Of the state's form."""
MAX_KINDS = 256


class LengthModel:
    """Expected answer length per kind of prompt, learned online; thread-safe.

    A kind's mean follows the last 50 answers or so. An answer that was cut off is a lower bound: it counts
    only if it is longer than expected. A kind not seen before has the mean of all kinds, and before any
    answer `prior`. At most 256 kinds are kept, the least recently used is dropped.

    Args:
        prior: Tokens expected before anything was seen.
    """

    def __init__(self, prior: float = 64.0) -> None:
        self._prior = number(prior, "prior", 1.0, 1e6)
        self._lock = threading.Lock()
        self._kinds: OrderedDict[str, tuple[float, int]] = OrderedDict()
        self._all = (self._prior, 0)

    def expected(self, kind: str, max_new_tokens: int) -> float:
        """Tokens to expect of an answer to a prompt of this kind, at most `max_new_tokens`."""
        with self._lock:
            mean, _ = self._kinds.get(kind, self._all)
            if kind in self._kinds:
                self._kinds.move_to_end(kind)
        return min(mean, float(max_new_tokens))

    def observe(self, kind: str, new_tokens: int, *, finished: bool = True) -> None:
        """Learn from an answer of `new_tokens`; `finished` is False if it was cut off by a limit or a
        deadline.
        """
        if not 0 < new_tokens < math.inf:
            return
        with self._lock:
            mean, count = self._kinds.get(kind, (self._all[0], 0))
            if finished or new_tokens > mean:
                self._kinds[kind] = self._mean_with(mean, count, new_tokens)
                self._kinds.move_to_end(kind)
                self._all = self._mean_with(*self._all, new_tokens)
                if len(self._kinds) > MAX_KINDS:
                    self._kinds.popitem(last=False)

    @staticmethod
    def _mean_with(mean: float, count: int, value: float) -> tuple[float, int]:
        """A mean over `count` answers and one more; after 50 each new one weighs a fiftieth."""
        count = min(count + 1, 50)
        return mean + (value - mean) / count, count

    def state(self) -> dict[str, Any]:
        """Plain values for JSON."""
        with self._lock:
            kinds = {kind: list(pair) for kind, pair in self._kinds.items()}
            return {"version": VERSION, "prior": self._prior, "all": list(self._all), "kinds": kinds}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "LengthModel":
        """Read `state`'s form; raises ConfigError if it is malformed or out of range."""
        if state.get("version") != VERSION:
            raise ConfigError(f"length model has version {state.get('version')!r}; expected {VERSION}")
        try:
            model = cls(state["prior"])
            rows = {"": state["all"], **{f"k{kind}": pair for kind, pair in state["kinds"].items()}}
            for name, (mean, count) in list(rows.items())[: MAX_KINDS + 1]:
                pair = (number(mean, "mean length", 0.0, 1e9), int(number(count, "count", 0, 50)))
                if name:
                    model._kinds[name[1:]] = pair
                else:
                    model._all = pair
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ConfigError(f"length model is incomplete or malformed: {error!r}") from None
        return model
