"""A gateway on a free port of this machine, in a thread."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from openai import OpenAI
from waits import MOST_S

from adaptive_fusion.decision_log import DecisionLog
from adaptive_fusion.policy.policy import Policy
from adaptive_fusion.serving.gateway.run import gateway_server
from adaptive_fusion.serving.gateway.service import Gateway
from adaptive_fusion.serving.gateway.settings import GatewaySettings
from adaptive_fusion.serving.gateway.side import Side
from adaptive_fusion.serving.run import DrainingServer
from adaptive_fusion.serving.trials import Trials


@contextmanager
def gateway(
    upstream: str,
    policy: Policy | str = "balanced",
    log: Path | None = None,
    trials: Callable[[Side], Trials] | None = None,
    **settings: Any,
) -> Iterator[DrainingServer]:
    """A gateway that listens; it drains at the end."""
    ready, chosen = threading.Event(), GatewaySettings(port=0, upstream=upstream, **settings)
    kept = None if log is None else DecisionLog(log)
    server = gateway_server(chosen, policy, kept, lambda line: ready.set(), trials)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    assert ready.wait(MOST_S)
    try:
        yield server
    finally:
        if thread.is_alive():
            assert server.loop is not None
            server.loop.call_soon_threadsafe(server.stop)
            thread.join(MOST_S)
        assert not thread.is_alive()


def inside(server: DrainingServer) -> Gateway:
    """What stands around the requests of a gateway."""
    found = server.service
    assert isinstance(found, Gateway)
    return found


def url_of(server: DrainingServer, path: str = "/v1/chat/completions") -> str:
    return f"http://127.0.0.1:{server.port}{path}"


def client_of(server: DrainingServer) -> OpenAI:
    return OpenAI(base_url=url_of(server, "/v1"), api_key="none", max_retries=0, timeout=MOST_S)
