"""Endpoints that show an experiment with a policy, and end it.

Knows the parts of the service. Must not know how experiments work.
"""

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from adaptive_fusion.errors import ConfigError, RolloutFileError
from adaptive_fusion.serving.http import as_json, read_body
from adaptive_fusion.serving.refusals import Refusal, json_response
from adaptive_fusion.serving.schema import read_object
from adaptive_fusion.serving.service import Service
from adaptive_fusion.serving.trials import Trials

MAX_WHY = 500


async def status(request: Request) -> Response:
    """The running or last experiment: arms, counts, guardrails with their evidence over time, who changed what."""
    return json_response(await _status(request))


async def _status(request: Request) -> dict[str, Any]:
    service: Service = request.app.state.service
    try:
        return await service.in_thread(_trials(request).status)
    except RolloutFileError as error:
        raise _unavailable(error) from None


def _unavailable(error: RolloutFileError) -> Refusal:
    return Refusal(str(error), 503, code="rollout_unavailable", retry_s=1.0)


async def promote(request: Request) -> Response:
    """Give everything to the new policy; needs the key."""
    return await _command(request, "promote")


async def abort(request: Request) -> Response:
    """Give everything back to the old policy; needs the key."""
    return await _command(request, "abort")


def _trials(request: Request) -> Trials:
    found: Trials | None = request.app.state.service.trials
    if found is None:
        raise Refusal("the server makes no experiments; start it with --rollout FILE", 404, code="no_rollout")
    return found


async def _command(request: Request, what: str) -> Response:
    service: Service = request.app.state.service
    trials = _trials(request)
    if service.settings.api_key is None:
        raise Refusal(
            "the server has no key, which this needs; start it with --api-key, or use adaptive-fusion rollout",
            403,
            code="key_required",
        )
    body = read_object(await as_json(await read_body(request, 1)))
    unknown = sorted(str(key) for key in body if key != "why")
    why = body.get("why", "by hand")
    if unknown or not isinstance(why, str) or len(why) > MAX_WHY:
        raise Refusal(f"the body is not as expected; expected why, a text of at most {MAX_WHY} characters", param="why")
    try:
        changed = await service.in_thread(trials.command, what, "over HTTP", why)
    except ConfigError as error:
        raise Refusal(str(error), 409, code="no_experiment") from None
    except RolloutFileError as error:
        raise _unavailable(error) from None
    return json_response({"changed": changed, **await _status(request)})
