"""How well a row did on a trace: attainment, quality and what happens around steps of load; and the outcomes that are
known without asking any row.

Knows traces. Must not know of models or how a row chooses.

Attainment counts feasible requests only: those that the cheapest point would have met under the load of the moment.
`misses` is the mean number of misses in the 20 requests after a step up of load, `recover` the median number of
requests after its end until quality (relative to the oracle's, over 20 requests) is back at 98 % of its usual level.
"""

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product

import numpy as np

from adaptive_fusion.bench.traces import BACKGROUND, FloatArray, IntArray, Trace

_AFTER = 20


@dataclass
class Outcome:
    """What a row did: the column that answered ``[n]``, and the time including retries after out of memory."""

    index: IntArray
    latency: FloatArray
    decision_us: float = 0.0


# Outcomes that need no row


def native(trace: Trace) -> Outcome:
    """The model untouched on every request."""
    return _taken(trace, np.zeros(len(trace.case), dtype=np.int64))


def oracle(trace: Trace) -> Outcome:
    """The best candidate for each request, knowing its true cost."""
    fits = (trace.times + trace.elapsed[:, None] <= trace.world.deadline_ms) & (trace.memory <= trace.free[:, None])
    fits[:, 0] = False
    best = np.where(fits, trace.quality, -1.0).argmax(1)
    return _taken(trace, np.where(fits.any(1), best, trace.world.cheapest[trace.case]))


def best_static(trace: Trace, attainment: float) -> Outcome:
    """One candidate for each lane, known in hindsight: of the choices that held the target the one of highest quality,
    else the one that held most.
    """
    could, quality = trace.feasible, trace.quality
    lanes = np.array([case.lane for case in trace.world.cases])[trace.case]
    sizes = {case.lane: len(case.candidates) for case in trace.world.cases}
    late = (trace.times + trace.elapsed[:, None] > trace.world.deadline_ms) | (trace.memory > trace.free[:, None])
    died = trace.memory > trace.free[:, None]
    parts: dict[str, list[tuple[float, float]]] = {}
    for lane, size in sizes.items():
        own = lanes == lane
        parts[lane] = [
            (float((late[own, i] & could[own]).sum()), float(np.where(died[own, i], 0.0, quality[own, i]).sum()))
            for i in range(1, size + 1)
        ]
    allowed = (1 - attainment) * int(could.sum()) + 1e-9
    held: tuple[float, tuple[int, ...]] | None = None
    least: tuple[float, tuple[int, ...]] = (math.inf, ())
    for chosen in product(*(range(size) for size in sizes.values())):
        rows = [parts[lane][i] for lane, i in zip(sizes, chosen, strict=True)]
        missed, worth = sum(row[0] for row in rows), sum(row[1] for row in rows)
        if missed <= allowed and (held is None or worth > held[0]):
            held = worth, chosen
        if missed < least[0]:
            least = missed, chosen
    columns = dict(zip(sizes, (held or least)[1], strict=True))
    return _taken(trace, np.array([columns[lane] + 1 for lane in lanes.tolist()]))


def _taken(trace: Trace, index: IntArray) -> Outcome:
    """These columns, without retries."""
    n = np.arange(len(index))
    took = np.where(trace.memory[n, index] <= trace.free, trace.times[n, index], math.inf)
    return Outcome(index, trace.elapsed + took)


# Scores


def score(trace: Trace, outcome: Outcome, best: Outcome) -> dict[str, float]:
    """Attainment, quality and the behaviour around steps of load; `best` is the oracle's outcome."""
    n = np.arange(len(outcome.index))
    could = trace.feasible
    missed = could & (outcome.latency > trace.world.deadline_ms)
    died = ~np.isfinite(outcome.latency)
    quality = np.where(died, 0.0, trace.quality[n, outcome.index])
    reached = trace.quality[n, best.index]
    result = {
        "attainment": 1.0 - float(missed.sum()) / max(int(could.sum()), 1),
        "feasible": float(could.mean()),
        "quality": float(quality.mean()),
        "of_oracle": float(quality.mean()) / float(reached.mean()),
        "decision_us": outcome.decision_us,
    }
    if trace.world.answered is not None:
        answered = trace.world.answered[trace.case][n, outcome.index]
        result["answered"] = float(np.where(died, 0.0, answered).mean())
    jumps = [int(j) + 1 for j in np.flatnonzero(np.abs(np.diff(np.log(trace.load))) > 0.25)]
    ups = [j for j in jumps if trace.load[j] > trace.load[j - 1] and j + _AFTER <= len(n)]
    if ups:
        counts = [int(missed[j : j + _AFTER].sum()) for j in ups]
        result |= {"misses": statistics.fmean(counts), "misses_max": float(max(counts))}
    downs = [j for j in jumps if trace.load[j] < trace.load[j - 1]]
    if downs and trace.name in ("step", BACKGROUND):
        result |= _recovery(trace, quality, reached, downs)
    return result


def _recovery(trace: Trace, quality: FloatArray, reached: FloatArray, downs: list[int]) -> dict[str, float]:
    kernel = np.ones(_AFTER) / _AFTER
    ratio = np.convolve(quality, kernel, "valid") / np.convolve(reached, kernel, "valid")
    calm = ratio[np.r_[False, trace.load[:-1] == 1.0][: len(ratio)] & (trace.load[: len(ratio)] == 1.0)]
    back = ratio >= 0.98 * float(np.median(calm))
    waits = [int(np.argmax(back[j:])) if back[j:].any() else len(ratio) - j for j in downs if j < len(ratio)]
    return {"recover": float(statistics.median(waits)), "recover_max": float(max(waits))} if waits else {}


def shortfalls(results: Mapping[str, Mapping[str, Mapping[str, float]]], attainment: float, n: int) -> list[str]:
    """What should hold of ``ours`` on traces of n requests and does not; a tie is within two standard errors."""
    found: list[str] = []
    tie = 2 * math.sqrt(attainment * (1 - attainment) / n)
    for trace, rows in results.items():
        ours = rows["ours"]
        if ours["attainment"] < attainment:
            found.append(f"{trace}: attainment {ours['attainment']:.4f} < {attainment}")
        if ours["of_oracle"] < 0.95:
            found.append(f"{trace}: quality {ours['of_oracle']:.3f} of the oracle's < 0.95")
        if trace == "step" and ours.get("misses", 0.0) > 4:
            found.append(f"{trace}: {ours['misses']:.1f} misses in the 20 requests after a step > 4")
        if trace == "step" and ours.get("recover", 0.0) > 60:
            found.append(f"{trace}: recovered {ours['recover']:.0f} requests after its end > 60")
        for name, row in rows.items():
            better = row["attainment"] > ours["attainment"] + tie and row["quality"] > ours["quality"]
            if name != "oracle" and better:
                found.append(f"{trace}: {name} is better in both attainment and quality")
    return found
