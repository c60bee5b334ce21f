"""An audit: a request that runs natively, with what would have been done and saved in its decision.

Knows a planner and its decisions. Must not know of requests or how a point is run.
"""

from dataclasses import asdict, replace
from typing import Any

from adaptive_fusion.budget import Budget
from adaptive_fusion.control.candidates import Choice
from adaptive_fusion.control.planner import Planner
from adaptive_fusion.control.request_info import RequestInfo
from adaptive_fusion.decisions import Decision
from adaptive_fusion.point import NATIVE, OperatingPoint


def audited(
    planner: Planner, info: RequestInfo, limits: Budget, point: OperatingPoint | None, because: str | None
) -> tuple[Decision, Choice]:
    """The native decision, whose `audit` has the plan that `Planner.decide` would have chosen and what it would have
    saved by prediction."""
    peek = replace(info, request_id="")  # what would be done as a rule: nothing is explored that does not run
    would = planner.decide(peek, replace(limits, on_infeasible="cheapest"), point, because)[0]
    decision, choice = planner.decide(info, limits, NATIVE)
    used, full = (planner.work(p, info).prompt_tokens for p in (would.point, NATIVE))
    saved: dict[str, Any] = {"tokens": full - used}
    if would.predicted is not None and decision.predicted is not None:
        saved["ttft_ms"] = decision.predicted.ttft_ms - would.predicted.ttft_ms
        saved["latency_ms"] = decision.predicted.latency_ms - would.predicted.latency_ms
    audit = {
        "point": would.point.to_dict(),
        "plan": would.point.name,
        "rung": would.rung,
        "lane": would.lane,
        "reason": would.reason,
        "feasible": would.feasible,
        "predicted": asdict(would.predicted) if would.predicted else None,
        "saved": saved,
    }
    return replace(decision, reason=f"audit: {decision.reason}", audit=audit), choice
