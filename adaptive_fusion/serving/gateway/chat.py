"""A chat request's way through the gateway: read, measured, planned, sent on, watched, learned from.

Knows the parts and calls them in order. Must not know how any of them does its work.
"""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import httpcore2
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from adaptive_fusion.control.candidates import Candidate
from adaptive_fusion.decision_log import text_hash
from adaptive_fusion.decisions import Decision, decision_record
from adaptive_fusion.errors import MediaError
from adaptive_fusion.execution.turns import Turns, turns_of
from adaptive_fusion.features.prompts import prompt_kind
from adaptive_fusion.point import NATIVE
from adaptive_fusion.reply import Reply
from adaptive_fusion.serving import answers
from adaptive_fusion.serving.gateway.engines import Agreed
from adaptive_fusion.serving.gateway.escalate import (
    ASKED,
    choices_of,
    entropies,
    event_without_logprobs,
    without_logprobs,
)
from adaptive_fusion.serving.gateway.events import MOST_HELD, Events, data_of
from adaptive_fusion.serving.gateway.plan import Planned
from adaptive_fusion.serving.gateway.proxy import Headers, Incoming, closed, encoding_of, is_stream, relay
from adaptive_fusion.serving.gateway.reading import OWN, Call, read_call
from adaptive_fusion.serving.gateway.service import Gateway, media_names
from adaptive_fusion.serving.gateway.side import Side
from adaptive_fusion.serving.gateway.sizing import Given, as_data_url
from adaptive_fusion.serving.gateway.splice import Node, NotReadable
from adaptive_fusion.serving.gateway.watch import Watch
from adaptive_fusion.serving.http import SMALL
from adaptive_fusion.serving.refusals import Refusal
from adaptive_fusion.serving.schema import SESSION_FIELDS, USER_FIELDS, key_of
from adaptive_fusion.serving.trials import Trial

REASON_CHARACTERS = 500
_LOGPROBS = {"logprobs": True, "top_logprobs": ASKED}
_REFUSED = (400, 404, 415, 422, 500, 501)
"""What an engine says that does not take a field."""


@dataclass
class Exchange:
    """One request under way.

    Attributes:
        scope: Its head.
        send: To its client.
        call: What it says.
        planned: What was decided.
        turns: Its place in its conversation.
        watch: What its answer takes.
        side: What has decided it.
        trial: Its part in an experiment.
    """

    scope: Scope
    send: Send
    call: Call
    planned: Planned
    turns: Turns
    watch: Watch
    side: Side
    trial: Trial | None = None
    lost_ms: float = 0.0


