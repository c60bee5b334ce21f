"""Requests to an engine from a program that waits for them: connections that are kept, and errors in words.

Knows addresses, bytes and status codes. Must not know what requests mean.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpcore2

from adaptive_fusion.errors import AdaptiveFusionError
from adaptive_fusion.serving.gateway.proxy import CONNECT_S, IDLE_S, Address
from adaptive_fusion.serving.gateway.settings import UPSTREAM_KEY_VARIABLE

CHAT = "/v1/chat/completions"
TIMEOUT_S = 600.0
MOST_ERROR = 400
"""Characters of an engine's own error that are passed on."""


class UpstreamError(AdaptiveFusionError):
    """The engine cannot be reached, or says that it will not answer.

    Attributes:
        status: Its HTTP status, or that of a proxy in its place.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Client:
    """An engine at an address; thread-safe.

    Args:
        url: Of it, with or without ``/v1`` at its end.
        key: Sent as bearer token; None takes ``ADAPTIVE_FUSION_UPSTREAM_KEY`` of the environment.
        timeout_s: How long it may say nothing.

    Raises:
        ConfigError: For an address that is none.
    """

    def __init__(self, url: str, key: str | None = None, timeout_s: float = TIMEOUT_S) -> None:
        self.address = Address.read(url)
        self._key = key if key is not None else os.environ.get(UPSTREAM_KEY_VARIABLE)
        self._timeouts = {"connect": CONNECT_S, "read": timeout_s, "write": timeout_s, "pool": timeout_s}
        self._pool = httpcore2.ConnectionPool(max_connections=64, keepalive_expiry=IDLE_S)

    def close(self) -> None:
        """Close all connections."""
        self._pool.close()

    @contextmanager
    def asked(self, body: bytes | None, path: str = CHAT) -> Iterator[httpcore2.Response]:
        """The engine's answer, not read yet; a body is posted.

        Raises:
            UpstreamError: If there is none, or it has another status than 200.
        """
        headers = [(b"host", self.address.host_header), (b"content-type", b"application/json")]
        if self._key:
            headers.append((b"authorization", f"Bearer {self._key}".encode()))
        method, url = "GET" if body is None else "POST", self.address.url(path.encode())
        options = {"timeout": self._timeouts}
        try:
            with self._pool.stream(method, url, headers=headers, content=body, extensions=options) as response:
                if response.status != 200:
                    said = shortened(response.read().decode("utf-8", "replace"))
                    raise UpstreamError(f"the engine answered {response.status}: {said}", response.status)
                yield response
        except httpcore2.TimeoutException as error:
            raise UpstreamError("the engine says nothing", 504) from error
        except (httpcore2.NetworkError, httpcore2.ProtocolError) as error:
            raise UpstreamError(f"the engine cannot be reached ({type(error).__name__})", 502) from error

    def json(self, body: bytes | None, path: str = CHAT) -> Any:
        """The engine's whole answer.

        Raises:
            UpstreamError: As `asked`, or if it is no JSON.
        """
        with self.asked(body, path) as response:
            data = response.read()
        try:
            return json.loads(data)
        except (ValueError, RecursionError) as error:
            raise UpstreamError("the engine's answer is no JSON", 502) from error


def shortened(said: Any) -> str:
    """What an engine says of an error, no longer than is read."""
    text = said if isinstance(said, str) else json.dumps(said)
    return text[:MOST_ERROR]
