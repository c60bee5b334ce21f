"""A chat request's way through the gateway: read, measured, planned, sent on, watched, learned from.

Knows the parts and calls them in order. Must not know how any of them does its work.
"""

import asyncio
import contextlib

import httpcore2
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from adaptive_fusion.execution.turns import Turns, turns_of
from adaptive_fusion.serving.gateway.answered import relayed
from adaptive_fusion.serving.gateway.beside import Aside
from adaptive_fusion.serving.gateway.entry import Entry
from adaptive_fusion.serving.gateway.exchange import Exchange, target_of
from adaptive_fusion.serving.gateway.incoming import Incoming
from adaptive_fusion.serving.gateway.look import looked
from adaptive_fusion.serving.gateway.plan import Planned
from adaptive_fusion.serving.gateway.proxy import given_up, relay
from adaptive_fusion.serving.gateway.reading import Call, read_call
from adaptive_fusion.serving.gateway.sent import as_it_came, body_of
from adaptive_fusion.serving.gateway.service import Gateway, media_names
from adaptive_fusion.serving.gateway.side import Side
from adaptive_fusion.serving.gateway.splice import NotReadable
from adaptive_fusion.serving.gateway.watch import Watch
from adaptive_fusion.serving.http import SMALL
from adaptive_fusion.serving.refusals import Refusal
from adaptive_fusion.serving.schema import SESSION_FIELDS, USER_FIELDS, key_of
from adaptive_fusion.serving.trials import Trial


async def chat_completions(gateway: Gateway, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer a conversation, as the engine does."""
    arrived_s, metrics = gateway.clock(), gateway.metrics
    metrics.arrived()
    incoming = Incoming(receive)
    with gateway.admitted() as entry, gateway.bodies.counting() as grown:
        body = await incoming.whole(gateway.settings.max_body_mib, grown)
        try:
            await incoming.while_there(_answer(gateway, scope, incoming.answering(send), body, arrived_s, entry))
        except ClientDisconnect:
            metrics.failed("cancelled")
            raise


async def _answer(gateway: Gateway, scope: Scope, send: Send, body: bytes, arrived_s: float, entry: Entry) -> None:
    headers = dict(scope["headers"])
    call: Call | None = None
    if headers.get(b"content-encoding", b"identity") == b"identity":
        with contextlib.suppress(NotReadable):
            call = read_call(body) if len(body) <= SMALL else await gateway.in_thread(read_call, body)
    if call is None:  # whatever it is, the engine is to say so
        entry.sent()
        await relay(await gateway.upstream.send(scope["method"], target_of(scope), scope["headers"], body), send)
        return
    trial, aside = _trial(gateway, call), Aside(scope["method"], target_of(scope), scope["headers"], call)
    try:
        side: Side = gateway.side if trial is None else await gateway.in_thread(trial.runner, aside)
        audit = side.plans.audit or (trial is not None and trial.audit)
        # What is sent as it came does not wait for what would have been done: that would be measured with it.
        under_way = asyncio.ensure_future(_as_it_came(gateway, scope, call, entry)) if audit else None
        try:
            planned, turns = await planned_call(gateway, call, arrived_s, side, audit=audit)
            aside.planned = planned
        except BaseException:
            await given_up(under_way)
            raise
    except BaseException as error:
        _failed(gateway, trial, call, error)
        raise
    gateway.metrics.decided(gateway.clock() - arrived_s)
    watch = Watch(gateway.clock, arrived_s, call.stream)
    exchange = Exchange(scope, send, call, planned, turns, watch, side, entry, trial, under_way)
    try:
        await _exchange(gateway, exchange)
    except BaseException as error:
        await given_up(under_way)
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


async def _as_it_came(gateway: Gateway, scope: Scope, call: Call, entry: Entry) -> httpcore2.Response:
    entry.sent()
    return await gateway.upstream.send(scope["method"], target_of(scope), scope["headers"], as_it_came(call))


async def _exchange(gateway: Gateway, exchange: Exchange) -> None:
    planned, call, scope = exchange.planned, exchange.call, exchange.scope
    if exchange.under_way is not None:
        response = await exchange.under_way
        await relayed(gateway, exchange, response, planned.decision, planned.ran)
        return
    looks = exchange.side.plans.looks
    asks = planned.choice.candidate.second is not None and planned.second is not None and looks.are_given
    if asks and (kept := await looked(gateway, exchange)) is not None:
        await kept
        return
    body = await body_of(gateway, call, planned, planned.given)
    exchange.entry.sent()
    response = await gateway.upstream.send(scope["method"], target_of(scope), scope["headers"], body)
    del body
    if exchange.refused_look and response.status == 200:  # so it was the look that it would not take
        looks.refused()
    await relayed(gateway, exchange, response, planned.decision, planned.ran)
