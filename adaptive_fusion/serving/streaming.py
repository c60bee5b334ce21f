"""An answer in pieces: server-sent events, from the first token to ``[DONE]``.

Knows jobs and the form of the pieces. Must not know how a request was read or made ready.
"""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.responses import Response

from adaptive_fusion.decisions import Decision
from adaptive_fusion.reply import Reply
from adaptive_fusion.runner import Prepared
from adaptive_fusion.serving import answers
from adaptive_fusion.serving.answers import Asked
from adaptive_fusion.serving.http import log as server_log
from adaptive_fusion.serving.http import place_of
from adaptive_fusion.serving.job import Job, made, record, tokenizer_of
from adaptive_fusion.serving.pieces import StopFilter
from adaptive_fusion.serving.refusals import as_refusal, error_body
from adaptive_fusion.serving.turns import ModelTurn, take

PING_S = 15
"""Seconds without a piece after which a comment is sent, so that nobody between takes the connection for dead."""


async def stream_answer(job: Job, prepared: Prepared, asked: Asked) -> Response:
    """The response begins with the first piece: what goes wrong before it still has its status."""
    loop = asyncio.get_running_loop()
    pieces: asyncio.Queue[str | None] = asyncio.Queue()
    decisions: list[Decision] = []

    def said(piece: str) -> None:
        loop.call_soon_threadsafe(pieces.put_nowait, piece)

    task = asyncio.create_task(take(ModelTurn(job, prepared, decisions.append, said)))

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
        _events(job, asked, decisions[-1], first, pieces, task, tokenizer_of(prepared)),
        headers=answers.headers(decisions[-1], asked.native_tokens),
        ping=PING_S,
        sep="\n",
    )


async def _events(
    job: Job,
    asked: Asked,
    decision: Decision,
    first: str | None,
    pieces: "asyncio.Queue[str | None]",
    task: "asyncio.Task[Reply]",
    tokenizer: Any,
) -> AsyncIterator[ServerSentEvent]:
    usage, shown, told = job.call.include_usage, StopFilter(asked.stops), False
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
        last = await made(_last_events, asked, job, reply, tokenizer)
        told = True  # counted and logged
        for event in last:
            yield event
    except Exception as error:
        told = True
        server_log.error("a stream failed: %s", place_of(error))
        refusal = as_refusal(error)
        job.failed(error)
        job.service.metrics.failed(refusal.code)
        yield _event(error_body(refusal))
    finally:
        task.cancel()
        if not told:  # the client has gone, or takes nothing
            job.failed(asyncio.CancelledError())
            job.service.metrics.failed("cancelled")
    yield ServerSentEvent(data="[DONE]", sep="\n")


def _last_events(asked: Asked, job: Job, reply: Reply, tokenizer: Any) -> list[ServerSentEvent]:
    """What is known only at the end: log-probabilities, the reason to end, what was measured, the usage."""
    fields = answers.outcome(asked, reply, job.waited_s)
    record(job, asked, reply, fields)()
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
