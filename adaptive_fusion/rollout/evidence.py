"""Evidence that may be looked at after every request: e-processes against "no worse".

Knows numbers from 0 (good) to 1 (bad). Must not know what they are numbers of, or what follows from them.

An e-process is a nonnegative process whose mean is at most 1 at any stopping time while its hypothesis holds. So it
reaches 1 / alpha, ever, with probability at most alpha (Ville 1939): one may look after every request and act at once.

Two arms (`Unpaired`). Hypothesis: the mean of the canary's badness b is at most that of the control's a plus a margin
m, in every block of requests, whatever the mean does from block to block. A block has n_a outcomes of the control and
n_b of the canary, its size fixed before they are looked at; it multiplies the process by

    prod over a of (1 - (w / n_a) (a - x))  *  prod over b of (1 + (w / n_b) (b - (x + m)))

for any x and any bet w >= 0 that were fixed before and leave every factor nonnegative. By the inequality of arithmetic
and geometric means its mean is at most (1 + w (E b - E a - m) / (n_a + n_b)) ** (n_a + n_b) <= 1. For outcomes of 0 and
1 it is the likelihood ratio of Turner, Ly, Gruenwald, "Generic E-variables for exact sequential k-sample tests that
allow for optional stopping" (2021), and with a margin of Turner, Gruenwald, "Exact anytime-valid confidence intervals
for contingency tables and beyond" (2022); for bounded ones it bets as Waudby-Smith, Ramdas, "Estimating means of
bounded random variables by betting" (2023). x is the pooled mean so far. Nobody knows how much worse a canary is: the
process is a mixture over bets, each the best one for a ratio of the two means, from 1.1 to anything.

A margin below 0 asks the other question: whether an arm can be shown not to be worse by so much.

One mean against a limit (`Single`), such as that of differences of pairs: factors 1 + w (d - limit), a mixture over w
(Waudby-Smith, Ramdas 2023, equation 24).
"""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from adaptive_fusion.errors import ConfigError

RATIOS = (1.15, 1.4, 1.7, 2.0, 2.5, 3.5, 7.0)
"""How many times as bad the canary may be, for each of which there is a bet."""
WEIGHTS = (0.08, 0.12, 0.18, 0.22, 0.2, 0.12, 0.08)
"""Of the bets, together 1."""
EAGER_RATIOS, EAGER_WEIGHTS = (1.4, 2.0, 3.5, 7.0, 30.0, 1000.0), (0.1, 0.2, 0.2, 0.15, 0.15, 0.2)
"""The same where what is looked for is far worse, such as a canary that is dead."""
STRENGTHS = (0.25, 0.5, 0.75, 1.0, 1.3, 1.7, 2.5)
"""The same for a margin below 0: bets as shares of the one that is best where the arms are alike."""
SINGLE_BETS = (0.02, 0.05, 0.1, 0.2, 0.4, 0.7)
"""Shares of the largest bet on one number; all weigh the same."""
MOST_WAITING = 256
"""Outcomes of an arm that wait for a block; the oldest make room, so that blocks stay of one time."""
MOST_TO_ONE = 20
"""Outcomes of the control to one of the canary, at most: more tell little more of the control."""
_SURE = 0.98  # of the largest bet: one surprise must not take everything
_PRIOR, _PRIOR_SUM = 2.0, 0.06  # pseudo-outcomes of the pooled mean, and their sum


