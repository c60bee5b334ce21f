"""Messages through a runner on the reference model: begun answers, details, special tokens, and the docs' example."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from adaptive_fusion.budget import Budget
from adaptive_fusion.errors import ConfigError
from adaptive_fusion.evaluation.questions import Question
from adaptive_fusion.learning.labelling.labeller import RunnerModel
from adaptive_fusion.learning.labelling.scoring import NATIVE_RUNG
from adaptive_fusion.point import NATIVE, OperatingPoint
from adaptive_fusion.reference.screens import make_scene
from adaptive_fusion.runner import AdaptiveRunner

DOCS = Path(__file__).parents[2] / "docs" / "messages.md"


@pytest.fixture(scope="module")
def runner(reference_model: Any, processor: Any) -> AdaptiveRunner:
    return AdaptiveRunner(reference_model, processor, policy="reference-balanced", seed=0)


@pytest.fixture(scope="module")
def screen() -> Image.Image:
    return make_scene("simple", 0, "eval", (112, 144)).image


def conversation(screen: Image.Image, *more: dict[str, Any], **options: Any) -> list[dict[str, Any]]:
    shown = {"type": "image", "image": screen, **options}
    return [{"role": "user", "content": [shown, "Describe the screen."]}, *more]


def test_the_example_of_the_docs_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (snippet,) = re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    exec(compile(snippet, str(DOCS), "exec"), {})
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("point", [NATIVE, OperatingPoint(downsample=0.5)])
def test_an_answer_begun_by_the_model_itself_comes_to_the_same_end(
    runner: AdaptiveRunner, screen: Image.Image, point: OperatingPoint
) -> None:
    options: dict[str, Any] = {"point": point, "max_new_tokens": 24, "do_sample": False}
    whole = runner.chat(conversation(screen), **options)
    tokenizer = runner.processor.tokenizer
    starts = [tokenizer.decode(whole.token_ids[:count]) for count in range(1, len(whole.token_ids) - 2)]
    begun = [text for count, text in enumerate(starts, 1) if tokenizer(text).input_ids == list(whole.token_ids[:count])]
    assert begun
    for text in begun[:: max(1, len(begun) // 3)]:
        messages = conversation(screen, {"role": "assistant", "content": text})
        left = 24 - len(tokenizer(text).input_ids)
        with runner.stream(messages, **{**options, "max_new_tokens": left}) as stream:
            pieces = "".join(stream)
        assert text + pieces == text + stream.reply.text == whole.text


def test_full_detail_is_kept_while_the_budget_allows(runner: AdaptiveRunner, screen: Image.Image) -> None:
    auto, high = (runner.decide(conversation(screen, detail=detail)) for detail in ("auto", "high"))
    assert not auto.point.is_full and high.point.is_full and "full detail" in high.reason
    given = runner.chat(conversation(screen, detail="high"), point=OperatingPoint.parse("native@0.5"), max_new_tokens=1)
    assert not given.decision.point.is_full and "over the full detail" in given.decision.reason
    rushed = runner.decide(conversation(screen, detail="high"), budget=Budget(latency_ms=0.01))
    assert not rushed.feasible and rushed.point == runner.decide(
        conversation(screen), budget=Budget(latency_ms=0.01)
    ).point  # fmt: skip


def test_what_a_part_asks_for_is_what_native_means(runner: AdaptiveRunner, screen: Image.Image) -> None:
    own, fewer = (
        runner.chat(conversation(screen, **options), point=NATIVE, max_new_tokens=2).measurement
        for options in ({}, {"max_pixels": 4096})
    )
    assert fewer.patches * 64 <= 4096 < own.patches * 64
    capped = runner.chat(
        conversation(screen, max_pixels=4096), point=replace(NATIVE, max_pixels=1024), max_new_tokens=2
    ).measurement
    assert capped.patches * 64 <= 1024


def test_views_of_one_picture_share_no_recording(runner: AdaptiveRunner, screen: Image.Image) -> None:
    model = RunnerModel(runner, max_new_tokens=2)
    took = [
        model.answers(Question(conversation(screen, **options), ""), [NATIVE_RUNG])[NATIVE_RUNG.name][1]
        for options in ({}, {"max_pixels": 4096}, {})
    ]
    assert took[0].patches == took[2].patches != took[1].patches


def test_special_tokens_in_a_question_are_answered_at_every_point(runner: AdaptiveRunner, screen: Image.Image) -> None:
    for point in (NATIVE, OperatingPoint("top", downsample=0.5), OperatingPoint("gated", 12, 0.25, adapter_rank=8)):
        for said in runner.processor.tokenizer.added_tokens_encoder:
            plain = runner.chat(screen, "What does mean?", point=point, max_new_tokens=1).measurement
            reply = runner.chat(screen, f"What does {said} mean?", point=point, max_new_tokens=1)
            assert reply.measurement.visual_tokens == plain.visual_tokens
            assert reply.measurement.prompt_tokens > plain.prompt_tokens + 1  # as characters, not as one token


def test_what_the_template_cannot_take_is_refused_by_name(runner: AdaptiveRunner, screen: Image.Image) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    with pytest.raises(ConfigError, match="does not show tools"):
        runner.chat(screen, "Call f.", tools=[tool])
    with pytest.raises(ConfigError, match="continue_final_message is True"):
        runner.chat(screen, "x", continue_final_message=True)
    with (
        pytest.raises(ConfigError, match="does not show tools"),
        runner.stream(screen, "Call f.", tools=[tool]) as stream,
    ):
        list(stream)
