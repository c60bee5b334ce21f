"""The server's own endpoints: decisions without answers, what is on offer, the last decisions, ratings.

Knows the parts of the service. Must not know how requests are run.
"""

from starlette.requests import Request
from starlette.responses import Response

from adaptive_fusion.decision_log import feedback_record
from adaptive_fusion.policy.policy import Policy
from adaptive_fusion.runner import Prepared
from adaptive_fusion.serving import answers
from adaptive_fusion.serving.blame import blaming
from adaptive_fusion.serving.chat import prepared_call
from adaptive_fusion.serving.explained import explained, pictures, policy_values, prediction
from adaptive_fusion.serving.http import as_json, bodies_of, read_body
from adaptive_fusion.serving.reading import checked
from adaptive_fusion.serving.refusals import Refusal, json_response
from adaptive_fusion.serving.schema import LIMITS, ChatCall, read_chat, read_object
from adaptive_fusion.serving.service import Service

FEEDBACK_KEYS = ("request_id", "rating", "source_id", "comment")
MAX_COMMENT = 2000


async def decide(request: Request) -> Response:
    """The decision that a chat request would get, with all that was measured; nothing is generated."""
    wanted = flag(request, "pictures")
    service, prepared, call = await _measured(request)
    with blaming(call):
        decision = await service.in_thread(prepared.decide)
        seen = {"pictures": await service.in_thread(pictures, prepared.request.media)} if wanted else {}
    planned = (
        prepared.runner.adapter.plan(prepared.request.sizes, decision.point).tokens if prepared.native_tokens else 0
    )
    whole = {**answers.outlook(decision, prepared.native_tokens), **explained(decision), **seen}
    whole["tokens"] = {**whole["tokens"], "visual_planned": planned}
    return json_response({**whole, "ignored": list(call.ignored)})


async def points(request: Request) -> Response:
    """What a chat request is offered, best first, with predictions, and what would be taken within its budget."""
    service, prepared, call = await _measured(request)
    with blaming(call):
        lane, candidates = await service.in_thread(prepared.offers)
        decision = await service.in_thread(prepared.decide)
    rejected = {row.point.name: row.reason for row in decision.rejected}
    rows = [
        {
            "plan": candidate.point.name,
            "point": candidate.point.to_dict(),
            "rung": candidate.key,
            "quality": candidate.quality,
            "predicted": prediction(candidate.predicted),
            "taken": candidate.point == decision.point,
            "why_not": rejected.get(candidate.point.name),
        }
        for candidate in candidates
    ]
    taken = answers.outlook(decision, prepared.native_tokens)
    return json_response({"lane": lane, "points": rows, "decision": taken, "ignored": list(call.ignored)})


async def decisions(request: Request) -> Response:
    """The last decisions, newest first, without what was asked or answered."""
    service: Service = request.app.state.service
    text = request.query_params.get("n", "20")
    count = int(text) if text.isascii() and text.isdigit() and len(text) < 8 else None
    if count is None or not 1 <= count <= service.settings.keep_decisions:
        raise Refusal(f"n is {text[:80]!r}; expected a number from 1 to {service.settings.keep_decisions}", param="n")
    return json_response({"decisions": await service.records.last(count)})


async def one_decision(request: Request) -> Response:
    """All that is kept of one of the last decisions, by the id of its request or its answer."""
    service: Service = request.app.state.service
    return json_response(await service.records.whole(answers.request_id(request.path_params["request_id"])))


async def policy(request: Request) -> Response:
    """By which policy the server decides, within which limits, and which others may be asked for."""
    service: Service = request.app.state.service
    settings, own = service.settings, service.runner.policy
    limits = service.runner.budget.merge(settings.budget)
    return json_response(policy_values(own, Policy.shipped(), limits, settings.mode, LIMITS))


def flag(request: Request, name: str) -> bool:
    """``true`` or ``false`` of the query, the latter without any; raises a Refusal for another word."""
    text = request.query_params.get(name, "false")
    if text not in ("true", "false"):
        raise Refusal(f"{name} is {text[:80]!r}; expected true or false", param=name)
    return text == "true"


async def feedback(request: Request) -> Response:
    """Rate an answer; the same rating again changes nothing."""
    service: Service = request.app.state.service
    body = read_object(await as_json(await read_body(request, 1)))
    unknown = sorted(str(key) for key in body if key not in FEEDBACK_KEYS)
    if unknown:
        raise Refusal(f"the body has {unknown[0][:80]!r}; expected {', '.join(FEEDBACK_KEYS)}", param=unknown[0][:80])
    named, source = body.get("request_id"), body.get("source_id")
    if not isinstance(named, str):
        raise Refusal(f"request_id is {type(named).__name__}; expected the id of an answer", param="request_id")
    if source is not None and (not isinstance(source, str) or not 0 < len(source) <= 200):
        raise Refusal("source_id is no string of 1 to 200 characters; expected one, or none", param="source_id")
    rating = checked(
        "rating", lambda: feedback_record(named, body.get("rating", "nothing"), source_id=source)["rating"]
    )
    comment = _comment(body.get("comment"))
    log = service.runner.log
    if log is None:
        raise Refusal("the server keeps no log; start it with --log FILE to rate answers", 400, code="no_log")
    request_id = answers.request_id(named)
    await service.records.require(request_id)
    new = await service.records.rated(request_id, source, rating)
    kept = comment if service.settings.keep_comments else None
    if new:
        await service.in_thread(lambda: log.feedback(request_id, rating, source_id=source, comment=kept))
        if service.trials is not None:
            await service.in_thread(service.trials.rated, request_id, rating)
    said = {"comment_kept": new and kept is not None} if comment is not None else {}
    return json_response({"request_id": request_id, "rating": rating, "recorded": new, **said})


def _comment(given: object) -> str | None:
    if given is not None and (not isinstance(given, str) or not 0 < len(given) <= MAX_COMMENT):
        raise Refusal(f"comment is no text of 1 to {MAX_COMMENT} characters; expected one, or none", param="comment")
    return given


async def _measured(request: Request) -> tuple[Service, Prepared, ChatCall]:
    """A chat request, loaded and measured."""
    service: Service = request.app.state.service
    with bodies_of(request).counting() as grown:
        body = await read_body(request, service.settings.max_body_mib, grown)
        service.require_ready()
        with service.side.admit():
            call = read_chat(await as_json(body))
            with blaming(call):
                return service, await prepared_call(service, call), call
