"""``/v1/chat/completions``: a request's way from its body to an answer, whole or in pieces.

Knows the parts of the service and calls them in order. Must not know how any of them does its work.
"""

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from opentelemetry.context import Context
from opentelemetry.trace import SpanKind
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from adaptive_fusion.budget import Budget
from adaptive_fusion.decisions import Decision
from adaptive_fusion.errors import MediaRefused
from adaptive_fusion.reply import Reply
from adaptive_fusion.runner import AdaptiveRunner, Prepared
from adaptive_fusion.serving import answers
from adaptive_fusion.serving.answers import Asked
from adaptive_fusion.serving.blame import blaming
from adaptive_fusion.serving.http import as_json, bodies_of, place_of, read_body, while_connected
from adaptive_fusion.serving.http import log as server_log
from adaptive_fusion.serving.media import check_media
from adaptive_fusion.serving.metrics import Metrics
from adaptive_fusion.serving.pieces import StopFilter
from adaptive_fusion.serving.refusals import Refusal, as_refusal, error_body, json_response
from adaptive_fusion.serving.scheduler import Place, too_late
from adaptive_fusion.serving.schema import ChatCall, read_chat
from adaptive_fusion.serving.service import Service
from adaptive_fusion.serving.tracing import caller_context, reply_attributes, request_attributes, say, span

T = TypeVar("T")
PING_S = 15
"""Seconds without a piece after which a comment is sent, so that nobody between takes the connection for dead."""


