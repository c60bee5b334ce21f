"""What a server is told at its start, checked in one place.

Knows numbers, names and addresses. Must not know of models, requests or HTTP.
"""

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adaptive_fusion.budget import Budget
from adaptive_fusion.checks import integer, number
from adaptive_fusion.errors import ConfigError

MODES = ("adaptive", "audit")
KEY_VARIABLE = "ADAPTIVE_FUSION_API_KEY"
MAX_PORT = 65535
KEEP_ALIVE_S = 30
"""How long a connection may stay open with nothing asked."""


@dataclass(frozen=True)
class Settings:
    """How a server is to behave.

    Attributes:
        model: The name that clients call the model by.
        mode: ``adaptive``, or ``audit``: every request runs natively, and the log says what would have been done.
        budget: Limits of every request; its own are put over them.
        host: Address to listen on. One that is not of this machine alone needs an `api_key`.
        port: To listen on; 0 takes a free one.
        api_key: What clients must present as bearer token; None asks for none.
        allowed_media_domains: Hosts from which media are fetched, by exact name; none are without it.
        max_new_tokens: Most tokens of an answer where the request does not say.
        batch: Most requests that the model answers in one pass; 1 puts none together.
        queue: Most requests that wait for the model or are made ready for it, beside the one that runs.
        max_body_mib: Largest body of a request, in MiB.
        keep_decisions: How many of the last decisions can be asked for and rated.
        keep_comments: Whether what people write beside a rating goes into the log; it may say anything of anybody.
        drain_s: How long admitted requests may take after a signal to end, in seconds.
        state: File in which what was learned is kept over a restart; None keeps nothing.
        calibrate: Measure this machine before the first request, unless a profile of it is there.
        ui: Whether the web UI is served below ``/ui``; it needs the extra ``ui``.
        generate: Options of ``generate`` that every request gets, such as ``cache_implementation``.

    Raises:
        ConfigError: For a value that is out of range, or a host open to others without a key.
    """

    model: str = "reference"
    mode: str = "adaptive"
    budget: Budget = Budget()  # noqa: RUF009 (frozen)
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = field(default=None, repr=False)
    allowed_media_domains: tuple[str, ...] = ()
    max_new_tokens: int = 256
    batch: int = 4
    queue: int = 64
    max_body_mib: int = 64
    keep_decisions: int = 1000
    keep_comments: bool = False
    drain_s: float = 60.0
    state: Path | None = None
    calibrate: bool = False
    ui: bool = False
    generate: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.model or not self.model.isprintable() or len(self.model) > 200:
            raise ConfigError(f"model name is {self.model[:200]!r}; expected 1 to 200 printable characters")
        if self.mode not in MODES:
            raise ConfigError(f"mode is {self.mode!r}; expected one of {', '.join(MODES)}")
        integer(self.port, "port", 0, MAX_PORT)
        integer(self.max_new_tokens, "max_new_tokens", 1, 1_000_000)
        integer(self.batch, "batch", 1, 64)
        integer(self.queue, "queue", 0, 100_000)
        integer(self.max_body_mib, "max_body_mib", 1, 1024)
        integer(self.keep_decisions, "keep_decisions", 1, 1_000_000)
        number(self.drain_s, "drain_s", 0.0, 3600.0)
        if self.api_key is not None and (not self.api_key.strip() or not self.api_key.isascii()):
            raise ConfigError("api_key is empty or not ASCII; expected the text that clients send as bearer token")
        if self.api_key is None and not self.is_local:
            raise ConfigError(
                f"host is {self.host!r}, which others can reach, and there is no key; expected --api-key or "
                f"{KEY_VARIABLE}, or a loopback host such as 127.0.0.1"
            )

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach the host."""
        return is_local(self.host)


def is_local(host: str) -> bool:
    """Whether a host, an IPv6 address plain or in brackets, is this machine by its name or its address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host[1:-1] if host.startswith("[") else host).is_loopback
    except ValueError:
        return False
