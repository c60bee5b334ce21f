"""The choice among the candidates for one request: how likely each is late, what it is worth, what is cheapest.

Knows candidates, limits and, to read, what was learned. Changes nothing, and knows nothing of clocks, threads and
counts: `controller` calls these steps in their order, `law` states what they do.
"""

import math
from collections.abc import Sequence
from typing import Any

from adaptive_fusion.budget import Budget
from adaptive_fusion.control import law
from adaptive_fusion.control.candidates import Candidate
from adaptive_fusion.control.estimators import Drift, probability_above
from adaptive_fusion.control.learned import Corrections
from adaptive_fusion.decisions import Rejected

Row = tuple[float, float, int, float, Candidate]
"""As the law sorts: minus the quality, predicted ms to the last token, place on offer, ms to the first, candidate."""
TimeLimit = tuple[str, float, Drift]
"""Of a limit that is set its name (``ttft`` or ``latency``), the milliseconds left and the drift of that time."""
Risk = tuple[float, Drift | None, str, tuple[Any, ...]]
"""P(late), the drift it comes from, and the reason: a template and its numbers, put together only for the log."""
Weighed = tuple[Candidate, float, Drift | None, str, tuple[Any, ...]]
"""A candidate and its `Risk`."""

_NO_LIMIT: Risk = (0.0, None, "best quality, no time limit set", ())
_LATE = "{} {:.0f} of {:.0f} ms, late with {:.0f} %"
_LATE_IN_TWO = "two passes, {} {:.0f} + {:.0f} of {:.0f} ms with {:.0f} %, late with {:.0f} %"


def valid_rows(candidates: Sequence[Candidate]) -> list[Row]:
    """The candidates with a finite quality and prediction, the best quality first and then the cheapest."""
    inf = math.inf
    rows: list[Row] = []
    for index, candidate in enumerate(candidates):
        predicted = candidate.predicted
        ttft = predicted.encode_ms + predicted.prefill_ms
        total, most, peak = ttft + predicted.decode_ms, ttft + predicted.decode_ms, predicted.peak_memory_gb
        if candidate.second is not None:
            total, most, peak = candidate.mean_ms, candidate.most_ms, candidate.peak_memory_gb
        if 0.0 <= ttft <= total < inf and most < inf and 0.0 <= peak < inf and -inf < candidate.quality < inf:
            rows.append((-candidate.quality, total, index, ttft, candidate))
    rows.sort()
    return rows


def times_left(budget: Budget, elapsed_ms: float, learned: Corrections) -> list[TimeLimit]:
    """The limits on time that are set, less what has passed."""
    limits: list[TimeLimit] = []
    if budget.latency_ms is not None:
        limits.append(("latency", budget.latency_ms - elapsed_ms, learned.latency))
    if budget.ttft_ms is not None:
        limits.append(("ttft", budget.ttft_ms - elapsed_ms, learned.ttft))
    return limits


def weigh(
    rows: Sequence[Row], limits: Sequence[TimeLimit], memory_gb: float, price: float, learned: Corrections
) -> tuple[list[Weighed], int]:
    """Each candidate with its risk, and the place of the one that is worth most.

    Args:
        rows: The best quality first. The list ends where no later candidate can be worth more.
        limits: All limits on time that are set.
        memory_gb: GiB that may be taken.
        price: Of a miss.
        learned: The drifts are in `limits`; from here come the memory envelope and the ceilings.

    Returns:
        The candidates looked at, and a place among them: -1 if none fits and is worth its risk.
    """
    envelope = learned.memory_envelope
    weighed: list[Weighed] = []
    best, worth = -1, 0.0
    risk: Risk
    for minus_quality, total, _, ttft, candidate in rows:
        if best >= 0 and -minus_quality <= worth:
            break  # no risk is below 0, so no point of this quality or less is worth more
        two = candidate.second is not None
        needed = candidate.peak_memory_gb if two else candidate.predicted.peak_memory_gb
        if needed * envelope > memory_gb:
            risk = (1.0, None, "memory {:.3g} > {:.3g} GiB", (needed * envelope, memory_gb))
        elif needed >= learned.memory_ceiling.limit:
            risk = (1.0, None, "memory: too near a point that ran out of it", ())
        elif (candidate.most_ms if two else total) >= learned.time_ceiling.limit:
            risk = (1.0, None, "overload: too near a point that was too slow", ())
        elif not limits:
            risk, best, worth = _NO_LIMIT, len(weighed), -minus_quality
        else:
            risk = (
                risk_of_two(candidate, limits, learned.ttft)
                if two
                else risk_of(candidate.drift_key, ttft, total, limits)
            )
            net = -minus_quality - price * risk[0]
            if net > worth and risk[0] <= law.RISK_MAX:
                best, worth = len(weighed), net
        weighed.append((candidate, *risk))
    return weighed, best


