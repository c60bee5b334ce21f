"""``transformers serve``: no field for pixels, no log-probabilities."""

from adaptive_fusion.serving.gateway.engines.engine import Engine

ENGINE = Engine(
    "transformers",
    stream_usage=False,
    notes=(
        "a request has no field for pixels",
        "logprobs are refused",
        "one request runs at a time",
        "a stream ends without [DONE]",
    ),
    source="src/transformers/cli/serving",
)
