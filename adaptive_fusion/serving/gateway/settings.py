"""What a gateway is told at its start, checked in one place.

Knows numbers, names and addresses. Must not know of requests or HTTP.
"""

from dataclasses import dataclass, field

from adaptive_fusion.checks import number
from adaptive_fusion.errors import ConfigError
from adaptive_fusion.serving.settings import Settings

UPSTREAM_KEY_VARIABLE = "ADAPTIVE_FUSION_UPSTREAM_KEY"


@dataclass(frozen=True)
class GatewaySettings(Settings):
    """How a gateway is to behave; what is not named here is as in `Settings`.

    Attributes:
        upstream: Address of the engine.
        engine: Its name, one of `engines.ENGINES`.
        processor: Preset, folder or id that says how the model upstream resizes.
        upstream_key: Sent to the engine in place of the client's own key.
        timeout_s: How long the engine may say nothing.
        preparers: Threads that measure media and make them smaller.

    Raises:
        ConfigError: As `Settings`.
    """

    model: str = "upstream"
    upstream: str = "http://127.0.0.1:8001"
    engine: str = "openai"
    processor: str = "qwen3-vl"
    upstream_key: str | None = field(default=None, repr=False)
    timeout_s: float = 600.0
    preparers: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        number(self.timeout_s, "timeout_s", above=0, high=86_400)
        if self.upstream_key is not None and not (self.upstream_key.isascii() and self.upstream_key.isprintable()):
            raise ConfigError("upstream_key is not printable ASCII; expected the text to send as bearer token")
