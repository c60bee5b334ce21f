"""What an answer is worth: against references or by the likelihood of the full answer, with inputs read from files."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from learning_data import CHEAP, RUNGS, STRONG, rung, subject
from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

from adaptive_fusion.errors import ConfigError
from adaptive_fusion.evaluation.folders import media_files, questions, read_references
from adaptive_fusion.evaluation.questions import Question
from adaptive_fusion.evaluation.text import word_f1
from adaptive_fusion.execution.batches import LEAST_SHARE, batches, collate
from adaptive_fusion.learning.data.labels import Subject
from adaptive_fusion.learning.labelling.scoring import ModelScorer, RungTiming
from adaptive_fusion.policy.fitted import Fingerprint
from adaptive_fusion.policy.rungs import Rung

LADDER = [rung(name) for name in RUNGS]


class Letters:
    """A model that reads the first letters of a word: all natively, half at half resolution."""

    fingerprint = Fingerprint("Letters", {}, {}, "abc")

    def describe(self, question: Question) -> Subject:
        return subject(np.array([1.0]), len(question.media))

    def answers(self, question: Question, rungs: Sequence[Rung]) -> dict[str, tuple[str, RungTiming]]:
        share = {r.name: r.point.downsample for r in rungs}
        return {
            name: (question.media[: round(len(question.media) * part)], RungTiming(10 * part, visual_tokens=4))
            for name, part in share.items()
        }

    def likelihoods(self, question: Question, text: str, rungs: Sequence[Rung]) -> dict[str, tuple[float, RungTiming]]:
        assert text == question.media  # the full-compute answer, whatever the rung
        return {r.name: (math.log(0.9 * r.point.downsample), RungTiming(10 * r.point.downsample)) for r in rungs}


def test_answers_are_scored_against_references_or_the_models_own_full_answer() -> None:
    scorer = ModelScorer(Letters())
    read = scorer.score(Question("ABCDEFGH", "Read.", ("abcdefgh",), metric="anls"), LADDER)
    assert read.quality == {"native@1": 1.0, STRONG: 1.0, "weighted3@1": 1.0, CHEAP: 0.5}
    assert read.reference_quality == 1.0 and read.cost[CHEAP] == 5.0
    assert read.measurement[CHEAP] == {"ttft_ms": 5.0, "visual_tokens": 4}
    wrong = scorer.score(Question("ABCD", "Read.", ("xyz",), metric="exact"), LADDER)
    assert wrong.reference_quality == 0.0 and set(wrong.quality.values()) == {0.0}
    own = scorer.score(Question("ABCD", "Read."), LADDER)
    assert own.reference_quality == 1.0
    assert own.quality == pytest.approx({"native@1": 1.0, STRONG: 1.0, "weighted3@1": 1.0, CHEAP: 0.5})
    with pytest.raises(ConfigError, match="'bleu'"):
        scorer.score(Question("A", "", ("A",), metric="bleu"), LADDER)


def test_word_f1_of_known_answers() -> None:
    assert word_f1("A red circle.", ["a red circle"]) == 1
    assert word_f1("a red circle", ["blue", "a red square"]) == pytest.approx(2 / 3)
    assert word_f1("", ["a"]) == 0 and word_f1("a a a a", ["a"]) == pytest.approx(2 / 5)


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(1, 500), max_size=30), most=st.integers(0, 2000))
def test_batches_hold_every_row_once_and_keep_to_their_size(lengths: list[int], most: int) -> None:
    groups = list(batches(lengths, most))
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    for group in groups:
        sizes = [lengths[i] for i in group]
        assert len(group) == 1 or (len(group) * max(sizes) <= most and min(sizes) >= LEAST_SHARE * max(sizes))


def test_rows_are_padded_on_the_left_and_followed_by_their_answers() -> None:
    rows = [
        {
            "input_ids": torch.tensor([[5, 6, 7]]),
            "attention_mask": torch.ones(1, 3, dtype=torch.long),
            "mm_token_type_ids": torch.tensor([[0, 1, 0]]),
            "image_grid_thw": torch.tensor([[1, 2, 2]]),
        },
        {
            "input_ids": torch.tensor([[8]]),
            "attention_mask": torch.ones(1, 1, dtype=torch.long),
            "mm_token_type_ids": torch.tensor([[0]]),
        },
    ]
    batch = collate(rows, [torch.tensor([1]), torch.tensor([2, 3])])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 1], [0, 8, 2, 3]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [0, 1, 1, 1]]
    assert batch["mm_token_type_ids"].tolist() == [[0, 1, 0, 0], [0, 0, 0, 0]]
    assert batch["image_grid_thw"].tolist() == [[1, 2, 2]]
    assert collate(rows[:1])["input_ids"].tolist() == [[5, 6, 7]]


def test_encoder_outputs_are_joined_by_kind_in_row_order() -> None:
    def encoded(kind: str, *counts: int) -> dict[str, Any]:
        features = [torch.full((count, 2), float(count)) for count in counts]
        taps = [[part + tap for part in features] for tap in (10, 20)]
        outputs = BaseModelOutputWithDeepstackFeatures(pooler_output=features, deepstack_features=taps)
        return {"input_ids": torch.tensor([[7]]), "mm_encoder_outputs": {kind: outputs}}

    batch = collate([encoded("image", 1, 2), encoded("video", 3), encoded("image", 4)])["mm_encoder_outputs"]
    assert list(batch) == ["image", "video"]
    assert [len(part) for part in batch["image"].pooler_output] == [1, 2, 4]
    first, second = ([int(part[0, 0]) for part in tap] for tap in batch["image"].deepstack_features)
    assert (first, second) == ([11, 12, 14], [21, 22, 24])
    assert [int(part[0, 0]) for tap in batch["video"].deepstack_features for part in tap] == [13, 23]


def test_folders_give_their_media_and_files_are_matched_with_references_by_name(tmp_path: Path) -> None:
    for name in ("b/2.PNG", "a.jpg", "notes.txt", "c.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"-")
    files, failed = media_files([tmp_path, tmp_path / "notes.txt", tmp_path / "a.jpg"])
    assert not failed
    assert [file.name for file in files] == ["a.jpg", "2.PNG", "c.mp4", "notes.txt"]

    table = tmp_path / "answers.csv"
    table.write_text(
        'path,reference,prompt,metric\nb/2.PNG,"TWO\nLINES",Read it.,anls\n'
        "b/2.PNG,a sign,,\nb/2.PNG,the sign,,\na.jpg,a cat,,\n"
    )
    found, failed = questions(files, "What is it?", read_references(table, "What is it?"))
    assert [(e.name, e.prompt, e.references, e.metric) for e in found] == [
        ("a.jpg", "What is it?", ("a cat",), "words"),
        ("2.PNG", "Read it.", ("TWO\nLINES",), "anls"),
        ("2.PNG", "What is it?", ("a sign", "the sign"), "words"),
    ]
    assert [name for name, _ in failed] == ["c.mp4", "notes.txt"]
    assert len(questions(files, "?")[0]) == 4

    coco = tmp_path / "captions.json"
    values = {
        "images": [{"id": 4, "file_name": "a.jpg"}],
        "annotations": [{"image_id": 4, "caption": "a cat"}, {"image_id": 4, "caption": "one cat"}],
    }
    coco.write_text(json.dumps(values), encoding="utf-8-sig")
    assert read_references(coco, "Q", "exact") == {"a.jpg": {("Q", "exact"): ["a cat", "one cat"]}}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("r.csv", "file,caption\n", "columns .*expected path and reference"),
        ("r.csv", "path,reference\nx/a.png,1\ny/a.png,1\n", "'x/a.png' and 'y/a.png'"),
        ("r.csv", "path,reference\na.png\n", "row 2"),
        ("r.csv", "path,reference,metric\na.png,1,bleu\n", "metric is 'bleu'"),
        ("r.json", "{", "not valid JSON"),
        ("r.json", '{"images": [], "annotations": [{"image_id": 9, "caption": "x"}]}', "image_id 9; expected"),
        ("r.json", '{"images": {}, "annotations": []}', "images dict; expected COCO's lists"),
        ("r.json", '{"images": [{"id": true, "file_name": "a"}], "annotations": []}', "id True; expected int or str"),
        ("none.csv", None, "cannot be read"),
    ],
)
def test_references_of_another_form_are_refused(tmp_path: Path, name: str, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_references(tmp_path / name, "?")


def test_what_cannot_be_gone_through_is_named_and_the_others_are_found(tmp_path: Path) -> None:
    for folder in ("bare", "shot.png", "full"):
        (tmp_path / folder).mkdir()
    (tmp_path / "full" / "gone.png").symlink_to("nowhere.png")  # to be refused by name, not passed over
    (tmp_path / "full" / "a.png").write_bytes(b"-")
    long, impossible = "x" * 5000, "a\0b.png"
    files, failed = media_files([tmp_path / "bare", tmp_path / "shot.png", long, tmp_path / "full", impossible])
    assert [file.name for file in files] == [long, "a.png", "gone.png", impossible]
    assert [name for name, _ in failed] == ["bare", "shot.png"]
    assert all("no images or clips" in reason for _, reason in failed)
