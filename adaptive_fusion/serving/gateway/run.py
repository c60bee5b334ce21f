"""The gateway's process: listen, say when the first request can come, end once those who are in are answered.

Knows uvicorn and the application. Must not know what is served.
"""

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path

import uvicorn

from adaptive_fusion.decision_log import DecisionLog
from adaptive_fusion.policy.files import AUTO
from adaptive_fusion.policy.policy import Policy
from adaptive_fusion.serving.connection import BACKLOG, MAX_HEAD, Connection
from adaptive_fusion.serving.gateway.app import Application
from adaptive_fusion.serving.gateway.beside import Shadow
from adaptive_fusion.serving.gateway.service import Gateway
from adaptive_fusion.serving.gateway.settings import GatewaySettings
from adaptive_fusion.serving.gateway.side import Side
from adaptive_fusion.serving.run import DrainingServer
from adaptive_fusion.serving.settings import KEEP_ALIVE_S
from adaptive_fusion.serving.trials import Trials


class _Server(DrainingServer):
    """Says when it listens."""

    def __init__(self, config: uvicorn.Config, app: Application, announce: Callable[[str], None]) -> None:
        gateway: Gateway = app.state.service
        super().__init__(config, gateway, *([app.ui.close] if app.ui is not None else ()))
        self._gateway, self._announce = gateway, announce

    async def startup(self, sockets: list[object] | None = None) -> None:  # type: ignore[override]
        """Listen."""
        found = self._gateway.state.restore()
        await super().startup(sockets)
        if self.started:
            settings, deciding = self._gateway.settings, self._gateway.deciding
            host = f"[{settings.host}]" if ":" in settings.host else settings.host
            pages = f", pages at http://{host}:{self.port}/ui" if settings.ui else ""
            self._announce(
                f"ready: http://{host}:{self.port}/v1{pages} before {settings.upstream} ({settings.engine}, "
                f"{settings.mode}, policy {deciding.policy.name}, {found})"
            )


def gateway_server(
    settings: GatewaySettings,
    policy: Policy | str | Path = AUTO,
    log: DecisionLog | None = None,
    announce: Callable[[str], None] = lambda line: None,
    trials: Callable[[Side], Trials] | None = None,
) -> DrainingServer:
    """A gateway that is not listening yet; ``run()`` listens until a signal comes.

    Args:
        settings: How.
        policy: As for `AdaptiveRunner`.
        log: The decision log.
        announce: Called with one line once the first request can come.
        trials: Makes experiments with policies, of which the one given is the old one.
    """
    gateway = Gateway(settings, policy, log)
    gateway.side.shadow = partial(Shadow, gateway)
    if trials is not None:
        gateway.trials = trials(gateway.side)
    app = Application(gateway)
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        http=Connection,
        backlog=BACKLOG,
        h11_max_incomplete_event_size=MAX_HEAD,
        ws="none",
        lifespan="on",
        access_log=False,
        log_level=logging.CRITICAL,
        server_header=False,
        date_header=False,  # the engine's own passes
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=5,
    )
    return _Server(config, app, announce)
