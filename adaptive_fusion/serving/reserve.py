"""How much of its deadline a request must have left to be let in while others wait: learned from what came of others.

The law: after each request that had waited, the reserve rises by `UP` if it was late and falls by `DOWN` if not. Where
letting in fewer makes fewer late, it comes to rest where ``UP x misses = DOWN x hits``, that is at `MISSES` late ones.
Between bounds, so that neither a good nor a bad hour is carried on for long.

Knows shares. Must not know of queues or requests.
"""

LEAST, MOST = 0.05, 0.5
"""Bounds, in shares of the deadline. The least is for what no prediction has: the way to the client."""
MISSES = 0.03
"""Share of late ones that it comes to rest at; budgets ask for 0.05 where they do not say."""
UP = 0.02
DOWN = UP * MISSES / (1.0 - MISSES)


class Reserve:
    """The share of a deadline that is kept in reserve."""

    def __init__(self) -> None:
        self.share = LEAST

    def observe(self, in_time: bool) -> None:
        """Learn from a request that had waited for others."""
        self.share = min(MOST, max(LEAST, self.share + (-DOWN if in_time else UP)))
