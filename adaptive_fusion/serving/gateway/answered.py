"""An answer of the engine passed on to its client, watched, and learned from once it is over.

Knows what is counted, logged and learned. Must not know how requests are planned or sent.
"""

import math
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

import httpcore2

from adaptive_fusion.control.candidates import Candidate
from adaptive_fusion.decision_log import text_hash
from adaptive_fusion.decisions import Decision, decision_record
from adaptive_fusion.features.prompts import prompt_kind
from adaptive_fusion.reply import Reply
from adaptive_fusion.serving import answers
from adaptive_fusion.serving.explained import explained
from adaptive_fusion.serving.gateway.exchange import Exchange, arm_of, headers_of, media_of
from adaptive_fusion.serving.gateway.proxy import encoding_of, is_stream, relay
from adaptive_fusion.serving.gateway.service import Gateway
from adaptive_fusion.serving.trials import Trial


async def relayed(
    gateway: Gateway,
    exchange: Exchange,
    response: httpcore2.Response,
    decision: Decision,
    ran: Candidate,
    pieces: AsyncIterator[bytes] | None = None,
    *,
    resized: bool = False,
) -> None:
    """Pass an answer on, watch it, and learn from it once it is over."""
    watch = exchange.watch
    watch.stream = is_stream(response.headers)
    watch.encoded(encoding_of(response.headers))
    added = [*headers_of(exchange.planned, decision), *arm_of(exchange.trial)]
    await relay(
        response,
        exchange.send,
        added=added,
        saw=watch.saw,
        pieces=pieces,
        resized=resized,
        is_done=lambda: watch.is_done,
    )
    watch.ended()
    _learn(gateway, exchange, decision, ran, response.status)


def _learn(gateway: Gateway, exchange: Exchange, decision: Decision, ran: Candidate, status: int) -> None:
    """Learn from an answer, count it, log it; nothing of what was asked or answered is kept."""
    planned, watch, call = exchange.planned, exchange.watch, exchange.call
    answered = status == 200 and (not watch.stream or watch.is_done)
    kind = prompt_kind(call.prompt) if call.prompt else ""
    expected = planned.work.new_tokens
    tokens = planned.tokens if decision.escalated is not True else planned.native_tokens
    measured = watch.measured(tokens, planned.work.prompt_tokens, expected)
    finish = watch.finish_reason or "stop"
    finish = finish if finish in ("stop", "length") else "stop"
    reply = Reply("", finish, decision, measured)
    if answered:
        exchange.side.deciding.took(
            planned.choice, ran, planned.work, kind, measured, ended=finish == "stop", lost_ms=exchange.lost_ms
        )
        gateway.metrics.finished(
            reply,
            finish,
            0.0,
            measured.latency_ms / 1e3,
            native_visual_tokens=planned.native_tokens,
            escalated=decision.escalated is True,
        )
        if exchange.trial is not None:
            exchange.trial.answered(reply, watch.elapsed_ms)
    else:
        gateway.metrics.failed("upstream_error")
        if exchange.trial is not None:
            _unanswered(exchange.trial, status, planned.decision.budget)
    kept = _kept(exchange, decision, reply if answered else None)
    gateway.records.add(decision.request_id, {**kept, "status": status}, explained(decision))
    gateway.access_log.write(
        "answer",
        request_id=decision.request_id,
        status=status,
        stream=watch.stream,
        finish_reason=watch.finish_reason,
        ttft_ms=measured.ttft_ms,
        latency_ms=measured.latency_ms,
        predicted_ms=decision.predicted.latency_ms if decision.predicted else None,
        lane=decision.lane,
        plan=decision.point.name,
        policy=decision.policy,
        feasible=decision.feasible,
        escalated=decision.escalated is True,
        visual_tokens=measured.visual_tokens,
        visual_tokens_native=planned.native_tokens,
        prompt_tokens=measured.prompt_tokens,
        new_tokens=measured.new_tokens,
        would_plan=decision.audit.get("plan"),
        would_save_tokens=decision.audit.get("saved", {}).get("tokens"),
    )
    if gateway.log is not None:
        names = [each.measured.name for each in planned.media if each.measured is not None]
        row = decision_record(
            decision,
            measured if answered else None,
            time_s=time.time(),
            content_hash="+".join(names) or None,
            prompt_hash=text_hash(call.prompt) if call.prompt else None,
            finish_reason=finish if answered else None,
            error=None if answered else f"the engine answered with status {status}",
        )
        gateway.log.write(row)


def _kept(exchange: Exchange, decision: Decision, reply: Reply | None) -> dict[str, Any]:
    """What can be asked of a request afterwards: its decision, and where it was answered what came of it as far as that
    is seen from outside."""
    planned, trial = exchange.planned, exchange.trial
    said = {} if trial is None else trial.said()
    asked = answers.Asked(exchange.call.model, int(time.time()), planned.native_tokens, trial=said)
    media = media_of(planned, escalated=decision.escalated is True)
    beside = {"created": asked.created, "media": media}
    if reply is None:
        return {**answers.outlook(decision, planned.native_tokens), **said, **beside}
    found = answers.outcome(asked, reply, 0.0)
    seen = {name: value for name, value in found["actual"].items() if math.isfinite(value)}
    return {**found, "actual": seen, **beside}


def _unanswered(trial: Trial, status: int, budget: Mapping[str, Any]) -> None:
    """The engine gave no answer; below 500 it says that the client is to blame."""
    if 400 <= status < 500:
        trial.left_out()
    else:
        trial.failed(RuntimeError(f"the engine answered with status {status}"), budget)
