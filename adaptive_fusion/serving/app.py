"""The application: which path leads where, and what the OpenAPI document says of it.

Knows routes and the service's life. Must not know what routes do.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from adaptive_fusion.runner import AdaptiveRunner
from adaptive_fusion.serving import answers, chat, own, rollouts
from adaptive_fusion.serving.chat import require_model
from adaptive_fusion.serving.document import DECISION_PATH, MODEL_PATH, descriptions
from adaptive_fusion.serving.http import BODIES, Bodies, Guard, answering
from adaptive_fusion.serving.refusals import Refusal, error_response, json_response
from adaptive_fusion.serving.service import Service
from adaptive_fusion.serving.settings import Settings
from adaptive_fusion.serving.trials import Trials

Handler = Callable[[Request], Awaitable[Response]]
OWN = "/v1/adaptive_fusion"
UI = "/ui"


def create_app(
    runner: AdaptiveRunner,
    settings: Settings | None = None,
    on_ready: Callable[[list[str]], None] = lambda notes: None,
    on_failure: Callable[[Exception], None] = lambda error: None,
    trials: Trials | None = None,
    service_for: Callable[..., Service] = Service,
) -> FastAPI:
    """An ASGI application that answers with `runner`.

    Args:
        runner: Its model is this application's alone.
        settings: How; None takes the defaults.
        on_ready: Called once the first request can come, with sentences that say what was found.
        on_failure: Called if the model cannot be made ready.
        trials: Experiments with policies.
        service_for: Makes the service of runner, settings and trials.

    Raises:
        ConfigError: For settings that do not go with the runner.
    """
    settings = settings if settings is not None else Settings()
    service = service_for(runner, settings, trials)

    @contextlib.asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        async def begin() -> None:
            try:
                on_ready(await service.warm_up())
            except Exception as error:
                on_failure(error)
                return
            await service.keep_saving()

        task = asyncio.create_task(begin())
        app.state.life = task
        try:
            yield
        finally:
            task.cancel()
            with contextlib.suppress(BaseException):
                await task
            await service.close()

    app = FastAPI(title="adaptive-fusion", lifespan=life, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.state.service = service
    app.state.bodies = Bodies(BODIES * settings.max_body_mib << 20)
    app.add_middleware(
        Guard,
        key=settings.api_key,
        local=settings.is_local,
        refused=service.metrics.rejected,
        pages=UI if settings.ui else None,
    )
    app.add_exception_handler(HTTPException, _http_error)  # type: ignore[arg-type]
    app.add_exception_handler(Exception, _failed)
    app.router.route_class = _Route
    described = descriptions(settings.model)
    for method, path, handler in _routes():
        app.add_api_route(
            path,
            answering(handler),
            methods=[method],
            response_class=Response,
            summary=(handler.__doc__ or "").strip().splitlines()[0],
            openapi_extra=dict(described.get(path, {})),
        )
    if settings.ui:
        from adaptive_fusion.serving.web.mount import mount_ui

        app.state.ui = mount_ui(app, service.media_limits.max_medium_bytes, UI)
    return app


class _Route(APIRoute):
    """A route that reads the request itself: nothing of it is to be found out by FastAPI, and nothing of the response
    to be checked."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """What answers."""
        handler: Callable[[Request], Coroutine[Any, Any, Response]] = self.endpoint
        return handler


def _routes() -> tuple[tuple[str, str, Handler], ...]:
    return (
        ("POST", "/v1/chat/completions", chat.chat_completions),
        ("GET", "/v1/models", _models),
        ("GET", MODEL_PATH, _model),
        ("POST", f"{OWN}/decide", own.decide),
        ("POST", f"{OWN}/points", own.points),
        ("GET", f"{OWN}/decisions", own.decisions),
        ("GET", DECISION_PATH, own.one_decision),
        ("GET", f"{OWN}/policy", own.policy),
        ("POST", f"{OWN}/feedback", own.feedback),
        ("GET", f"{OWN}/rollout", rollouts.status),
        ("POST", f"{OWN}/rollout/promote", rollouts.promote),
        ("POST", f"{OWN}/rollout/abort", rollouts.abort),
        ("GET", "/health", _health),
        ("GET", "/ready", _ready),
        ("GET", "/metrics", _metrics),
    )


async def _models(request: Request) -> Response:
    """The models there are."""
    service: Service = request.app.state.service
    return json_response(answers.model_list([service.settings.model], 0))


async def _model(request: Request) -> Response:
    """The model of that name."""
    service: Service = request.app.state.service
    require_model(service, request.path_params["name"])
    return json_response(answers.model_list([service.settings.model], 0)["data"][0])


async def _health(request: Request) -> Response:
    """Whether the process answers."""
    return json_response({"status": "ok"})


async def _ready(request: Request) -> Response:
    """Whether a request would be answered now."""
    request.app.state.service.require_ready()
    return json_response({"status": "ready"})


async def _metrics(request: Request) -> Response:
    """Counters, for Prometheus."""
    service: Service = request.app.state.service
    service.metrics.observe_controller(service.runner.controller)
    if service.runner.encoder_cache is not None:
        service.metrics.observe_cache(service.runner.encoder_cache.counts())
    text, kind = service.metrics.render()
    return Response(text, headers={"content-type": kind})


async def _failed(request: Request, error: Exception) -> Response:
    """What no route has turned into a response."""
    return error_response(error)


async def _http_error(request: Request, error: HTTPException) -> Response:
    """Paths and methods that there are not."""
    codes: Mapping[int, str] = {404: "not_found", 405: "method_not_allowed"}
    message = {404: "there is no such path here", 405: "the path does not take this method"}
    refusal = Refusal(
        message.get(error.status_code, "the request cannot be read"),
        error.status_code,
        code=codes.get(error.status_code, "invalid_request"),
    )
    response: Any = error_response(refusal)
    for name, value in (error.headers or {}).items():
        response.headers[name] = value
    found: Response = response
    return found
