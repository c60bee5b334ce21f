"""From logs to a policy folder: the same every time, robust against hostile rows, and refused if worse."""

import errno
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from learning_data import (
    CHEAP,
    COSTS,
    RECORDS,
    RUNGS,
    STRONG,
    accuracy,
    base_policy,
    oracle_labels,
    p_hard,
    subject,
    write_jsonl,
)
from sklearn.linear_model import LogisticRegression

from adaptive_fusion.errors import ConfigError, GateRefused
from adaptive_fusion.learning.data.dataset import Dataset
from adaptive_fusion.learning.data.labels import label_record
from adaptive_fusion.learning.data.matrix import build_dataset
from adaptive_fusion.learning.data.samples import FILE as SAMPLE_FILE
from adaptive_fusion.learning.data.samples import Sample
from adaptive_fusion.learning.fitting import train as train_module
from adaptive_fusion.learning.fitting.train import Trained, train
from adaptive_fusion.policy.fitted import Fingerprint, Fitted
from adaptive_fusion.policy.policy import Policy


@pytest.fixture(scope="module")
def trained(logs: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return train([logs], tmp_path_factory.mktemp("out"), base=base_policy(), n=100)


def test_the_same_logs_and_seed_give_the_same_bytes(trained: Trained, logs: Path, tmp_path: Path) -> None:
    lines = logs.read_text().splitlines(keepends=True)
    (tmp_path / "labels.jsonl").write_text("".join(lines[::-1]))
    again = train([tmp_path / "labels.jsonl"], tmp_path / "out", base=base_policy(), n=100, jobs=1).folder
    names = sorted(path.name for path in trained.folder.iterdir())
    assert (
        names
        == sorted(path.name for path in again.iterdir())
        == [
            "README.md",
            "policy.toml",
            "report.json",
            "router.json",
            "training.json",
        ]
    )
    for name in names:
        assert (again / name).read_bytes() == (trained.folder / name).read_bytes(), name
    other = train([logs], tmp_path / "seed", base=base_policy(), n=100, seed=1, estimators=("logistic",)).folder
    assert (other / "router.json").read_bytes() != (trained.folder / "router.json").read_bytes()


def test_the_base_is_the_shipped_policy_that_the_labels_are_for(logs: Path, tmp_path: Path) -> None:
    assert train_module.labelled_policy([logs], 1).name == "balanced"  # the first rung of its cheap lane is labelled
    for name in ("reference-latency", "reference-quality"):
        quality = {rung.name: 0.5 for ladder in Policy.load(name).lanes.values() for rung in ladder}
        labels = [label_record(subject(np.zeros(4), i, reads=False), "oracle", quality=quality) for i in range(3)]
        assert train_module.labelled_policy([write_jsonl(tmp_path / f"{name}.jsonl", labels)], 1).name == name
    unknown = [label_record(subject(np.zeros(4), 0, reads=False), "oracle", quality={"top@1": 1.0})]
    assert train_module.labelled_policy([write_jsonl(tmp_path / "top.jsonl", unknown)], 1).name == "balanced"


def test_the_folder_loads_and_its_card_has_figures_data_slices_and_limits(trained: Trained) -> None:
    policy = Policy.load(trained.folder)
    assert policy == trained.fitted.policy
    report = json.loads((trained.folder / "report.json").read_text())
    card = (trained.folder / "README.md").read_text()
    apgr = report["test"]["figures"]["apgr"]
    assert f"| APGR | {apgr['mean']:.4f} | {apgr['low']:.4f} to {apgr['high']:.4f} |" in card
    assert report["data"]["sha256"] in card and "| scene | " in card and "## Limits" in card
    assert "adaptive-fusion train labels.jsonl --base base --objective quality" in card
    assert report["gate"]["accepted"] is True


def hostile(share: float, source: str, *, ids: int, extreme: bool) -> list[dict[str, Any]]:
    """Labels that say the opposite of the truth, with features that pull hardest."""
    rng = np.random.default_rng(9)
    out = []
    for i in range(round(RECORDS * share / (1 - share))):
        row = rng.normal(size=4) * (1000 if extreme else 1.5)
        hard = p_hard(row / (1000 if extreme else 1), True) > 0.5
        quality = {CHEAP: 1.0 if hard else 0.0, STRONG: 1.0}
        known = subject(row, 10**7 + i, reads=True)
        out.append(
            label_record(known, source, quality=quality, reference_quality=1.0, cost=COSTS, source_id=f"u{i % ids}")
        )
    return out


@pytest.mark.parametrize(
    ("source", "extreme", "ids"),
    [("feedback", True, 40), ("feedback", False, 1), ("oracle", True, 1), ("oracle", False, 40)],
)
def test_five_percent_hostile_rows_are_refused_or_cost_less_than_two_points(
    source: str, extreme: bool, ids: int, trained: Trained, fresh: Dataset, tmp_path: Path
) -> None:
    poisoned = oracle_labels(RECORDS, 1) + hostile(0.05, source, ids=ids, extreme=extreme)
    path = write_jsonl(tmp_path / "l.jsonl", poisoned)
    clean = accuracy(trained.fitted.policy, fresh)
    try:
        found = train([path], tmp_path / "out", base=trained.fitted.policy, estimators=("logistic",), n=50)
    except GateRefused:
        assert not (tmp_path / "out").exists()
        return
    assert accuracy(found.fitted.policy, fresh) > clean - 0.02


def test_the_hostile_rows_do_harm_where_nothing_defends(data: Dataset, fresh: Dataset, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "l.jsonl", oracle_labels(RECORDS, 1) + hostile(0.05, "oracle", ids=1, extreme=True))
    poisoned = build_dataset([path], cheap=CHEAP, rungs=RUNGS)
    naive = LogisticRegression().fit(poisoned.x[:, :4], poisoned.y)
    honest = LogisticRegression().fit(data.x[:, :4], data.y)
    assert naive.score(fresh.x[:, :4], fresh.y) < honest.score(fresh.x[:, :4], fresh.y) - 0.15


def test_a_worse_candidate_is_refused_with_the_figures_unless_forced(trained: Trained, tmp_path: Path) -> None:
    records = oracle_labels(600, 4)
    rng = np.random.default_rng(0)
    for record in records:  # features that say nothing: the candidate can only guess
        record["features"] = {name: float(rng.normal()) for name in record["features"]}
        record["prompt_features"] = {}
    honest = oracle_labels(300, 5)
    path = write_jsonl(tmp_path / "l.jsonl", records + honest)
    out = tmp_path / "out"
    common = {"base": base_policy(), "incumbent": trained.folder, "estimators": (_Guess(),), "n": 50}
    with pytest.raises(GateRefused, match=r"worse than trained: apgr_difference is -0\.\d+ \(95 % interval"):
        train([path], out, **common)
    assert not out.exists()
    forced = train([path], out, force=True, **common)
    assert not forced.verdict.accepted and "REFUSED, written by force" in (out / "README.md").read_text()


def test_what_is_in_the_folder_stays_unless_it_is_a_policy(trained: Trained, logs: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    project = tmp_path / "project"
    project.mkdir()
    (project / "README.md").write_text("Mine.")
    for out, said in ((tmp_path / "file", "'file', a file"), (project, "README.md but no policy.toml")):
        with pytest.raises(ConfigError, match=said):
            train(["no such logs"], out, base=base_policy())  # refused before anything is read
    assert (project / "README.md").read_text() == "Mine."
    shutil.copytree(trained.folder, tmp_path / "old")
    (tmp_path / "old" / "quality.json").touch()
    (tmp_path / "old" / "notes.txt").write_text("kept")
    train([logs], tmp_path / "old", base=base_policy(), n=100)
    names = {path.name for path in trained.folder.iterdir()}
    assert {path.name for path in (tmp_path / "old").iterdir()} == names | {"notes.txt"}


def test_a_folder_that_cannot_be_written_whole_keeps_the_earlier_policy(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(trained.folder, tmp_path / "old")
    before = {path.name: path.read_bytes() for path in (tmp_path / "old").iterdir()}

    def full(*_: Any) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(train_module, "card", full)
    with pytest.raises(OSError, match="No space left"):
        train_module._write(
            tmp_path / "old",
            trained.fitted,
            trained.verdict,
            "base",
            "command",
            Sample.load(trained.folder / SAMPLE_FILE),
        )
    assert {path.name: path.read_bytes() for path in (tmp_path / "old").iterdir()} == before


class _Guess:
    def fit(self, X: Any, y: Any) -> None: ...

    def predict_proba(self, X: Any) -> Any:
        p = np.abs(np.sin(1e4 * X[:, 0]))
        return np.stack([1 - p, p], axis=1)


def test_the_policy_is_fitted_to_the_model_of_its_labels(logs: Path, tmp_path: Path) -> None:
    model = Fingerprint("Model", {"depth": 2}, {"depth": 2}, "abcd")
    records = [{**json.loads(line), "model": model.to_dict()} for line in logs.read_text().splitlines()]
    other = Fitted(replace(model, architecture="Another"), ("their images",))
    base = replace(base_policy(), fitted=other)
    options: dict[str, Any] = {"base": base, "n": 20, "estimators": ("logistic",)}
    found = train([write_jsonl(tmp_path / "l.jsonl", records)], tmp_path / "out", **options).fitted.policy.fitted
    assert found.model == model and set(found.kinds) == {"dense", "simple"} and "edge_density" in found.features
    unsaid = train([logs], tmp_path / "unsaid", **options)
    assert unsaid.fitted.policy.fitted == other
    assert "do not say" in (unsaid.folder / "README.md").read_text()
