"""What a request's outcome says to the guardrails: metrics by name, from a reply or from what went wrong.

Knows replies, errors and the controller's price. Must not know of experiments, stores or HTTP.
"""

import math
from collections.abc import Mapping
from typing import Any

from adaptive_fusion.control import law
from adaptive_fusion.control.controller import Controller
from adaptive_fusion.decision_log import THUMBS
from adaptive_fusion.errors import ContextLengthError, InfeasibleBudgetError, MediaError, OutOfMemoryError
from adaptive_fusion.reply import Reply

_STEPPED_DOWN = "stepped down after running out of memory"
_PRICES = math.log(law.PRICE_MAX / law.PRICE_MIN)
URGENT = ("errors", "dead", "out_of_memory")
"""What counts at every request of a unit; of all else each unit has one say."""


def of_reply(reply: Reply, controller: Controller | None = None, *, e2e_ms: float | None = None) -> dict[str, float]:
    """Metrics of an answered request.

    Args:
        reply: The answer.
        controller: That of its arm, for the price of a miss.
        e2e_ms: From arrival to the answer, if somebody measured it from outside.
    """
    decision, took, budget = reply.decision, reply.measurement, reply.decision.budget
    found = {
        "errors": 0.0, "dead": 0.0,
        "out_of_memory": float(_STEPPED_DOWN in decision.reason),
        "escalations": float(decision.escalated is True),
    }  # fmt: skip
    late = []
    if "latency_ms" in budget:
        late.append(max(took.latency_ms, e2e_ms or 0.0) > budget["latency_ms"] or reply.finish_reason == "deadline")
    if "ttft_ms" in budget:
        late.append(took.ttft_ms > budget["ttft_ms"])
    if late:
        found["deadline_misses"] = float(any(late))
        if controller is not None:
            found["miss_price"] = price_place(controller, float(budget.get("attainment", 0.95)))
    return found


def of_error(error: BaseException, budget: Mapping[str, Any] | None = None) -> dict[str, float] | None:
    """Metrics of a request that ended in an error; None where that says nothing of the arm: of media that cannot be
    used, a prompt that is too long, a client that went away. With a deadline in the `budget` it is also missed."""
    if isinstance(error, MediaError | ContextLengthError) or not isinstance(error, Exception):
        return None
    if isinstance(error, InfeasibleBudgetError):
        return missed()  # the policy did as the budget asks; no error, which clients could bring about at will
    late = {"deadline_misses": 1.0} if budget and ("latency_ms" in budget or "ttft_ms" in budget) else {}
    return {"errors": 1.0, "dead": 1.0, "out_of_memory": float(isinstance(error, OutOfMemoryError)), **late}


def missed() -> dict[str, float]:
    """Metrics of a request that was turned away because its deadline could not be met."""
    return {"errors": 0.0, "dead": 0.0, "out_of_memory": 0.0, "escalations": 0.0, "deadline_misses": 1.0}


def of_rating(rating: float | str) -> dict[str, float]:
    """What somebody said of an answer, ``up``, ``down`` or 0 to 1."""
    return {"ratings": float(THUMBS[rating] if isinstance(rating, str) else rating)}


def price_place(controller: Controller, attainment: float) -> float:
    """Where a controller's price of a miss lies in its range, 0 (lowest) to 1, by its logarithm."""
    price = controller.price(attainment)
    return min(max(math.log(price / law.PRICE_MIN) / _PRICES, 0.0), 1.0)
