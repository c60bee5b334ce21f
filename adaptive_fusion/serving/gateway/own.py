"""The gateway's own endpoints: decisions without answers, what is on offer, whether the engine is there.

Knows the parts of the gateway. Must not know how requests are sent.
"""

from dataclasses import asdict
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from adaptive_fusion.serving import answers
from adaptive_fusion.serving.gateway.chat import planned_call
from adaptive_fusion.serving.gateway.exchange import said_of
from adaptive_fusion.serving.gateway.plan import Planned
from adaptive_fusion.serving.gateway.proxy import closed
from adaptive_fusion.serving.gateway.reading import read_call
from adaptive_fusion.serving.gateway.service import Gateway
from adaptive_fusion.serving.http import read_body
from adaptive_fusion.serving.refusals import Refusal, json_response


async def decide(request: Request) -> Response:
    """The decision that a chat request would get; nothing is sent on."""
    _, planned = await _planned(request)
    return json_response(_outlook(planned))


async def points(request: Request) -> Response:
    """What a chat request is offered, best first, with predictions, and what would be taken within its budget."""
    gateway, planned = await _planned(request)
    planner, info = gateway.deciding.planner, planned.info
    hardest, route = planner.route(info)
    offers = planner.candidates(info, route.lane, hardest, planner.needs(info))
    rejected = {row.point.name: row.reason for row in planned.decision.rejected}
    rows = [
        {
            "plan": offer.point.name,
            "point": offer.point.to_dict(),
            "rung": offer.key,
            "quality": offer.quality,
            "predicted": {
                **asdict(offer.predicted),
                "ttft_ms": offer.predicted.ttft_ms,
                "latency_ms": offer.predicted.latency_ms,
            },
            "taken": offer.point == planned.decision.point,
            "why_not": rejected.get(offer.point.name),
        }
        for offer in sorted(offers, key=lambda offer: -offer.quality)
    ]
    return json_response({"lane": route.lane, "points": rows, "decision": _outlook(planned)})


async def health(request: Request) -> Response:
    """Whether the process answers."""
    return json_response({"status": "ok"})


async def ready(request: Request) -> Response:
    """Whether a request would be answered now: whether the engine upstream answers anything."""
    gateway: Gateway = request.app.state.service
    with gateway.admitted():
        response = await gateway.upstream.send("GET", b"/v1/models", [(b"accept", b"application/json")], None)
    await closed(response)
    if response.status >= 500:
        raise Refusal("the engine upstream is not ready", 503, code="not_ready", retry_s=1.0)
    return json_response({"status": "ready"})


async def metrics(request: Request) -> Response:
    """Counters, for Prometheus."""
    gateway: Gateway = request.app.state.service
    gateway.metrics.observe_controller(gateway.deciding.controller)
    text, kind = gateway.metrics.render()
    return Response(text, headers={"content-type": kind})


async def _planned(request: Request) -> tuple[Gateway, Planned]:
    gateway: Gateway = request.app.state.service
    arrived_s = gateway.clock()
    with gateway.admitted(), gateway.bodies.counting() as grown:
        body = await read_body(request, gateway.settings.max_body_mib, grown)
        call = await gateway.in_thread(read_call, body)
        planned, _ = await planned_call(gateway, call, arrived_s)
        return gateway, planned


def _outlook(planned: Planned) -> dict[str, Any]:
    media = [
        {"given": said_of(given), **({"why": medium.why} if medium.measured is None else {})}
        for medium, given in zip(planned.media, planned.given, strict=True)
    ]
    found = answers.outlook(planned.decision, planned.native_tokens)
    return {**found, "tokens": {**found["tokens"], "visual_sent": planned.tokens}, "media": media}