def risk_of(key: str, ttft_ms: float, latency_ms: float, limits: Sequence[TimeLimit]) -> Risk:
    """The risk of a point at the limit where P(late) is highest.

    Args:
        key: The name under which the point's own drift is kept.
        ttft_ms: Predicted time to the first token.
        latency_ms: Predicted time to the last.
        limits: All limits on time that are set.
    """
    highest, risk = -1.0, _NO_LIMIT
    for name, left_ms, drift in limits:
        predicted_ms = latency_ms if name == "latency" else ttft_ms
        p_late, mean = _p_late(key, predicted_ms, left_ms, drift)
        if p_late > highest:
            highest = p_late
            risk = (p_late, drift, _LATE, (name, predicted_ms * math.exp(mean), left_ms, 100.0 * p_late))
    return risk


def risk_of_two(candidate: Candidate, limits: Sequence[TimeLimit], first: Drift) -> Risk:
    """The risk of a plan of two passes at the limit where P(late) is highest: (1 - p) P(the first alone is late) +
    p P(both are late), p being the share that goes on.

    Args:
        candidate: With a second pass.
        limits: All limits on time that are set.
        first: Drift of times to the first token: what the first pass is expected to use up before the second begins.
    """
    own, second = candidate.predicted, candidate.second
    if second is None:
        return risk_of(candidate.drift_key, own.ttft_ms, own.latency_ms, limits)
    better, share = second.candidate, second.share
    highest, risk = -1.0, _NO_LIMIT
    spent_ms = own.ttft_ms * first.factor(candidate.drift_key) + second.wait_ms
    for name, left_ms, drift in limits:
        whole = name == "latency"
        alone_ms = own.latency_ms if whole else own.ttft_ms + second.wait_ms
        better_ms = better.predicted.latency_ms if whole else better.predicted.ttft_ms
        alone, _ = _p_late(candidate.drift_key, alone_ms, left_ms, drift)
        both, mean = _p_late(better.drift_key, better_ms, left_ms - spent_ms, drift)
        p_late = (1.0 - share) * alone + share * both
        if p_late > highest:
            highest = p_late
            told = (name, spent_ms, better_ms * math.exp(mean), left_ms, 100.0 * share, 100.0 * p_late)
            risk = (p_late, drift, _LATE_IN_TWO, told)
    return risk


def _p_late(key: str, predicted_ms: float, left_ms: float, drift: Drift) -> tuple[float, float]:
    """P(what is predicted to take this exceeds what is left), and the logarithm of the factor expected on it."""
    mean, scale = drift.expect(key)
    if left_ms <= 0.0:
        return 1.0, mean
    if predicted_ms <= 0.0:
        return 0.0, mean
    return probability_above(math.log(left_ms) - math.log(predicted_ms), mean, scale), mean


def cheapest(rows: Sequence[Row], predicted_gb: float) -> Candidate:
    """Of those predicted to take less memory than this (late is better than out of memory) the one predicted to take
    least time, else the one that takes least memory.

    By predictions alone: under a load that nothing fits, what a point has learned of its own is mostly that load, and
    a point that was hardly tried would look worse than it is, or better.
    """
    fitting = [row for row in rows if row[4].predicted.peak_memory_gb < predicted_gb]
    if fitting:
        return min(fitting, key=lambda row: row[1])[4]
    return min(rows, key=lambda row: (row[4].predicted.peak_memory_gb, row[1]))[4]


def hopeless(fallback: Candidate, budget: Budget, elapsed_ms: float, predicted_gb: float, drift: Drift) -> bool:
    """Whether the cheapest candidate need not be started, where nothing fits.

    It need not, unless late answers are cut off at the deadline: then only if memory does not suffice, or if even the
    first token is expected after the deadline.
    """
    if budget.on_deadline != "stop" or budget.latency_ms is None:
        return True
    if not fallback.predicted.peak_memory_gb < predicted_gb:
        return True
    return fallback.predicted.ttft_ms * drift.factor(fallback.drift_key) > budget.latency_ms - elapsed_ms


def why(row: Weighed) -> str:
    """The risk of a candidate in words."""
    return row[3].format(*row[4])


def rejected(rows: Sequence[Weighed]) -> tuple[Rejected, ...]:
    """Candidates that were not taken, each with what spoke against it."""
    return tuple([Rejected(row[0].point, why(row), row[0].predicted) for row in rows])
