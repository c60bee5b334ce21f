"""The engines that a gateway can stand before, one file each."""

from adaptive_fusion.errors import ConfigError
from adaptive_fusion.serving.gateway.engines import (
    dashscope,
    llamacpp,
    lmdeploy,
    ollama,
    openai,
    sglang,
    transformers,
    vllm,
)
from adaptive_fusion.serving.gateway.engines.engine import Agreed, Engine

ENGINES: dict[str, Engine] = {
    one.ENGINE.name: one.ENGINE
    for one in (vllm, sglang, lmdeploy, transformers, openai, llamacpp, ollama, dashscope)
}  # fmt: skip


def find(name: str) -> Engine:
    """The engine of a name.

    Raises:
        ConfigError: For a name that is not in `ENGINES`.
    """
    if name.lower() not in ENGINES:
        raise ConfigError(f"engine is {name!r}; expected {', '.join(ENGINES)}")
    return ENGINES[name.lower()]


__all__ = ["ENGINES", "Agreed", "Engine", "find"]
