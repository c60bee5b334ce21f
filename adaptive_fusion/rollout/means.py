"""The mean of outcomes with an interval that may be looked at after every request: a confidence sequence.

Knows numbers from 0 to 1. Must not know of what, nor what follows: `evidence` decides, these are for people.

It is the predictable plug-in empirical-Bernstein confidence sequence of Waudby-Smith, Ramdas, "Estimating means of
bounded random variables by betting" (2023), theorem 2.
"""

import math
from collections.abc import Sequence


class MeanSequence:
    """A confidence sequence for the mean of numbers from 0 to 1: it holds at every moment together with `level`.

    Args:
        level: Probability that the mean is inside at all times.
    """

    def __init__(self, level: float = 0.95) -> None:
        self._log = math.log(2.0 / (1.0 - level))
        self._n, self._total = 0, 0.0
        self._squares = 0.25  # of deviations from the mean as it was then; one pseudo-outcome of variance 1/4
        self._weights = self._weighted = self._cost = 0.0
        self._new: list[float] = []  # not counted in yet: that is done when somebody looks, many at a time

    def observe(self, value: float) -> None:
        """One more number."""
        self._new.append(value)

    def _count_in(self) -> None:
        n, total, squares, twice = self._n, self._total, self._squares, 2.0 * self._log
        weights, weighted, cost = self._weights, self._weighted, self._cost
        for value in self._new:
            n += 1
            before = (total + 0.5) / n
            bet = math.sqrt(twice / (squares / n * n * math.log(n + 1.0)))
            bet = bet if bet < 0.5 else 0.5
            cost += (value - before) ** 2 * (-math.log1p(-bet) - bet)
            weights += bet
            weighted += bet * value
            total += value
            squares += (value - (total + 0.5) / (n + 1.0)) ** 2
        self._n, self._total, self._squares = n, total, squares
        self._weights, self._weighted, self._cost = weights, weighted, cost
        self._new.clear()

    @property
    def n(self) -> int:
        """How many they are."""
        return self._n + len(self._new)

    @property
    def mean(self) -> float | None:
        """The plain mean; None of nothing."""
        self._count_in()
        return self._total / self._n if self._n else None

    @property
    def interval(self) -> tuple[float, float]:
        """Lower and upper end."""
        self._count_in()
        if not self._n:
            return 0.0, 1.0
        centre, radius = self._weighted / self._weights, (self._log + self._cost) / self._weights
        return max(0.0, centre - radius), min(1.0, centre + radius)

    def state(self) -> list[float]:
        """Everything, in plain values for JSON."""
        self._count_in()
        return [self._n, self._total, self._squares, self._weights, self._weighted, self._cost]

    def restore(self, state: Sequence[float]) -> None:
        """Go on from `state`."""
        self._n = int(state[0])
        self._total, self._squares, self._weights, self._weighted, self._cost = state[1:]
        self._new.clear()
