"""Models with quantized weights: native answers as the model does, every other point runs on what it computes."""

import copy
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

from adaptive_fusion.models import adapter_for
from adaptive_fusion.point import NATIVE, OperatingPoint
from adaptive_fusion.reference import model_path
from adaptive_fusion.runner import AdaptiveRunner

WHY = "needs pip install adaptive-fusion[compat]"


def torchao(reference: Any) -> Any:
    quantization = pytest.importorskip("torchao.quantization", reason=WHY)
    model = copy.deepcopy(reference)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    assert any(type(parameter).__name__ == "Int8Tensor" for parameter in model.parameters())
    return model


def bitsandbytes(reference: Any) -> Any:
    pytest.importorskip("bitsandbytes", reason=WHY)
    config = BitsAndBytesConfig(load_in_8bit=True)
    model = AutoModelForImageTextToText.from_pretrained(model_path(), quantization_config=config).eval()
    assert any(type(module).__name__ == "Linear8bitLt" for module in model.modules())
    return model


@pytest.mark.parametrize("quantize", [torchao, bitsandbytes])
def test_a_quantized_model_answers(quantize: Any, reference_model: Any, processor: Any, noise_image: Any) -> None:
    model = quantize(reference_model)
    content = [{"type": "image", "image": noise_image(96, 64)}, {"type": "text", "text": "Describe the screen."}]
    inputs = adapter_for(model, processor).prepare([{"role": "user", "content": content}], NATIVE)
    expected = model.generate(**inputs, max_new_tokens=6)
    runner = AdaptiveRunner(model, processor, seed=0)
    plain = AdaptiveRunner(reference_model, processor, seed=0)
    assert torch.equal(runner.generate(**inputs, point=NATIVE, max_new_tokens=6), expected)
    # Untrained fusion is the identity, on quantized mergers too.
    assert torch.equal(runner.generate(**inputs, point=OperatingPoint("weighted", 6), max_new_tokens=6), expected)
    for name in ("native@0.5", "gated12r8@0.5", "sum9", "top"):
        point = OperatingPoint.parse(name)
        taps = [each.adapter.encode(inputs, point).inputs["mm_encoder_outputs"]["image"] for each in (runner, plain)]
        for ours, theirs in zip(taps[0].deepstack_features, taps[1].deepstack_features, strict=True):
            assert torch.allclose(torch.cat(ours), torch.cat(theirs), atol=0.1 * float(torch.cat(theirs).abs().max()))
        runner.generate(**inputs, point=point, max_new_tokens=3)
    assert runner.generate(**inputs, max_new_tokens=3).shape[1] <= inputs["input_ids"].shape[1] + 3
