"""Every model option of ``serve`` on the reference model: it answers, or says by name what is missing."""

import importlib.util
from typing import Any

import pytest
from server import asking, client_of, image, serving, text

from adaptive_fusion.errors import ConfigError
from adaptive_fusion.loading import cache_options, model_options, open_runner

HAS = {name: importlib.util.find_spec(name) is not None for name in ("bitsandbytes", "flash_attn", "optimum")}


def answer(options: dict[str, Any], **generate: Any) -> Any:
    """What comes back for an image, streamed and whole, at a cheap plan and natively."""
    runner = open_runner("reference", "reference-balanced", None, options)
    with serving(runner, generate=generate) as server:
        client, found = client_of(server), []
        for point in ("native", "weighted6r4@0.5"):
            asked: dict[str, Any] = {
                "model": "reference",
                "messages": asking(image(96, 64), text("Describe the image.")),
                "max_tokens": 6,
                "extra_body": {"adaptive_fusion": {"point": point}},
            }
            whole = client.chat.completions.create(**asked).choices[0].message.content
            chunks = client.chat.completions.create(**asked, stream=True)
            said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
            assert said.strip() == whole.strip()
            found.append(whole)
        return runner, found


@pytest.fixture(scope="module")
def plain() -> list[str]:
    found: list[str] = answer({})[1]
    return found


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_formats_of_weights(dtype: str, plain: list[str]) -> None:
    runner, said = answer(model_options(dtype=dtype))
    assert str(runner.model.dtype).endswith({"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}[dtype])
    assert all(said) and (dtype != "fp32" or said == plain)


@pytest.mark.parametrize("attention", ["sdpa", "eager", "flash_attention_2"])
def test_attention(attention: str, plain: list[str]) -> None:
    if attention == "flash_attention_2" and not HAS["flash_attn"]:
        with pytest.raises(ConfigError, match=r"flash_attn|FlashAttention"):
            answer(model_options(attention=attention))
        return
    assert answer(model_options(attention=attention))[1] == plain


@pytest.mark.parametrize("cache", ["static", "quantized"])
def test_caches(cache: str, plain: list[str]) -> None:
    if cache == "quantized" and not HAS["optimum"]:
        with pytest.raises(ConfigError, match="cache is quantized, which needs optimum-quanto"):
            cache_options(cache)
        return
    found = answer({}, **cache_options(cache))[1]
    assert all(found) and (cache == "quantized" or found == plain)


@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_quantization(quantization: str) -> None:
    if not HAS["bitsandbytes"]:
        with pytest.raises(ConfigError, match="bitsandbytes"):
            answer(model_options(quantization=quantization))
        return
    assert all(answer(model_options(quantization=quantization))[1])


@pytest.mark.parametrize("place", ["cpu", "auto"])
def test_places(place: str, plain: list[str]) -> None:
    assert answer(model_options(device_map=place))[1] == plain
