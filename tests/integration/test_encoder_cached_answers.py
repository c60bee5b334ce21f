"""What the encoder made of a medium is not made again, answers are what they were, and no medium passes for another."""

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from batches import paying, together
from peft import LoraConfig, get_peft_model
from transformers import StoppingCriteria

from adaptive_fusion.budget import Budget
from adaptive_fusion.control.estimators import ENCODED
from adaptive_fusion.errors import ConfigError
from adaptive_fusion.media.clips import Video
from adaptive_fusion.point import NATIVE, OperatingPoint
from adaptive_fusion.prepared import Turn
from adaptive_fusion.reference.screens import make_scene
from adaptive_fusion.reply import Reply
from adaptive_fusion.runner import AdaptiveRunner

HALF, FEWER = OperatingPoint(downsample=0.5), OperatingPoint(max_pixels=4096)
TOP = OperatingPoint(fusion="top")
FUSED = OperatingPoint(fusion="sum", layers=6)


@pytest.fixture
def cached(reference_model: Any, processor: Any) -> AdaptiveRunner:
    return AdaptiveRunner(reference_model, processor, policy="reference-balanced", encoder_cache_mb=64)


@pytest.fixture
def plain(reference_model: Any, processor: Any) -> AdaptiveRunner:
    return AdaptiveRunner(reference_model, processor, policy="reference-balanced")


@pytest.fixture
def tower_runs(reference_model: Any) -> Iterator[list[int]]:
    """Grows by the patches of each run of the vision tower."""
    runs: list[int] = []
    handle = reference_model.model.visual.register_forward_hook(
        lambda _module, given, kwargs, _out: runs.append(int(kwargs["grid_thw"].prod(-1).sum())), with_kwargs=True
    )
    yield runs
    handle.remove()


def asked(runner: AdaptiveRunner, media: Any, point: OperatingPoint = NATIVE, **more: Any) -> Reply:
    return runner.prepared(media, "What is shown?", point=point, max_new_tokens=4, **more).chat()


def test_answers_are_the_same_and_the_encoder_runs_once(
    cached: AdaptiveRunner, plain: AdaptiveRunner, noise_image: Any, tower_runs: list[int]
) -> None:
    one, other = noise_image(64, 48), noise_image(48, 64)
    frames = np.stack([np.asarray(noise_image(48, 48, seed)) for seed in range(3)])
    clip = Video(frames, (0.0, 0.5, 1.0), 1.5, 3)
    for point in (NATIVE, HALF, TOP, FUSED, FEWER):
        media = [other, clip, one, other]
        expected = asked(plain, media, point)
        assert asked(cached, media, point).token_ids == expected.token_ids
        tower_runs.clear()
        again = asked(cached, media, point)
        assert again.token_ids == expected.token_ids
        assert not tower_runs and again.measurement.patches == 0 and again.decision.encoder_cache == "hit"
        assert again.measurement.visual_tokens == expected.measurement.visual_tokens
        assert again.measurement.prompt_tokens == expected.measurement.prompt_tokens


def test_only_what_is_not_there_is_encoded(cached: AdaptiveRunner, noise_image: Any, tower_runs: list[int]) -> None:
    one, other = noise_image(96, 64), noise_image(64, 80)
    assert asked(cached, one).decision.encoder_cache == "miss"
    both = asked(cached, [one, other])
    assert both.decision.encoder_cache == "part" and tower_runs == [12 * 8, 8 * 10]
    assert asked(cached, other, HALF).decision.encoder_cache == "hit"  # pooled from what is kept
    assert asked(cached, other, TOP).decision.encoder_cache == "hit"  # no taps
    for point in (FUSED, FEWER):
        assert asked(cached, one, point).decision.encoder_cache == "miss"
    assert asked(cached, one, tenant="somebody").decision.encoder_cache == "miss"
    assert asked(cached, one.transpose(0)).decision.encoder_cache == "miss"
    counts = cached.encoder_cache.counts()  # type: ignore[union-attr]
    assert (counts.hits, counts.misses) == (3, 6) and not counts.evicted


def test_a_hit_is_known_before_and_teaches_nothing_of_encoding(
    cached: AdaptiveRunner, plain: AdaptiveRunner, noise_image: Any
) -> None:
    image = noise_image(96, 64)
    first = asked(cached, image)
    assert first.decision.predicted is not None and first.decision.predicted.encode_ms > 0
    before = cached.controller.state()
    known = cached.decide(image, "What is shown?")
    again = asked(cached, image)
    assert known.encoder_cache and again.decision.predicted is not None
    assert again.decision.predicted.encode_ms == 0.0
    after = cached.controller.state()
    for time in ("ttft", "latency"):
        own = {key: row for key, row in after[time]["points"].items() if not key.endswith(ENCODED)}
        assert own == before[time]["points"] and len(own) < len(after[time]["points"])
        assert {**after[time], "points": 0} == {**before[time], "points": 0}
    assert cached.work(image, "?", NATIVE, 4) == plain.work(image, "?", NATIVE, 4)  # what it would be for anybody


