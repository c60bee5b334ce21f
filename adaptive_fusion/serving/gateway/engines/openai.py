"""OpenAI's own API, and any engine that is only known to be like it: nothing beyond the standard's fields."""

from adaptive_fusion.serving.gateway.engines.engine import Engine, image_tokens_of_prompt

ENGINE = Engine(
    "openai",
    logprobs=True,
    image_tokens=image_tokens_of_prompt,
    notes=("a request has no field for pixels; detail holds for one image and is passed on as it came",),
    source="https://platform.openai.com/docs/api-reference/chat/create",
)
