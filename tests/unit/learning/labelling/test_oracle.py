"""Oracle labels: each input once, resumable after a kill, the same in parallel."""

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from learning_data import CHEAP, RUNGS, STRONG, rung, subject

from adaptive_fusion.errors import ConfigError, MediaError
from adaptive_fusion.learning.data.labels import Subject
from adaptive_fusion.learning.data.matrix import build_dataset
from adaptive_fusion.learning.labelling.oracle import LabelRun, RungScores, label_inputs

LADDER = [rung(name) for name in RUNGS]


@dataclass
class Sums:
    """RungScores numbers: an input n is worth 1 - n / 100 at the cheap rung. 13 cannot be scored, "x" not described."""

    seen: Counter = field(default_factory=Counter)
    stop_at: int | None = None

    def describe(self, item: Any) -> Subject:
        if item == "x":
            raise MediaError("not a number")
        return subject(np.array([float(item)]), int(item))

    def score(self, item: Any, rungs: Any) -> RungScores:
        if item == self.stop_at:
            raise KeyboardInterrupt
        if item == 13:
            raise MediaError("unlucky")
        self.seen[item] += 1
        quality = {r.name: 1.0 if r.point.fusion == "gated" else 1 - int(item) / 100 for r in rungs}
        return RungScores(quality, 1.0, dict.fromkeys(quality, 5.0), {STRONG: {"visual_tokens": 7}})


class Unpicklable(Sums):
    def __reduce__(self) -> Any:
        raise TypeError("holds a model")


def label(scorer: Any, inputs: list[Any], out: Path, **options: Any) -> LabelRun:
    return label_inputs(scorer, inputs, LADDER, out, clock=lambda: 7.0, **options)


def test_each_input_is_scored_once_and_a_killed_run_resumes(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "labels.jsonl"
    inputs = [1, 2, 2, "x", 13, 3, 1, 4, 5]
    killed = Sums(stop_at=4)
    with pytest.raises(KeyboardInterrupt):
        label(killed, inputs, out)
    assert killed.seen == {1: 1, 2: 1, 3: 1}
    with out.open("a") as handle:
        handle.write('{"torn": ')
    resumed = Sums()
    run = label(resumed, inputs, out)
    assert resumed.seen == {4: 1, 5: 1}
    assert run == LabelRun(2, 5, 0, (("x", "not a number"), ("13", "unlucky")))
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [r["features"]["edge_density"] for r in records] == [1, 2, 3, 4, 5]
    assert records[0]["quality"] == {STRONG: 1.0, "weighted3@1": 0.99, CHEAP: 0.99} and records[0]["time_s"] == 7
    assert records[0]["cost"] == dict.fromkeys(RUNGS, 5.0) and records[0]["measurement"] == {
        STRONG: {"visual_tokens": 7}
    }
    data = build_dataset([out], cheap=CHEAP, rungs=RUNGS)
    assert data.report["broken_lines"] == 0 and data.y.sum() == 3  # 3, 4 and 5 lose more than 0.02


def test_labels_that_lack_a_rung_are_made_again(tmp_path: Path) -> None:
    out = tmp_path / "l.jsonl"
    label_inputs(Sums(), [1, 2], LADDER[:1], out, clock=lambda: 1.0)
    assert label(Sums(), [1, 2, 2], out) == LabelRun(2, 0, 1, ())
    data = build_dataset([out], cheap=CHEAP, rungs=RUNGS)
    assert len(data) == 2 and np.isfinite(data.quality).all()


def test_labels_of_another_model_are_made_anew(tmp_path: Path) -> None:
    out = tmp_path / "l.jsonl"
    assert label(Sums(), [1, 2], out, source_id="small").scored == 2
    assert label(Sums(), [1, 2], out, source_id="large") == LabelRun(2, 0, 0, ())
    assert label(Sums(), [1, 2], out, source_id="small") == LabelRun(0, 2, 0, ())


def test_several_processes_give_the_same_labels_and_an_unpicklable_scorer_runs_here(tmp_path: Path) -> None:
    inputs = [*range(10), 3, 13]
    alone, parallel, here = (tmp_path / name for name in ("alone", "parallel", "here"))
    assert label(Sums(), inputs, alone) == label(Sums(), inputs, parallel, jobs=2)
    scorer = Unpicklable()
    label(scorer, inputs, here, jobs=2)
    assert alone.read_bytes() == parallel.read_bytes() == here.read_bytes()
    assert scorer.seen == Counter(range(10))


def test_without_rungs_there_is_nothing_to_score(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no rungs"):
        label_inputs(Sums(), [1], [], tmp_path / "l.jsonl")


@dataclass
class Turns:
    """Takes pairs of content and question, and notes in which order they are scored."""

    order: list[Any] = field(default_factory=list)

    def describe(self, item: Any) -> Subject:
        return subject(np.array([0.0]), item[0], reads=bool(item[1]))

    def score(self, item: Any, rungs: Any) -> RungScores:
        self.order.append(item)
        return RungScores({r.name: 1.0 for r in rungs}, 1.0)


def test_questions_on_one_content_are_scored_one_after_the_other(tmp_path: Path) -> None:
    scorer = Turns()
    label(scorer, [(1, 0), (2, 0), (1, 1), (2, 1), (3, 0)], tmp_path / "l.jsonl")
    assert scorer.order == [(1, 0), (1, 1), (2, 0), (2, 1), (3, 0)]
