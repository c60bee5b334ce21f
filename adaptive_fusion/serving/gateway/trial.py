"""An engine and a gateway on this machine for as long as a measurement takes, and one request with its times.

Knows processes, threads and addresses. Must not know what is compared.
"""

import json
import math
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adaptive_fusion.decision_log import DecisionLog
from adaptive_fusion.errors import AdaptiveFusionError
from adaptive_fusion.policy.policy import Policy
from adaptive_fusion.serving.gateway.client import Client, UpstreamError
from adaptive_fusion.serving.gateway.escalate import choices_of
from adaptive_fusion.serving.gateway.events import Events, data_of
from adaptive_fusion.serving.gateway.run import gateway_server
from adaptive_fusion.serving.gateway.settings import GatewaySettings

START_S = 300.0
"""How long an engine or a gateway may take until it answers."""
_PAUSE_S = 0.2


@dataclass(frozen=True)
class Timed:
    """One streamed answer: milliseconds to its first piece and its last, its text, tokens of its prompt as the engine
    counts them (None where it does not say), and the bytes of the request."""

    ttft_ms: float
    latency_ms: float
    text: str
    prompt_tokens: int | None
    upload: int


def timed(client: Client, body: bytes) -> Timed:
    """Ask for a stream and read all of it.

    Raises:
        UpstreamError: If there is no answer, or it broke off.
    """
    began, first = time.perf_counter(), math.nan
    events, text, prompt = Events(), "", None
    with client.asked(body) as response:
        for piece in response.iter_stream():
            for event in events.feed(piece):
                data = data_of(event)
                for choice in choices_of(data)[:1]:
                    said = (choice.get("delta") or {}).get("content") or ""
                    if said and math.isnan(first):
                        first = time.perf_counter()
                    text += said
                if data is not None and b'"usage"' in data:
                    prompt = (json.loads(data).get("usage") or {}).get("prompt_tokens", prompt)
    ended = time.perf_counter()
    if math.isnan(first):
        raise UpstreamError("the engine's stream says nothing", 502)
    return Timed((first - began) * 1e3, (ended - began) * 1e3, text, prompt, len(body))


@contextmanager
def transformers_serve(model: str | Path) -> Iterator[str]:
    """The address of ``transformers serve`` with a model, on the processor of this machine.

    Raises:
        AdaptiveFusionError: If it ends, or does not answer in time.
    """
    port = _free_port()
    command = [sys.executable, "-c", "from transformers.cli.transformers import main; main()", "serve", str(model)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--log-level", "error"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, env={**os.environ, "HF_HUB_OFFLINE": "1"}, **quiet)  # type: ignore[call-overload]
    url = f"http://127.0.0.1:{port}"
    try:
        _wait(url, lambda: process.poll() is not None)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextmanager
def gateway(policy: Policy | str | Path, log: Path | None = None, **settings: Any) -> Iterator[str]:
    """The address of a gateway in a thread of this process, on a free port.

    Args:
        policy: As for `AdaptiveRunner`.
        log: Of its decisions; an audit needs one.
        settings: Of `GatewaySettings`.

    Raises:
        AdaptiveFusionError: If it does not come up.
    """
    ready = threading.Event()
    kept = None if log is None else DecisionLog(log)
    server = gateway_server(GatewaySettings(port=0, **settings), policy, kept, lambda line: ready.set())
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        if not ready.wait(START_S):
            raise AdaptiveFusionError("the gateway did not come up")
        yield f"http://127.0.0.1:{server.port}"
    finally:
        if thread.is_alive() and server.loop is not None:
            server.loop.call_soon_threadsafe(server.stop)
        thread.join(START_S)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait(url: str, ended: Any) -> None:
    client, until = Client(url, timeout_s=_PAUSE_S * 10), time.monotonic() + START_S
    try:
        while time.monotonic() < until and not ended():
            try:
                client.json(None, "/health")
                return
            except UpstreamError:
                time.sleep(_PAUSE_S)
    finally:
        client.close()
    raise AdaptiveFusionError("transformers serve did not come up: pip install 'transformers[serving]'")
