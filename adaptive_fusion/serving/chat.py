"""``/v1/chat/completions``: a request's way from its body to a job that is made ready, and whole answers.

Knows the parts of the service and calls them in order. Must not know how any of them does its work.
"""

import asyncio
import time
from collections.abc import Callable
from typing import Any

from opentelemetry.context import Context
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from adaptive_fusion.budget import Budget
from adaptive_fusion.decisions import Decision
from adaptive_fusion.errors import MediaRefused
from adaptive_fusion.runner import AdaptiveRunner, Prepared
from adaptive_fusion.serving import answers
from adaptive_fusion.serving.answers import Asked
from adaptive_fusion.serving.blame import blaming
from adaptive_fusion.serving.http import ELAPSED, afterwards, as_json, bodies_of, read_body, while_connected
from adaptive_fusion.serving.job import Job, made, own_budget, record, tokenizer_of
from adaptive_fusion.serving.media import check_media
from adaptive_fusion.serving.metrics import Metrics
from adaptive_fusion.serving.refusals import Refusal, as_refusal, json_response
from adaptive_fusion.serving.scheduler import Place
from adaptive_fusion.serving.schema import SESSION_FIELDS, USER_FIELDS, ChatCall, read_chat
from adaptive_fusion.serving.service import Service
from adaptive_fusion.serving.streaming import stream_answer
from adaptive_fusion.serving.tracing import caller_context, request_attributes, span
from adaptive_fusion.serving.trials import Trial
from adaptive_fusion.serving.turns import ModelTurn, take


async def chat_completions(request: Request) -> Response:
    """Answer a conversation."""
    service: Service = request.app.state.service
    metrics, arrived_s = service.metrics, service.runner.clock() - request.scope.get(ELAPSED, 0.0)
    metrics.arrived()
    try:
        with bodies_of(request).counting() as grown:
            body = await read_body(request, service.settings.max_body_mib, grown)
            service.require_ready()
            place = service.scheduler.admit()
            try:
                trace = caller_context(request.headers)
                return await while_connected(request, _respond(service, place, arrived_s, body, trace))
            except BaseException:
                place.release()
                raise
    except (ClientDisconnect, asyncio.CancelledError):
        metrics.failed("cancelled")
        raise
    except Exception as error:
        _count_refused(metrics, error)
        raise


def _count_refused(metrics: Metrics, error: Exception) -> None:
    """Not in the frame that raises: an error that is held there holds itself, and the body with it, until the garbage
    collector comes by."""
    if isinstance(error, MediaRefused):
        metrics.media_refused(error.reason)
    refusal = as_refusal(error)
    (metrics.failed if refusal.status >= 500 and refusal.code != "draining" else metrics.rejected)(refusal.code)


def require_model(service: Service, name: str) -> None:
    """Raises a Refusal, 404, for a name that is not the model's."""
    if name != service.settings.model:
        raise Refusal(
            f"model {name[:80]!r} does not exist here; expected {service.settings.model}",
            404,
            code="model_not_found",
            param="model",
        )


async def prepared_call(
    service: Service,
    call: ChatCall,
    arrived_s: float | None = None,
    before: Callable[[], None] = lambda: None,
    trial: Trial | None = None,
) -> Prepared:
    """A request with its media loaded and measured, outside the event loop.

    `before` is called in the thread that does it, when one is free; what it raises ends the request. In a `trial` the
    runner of its arm prepares it.
    """
    require_model(service, call.model)
    messages = await check_media(call.messages, service.media_limits)
    return await service.in_thread(_prepare, service, call, messages, arrived_s, before, trial)


def _prepare(
    service: Service,
    call: ChatCall,
    messages: list[dict[str, Any]],
    arrived_s: float | None,
    before: Callable[[], None],
    trial: Trial | None,
) -> Prepared:
    before()
    settings = service.settings
    apart = trial is None or call.policy is not None
    runner = service.runner_for(call.policy) if apart or trial is None else trial.runner(messages)
    return runner.prepared(
        messages,
        budget=own_budget(service, call),
        max_new_tokens=call.max_new_tokens or settings.max_new_tokens,
        point=call.point,
        arrived_s=arrived_s,
        seed=call.seed,
        audit=settings.mode == "audit" or (trial is not None and trial.audit),
        context=service.context,
        tenant=service.tenant,
        continue_final_message=call.continues,
        **settings.generate,
        **_sampling(runner, call),
    )


