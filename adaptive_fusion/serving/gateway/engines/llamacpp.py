"""llama.cpp's server: the tokens of images are limited when it starts."""

from adaptive_fusion.serving.gateway.engines.engine import Engine

ENGINE = Engine(
    "llamacpp",
    logprobs=True,
    notes=(
        "tokens of images are limited at its start only: --image-min-tokens, --image-max-tokens",
        "usage counts text and images together",
    ),
    source="tools/server/README.md",
)
