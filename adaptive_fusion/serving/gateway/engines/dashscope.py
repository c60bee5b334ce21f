"""DashScope (Qwen in the cloud of Alibaba): its own limits stand in each part; counts the tokens of images."""

from adaptive_fusion.serving.gateway.engines.engine import Engine, image_tokens_of_prompt

ENGINE = Engine(
    "dashscope",
    logprobs=True,
    image_tokens=image_tokens_of_prompt,
    notes=("min_pixels and max_pixels hold for one part and are passed on as they came",),
    source="https://help.aliyun.com/zh/model-studio/vision",
)