def _sampling(runner: AdaptiveRunner, call: ChatCall) -> dict[str, Any]:
    """Options of ``generate``; transformers' own top-k of 50 holds only if the model's configuration has it."""
    options = dict(call.options)
    if options.get("do_sample") and "top_k" not in options:
        options["top_k"] = getattr(runner.generation_config, "top_k", None) or 0
    return options


async def _respond(service: Service, place: Place, arrived_s: float, body: bytes, trace: Context) -> Response:
    crowded = service.scheduler.admitted > 1
    call = read_chat(await as_json(body))
    job = Job(service, place, arrived_s, call, trace, crowded=crowded)
    if service.trials is not None:
        # A request that says itself how it is to be decided is in no experiment.
        fixed = call.policy is not None or call.point is not None
        job.trial = service.trials.begin(call.messages, user=call.user, session=call.session, fixed=fixed)
    with blaming(call):
        try:
            return await _answered(job)
        except BaseException as error:
            job.failed(error)
            raise


async def _answered(job: Job) -> Response:
    service, call = job.service, job.call
    with span("prepare", request_attributes(service.settings.model), context=job.trace):
        _refuse_if_queue_is_too_long(job)
        prepared = await prepared_call(service, call, job.arrived_s, job.refuse_if_expired, job.trial)
        job.made_ready = True
        if job.limit_s is not None and (wait_s := job.wait_s):
            job.had_to_wait = True
            await service.in_thread(_refuse_if_late, job, prepared, wait_s)
    asked = Asked(
        model=service.settings.model,
        created=int(time.time()),
        native_tokens=prepared.native_tokens,
        stops=call.stops,
        ignored=_ignored(job),
        trial=job.trial.said() if job.trial is not None else {},
        top_logprobs=call.top_logprobs if call.logprobs else None,
    )
    return await (stream_answer if call.stream else _whole)(job, prepared, asked)


def _ignored(job: Job) -> tuple[str, ...]:
    """Fields that changed nothing; what an experiment went by did."""
    used = {"user": USER_FIELDS, "session": SESSION_FIELDS}.get(job.trial.unit if job.trial is not None else "", ())
    return tuple(name for name in job.call.ignored if name not in used)


def _refuse_if_queue_is_too_long(job: Job) -> None:
    """Refuse, before anything costs time, a request whose turn is expected to come too late for any job of late."""
    now, least_s = job.service.runner.clock(), job.service.scheduler.least_s
    if job.latest_s is not None and (wait_s := job.wait_s) and now + wait_s + least_s >= job.latest_s:
        raise _unreachable(wait_s)


def _refuse_if_late(job: Job, prepared: Prepared, wait_s: float) -> None:
    """Refuse a request that would have kept its deadline but for those before it."""
    if not _in_time(prepared.decide(wait_ms=wait_s * 1e3, refuse=False), job.limits) and _in_time(
        prepared.decide(refuse=False), job.limits
    ):
        raise _unreachable(wait_s)


def _in_time(decision: Decision, limits: Budget) -> bool:
    return decision.feasible and decision.p_late <= 1.0 - limits.attainment


def _unreachable(wait_s: float) -> Refusal:
    return Refusal(
        f"the deadline cannot be met: those before it are expected to take {wait_s * 1e3:.0f} ms",
        429,
        code="deadline_unreachable",
        retry_s=wait_s,
    )


async def _whole(job: Job, prepared: Prepared, asked: Asked) -> Response:
    with job.place:
        reply = await take(ModelTurn(job, prepared))
    values = await made(answers.completion, asked, reply, tokenizer_of(prepared), job.waited_s)
    tell = record(job, asked, reply, values["adaptive_fusion"])
    response = json_response(values, headers=answers.headers(reply.decision, asked.native_tokens, reply))
    afterwards(response, tell)
    return response