def test_weights_whose_writes_are_not_counted_are_known_by_their_values(processor: Any, noise_image: Any) -> None:
    with torch.inference_mode():  # its tensors have no version
        cached = AdaptiveRunner.from_pretrained("reference", encoder_cache_mb=16)
    image = noise_image(96, 64)
    assert [asked(cached, image).decision.encoder_cache for _ in range(2)] == ["miss", "hit"]
    with torch.inference_mode():
        cached.model.model.visual.blocks[0].mlp.linear_fc1.weight.mul_(1.01)
    assert asked(cached, image).decision.encoder_cache == "miss"


def test_what_changes_the_encoder_changes_the_key(
    cached: AdaptiveRunner, reference_model: Any, noise_image: Any
) -> None:
    image, tower = noise_image(96, 64), reference_model.model.visual

    def there() -> bool:
        return asked(cached, image).decision.encoder_cache == "hit"

    assert not there() and there()
    weight = tower.blocks[0].mlp.linear_fc1.weight
    before = weight.detach().clone()
    try:
        weight.data.mul_(1.01)  # no version counter tells of this one
        assert not there() and there()
        half = len(weight) // 2
        weight.data[:half].mul_(1.01)  # nor of these, of which each spares the middle
        assert not there() and there()
        weight.data[half + 1 :].mul_(1.01)
        assert not there() and there()
    finally:
        with torch.no_grad():
            weight.copy_(before)
    assert not there()  # written to: nobody knows that it is what it was
    image_processor = cached.processor.image_processor
    mean = image_processor.image_mean
    try:
        image_processor.image_mean = [0.4, 0.5, 0.5]
        assert not there()
    finally:
        image_processor.image_mean = mean
    assert there()


def test_a_conversation_keeps_its_plan_until_the_question_or_the_budget_asks_for_another(
    reference_model: Any, processor: Any
) -> None:
    runner = AdaptiveRunner(reference_model, processor, policy="balanced", encoder_cache_mb=64, escalate=False)
    image = make_scene("dense", 1, "eval", (384, 384)).image
    said: list[dict[str, Any]] = []

    def turn(question: str, **more: Any) -> Reply:
        media = [{"type": "image", "image": image}] if not said else []
        said.append({"role": "user", "content": [*media, {"type": "text", "text": question}]})
        reply = runner.prepared(said, max_new_tokens=2, **more).chat()
        said.append({"role": "assistant", "content": reply.text or "?"})
        return reply

    def pixels(reply: Reply) -> int:
        return reply.decision.point.max_pixels or image.width * image.height

    caption = turn("Write a caption for this image.")
    assert not caption.decision.conversation
    print_ = turn("Read the small print in the footer.")
    alone = runner.chat(image, "Read the small print in the footer.", max_new_tokens=2)
    assert pixels(print_) == pixels(alone) > pixels(caption)
    assert print_.decision.conversation == {
        "from": caption.decision.rung,
        "to": print_.decision.rung,
        "change": "rises",
    }
    again = turn("Write a caption for this image.")
    assert again.decision.point == print_.decision.point and again.decision.conversation["change"] == "stays"
    assert again.decision.encoder_cache == "hit"
    strangers = runner.prepared(said, "And now?", max_new_tokens=2, tenant="somebody").decide()
    assert not strangers.conversation
    late = turn("Write a caption for this image.", budget=Budget(latency_ms=0.01))
    assert pixels(late) < pixels(again) or late.decision.point.downsample < again.decision.point.downsample
    assert late.decision.conversation["change"] == "falls" and "falls" in late.decision.reason


def test_a_larger_image_in_a_conversation_gives_the_smaller_no_less_and_that_is_said(
    reference_model: Any, processor: Any
) -> None:
    runner = AdaptiveRunner(reference_model, processor, policy="balanced", encoder_cache_mb=64, escalate=False)

    def about(side: int) -> list[dict[str, Any]]:
        image = make_scene("dense", 1, "eval", (side, side)).image
        shown = {"type": "image", "image": image}
        return [{"role": "user", "content": [shown, {"type": "text", "text": "Write a caption for this image."}]}]

    said = about(256)
    first = runner.chat(said, max_new_tokens=2)
    assert first.decision.point.max_pixels
    said += [{"role": "assistant", "content": "?"}, *about(448)]
    second = runner.chat(said, max_new_tokens=2)
    assert second.decision.rung == first.decision.rung  # the same step: a share of the largest image's pixels
    assert (second.decision.point.max_pixels or 448 * 448) > first.decision.point.max_pixels
    assert second.decision.conversation["change"] == "rises" and "size of the largest" in second.decision.reason
    said += [{"role": "assistant", "content": "?"}, {"role": "user", "content": "Write a caption for both."}]
    third = runner.chat(said, max_new_tokens=2)
    assert third.decision.point == second.decision.point and third.decision.conversation["change"] == "stays"
    assert third.decision.encoder_cache == "hit"


