"""Ollama: options of a request reload the model, so none is sent."""

from adaptive_fusion.serving.gateway.engines.engine import Engine

ENGINE = Engine(
    "ollama",
    notes=(
        "options that limit images reload the model: none is sent",
        "usage counts text and images together",
    ),
    source="docs/api.md",
)