@dataclass
class _Job:
    """A request on its way.

    Attributes:
        service: Of which server.
        place: In the queue.
        arrived_s: On the runner's clock.
        call: What is asked.
        trace: The caller's trace.
        waited_s: How long it waited for the model, once it has it.
        had_to_wait: Whether others were before it when it had been made ready.
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

    @property
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


async def chat_completions(request: Request) -> Response:
    """Answer a conversation."""
    service: Service = request.app.state.service
    metrics, arrived_s = service.metrics, service.runner.clock()
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


def own_budget(service: Service, call: ChatCall) -> Budget:
    """The server's limits with the request's put over them."""
    return service.settings.budget.merge(call.budget)


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
    service: Service, call: ChatCall, arrived_s: float | None = None, before: Callable[[], None] = lambda: None
) -> Prepared:
    """A request with its media loaded and measured, outside the event loop.

    `before` is called in the thread that does it, when one is free; what it raises ends the request.
    """
    require_model(service, call.model)
    messages = await check_media(call.messages, service.media_limits)
    return await service.in_thread(_prepare, service, call, messages, arrived_s, before)


def _prepare(
    service: Service,
    call: ChatCall,
    messages: list[dict[str, Any]],
    arrived_s: float | None,
    before: Callable[[], None],
) -> Prepared:
    before()
    settings, runner = service.settings, service.runner_for(call.policy)
    return runner.prepared(
        messages,
        budget=own_budget(service, call),
        max_new_tokens=call.max_new_tokens or settings.max_new_tokens,
        point=call.point,
        arrived_s=arrived_s,
        seed=call.seed,
        audit=settings.mode == "audit",
        context=service.context,
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
    job = _Job(service, place, arrived_s, call, trace, crowded=crowded)
    with blaming(call):
        return await _answered(job)


async def _answered(job: _Job) -> Response:
    service, call = job.service, job.call
    with span("prepare", request_attributes(service.settings.model), context=job.trace):
        _refuse_if_queue_is_too_long(job)
        prepared = await prepared_call(service, call, job.arrived_s, before=job.refuse_if_expired)
        if job.limit_s is not None and (wait_s := job.wait_s):
            job.had_to_wait = True
            await service.in_thread(_refuse_if_late, job, prepared, wait_s)
    asked = Asked(
        model=service.settings.model,
        created=int(time.time()),
        native_tokens=prepared.native_tokens,
        stops=call.stops,
        ignored=call.ignored,
        top_logprobs=call.top_logprobs if call.logprobs else None,
    )
    return await (_stream if call.stream else _whole)(job, prepared, asked)


def _refuse_if_queue_is_too_long(job: _Job) -> None:
    """Refuse, before anything costs time, a request whose turn is expected to come too late for any job of late."""
    now, least_s = job.service.runner.clock(), job.service.scheduler.least_s
    if job.latest_s is not None and (wait_s := job.wait_s) and now + wait_s + least_s >= job.latest_s:
        raise _unreachable(wait_s)


def _refuse_if_late(job: _Job, prepared: Prepared, wait_s: float) -> None:
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


async def _run(
    job: _Job, prepared: Prepared, answer: Callable[[threading.Event, Callable[[Decision], None]], Reply]
) -> Reply:
    """Wait for the model and let it `answer`, under a span of its own."""
    service, queued_s = job.service, job.service.runner.clock()
    metrics, clock = service.metrics, service.runner.clock

    def work(cancelled: threading.Event) -> Reply:
        began = clock()
        job.waited_s = began - queued_s
        metrics.started(job.waited_s)
        try:
            return answer(cancelled, lambda decision: metrics.decided(clock() - began))
        finally:
            metrics.ended()

    options = {**job.call.options, "stream": job.call.stream, "seed": job.call.seed}
    attributes = request_attributes(service.settings.model, {**options, "max_tokens": job.call.max_new_tokens})
    name = f"chat {service.settings.model}"
    with span(name, attributes, context=job.trace, kind=SpanKind.SERVER) as current:
        try:
            job.refuse_if_expired()
            reply = await service.scheduler.run(work, latest_s=job.latest_s)
        except Refusal:
            service.reserve.observe(False)
            raise
        say(current, reply_attributes(reply))
        say(
            current,
            {
                "adaptive_fusion.queue_ms": job.waited_s * 1e3,
                "adaptive_fusion.media": len(prepared.request.media),
                "adaptive_fusion.visual_tokens_native": prepared.native_tokens,
                "adaptive_fusion.escalated": False,
            },
        )
    return reply


def _done(job: _Job, asked: Asked, reply: Reply, fields: Mapping[str, Any]) -> None:
    """Count, log and keep what came of a request."""
    service, decision, took = job.service, reply.decision, reply.measurement
    e2e_s = service.runner.clock() - job.arrived_s
    service.metrics.finished(
        reply, reply.finish_reason, job.waited_s, e2e_s, native_visual_tokens=asked.native_tokens, escalated=False
    )
    if job.had_to_wait and job.limit_s is not None:
        limit_ms = decision.budget.get("latency_ms")
        service.reserve.observe(reply.met is not False and (limit_ms is None or e2e_s * 1e3 <= limit_ms))
    service.records.add(decision.request_id, {"created": asked.created, **fields})
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
        escalated=False,
        prompt_tokens=took.prompt_tokens,
        new_tokens=took.new_tokens,
        visual_tokens=took.visual_tokens,
        visual_tokens_native=asked.native_tokens,
        would_plan=decision.audit.get("plan"),
        would_save_tokens=decision.audit.get("saved", {}).get("tokens"),
    )


def _tokenizer(prepared: Prepared) -> Any:
    return getattr(prepared.runner.processor, "tokenizer", prepared.runner.processor)


async def _whole(job: _Job, prepared: Prepared, asked: Asked) -> Response:
    with job.place:
        reply = await _run(
            job, prepared, lambda cancelled, decided: prepared.chat(cancelled=cancelled, decided=decided)
        )
    values = await _made(answers.completion, asked, reply, _tokenizer(prepared), job.waited_s)
    _done(job, asked, reply, values["adaptive_fusion"])
    return json_response(values, headers=answers.headers(reply.decision, asked.native_tokens, reply))


async def _made(make: Callable[..., T], asked: Asked, *arguments: Any) -> T:
    """What is to be sent; outside the event loop where it takes long, and not behind those who decode media."""
    if asked.top_logprobs is None:
        return make(asked, *arguments)
    return await asyncio.to_thread(make, asked, *arguments)


async def _stream(job: _Job, prepared: Prepared, asked: Asked) -> Response:
    """The response begins with the first piece: what goes wrong before it still has its status."""
    loop = asyncio.get_running_loop()
    pieces: asyncio.Queue[str | None] = asyncio.Queue()
    decisions: list[Decision] = []

    def answer(cancelled: threading.Event, decided: Callable[[Decision], None]) -> Reply:
        def note(decision: Decision) -> None:
            decided(decision)
            decisions.append(decision)

        with prepared.stream(cancelled=cancelled, decided=note) as stream:
            for piece in stream:
                loop.call_soon_threadsafe(pieces.put_nowait, piece)
            return stream.reply

    task = asyncio.create_task(_run(job, prepared, answer))

    def ended(done: asyncio.Task[Reply]) -> None:
        job.place.release()
        pieces.put_nowait(None)
        if not done.cancelled():
            done.exception()  # looked at, whoever reads the pieces

    task.add_done_callback(ended)
    try:
        first = await pieces.get()
        if first is None:
            task.result()
    except BaseException:
        task.cancel()
        del task  # it holds the error, which holds this frame and the request
        raise
    return EventSourceResponse(
        _events(job, asked, decisions[0], first, pieces, task, _tokenizer(prepared)),
        headers=answers.headers(decisions[0], asked.native_tokens),
        ping=PING_S,
        sep="\n",
    )


async def _events(
    job: _Job,
    asked: Asked,
    decision: Decision,
    first: str | None,
    pieces: "asyncio.Queue[str | None]",
    task: "asyncio.Task[Reply]",
    tokenizer: Any,
) -> AsyncIterator[ServerSentEvent]:
    usage, shown = job.call.include_usage, StopFilter(asked.stops)
    try:
        yield _event(answers.chunk(asked, decision, {"role": "assistant", "content": ""}, include_usage=usage))
        piece = first
        while piece is not None:
            if text := shown.feed(piece):
                yield _event(answers.chunk(asked, decision, {"content": text}, include_usage=usage))
            piece = await pieces.get()
        reply = task.result()
        if text := shown.flush():
            yield _event(answers.chunk(asked, decision, {"content": text}, include_usage=usage))
        for event in await _made(_last_events, asked, job, reply, tokenizer):
            yield event
    except Exception as error:
        server_log.error("a stream failed: %s", place_of(error))
        refusal = as_refusal(error)
        job.service.metrics.failed(refusal.code)
        yield _event(error_body(refusal))
    finally:
        if not task.done():
            task.cancel()
            job.service.metrics.failed("cancelled")
    yield ServerSentEvent(data="[DONE]", sep="\n")


def _last_events(asked: Asked, job: _Job, reply: Reply, tokenizer: Any) -> list[ServerSentEvent]:
    """What is known only at the end: log-probabilities, the reason to end, what was measured, the usage."""
    fields = answers.outcome(asked, reply, job.waited_s)
    _done(job, asked, reply, fields)
    usage = job.call.include_usage
    rows = answers.token_rows(reply, tokenizer, asked) if asked.top_logprobs is not None else None
    last = answers.chunk(
        asked, reply.decision, {}, reply=reply, logprobs=rows, include_usage=usage, adaptive_fusion=fields
    )
    found = [_event(last)]
    if usage:
        found.append(_event({**answers.usage_chunk(asked, reply), "adaptive_fusion": fields}))
    return found


def _event(values: dict[str, Any]) -> ServerSentEvent:
    return ServerSentEvent(data=json.dumps(values, separators=(",", ":"), allow_nan=False), sep="\n")