def test_what_is_put_out_before_its_row_comes_is_encoded_again(
    reference_model: Any, processor: Any, noise_image: Any, tower_runs: list[int]
) -> None:
    runner = AdaptiveRunner(
        reference_model, processor, policy="native", profile=paying(), escalate=False, encoder_cache_mb=1
    )
    small, large = noise_image(64, 64), noise_image(384, 384)
    expected = [asked(runner, each, do_sample=False).token_ids for each in (small, large)]
    cache = runner.encoder_cache
    assert cache is not None
    cache.clear()
    asked(runner, large, do_sample=False)
    cache.max_bytes = cache.nbytes
    cache._kept = type(cache._kept)(cache.nbytes, cache._kept.getsizeof)  # room for the large one alone
    assert asked(runner, small, do_sample=False).decision.encoder_cache == "miss"
    calls = [
        runner.prepared(each, "What is shown?", point=NATIVE, max_new_tokens=4, do_sample=False)
        for each in (large, small)
    ]
    assert calls[1].decide().encoder_cache == "hit"
    tower_runs.clear()
    rows = together([Turn(call) for call in calls])
    assert [row.token_ids for row in rows] == expected[::-1] and tower_runs == [48 * 48, 8 * 8]
    assert [(row.decision.batch, row.decision.encoder_cache) for row in rows] == [(2, "miss")] * 2


def test_adapters_on_the_tower_have_entries_of_their_own(tiny_dense: Any, processor: Any, noise_image: Any) -> None:
    torch.manual_seed(0)
    adapted = LoraConfig(target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(copy.deepcopy(tiny_dense), adapted).eval()
    runner = AdaptiveRunner(model, processor, policy="native", encoder_cache_mb=8)
    bare = AdaptiveRunner(tiny_dense, processor, policy="native")
    image = noise_image(64, 64)

    def found() -> str:
        return asked(runner, image).decision.encoder_cache

    assert [found(), found()] == ["miss", "hit"]
    with model.disable_adapter():
        assert [found(), found()] == ["miss", "hit"]
        assert asked(runner, image).token_ids == asked(bare, image).token_ids
    assert found() == "hit"
    for layer in model.modules():
        if isinstance(scaling := getattr(layer, "scaling", None), dict):
            scaling["default"] = 3.0
    assert found() == "miss"
    model.merge_adapter()
    assert found() == "miss"


def test_beams_leave_what_is_kept_as_it_is(cached: AdaptiveRunner, plain: AdaptiveRunner, noise_image: Any) -> None:
    media, beams = [noise_image(64, 48), noise_image(48, 64)], {"num_beams": 3, "do_sample": False}
    for _ in range(2):
        for more in (beams, {}):
            for point in (NATIVE, HALF):
                assert asked(cached, media, point, **more).token_ids == asked(plain, media, point, **more).token_ids


def test_memory_that_runs_out_gets_back_what_is_kept(tiny_dense: Any, processor: Any, noise_image: Any) -> None:
    runner, image = AdaptiveRunner(tiny_dense, processor, policy="native", encoder_cache_mb=8), noise_image(64, 64)
    asked(runner, image)
    held: list[int] = []

    class Starved(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> bool:
            held.append(runner.encoder_cache.nbytes)  # type: ignore[union-attr]
            if len(held) == 1:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return False

    other = noise_image(64, 80)
    asked(runner, other, stopping_criteria=[Starved()])
    both = held[0]
    asked(runner, image)
    asked(runner, other)
    assert runner.encoder_cache is not None and 0 < held[1] < both <= runner.encoder_cache.nbytes


def test_without_a_cache_nothing_is_said_of_one(plain: AdaptiveRunner, noise_image: Any) -> None:
    assert plain.encoder_cache is None and asked(plain, noise_image(64, 64)).decision.encoder_cache == ""
    with pytest.raises(ConfigError, match="encoder_cache_mb is -1"):
        AdaptiveRunner(plain.model, plain.processor, encoder_cache_mb=-1)
