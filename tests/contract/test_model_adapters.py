"""What every model family must do through its adapter: native is native, knobs that apply work, others are refused.

Real classes of transformers with tiny random weights; the processors are the families' own.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoProcessor,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessor,
    Gemma3Processor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
)

from adaptive_fusion.errors import ConfigError, PolicyMismatchWarning, UnsupportedModelError
from adaptive_fusion.execution.encoder_cache import EncoderCache
from adaptive_fusion.execution.request import build_request
from adaptive_fusion.features.complexity import measure_complexity
from adaptive_fusion.media.clips import Video
from adaptive_fusion.models import GridAdapter, Size, adapter_for
from adaptive_fusion.models.encoder_keys import EncoderKeys
from adaptive_fusion.models.fingerprint import fingerprint
from adaptive_fusion.point import NATIVE, OperatingPoint
from adaptive_fusion.policy import Policy
from adaptive_fusion.policy.fitted import Fitted
from adaptive_fusion.reference import model_path
from adaptive_fusion.runner import AdaptiveRunner
from tests.conftest import _random, tiny_text, tiny_vision, token_ids


def qwen25(processor: Any) -> tuple[Any, Any]:
    text = {**tiny_text(processor.tokenizer), "max_position_embeddings": 2048}
    text.pop("head_dim")
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "patch_size": 8,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": 32,
        "window_size": 32,
        "fullatt_block_indexes": [1],
    }
    model = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(text_config=text, vision_config=vision, **token_ids(processor))
    )
    videos = Qwen2VLVideoProcessor(
        patch_size=8, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 1024, "longest_edge": 147456}
    )
    return model, Qwen2_5_VLProcessor(
        image_processor=processor.image_processor,
        tokenizer=processor.tokenizer,
        video_processor=videos,
        chat_template=processor.chat_template,
    )


def qwen35(processor: Any) -> tuple[Any, Any]:
    text = {**tiny_text(processor.tokenizer), "linear_key_head_dim": 8, "linear_value_head_dim": 8}
    text |= {"linear_num_key_heads": 2, "linear_num_value_heads": 2}
    text["rope_parameters"] = {**text["rope_parameters"], "partial_rotary_factor": 1.0}
    vision = {k: v for k, v in tiny_vision().items() if k != "deepstack_visual_indexes"}
    config = Qwen3_5Config(text_config=text, vision_config=vision, **token_ids(processor))
    return Qwen3_5ForConditionalGeneration(config), processor


def gemma3(processor: Any) -> tuple[Any, Any]:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=processor.tokenizer.backend_tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        padding_side="left",
        extra_special_tokens={
            "image_token": "<|image_pad|>",
            "boi_token": "<|vision_start|>",
            "eoi_token": "<|vision_end|>",
        },
    )
    ids = token_ids(processor)
    text = {k: v for k, v in tiny_text(tokenizer).items() if k != "rope_parameters"}
    config = Gemma3Config(
        text_config={**text, "sliding_window": 512},
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 64,
            "patch_size": 8,
        },
        mm_tokens_per_image=16,
        image_token_index=ids["image_token_id"],
        boi_token_index=ids["vision_start_token_id"],
        eoi_token_index=ids["vision_end_token_id"],
    )
    template = processor.chat_template.replace("<|vision_start|><|image_pad|><|vision_end|>", "<|vision_start|>")
    images = Gemma3ImageProcessor(size={"height": 64, "width": 64})
    built = Gemma3Processor(images, tokenizer, chat_template=template, image_seq_length=16)
    return Gemma3ForConditionalGeneration(config), built


FAMILIES = {"Qwen2.5-VL": qwen25, "Qwen3.5": qwen35, "Gemma 3": gemma3}


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request: pytest.FixtureRequest, processor: Any) -> tuple[str, Any, Any]:
    model, its_processor = FAMILIES[request.param](processor)
    return request.param, _random(model), its_processor


def test_every_family_has_a_fingerprint_that_policies_can_keep(family: tuple[str, Any, Any], tmp_path: Path) -> None:
    _, model, processor = family
    found = fingerprint(adapter_for(model, processor))
    assert found.architecture == type(model).__name__ and found.digest
    for part in (found.vision, found.text):
        assert {"depth", "width", "heads", "mlp"} <= set(part)
    assert {"min_pixels", "max_pixels"} <= set(found.processor)
    saved = replace(Policy.load("native"), name="own", fitted=Fitted(found)).save(tmp_path / "own")
    assert Policy.load(saved).fitted.differences(found) == ()


def ask(*images: Any) -> list[dict[str, Any]]:
    parts = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": "Describe the screen."}]}]


def test_native_equals_generate_and_downsampling_drops_tokens(family: Any, noise_image: Any) -> None:
    _, model, processor = family
    adapter = adapter_for(model, processor)
    inputs = adapter.prepare(ask(noise_image(96, 64), noise_image(64, 64, 1)), NATIVE)
    expected = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    native = adapter.encode(inputs, NATIVE)
    assert torch.equal(model.generate(**native.inputs, max_new_tokens=6, do_sample=False), expected)
    tokens = [native.visual_tokens]
    for ratio in (0.5, 0.25):
        point = OperatingPoint(downsample=ratio)
        encoded = adapter.encode(inputs, point)
        assert encoded.visual_tokens == adapter.plan(adapter.sizes(inputs), point).tokens
        if isinstance(adapter, GridAdapter):
            replayed = adapter.encode(inputs, point, adapter.record(inputs, point, adapter.levels(point)))
            outputs = (each.inputs["mm_encoder_outputs"]["image"].pooler_output for each in (encoded, replayed))
            assert all(torch.equal(*pair) for pair in zip(*outputs, strict=True))
        model.generate(**encoded.inputs, max_new_tokens=3, do_sample=False)
        tokens.append(encoded.visual_tokens)
    assert tokens[0] > tokens[1] > tokens[2] >= 2


def bordered(width: int, height: int, seed: int = 0) -> Image.Image:
    """Noise in the upper left quarter of a screen of one shade."""
    pixels = np.full((height, width, 3), 235, np.uint8)
    pixels[: height // 2, : width // 2] = np.random.default_rng(seed).integers(0, 256, (height // 2, width // 2, 3))
    return Image.fromarray(pixels)


def features(encoded: Any) -> list[torch.Tensor]:
    """Everything that the language model is given of images."""
    out = encoded.inputs["mm_encoder_outputs"]["image"]
    return [
        part for stream in (out.pooler_output, *(getattr(out, "deepstack_features", None) or ())) for part in stream
    ]


def test_blank_parts_are_left_out_of_the_encoder_where_it_can_be_told_so(family: Any, noise_image: Any) -> None:
    name, model, processor = family
    adapter, point = adapter_for(model, processor), OperatingPoint(blanks=2)
    if name != "Qwen3.5":
        with pytest.raises(UnsupportedModelError, match="blanks: "):
            adapter.require(point)
        return
    blanks_leave_the_rest_as_it_is(adapter, noise_image)


def test_blank_parts_are_left_out_of_an_encoder_with_taps(tiny_dense: Any, processor: Any, noise_image: Any) -> None:
    adapter = adapter_for(tiny_dense, processor)
    blanks_leave_the_rest_as_it_is(adapter, noise_image)
    inputs = adapter.prepare(ask(bordered(128, 96), bordered(96, 96)), NATIVE)
    for point in (OperatingPoint("gated", 12, 0.5, adapter_rank=8, blanks=2), OperatingPoint("top", blanks=4)):
        with adapter.built([point]):
            recorded = adapter.record(inputs, point, adapter.levels(point))
            alone, again = adapter.encode(inputs, point), adapter.encode(inputs, point, recorded)
        assert alone.patches == again.patches < adapter.plan(adapter.sizes(inputs), point).patches
        for pair in zip(features(alone), features(again), strict=True):
            torch.testing.assert_close(*pair)


def blanks_leave_the_rest_as_it_is(adapter: Any, noise_image: Any) -> None:
    point, before = OperatingPoint(blanks=2), adapter.model.config.vision_config._attn_implementation
    busy = adapter.prepare(ask(noise_image(96, 64), noise_image(64, 64, 1)), NATIVE)
    native, same = adapter.encode(busy, NATIVE), adapter.encode(busy, point)
    assert same.patches == native.patches
    assert all(torch.equal(*pair) for pair in zip(features(native), features(same), strict=True))

    # The busy one is large enough to hide the others, if it were all of them together that decided.
    images = [bordered(128, 96), noise_image(512, 512), bordered(96, 128, 1)]
    inputs = adapter.prepare(ask(*images), NATIVE)
    native, found = adapter.encode(inputs, NATIVE), adapter.encode(inputs, point)
    assert found.patches < native.patches and found.visual_tokens == native.visual_tokens
    for key in ("input_ids", "image_grid_thw"):
        assert torch.equal(native.inputs[key], found.inputs[key])
    assert adapter.model.config.vision_config._attn_implementation == before
    adapter.model.generate(**found.inputs, max_new_tokens=3, do_sample=False)
    # Packed, each is what it is alone.
    alone = [adapter.encode(adapter.prepare(ask(image), NATIVE), point) for image in images]
    assert sum(each.patches for each in alone) == found.patches
    streams = [features(each) for each in alone]
    together = [each[place] for place in range(len(streams[0])) for each in streams]
    for pair in zip(features(found), together, strict=True):
        torch.testing.assert_close(*pair)


def test_knobs_that_do_not_apply_are_refused_by_name_or_set_aside(family: Any) -> None:
    name, model, processor = family
    adapter = adapter_for(model, processor)
    point = OperatingPoint("gated", 12, 0.5, 8192, 8)
    with pytest.raises(UnsupportedModelError, match=r"fusion: .*no DeepStack taps"):
        adapter.require(point)
    kept, reasons = adapter.restrict(point)
    assert kept.downsample == 0.5 and (kept.fusion, kept.layers, kept.adapter_rank) == ("native", 3, 0)
    assert (kept.max_pixels == 8192) == (name != "Gemma 3") and reasons


def test_the_pixel_budget_is_kept_where_it_applies(family: Any, noise_image: Any) -> None:
    name, model, processor = family
    if name == "Gemma 3":
        assert "max_pixels" in adapter_for(model, processor).refusals
        return
    adapter = adapter_for(model, processor)
    point = OperatingPoint(max_pixels=4096)
    inputs = adapter.prepare(ask(noise_image(160, 128)), point)
    (size,) = adapter.sizes(inputs)
    assert size.height * size.width <= 4096
    assert adapter.encode(inputs, point).patches == adapter.plan([Size(1, 128, 160)], point).patches


def test_images_are_put_back_together_from_the_processors_tensors(family: Any, noise_image: Any) -> None:
    _, model, processor = family
    adapter = adapter_for(model, processor)
    smooth = noise_image(4, 4).resize((64, 64))
    (found,) = adapter.thumbnails(adapter.prepare(ask(smooth), NATIVE))
    assert found.shape == (64, 64, 3)
    assert abs(found.astype(int) - torch.tensor(list(smooth.getdata())).view(64, 64, 3).numpy()).max() <= 1


@pytest.mark.filterwarnings("ignore:Passing `min_pixels`:FutureWarning")  # transformers' own, about its own defaults
@pytest.mark.parametrize("given", [{"min_pixels": 4096, "max_pixels": 10000}, {"max_pixels": 10000}])
def test_a_processor_loaded_with_its_own_limits_keeps_the_points_budget(
    tiny_dense: Any, noise_image: Any, clip: Any, given: dict[str, int]
) -> None:
    adapter = adapter_for(tiny_dense, AutoProcessor.from_pretrained(model_path(), **given))
    sizes = [Size(1, 200, 300), Size(*clip.frames.shape[:3], clip=True)]
    content = [{"type": "image", "image": noise_image(300, 200)}, {"type": "video", "video": clip}]
    for point in (NATIVE, OperatingPoint(max_pixels=6400), OperatingPoint(max_pixels=2048)):
        inputs = adapter.prepare([{"role": "user", "content": content}], point)
        still, *_ = adapter.sizes(inputs)
        assert still.height * still.width <= (point.max_pixels or 10000)
        assert adapter.encode(inputs, point).patches == adapter.plan(sizes, point).patches


def test_tensors_that_lost_their_other_half_are_refused(family: Any, noise_image: Any) -> None:
    name, model, processor = family
    if name == "Gemma 3":  # its images have no grid
        return
    adapter = adapter_for(model, processor)
    inputs = adapter.prepare(ask(noise_image(64, 64)), NATIVE)
    pixels = {**inputs, "pixel_values": inputs["pixel_values"][:-1]}
    for half in ({k: v for k, v in inputs.items() if k != "image_grid_thw"}, {**inputs, "pixel_values": None}, pixels):
        for use in (adapter.sizes, adapter.thumbnails, lambda given: adapter.encode(given, NATIVE)):
            with pytest.raises(
                ConfigError, match=r"pixel_values has \d+ rows and image_grid_thw stands for \d+ patches"
            ):
                use(half)


def test_the_runner_drives_every_family_with_a_shipped_policy(family: Any, noise_image: Any) -> None:
    _, model, processor = family
    with pytest.warns(PolicyMismatchWarning, match="another architecture"):
        runner = AdaptiveRunner(model, processor, policy=Policy.load("reference-balanced"))
    reply = runner.chat(noise_image(96, 64), "Describe the screen.", max_new_tokens=4)
    assert reply.decision.lane in ("weighted", "gated") and reply.measurement.new_tokens >= 1
    inputs = runner.adapter.prepare(ask(noise_image(96, 64)), NATIVE)
    out = runner.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert torch.equal(out[:, : inputs["input_ids"].shape[1]], inputs["input_ids"])
    assert measure_complexity(runner.adapter.thumbnails(inputs)[0]).score >= 0


def test_what_the_encoder_made_of_media_serves_every_family(family: Any, noise_image: Any) -> None:
    """Some media there and some not, clips beside images where the family takes them: as if all were encoded."""
    name, model, processor = family
    adapter, cache = adapter_for(model, processor), EncoderCache(8)
    keys = EncoderKeys(adapter)
    one, other = noise_image(64, 48), noise_image(48, 80, 1)
    clip = Video(np.stack([np.asarray(noise_image(48, 48, n)) for n in range(4)]), (0.0, 0.5, 1.0, 1.5), 2.0, 4)
    asked = [[one], [other, one]] if name == "Gemma 3" else [[one], [clip, one], [other, clip, one]]
    for media, there in zip(asked, ([False], [False, True], [False, True, True]), strict=False):
        request = build_request(media, "?", exact=True)
        plain = adapter.encode(adapter.prepare(request.messages, NATIVE), NATIVE)
        for expected in (there, [True] * len(media)):
            seen = keys.seen(cache, request.messages, request.digests, "")
            assert seen is not None and list(seen(NATIVE)) == expected
            found = adapter.encode(adapter.prepare(request.messages, NATIVE, reuse=seen.at(NATIVE)), NATIVE)
            assert found.inputs.keys() == plain.inputs.keys() and found.visual_tokens == plain.visual_tokens
            for key in plain.inputs.keys() - {"mm_encoder_outputs"}:
                torch.testing.assert_close(found.inputs[key], plain.inputs[key], rtol=0, atol=0)
            for kind, out in plain.inputs["mm_encoder_outputs"].items():
                same = found.inputs["mm_encoder_outputs"][kind]
                torch.testing.assert_close(list(same.pooler_output), list(out.pooler_output))
        assert found.patches == 0
