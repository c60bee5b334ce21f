"""SGLang: no limit of pixels in a request; counts the tokens of images."""

from adaptive_fusion.serving.gateway.engines.engine import Engine, image_tokens_of_prompt

ENGINE = Engine(
    "sglang",
    logprobs=True,
    image_tokens=image_tokens_of_prompt,
    notes=("a request has no field for pixels",),
    source="python/sglang/srt/entrypoints/openai/protocol.py",
)
