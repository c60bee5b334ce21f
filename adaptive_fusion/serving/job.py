"""A chat request on its way: its limits, and what is counted, logged and kept of it.

Knows the parts of the service. Must not know of bodies, media, or the form of an answer.
"""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, TypeVar

from opentelemetry.context import Context

from adaptive_fusion.budget import Budget
from adaptive_fusion.errors import ConfigError
from adaptive_fusion.reply import Reply
from adaptive_fusion.runner import Prepared
from adaptive_fusion.serving.answers import Asked
from adaptive_fusion.serving.explained import explained
from adaptive_fusion.serving.refusals import Refusal
from adaptive_fusion.serving.scheduler import Place, too_late
from adaptive_fusion.serving.schema import ChatCall
from adaptive_fusion.serving.service import Service
from adaptive_fusion.serving.trials import Trial

T = TypeVar("T")
TOO_LATE = ("deadline_passed", "deadline_unreachable")


@dataclass
class Job:
    """A request on its way.

    Attributes:
        service: Of which server.
        place: In the queue.
        arrived_s: On the runner's clock.
        call: What is asked.
        trace: The caller's trace.
        waited_s: How long it waited for the model, once it has it.
        had_to_wait: Whether others were before it when it had been made ready.
        trial: Its part in an experiment.
        made_ready: Whether its media were loaded: what goes wrong before is the client's.
        crowded: Whether others were there when it came, with whom it shares the threads that make ready.
    """

    service: Service
    place: Place
    arrived_s: float
    call: ChatCall
    trace: Context | None = None
    waited_s: float = 0.0
    had_to_wait: bool = False
    crowded: bool = False
    trial: Trial | None = None
    made_ready: bool = False

    @cached_property
    def limits(self) -> Budget:
        """The limits that hold for it."""
        return self.service.runner.budget.merge(own_budget(self.service, self.call))

    @property
    def latest_s(self) -> float | None:
        """When it is too late to begin."""
        return None if self.limit_s is None else self.arrived_s + self.limit_s

    @property
    def limit_s(self) -> float | None:
        """From its arrival to its first deadline; None without one."""
        limits = self.limits
        given = [limit for limit in (limits.latency_ms, limits.ttft_ms) if limit is not None]
        return min(given) / 1e3 if given else None

    @property
    def wait_s(self) -> float:
        """How long it is expected to wait for the model from now on, and what is kept in reserve; 0 if nobody is before
        it."""
        wait_s = self.service.scheduler.expected_wait_s(self.place)
        return wait_s + self.service.reserve.share * (self.limit_s or 0.0) if wait_s else 0.0

    def refuse_if_expired(self) -> None:
        """Raises a Refusal, 429, once the deadline has passed while others were there. Where nobody was, a deadline
        that passes is no matter of waiting, and the budget says what becomes of it."""
        if self.crowded and self.latest_s is not None and self.service.runner.clock() >= self.latest_s:
            raise too_late()

    def failed(self, error: BaseException) -> None:
        """It ended in an error, or nobody waits for it any more."""
        if self.trial is None:
            return
        if isinstance(error, Refusal):
            (self.trial.turned_away if error.code in TOO_LATE else self.trial.left_out)()
        elif isinstance(error, ConfigError) and not self.made_ready:
            self.trial.left_out()  # the request's own fault, whoever would have answered
        else:
            self.trial.failed(error, self.limits.to_dict())


def own_budget(service: Service, call: ChatCall) -> Budget:
    """The server's limits with the request's put over them."""
    return service.settings.budget.merge(call.budget)


def record(job: Job, asked: Asked, reply: Reply, fields: Mapping[str, Any]) -> Callable[[], None]:
    """Keep what came of a request; what is returned counts and logs it, which its client need not wait for."""
    service, decision = job.service, reply.decision
    e2e_s = service.runner.clock() - job.arrived_s
    if job.had_to_wait and job.limit_s is not None:
        limit_ms = decision.budget.get("latency_ms")
        service.reserve.observe(reply.met is not False and (limit_ms is None or e2e_s * 1e3 <= limit_ms))
    if job.trial is not None:
        job.trial.answered(reply, e2e_s * 1e3)
    service.records.add(decision.request_id, {"created": asked.created, **fields}, explained(decision))
    return partial(_tell, job, asked, reply, e2e_s)


def _tell(job: Job, asked: Asked, reply: Reply, e2e_s: float) -> None:
    service, decision, took = job.service, reply.decision, reply.measurement
    escalated = decision.escalated is True
    service.metrics.finished(
        reply, reply.finish_reason, job.waited_s, e2e_s, native_visual_tokens=asked.native_tokens, escalated=escalated
    )
    service.access_log.write(
        "answer",
        request_id=decision.request_id,
        finish_reason=reply.finish_reason,
        stream=job.call.stream,
        ms=e2e_s * 1e3,
        queue_ms=job.waited_s * 1e3,
        ttft_ms=took.ttft_ms,
        latency_ms=took.latency_ms,
        predicted_ms=decision.predicted.latency_ms if decision.predicted else None,
        lane=decision.lane,
        plan=decision.point.name,
        policy=decision.policy,
        feasible=decision.feasible,
        met=reply.met,
        escalated=escalated,
        batch=decision.batch,
        prompt_tokens=took.prompt_tokens,
        new_tokens=took.new_tokens,
        visual_tokens=took.visual_tokens,
        visual_tokens_native=asked.native_tokens,
        would_plan=decision.audit.get("plan"),
        would_save_tokens=decision.audit.get("saved", {}).get("tokens"),
    )


def tokenizer_of(prepared: Prepared) -> Any:
    return getattr(prepared.runner.processor, "tokenizer", prepared.runner.processor)


async def made(make: Callable[..., T], asked: Asked, *arguments: Any) -> T:
    """What is to be sent; outside the event loop where it takes long, and not behind those who decode media."""
    if asked.top_logprobs is None:
        return make(asked, *arguments)
    return await asyncio.to_thread(make, asked, *arguments)
