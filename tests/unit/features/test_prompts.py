"""Prompt features: what they see, in two languages, and what they must not keep."""

import math
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptive_fusion.features.prompts import BUCKETS, PROMPT_FEATURE_NAMES, PROMPT_KINDS, prompt_features, prompt_kind

HASHED = [name for name in PROMPT_FEATURE_NAMES if name.startswith("prompt_hash_")]


@pytest.mark.parametrize(
    ("prompt", "kind"),
    [
        ("Describe the screen.", "describe"),
        ("Read the text.", "read"),
        ("What happens in the clip?", "event"),
        ("How many red icons are there?", "count"),
        ("Is there a red circle?", "yesno"),
        ("Doesn't the dialog have a button?", "yesno"),
        ("Where is the OK button?", "other"),
        ("请描述这张图片", "describe"),
        ("读出图中的文字", "read"),
        ("视频里发生了什么？", "event"),
        ("图中有多少个图标？", "count"),
        ("这张图片里有红色圆圈吗？", "yesno"),
        ("Can you describe the image?", "describe"),
        ("Could you please read the text?", "read"),
        ("Can you see any text?", "yesno"),
        ("Will you say yes or no: is there text?", "yesno"),
        ("", "other"),
    ],
)
def test_kinds_in_english_and_chinese(prompt: str, kind: str) -> None:
    assert prompt_kind(prompt) == kind
    if kind not in ("other",):
        assert prompt_features(prompt)[f"prompt_{kind}"] == 1.0


def test_flags_counts_and_shares() -> None:
    found = prompt_features("Compare 'Save' with \"Open\" and find the 12 differences 图")
    asked = {name for name, value in found.items() if value == 1.0 and name not in HASHED}
    assert asked == {"prompt_compare", "prompt_where", "prompt_quoted"}
    assert found["prompt_digits"] == pytest.approx(math.log1p(2))
    assert 0 < found["prompt_cjk"] < 0.1
    assert prompt_features("你好？")["prompt_question"] == prompt_features("ok?")["prompt_question"] == 1.0
    # A word inside another word is not that word.
    assert prompt_features("The bread is already spread")["prompt_read"] == 0.0


def test_a_question_at_either_end_of_a_long_prompt_is_seen() -> None:
    filler = "lorem ipsum dolor sit amet " * 4000
    assert prompt_kind(filler + "How many icons are there?") == "count"
    assert prompt_kind("Read the text. " + filler) == "read"
    longer, shorter = prompt_features(filler), prompt_features(filler[:2000])
    assert longer["prompt_log_words"] == pytest.approx(math.log1p(5 * 4000), rel=0.02)
    assert longer["prompt_log_chars"] > shorter["prompt_log_chars"]


def test_the_hash_is_the_same_in_every_process() -> None:
    code = "from adaptive_fusion.features.prompts import prompt_features as f; print(sorted(f('Read 读 it').items()))"
    runs = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True, text=True, check=True, timeout=300,
        ).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    assert runs == {f"{sorted(prompt_features('Read 读 it').items())}\n"}


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=1500))
def test_any_text_gives_the_same_bounded_numbers_each_time(prompt: str) -> None:
    found = prompt_features(prompt)
    assert tuple(found) == PROMPT_FEATURE_NAMES
    assert all(type(value) is float and math.isfinite(value) for value in found.values())
    norm = sum(found[name] ** 2 for name in HASHED)
    assert len(HASHED) == BUCKETS
    assert norm == pytest.approx(1.0) or norm == 0.0
    assert found == prompt_features(prompt)
    assert prompt_kind(prompt) in PROMPT_KINDS
