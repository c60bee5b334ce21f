"""The gateway's own endpoints: decisions without answers, what is on offer, whether the engine is there.

Knows the parts of the gateway. Must not know how requests are sent.
"""

from dataclasses import asdict, replace
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from adaptive_fusion.media.load import load_media
from adaptive_fusion.media.pixels import DEFAULT
from adaptive_fusion.serving import answers
from adaptive_fusion.serving import own as shared
from adaptive_fusion.serving.explained import explained, pictures, policy_values
from adaptive_fusion.serving.gateway.chat import planned_call
from adaptive_fusion.serving.gateway.exchange import media_of
from adaptive_fusion.serving.gateway.plan import Planned
from adaptive_fusion.serving.gateway.proxy import closed
from adaptive_fusion.serving.gateway.reading import read_call
from adaptive_fusion.serving.gateway.service import Gateway
from adaptive_fusion.serving.http import read_body
from adaptive_fusion.serving.refusals import Refusal, json_response

LIMITS = ("latency_ms", "ttft_ms", "attainment", "on_infeasible")
"""What of a budget holds before an engine; memory and the middle of an answer are the engine's own."""


async def decide(request: Request) -> Response:
    """The decision that a chat request would get, with all that was measured; nothing is sent on."""
    wanted = shared.flag(request, "pictures")
    gateway, planned = await _planned(request)
    seen = {"pictures": await gateway.in_thread(_pictures, gateway, planned)} if wanted else {}
    return json_response({**_outlook(planned), **explained(planned.decision), **seen})


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


async def policy(request: Request) -> Response:
    """By which policy the gateway decides, and within which limits. It has one for all requests, and can keep those
    limits that do not depend on what the engine does inside."""
    gateway: Gateway = request.app.state.service
    deciding = gateway.deciding
    return json_response(policy_values(deciding.policy, (), deciding.budget, gateway.settings.mode, LIMITS))


async def health(request: Request) -> Response:
    """Whether the process answers."""
    return json_response({"status": "ok"})


async def ready(request: Request) -> Response:
    """Whether a request would be answered now: whether the engine upstream answers anything."""
    gateway: Gateway = request.app.state.service
    with gateway.admitted(counted=False):
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
    found = answers.outlook(planned.decision, planned.native_tokens)
    return {**found, "tokens": {**found["tokens"], "visual_planned": planned.tokens}, "media": media_of(planned)}


def _pictures(gateway: Gateway, planned: Planned) -> list[dict[str, Any]]:
    """Of the media whose bytes are here, as they came."""
    limits = replace(DEFAULT, max_megapixels=gateway.limits.max_megapixels)
    return pictures([load_media(each.data, limits=limits) for each in planned.media if each.data is not None])