class Unpaired:
    """The e-process that an arm is worse than the other, from outcomes as they come.

    Args:
        margin: By how much the canary's mean may be higher. Below 0: by how much it is lower, until there is evidence
            against that. With the arms changed round that is evidence that the canary is not so much worse.
        binary: Whether outcomes are 0 or 1; of others the spread is estimated too.
        eager: Whether a block is taken as soon as both arms have an outcome, which is quicker at the start and a fifth
            slower in the long run; else blocks have the ratio that `ratio` says.
    """

    def __init__(self, margin: float = 0.0, *, binary: bool = True, eager: bool = False) -> None:
        if not -1.0 < margin < 1.0:
            raise ConfigError(f"margin is {margin!r}; expected a number above -1 and below 1")
        self.margin, self.binary, self.eager = margin, binary, eager
        self.to_one = 1
        self.peak = 0.0
        far = eager and margin >= 0.0
        self._ratios = EAGER_RATIOS if far else RATIOS
        self._logs = [math.log(weight) for weight in (EAGER_WEIGHTS if far else WEIGHTS)]
        self._waiting: tuple[deque[float], deque[float]] = (deque(), deque())
        self._n, self._sum, self._squares = [0, 0], [0.0, 0.0], [0.0, 0.0]
        self._plans: dict[tuple[int, int], _Plan] = {}  # by the size of a block, until something bad is seen

    @property
    def log_e(self) -> float:
        """Logarithm of the process as it is; `peak` has the highest that it was."""
        return _log_sum(self._settled())

    def ratio(self, share: float) -> None:
        """From now on a canary with `share` of all units is compared: how many of the control's outcomes come to one
        of its."""
        self.to_one = max(1, min(MOST_TO_ONE, round((1.0 - share) / share))) if 0.0 < share < 1.0 else 1

    def observe(self, canary: bool, badness: float) -> None:
        """An outcome of an arm, 0 (good) to 1 (bad)."""
        controls, canaries = self._waiting
        mine = canaries if canary else controls
        mine.append(badness)
        if len(mine) > MOST_WAITING:
            mine.popleft()
        if not (controls and canaries):
            return
        if self.eager:
            self._block(min(len(controls), MOST_TO_ONE), min(len(canaries), MOST_TO_ONE))
        elif len(controls) >= self.to_one:
            self._block(self.to_one, 1)

    def _block(self, n_a: int, n_b: int) -> None:
        controls, canaries = self._waiting
        a = [controls.popleft()] if n_a == 1 else [controls.popleft() for _ in range(n_a)]
        b = [canaries.popleft()] if n_b == 1 else [canaries.popleft() for _ in range(n_b)]
        plan = self._plans.get((n_a, n_b))
        if plan is None or plan.left <= 0:
            plan = self._replan(n_a, n_b)
        self._n[0] += n_a
        self._n[1] += n_b
        if self.margin >= 0.0 and not any(a) and not any(b):
            # It cannot raise the process: a clean block says that the canary is no worse. Counted, not computed.
            plan.clean_blocks += 1
            plan.left -= 1
            return
        self._settle()
        for index, gain in enumerate(plan.gains(a, b)):
            self._logs[index] += math.log(gain)
        self.peak = max(self.peak, _log_sum(self._logs))
        for arm, values in enumerate((a, b)):
            self._sum[arm] += math.fsum(values)
            self._squares[arm] += math.fsum([value * value for value in values])
        self._plans.clear()

    def _settle(self) -> None:
        """Put the clean blocks into the logarithms. When that happens follows from the outcomes alone, never from who
        looks: whoever has the same outcomes has the same numbers, to the last bit."""
        self._logs = self._settled()
        for plan in self._plans.values():
            plan.clean_blocks = 0

    def _settled(self) -> list[float]:
        """The logarithms with the clean blocks in them."""
        logs = self._logs
        for plan in self._plans.values():
            if plan.clean_blocks:
                logs = plan.settled(logs)
        return logs

    def _replan(self, n_a: int, n_b: int) -> "_Plan":
        """Bets for blocks of that size, from blocks past: they hold until something bad was seen, or for some time."""
        self._settle()
        means = [(total + _PRIOR_SUM) / (n + _PRIOR) for n, total in zip(self._n, self._sum, strict=True)]
        mean = (n_a * means[0] + n_b * means[1]) / (n_a + n_b)
        spread = mean * (1.0 - mean)
        if not self.binary:
            n = sum(self._n)
            plain = sum(self._sum) / n if n else 0.0
            spread = max((sum(self._squares) - n * plain * plain + spread) / (n + 1.0), 1e-4)
        plan = _Plan(self._ratios, n_a, n_b, mean, self.margin, spread, 1 + sum(self._n) // 16)
        self._plans[n_a, n_b] = plan
        return plan

    def state(self) -> dict[str, Any]:
        """Everything, in plain values for JSON; `restore` goes on with the same numbers."""
        return {
            "logs": list(self._logs), "waiting": [list(waiting) for waiting in self._waiting], "n": list(self._n),
            "sum": list(self._sum), "squares": list(self._squares), "to_one": self.to_one, "peak": self.peak,
            "plans": [[*plan.given, plan.left, plan.clean_blocks] for plan in self._plans.values()],
        }  # fmt: skip

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`."""
        self._logs = [float(value) for value in state["logs"]]
        self._waiting = (deque(state["waiting"][0]), deque(state["waiting"][1]))
        self._n, self._sum, self._squares = list(state["n"]), list(state["sum"]), list(state["squares"])
        self.to_one, self.peak = int(state["to_one"]), float(state["peak"])
        plans = [_Plan(self._ratios, *plan) for plan in state["plans"]]
        self._plans = {plan.size: plan for plan in plans}


class _Plan:
    """The bets of a block of `n_a` and `n_b` outcomes, of which `mean` and variance `spread` are expected; they are to
    hold for so many `left`. `x` and `y` are the means of both arms at the edge of the hypothesis. `clean_blocks` have
    come by it with nothing bad in them, and are not in the logarithms yet."""

    __slots__ = ("bets", "clean_blocks", "given", "left", "size", "x", "y")

    def __init__(
        self,
        ratios: Sequence[float],
        n_a: int,
        n_b: int,
        mean: float,
        margin: float,
        spread: float,
        left: int,
        clean_blocks: int = 0,
    ) -> None:
        self.given, self.left = (n_a, n_b, mean, margin, spread), left
        self.size, self.clean_blocks, n = (n_a, n_b), clean_blocks, n_a + n_b
        if margin >= 0.0:
            self.x, self.y = min(mean, 0.999 - margin), min(mean, 0.999 - margin) + margin
            # Where the canary is `ratio` times as bad, and both together are as bad as they are, its own mean is that.
            worse = [min(ratio * n * mean / (n_a + ratio * n_b), 1.0) for ratio in ratios]
            bets = [n_b * (alternative - mean) / spread for alternative in worse]
        else:
            self.x = min(max(mean - margin * n_b / n, -margin), 0.999)
            self.y = self.x + margin
            alike = n_a * (self.x - mean) / max(spread, self.x * (1.0 - self.x) * spread / (mean * (1.0 - mean)))
            bets = [strength * alike for strength in STRENGTHS]
        largest = _SURE * min(n_a / (1.0 - self.x), n_b / self.y if self.y > 0.0 else math.inf)
        self.bets = [min(bet, largest) for bet in bets]

    def settled(self, logs: Sequence[float]) -> list[float]:
        """Logarithms of the process with the clean blocks in them."""
        clean = self.gains([0.0] * self.size[0], [0.0] * self.size[1])
        return [log + self.clean_blocks * math.log(gain) for log, gain in zip(logs, clean, strict=True)]

    def gains(self, a: Sequence[float], b: Sequence[float]) -> list[float]:
        """By bet what a block multiplies the process by."""
        found = []
        for bet in self.bets:
            down, up, gain = bet / self.size[0], bet / self.size[1], 1.0
            for value in a:
                gain *= 1.0 - down * (value - self.x)
            for value in b:
                gain *= 1.0 + up * (value - self.y)
            found.append(gain)
        return found


class Single:
    """The e-process that one mean is above a limit: of the differences of two arms on the same requests, or of an arm
    by itself.

    Args:
        limit: What the mean may be.
        low: The least value; the highest is 1.
        bets: Shares of the largest bet, of which it is the mean.
    """

    def __init__(self, limit: float, *, low: float = -1.0, bets: Sequence[float] = SINGLE_BETS) -> None:
        if not low < limit < 1.0:
            raise ConfigError(f"limit is {limit!r}; expected a number above {low:g} and below 1")
        self.limit, self.n = limit, 0
        self._room, self._bets = limit - low, tuple(bets)
        self._logs = [-math.log(len(self._bets))] * len(self._bets)
        self.log_e = self.peak = 0.0

    def observe(self, value: float) -> None:
        """One more value, from `low` to 1."""
        self.n += 1
        excess = (value - self.limit) / self._room
        self._logs = [log + math.log1p(bet * excess) for log, bet in zip(self._logs, self._bets, strict=True)]
        self.log_e = _log_sum(self._logs)
        self.peak = max(self.peak, self.log_e)

    def state(self) -> dict[str, Any]:
        """Everything, in plain values for JSON."""
        return {"logs": list(self._logs), "n": self.n, "peak": self.peak}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`."""
        self._logs, self.n = [float(value) for value in state["logs"]], int(state["n"])
        self.peak, self.log_e = float(state["peak"]), _log_sum(self._logs)


def _log_sum(logs: Sequence[float]) -> float:
    """The logarithm of the sum of exponentials."""
    if len(logs) == 1:
        return logs[0]
    most = max(logs)
    return most + math.log(math.fsum([math.exp(log - most) for log in logs]))