async def chat_completions(gateway: Gateway, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer a conversation, as the engine does."""
    arrived_s, metrics = gateway.clock(), gateway.metrics
    metrics.arrived()
    incoming = Incoming(receive)
    with gateway.admitted(), gateway.bodies.counting() as grown:
        body = await incoming.whole(gateway.settings.max_body_mib, grown)
        try:
            await incoming.while_there(_answer(gateway, scope, incoming.answering(send), body, arrived_s))
        except ClientDisconnect:
            metrics.failed("cancelled")
            raise


async def _answer(gateway: Gateway, scope: Scope, send: Send, body: bytes, arrived_s: float) -> None:
    headers = dict(scope["headers"])
    call: Call | None = None
    if headers.get(b"content-encoding", b"identity") == b"identity":
        with contextlib.suppress(NotReadable):
            call = read_call(body) if len(body) <= SMALL else await gateway.in_thread(read_call, body)
    if call is None:  # whatever it is, the engine is to say so
        await relay(await gateway.upstream.send(scope["method"], target_of(scope), scope["headers"], body), send)
        return
    trial = _trial(gateway, call)
    try:
        side: Side = gateway.side if trial is None else await gateway.in_thread(trial.runner)
        planned, turns = await planned_call(gateway, call, arrived_s, side, audit=trial is not None and trial.audit)
    except BaseException as error:
        _failed(gateway, trial, call, error)
        raise
    gateway.metrics.decided(gateway.clock() - arrived_s)
    exchange = Exchange(scope, send, call, planned, turns, Watch(gateway.clock, arrived_s, call.stream), side, trial)
    try:
        await _exchange(gateway, exchange)
    except BaseException as error:
        if isinstance(error, asyncio.CancelledError):
            side.controller.miss(planned.choice, exchange.watch.elapsed_ms, kind="cancelled", ran=planned.ran)
        _failed(gateway, trial, call, error)
        raise


def _trial(gateway: Gateway, call: Call) -> Trial | None:
    """A request's part in an experiment; one that says itself what to run is in none."""
    if gateway.trials is None:
        return None
    raw = call.body.root.plain()
    users, sessions = key_of(raw, *USER_FIELDS), key_of(raw, *SESSION_FIELDS)
    return gateway.trials.begin(raw.get("messages") or (), user=users, session=sessions, fixed=call.point is not None)


def _failed(gateway: Gateway, trial: Trial | None, call: Call, error: BaseException) -> None:
    """A request came to nothing. What the client is to blame for, and that the engine cannot be reached at all, says
    nothing of its arm."""
    if trial is None:
        return
    if isinstance(error, Refusal):
        trial.left_out()
    else:
        trial.failed(error, gateway.deciding.budget.merge(call.budget).to_dict())


async def planned_call(
    gateway: Gateway, call: Call, arrived_s: float, side: Side | None = None, *, audit: bool = False
) -> tuple[Planned, Turns]:
    """What is decided for a request, and its place in its conversation."""
    side = gateway.side if side is None else side
    plans = side.audited if audit else side.plans
    media = await gateway.measured(call, side, audit=audit)
    turns = turns_of(call.messages, media_names(media), gateway.tenant) if media else Turns()
    elapsed_ms = (gateway.clock() - arrived_s) * 1e3
    if any(each.measured is not None for each in media):
        return await gateway.in_thread(plans.decide, call, media, turns, elapsed_ms), turns
    return plans.decide(call, media, turns, elapsed_ms), turns


async def _exchange(gateway: Gateway, exchange: Exchange) -> None:
    planned, call = exchange.planned, exchange.call
    given = planned.given
    second = planned.choice.candidate.second
    asks = second is not None and planned.second is not None and exchange.side.plans.gives_logprobs
    if asks and (kept := await _looked(gateway, exchange)) is not None:
        await kept
        return
    body = await _body(gateway, call, planned, given)
    response = await gateway.upstream.send(
        exchange.scope["method"], target_of(exchange.scope), exchange.scope["headers"], body
    )
    del body
    await _relayed(gateway, exchange, response, planned.decision, planned.ran)


async def _body(
    gateway: Gateway, call: Call, planned: Planned, given: Sequence[Given], added: Mapping[str, Any] | None = None
) -> bytes:
    """The body that goes upstream: the client's own where nothing is changed."""
    changed = any(each != Given() for each in given)
    if not changed and not added and call.body.root.get(OWN) is None:
        return call.body.data
    return await gateway.in_thread(_edited, gateway, call, planned, given, dict(added or {}))


def _edited(gateway: Gateway, call: Call, planned: Planned, given: Sequence[Given], added: dict[str, Any]) -> bytes:
    replaced, unchanged = list[tuple[Node, str]](), False
    for shown, medium, one in zip(call.shown, planned.media, given, strict=True):
        if one == Given():
            continue
        try:
            data = gateway.smaller(medium, one)
        except MediaError:
            data = None
        if data is not None:
            replaced.append((shown.node, json.dumps(as_data_url(data, shown.text))))
        unchanged |= data is None
    if unchanged and len(set(given)) == 1:
        # What cannot be written again in its own format can still be told to some engines.
        frames = [
            gateway.plans.frames(m.measured, one) for m, one in zip(planned.media, given, strict=True) if m.measured
        ]
        agreed = Agreed(max_pixels=given[0].max_pixels, max_frames=frames[0] if len(set(frames)) == 1 else None)
        added = {**gateway.engine.fields(call.body.root.plain(), agreed), **added}
    removed = [OWN, *(name for name in added if name in _LOGPROBS)]
    return call.body.edited(replaced, added, removed)


async def _relayed(
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
    added = [*headers_of(exchange.planned, decision), *_arm_of(exchange.trial)]
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
    if answered:
        exchange.side.deciding.took(
            planned.choice, ran, planned.work, kind, measured, ended=finish == "stop", lost_ms=exchange.lost_ms
        )
        reply = Reply("", finish, decision, measured)
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
    gateway.records.add(decision.request_id, {**answers.outlook(decision, planned.native_tokens), "status": status})
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


def _unanswered(trial: Trial, status: int, budget: Mapping[str, Any]) -> None:
    """The engine gave no answer; below 500 it says that the client is to blame."""
    if 400 <= status < 500:
        trial.left_out()
    else:
        trial.failed(RuntimeError(f"the engine answered with status {status}"), budget)


# A look at the first token


async def _looked(gateway: Gateway, exchange: Exchange) -> Any:
    """Ask the engine how sure the model is; what passes its answer on, or None where it has to be asked again as if it
    had not been."""
    planned, call = exchange.planned, exchange.call
    second = planned.choice.candidate.second
    assert second is not None and planned.second is not None
    ours = not call.asks_logprobs
    body = await _body(gateway, call, planned, planned.given, _LOGPROBS if ours else None)
    head = [pair for pair in exchange.scope["headers"] if pair[0].lower() != b"accept-encoding"]
    head.append((b"accept-encoding", b"identity"))
    response = await gateway.upstream.send(exchange.scope["method"], target_of(exchange.scope), head, body)
    if response.status != 200:
        if ours and response.status in _REFUSED:
            await closed(response)
            exchange.side.plans.gives_logprobs = False
            return None
        return _relayed(gateway, exchange, response, planned.decision, planned.ran)
    stream = is_stream(response.headers)
    pieces = response.aiter_stream().__aiter__()
    try:
        held, rest, found, whole = await _first_tokens(pieces, stream, second.k)
    except BaseException:
        await closed(response)
        raise
    first_ms = exchange.watch.elapsed_ms
    decision = planned.decision
    why = "" if found else "the engine gave no log-probabilities"
    entropy = fmean(found) if found else None
    if entropy is not None and entropy > second.threshold:
        limits = exchange.side.deciding.budget.merge(call.budget)
        why = exchange.side.controller.too_late_for(second.candidate, limits, first_ms)
        if not why:
            await closed(response)
            return await _second(gateway, exchange, entropy, first_ms)
    if entropy is not None:
        exchange.side.controller.looked_at(planned.choice, first_ms - planned.choice.elapsed_ms, escalated=False)
        decision = replace(decision, escalated=False, escalation={**decision.escalation, "entropy": entropy})
    if why:
        decision = replace(decision, escalation={**decision.escalation, "why": why})
    shown = _shown(held, rest, pieces, stream, ours, whole)
    return _relayed(gateway, exchange, response, decision, planned.ran, shown, resized=ours)


async def _first_tokens(
    pieces: AsyncIterator[bytes], stream: bool, k: int
) -> tuple[list[bytes], bytes, list[float], bool]:
    """What came until `k` tokens were seen: whole events (or the whole answer), the beginning of the next, the
    entropies, and whether that is all."""
    events, held, found, size = Events(), list[bytes](), list[float](), 0
    async for piece in pieces:
        size += len(piece)
        if not stream:
            held.append(piece)
        for event in events.feed(piece) if stream else ():
            held.append(event)
            found += entropies(choices_of(data_of(event)))
        if (stream and len(found) >= k) or size > MOST_HELD:
            return held, events.rest, found[:k], False
    if not stream:
        held = [b"".join(held)]
        found = entropies(choices_of(held[0]))
    return held, events.rest, found[:k], True


async def _shown(
    held: list[bytes], rest: bytes, pieces: AsyncIterator[bytes], stream: bool, ours: bool, whole: bool
) -> AsyncIterator[bytes]:
    """What was held back and all that follows, without the log-probabilities that the client did not ask for."""
    if not ours or (not stream and not whole):
        yield b"".join(held) + rest
        async for piece in pieces:
            yield piece
        return
    if not stream:
        yield without_logprobs(held[0])
        return
    yield b"".join(map(event_without_logprobs, held))
    events = Events()
    for event in events.feed(rest):
        yield event_without_logprobs(event)
    async for piece in pieces:
        if made := b"".join(map(event_without_logprobs, events.feed(piece))):
            yield made
    if events.rest:
        yield events.rest


async def _second(gateway: Gateway, exchange: Exchange, entropy: float, first_ms: float) -> Any:
    """The better plan, after a first pass that was given up."""
    planned, call = exchange.planned, exchange.call
    second = planned.choice.candidate.second
    assert second is not None and planned.second is not None
    exchange.side.controller.looked_at(planned.choice, first_ms - planned.choice.elapsed_ms, escalated=True)
    exchange.lost_ms = first_ms - planned.choice.elapsed_ms
    decision = planned.decision
    decision = replace(
        decision,
        point=second.candidate.point,
        rung=second.candidate.key,
        predicted=second.candidate.predicted,
        escalated=True,
        escalation={
            **decision.escalation,
            "entropy": entropy,
            "first_rung": decision.rung,
            "first_ms": exchange.lost_ms,
        },
    )
    exchange.side.plans.rise(exchange.turns, planned.media, planned.second)
    body = await _body(gateway, call, planned, planned.second)
    response = await gateway.upstream.send(
        exchange.scope["method"], target_of(exchange.scope), exchange.scope["headers"], body
    )
    return _relayed(gateway, exchange, response, decision, second.candidate)


# What is said of it


def target_of(scope: Scope) -> bytes:
    """Path and query of a request, as they came."""
    path: bytes = scope.get("raw_path") or scope["path"].encode()
    query: bytes = scope.get("query_string") or b""
    return path.partition(b"?")[0] + (b"?" + query if query else b"")


def headers_of(planned: Planned, decision: Decision) -> Headers:
    """The decision, beside the engine's own headers."""
    found = answers.headers(decision, planned.native_tokens)
    values = {name: value for name, value in found.items() if name.startswith(answers.HEADER)}
    if decision.point != NATIVE or decision.escalated is not True:
        values[f"{answers.HEADER}visual-tokens"] = str(planned.tokens)
    if decision.escalated is not None:
        values[f"{answers.HEADER}escalated"] = str(decision.escalated).lower()
    if planned.media:
        given = planned.second if decision.escalated and planned.second is not None else planned.given
        told = [medium.why or said_of(one) for medium, one in zip(planned.media, given, strict=True)]
        values[f"{answers.HEADER}media"] = ", ".join(told)
    values[f"{answers.HEADER}reason"] = decision.reason[:REASON_CHARACTERS]
    return [(name.encode(), answers.plain(value).encode()) for name, value in values.items()]


def _arm_of(trial: Trial | None) -> Headers:
    """The arm of an experiment, and which; nothing without one."""
    told = trial.said().get("rollout", {}) if trial is not None else {}
    return [(f"{answers.HEADER}{name}".encode(), answers.plain(value).encode()) for name, value in told.items()]


def said_of(given: Given) -> str:
    """What a medium gets, in a word."""
    pixels = "native" if given.max_pixels is None else f"{given.max_pixels}px"
    return pixels if given.max_fps is None else f"{pixels}/{given.max_fps:g}fps"
