"""A look at the model's first tokens: how sure it is of them, and the better plan where it is not.

The engine is asked for log-probabilities beside its answer; what it says is held back until they are here and passed on
without them, or given up. Knows answers and thresholds. Must not know how plans are made.
"""

from collections.abc import AsyncIterator
from dataclasses import replace
from statistics import fmean
from typing import Any

from adaptive_fusion.serving.gateway.answered import relayed
from adaptive_fusion.serving.gateway.escalate import (
    ASKED,
    choices_of,
    entropies,
    event_without_logprobs,
    without_logprobs,
)
from adaptive_fusion.serving.gateway.events import MOST_HELD, Events, data_of
from adaptive_fusion.serving.gateway.exchange import Exchange, target_of
from adaptive_fusion.serving.gateway.proxy import closed, is_stream
from adaptive_fusion.serving.gateway.sent import LOGPROBS, body_of
from adaptive_fusion.serving.gateway.service import Gateway

_ASKING = dict(zip(LOGPROBS, (True, ASKED), strict=True))
_REFUSED = (400, 404, 415, 422, 500, 501)
"""What an engine says that does not take a field."""


async def looked(gateway: Gateway, exchange: Exchange) -> Any:
    """Ask the engine how sure the model is; what passes its answer on, or None where it has to be asked again as if it
    had not been."""
    planned, call = exchange.planned, exchange.call
    second = planned.choice.candidate.second
    assert second is not None and planned.second is not None
    ours = not call.asks_logprobs
    body = await body_of(gateway, call, planned, planned.given, _ASKING if ours else None)
    head = [pair for pair in exchange.scope["headers"] if pair[0].lower() != b"accept-encoding"]
    head.append((b"accept-encoding", b"identity"))
    exchange.entry.sent()
    response = await gateway.upstream.send(exchange.scope["method"], target_of(exchange.scope), head, body)
    if response.status != 200:
        if ours and response.status in _REFUSED:
            await closed(response)
            exchange.refused_look = True
            return None
        return relayed(gateway, exchange, response, planned.decision, planned.ran)
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
        exchange.side.plans.looks.given()
        exchange.side.controller.looked_at(planned.choice, first_ms - planned.choice.elapsed_ms, escalated=False)
        decision = replace(decision, escalated=False, escalation={**decision.escalation, "entropy": entropy})
    if why:
        decision = replace(decision, escalation={**decision.escalation, "why": why})
    shown = _shown(held, rest, pieces, stream, ours, whole)
    return relayed(gateway, exchange, response, decision, planned.ran, shown, resized=ours)


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
    body = await body_of(gateway, call, planned, planned.second)
    response = await gateway.upstream.send(
        exchange.scope["method"], target_of(exchange.scope), exchange.scope["headers"], body
    )
    return relayed(gateway, exchange, response, decision, second.candidate)
