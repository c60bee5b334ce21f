"""What an adaptation takes over from an earlier run, and what it must not."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adaptive_fusion.errors import ConfigError
from adaptive_fusion.evaluation.questions import Question
from adaptive_fusion.features.complexity import FEATURE_NAMES, VERSION
from adaptive_fusion.learning.adapting.adapt import LEAST_JUDGED
from adaptive_fusion.learning.adapting.answers import answered, read_answers
from adaptive_fusion.learning.adapting.cases import Case, halves
from adaptive_fusion.learning.adapting.judge import FOLDS
from adaptive_fusion.learning.adapting.needs import LEAST_IMAGES
from adaptive_fusion.learning.adapting.work import Terms, Work
from adaptive_fusion.learning.data.labels import Subject
from adaptive_fusion.policy.fitted import Fingerprint
from adaptive_fusion.policy.rungs import Rung

MODEL = Fingerprint("Model", {"depth": 2}, {"depth": 2}, "abc", {"max_pixels": 1000})
TERMS = Terms(MODEL, "balanced", False, 160)
RUNGS = tuple(map(Rung.parse, ("native@1", "native@1/50%")))


def case(content: str, prompt: str = "p") -> Case:
    subject = Subject(content, "image", dict.fromkeys(FEATURE_NAMES, 0.0), VERSION, prompt_hash=prompt)
    info: Any = None  # nothing here plans
    return Case(Question(content, "Describe."), subject, info, -1.0)


def label(content: str, **quality: float) -> dict[str, Any]:
    values = {name.replace("_", "@1/") + "%" if "_" in name else f"{name}@1": each for name, each in quality.items()}
    measured = {name: {"visual_tokens": 4} for name in values}
    return {
        "content_hash": content, "prompt_hash": "p", "quality": values, "cost": values, "measurement": measured,
        "entropies": {}, "model": MODEL.to_dict(),
    }  # fmt: skip


def test_a_later_label_of_other_steps_does_not_hide_the_one_that_has_all_of_them(tmp_path: Path) -> None:
    file, content = tmp_path / "labels.jsonl", "0" * 64
    lines = [label(content, native=1.0, native_50=0.7), label(content, native=1.0, native_50=0.8)]
    lines += [label(content, native=1.0, native_25=0.1)]
    file.write_text("".join(json.dumps(each) + "\n" for each in lines))
    found = read_answers(file, [case(content), case("1" * 64)], RUNGS, 0.02, MODEL)
    assert found.quality.tolist() == [[1.0, 0.8]]
    assert answered(file) == {(content, "p")}
    with pytest.raises(ConfigError, match="labels of"):
        read_answers(file, [case(content)], RUNGS, 0.02, replace(MODEL, digest="def"))


def test_what_answers_depend_on_names_their_file() -> None:
    others = [
        replace(TERMS, model=replace(MODEL, digest="def")),
        replace(TERMS, model=replace(MODEL, processor={"max_pixels": 2000})),
        replace(TERMS, base="quality"),
        replace(TERMS, distilled=True),
        replace(TERMS, max_new_tokens=8),
    ]
    assert len({TERMS.key, *(each.key for each in others)}) == 6


def test_shares_stay_for_images_that_were_begun_and_are_chosen_anew_for_others(tmp_path: Path) -> None:
    work = Work(tmp_path / "work", TERMS)
    assert work.shares([0.5, 0.25], begun=False) == [0.5, 0.25]
    assert work.shares([0.75], begun=True) == [0.5, 0.25]
    assert work.shares([0.75], begun=False) == [0.75] == work.shares([0.5], begun=True)


def test_only_one_run_is_at_work_in_a_folder(tmp_path: Path) -> None:
    first, second = Work(tmp_path / "work", TERMS), Work(tmp_path / "work", replace(TERMS, base="quality"))
    with first.alone(), pytest.raises(ConfigError, match="another run is at work in 'work'"), second.alone():
        pass
    with second.alone():
        pass


def test_halves_are_of_whole_images_and_stay_when_images_are_added() -> None:
    names = [f"{each:064x}" for each in range(200)]
    cases = [case(name, prompt) for name in names for prompt in "ab"]
    one, other = halves(cases)
    assert {each.key for each in one} | {each.key for each in other} == {each.key for each in cases}
    contents = [{each.subject.content_hash for each in half} for half in (one, other)]
    assert contents[0].isdisjoint(contents[1]) and 70 < len(contents[0]) < 130
    few = halves(cases[:50])
    assert few[0] == [each for each in one if each in cases[:50]]


def test_policies_that_are_judged_have_as_many_images_as_their_own_needs_take() -> None:
    def least_without_a_fold(images: int) -> int:
        folds = np.arange(images) % FOLDS
        return min(int((folds != fold).sum()) for fold in range(FOLDS))

    assert least_without_a_fold(LEAST_JUDGED) >= LEAST_IMAGES > least_without_a_fold(LEAST_JUDGED - 1)
