"""The commands that train, judge and pack: what they print, write and refuse, on labels with known truth."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from learning_data import CHEAP, RUNGS, STRONG, base_policy, oracle_labels, subject, write_jsonl
from PIL import Image
from typer.testing import CliRunner, Result

from adaptive_fusion.cli import app
from adaptive_fusion.commands.evaluate import _show
from adaptive_fusion.commands.output import console
from adaptive_fusion.learning.data.labels import shadow_record
from adaptive_fusion.learning.data.matrix import build_dataset
from adaptive_fusion.learning.judging.evaluate import evaluate
from adaptive_fusion.policy.policy import Policy

RECORDS = 900


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Labels, rated decisions of a policy that explores, a broken line, and the policy whose ladders are kept."""
    folder = tmp_path_factory.mktemp("logs")
    labels = oracle_labels(RECORDS, 1)
    for i, record in enumerate(labels):
        record["quality"]["native@1"] = record["reference_quality"]
        record["cost"] = {**record["cost"], "native@1": 100.0}
        record["slices"] = {"task": "read" if i % 2 else "describe"}
    write_jsonl(folder / "labels.jsonl", labels)
    rng = np.random.default_rng(3)
    records: list[dict[str, Any]] = []
    for i in range(200):
        known, taken = subject(rng.normal(size=4), 10**6 + i), RUNGS[rng.integers(3)]
        hashes = {"content_hash": known.content_hash, "kind": "image", "features": dict(known.features)}
        records.append({"schema": 1, "request_id": str(i), "rung": taken, "propensity": 1 / 3, **hashes})
        records.append(shadow_record(str(i), {taken: 0.9 if taken == STRONG else 0.6}))
    write_jsonl(folder / "decisions.jsonl", records)
    with (folder / "decisions.jsonl").open("a") as handle:
        handle.write('{"event": "lab')
    base_policy().save(folder / "base")
    return folder


@pytest.fixture(scope="module")
def trained(folder: Path) -> dict[str, Any]:
    result = call(
        *("train", folder / "labels.jsonl", "--out", folder / "new", "--base", folder / "base", "--json"),
        *("--estimator", "logistic"),
    )
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def test_train_writes_a_policy_whose_card_names_the_command(trained: dict[str, Any], folder: Path) -> None:
    assert trained["accepted"] is True and trained["policy"] == "trained" and trained["reasons"] == []
    assert Policy.load(folder / "new").threshold == pytest.approx(trained["threshold"]["value"]["mean"])
    card = (folder / "new" / "README.md").read_text()
    assert "adaptive-fusion train labels.jsonl --base base --objective quality --tolerance 0.02" in card
    assert "--estimator logistic --seed 0 --out DIR" in card
    for heading in ("Lanes", "Router", "Figures", "Slices", "Gate", "Training data", "Limits", "Command"):
        assert f"\n## {heading}\n" in card
    assert all(f"`{rung.name}`" in card for ladder in base_policy().lanes.values() for rung in ladder)


def test_what_the_question_adds_is_told_by_task(trained: dict[str, Any], folder: Path) -> None:
    asked = trained["prompt_features"]
    assert asked["gain"]["log_loss"]["high"] < 0
    assert set(asked["tasks"]) == {"describe", "read"}
    both = [asked["tasks"][task]["with"]["log_loss"] for task in ("describe", "read")]
    assert min(both) < asked["with"]["log_loss"] < max(both)
    assert "| read, with |" in (folder / "new" / "README.md").read_text()


def test_evaluate_shows_the_policy_beside_every_baseline(trained: dict[str, Any], folder: Path) -> None:
    arguments = ("evaluate", folder / "new", folder / "base", "--logs", folder / "labels.jsonl", "--split", "test")
    result = call(*arguments, "--json", "--plot", folder / "curve.png")
    assert result.exit_code == 0, result.stderr
    new, base = (json.loads(line) for line in result.stdout.splitlines())
    assert (new["policy"], base["policy"]) == ("trained", "base") and new["off_policy"] is None
    figures, traffic = new["figures"], new["traffic"]["figures"]
    assert figures["oracle_apgr"]["mean"] > figures["apgr"]["mean"] > figures["entropy_apgr"]["mean"]
    assert figures["random_apgr"]["mean"] == pytest.approx(0.5)
    assert figures["over_entropy_median"]["low"] > 0
    assert traffic["kept"]["mean"] == pytest.approx(figures["quality"]["mean"] / figures["strong_quality"]["mean"])
    assert traffic["cost_share"]["mean"] == pytest.approx(figures["cost"]["mean"] / 100)
    assert base["traffic"]["static"] in {STRONG, "native@1"}  # rungs that only the labels name stand there too
    assert (folder / "curve.png").read_bytes().startswith(b"\x89PNG")
    shown = call(*arguments).stdout
    for text in ("CPT(80 %)", "oracle", "entropy-median", "native", "expected calibration error", "worst first"):
        assert text in shown


def test_evaluate_reads_the_value_off_policy_where_decisions_are_rated(trained: dict[str, Any], folder: Path) -> None:
    logs = ("--logs", folder / "labels.jsonl", "--logs", folder / "decisions.jsonl")
    result = call("evaluate", folder / "new", *logs, "--json")
    value = json.loads(result.stdout)["off_policy"]
    assert value["decisions"] == 200 and 40 < value["effective_samples"] < 110
    assert value["coverage"]["low"] <= 1 <= value["coverage"]["high"]
    assert {"ips", "snips", "doubly_robust", "logged"} <= set(value)
    assert "off-policy, 200 decisions" in call("evaluate", folder / "new", *logs).stdout


def test_decisions_that_tell_nothing_of_a_policy_leave_its_other_figures(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    known = subject(np.zeros(4), 10**7)
    hashes = {"content_hash": known.content_hash, "kind": "image", "features": dict(known.features)}
    decided = {"schema": 1, "request_id": "a", "rung": RUNGS[1], "propensity": 1.0, **hashes}
    write_jsonl(tmp_path / "decisions.jsonl", [decided, shadow_record("a", {RUNGS[1]: 0.9})])
    (report,) = evaluate([folder / "base"], [folder / "labels.jsonl", tmp_path], n=5)
    assert report.figures["kept"].mean > 0 and report.off_policy is None
    assert "takes none of the logged actions" in report.to_dict()["off_policy_note"]
    _show(console(), report)
    assert "no value off-policy: the target policy takes none" in " ".join(capsys.readouterr().out.split())


def test_a_worse_policy_ends_with_exit_code_1_and_the_figures(
    trained: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    arguments = (
        *("train", folder / "labels.jsonl", "--base", folder / "base", "--incumbent", folder / "new"),
        *("--estimator", "logistic", "--out", tmp_path / "worse"),
        *(part for name in ("edge_density", "grey_entropy", "prompt_read") for part in ("--leave-out", name)),
    )
    refused = call(*arguments, "--json")
    assert refused.exit_code == 1 and "95 % interval" in refused.stderr
    told = json.loads(refused.stdout)
    assert told["accepted"] is False and told["reasons"] and told["gate"]["apgr_difference"]["high"] < 0
    assert not (tmp_path / "worse").exists()
    forced = call(*arguments, "--force")
    assert forced.exit_code == 0 and "REFUSED, written by force" in forced.stdout


def test_bad_input_ends_with_exit_code_2(folder: Path, tmp_path: Path) -> None:
    labels, base, votes = folder / "labels.jsonl", folder / "base", tmp_path / "votes.csv"
    votes.write_text("request_id,rating\na,up\n")
    for arguments, said in (
        (("train", tmp_path / "nothing", "--out", tmp_path / "x"), "no logs at 'nothing'"),
        (
            ("train", labels, "--base", "reference-latency", "--out", tmp_path / "x"),
            f"the labels have {STRONG}, {CHEAP}, {RUNGS[1]}",
        ),
        (("train", labels, "--base", base, "--out", tmp_path / "x", "--objective", "speed"), "'speed'"),
        (("train", labels, "--base", base, "--out", tmp_path / "x", "--estimator", "forest"), "'forest'"),
        (("evaluate", "nosuch", "--logs", labels), "'nosuch'"),
        (("evaluate", base, "--logs", labels, "--split", "half"), "'half'"),
        (("evaluate", base, "--logs", labels, "--plot", tmp_path / "x.gif"), ".png"),
        (("train", labels, "--base", base, "--out", labels), "out is 'labels.jsonl', a file"),
        (("logs", "compact", labels, "--out", labels), "ends in .parquet"),
        (("label", "--feedback", votes, "--out", tmp_path), "Is a directory"),
        (("label", "--feedback", votes, "--out", labels / "x"), "labels.jsonl"),
        (("label", tmp_path / "a.png", "--metric", "bleu", "--out", tmp_path / "x"), "metric is 'bleu'"),
    ):
        result = call(*arguments)
        assert result.exit_code == 2 and said in result.stderr, result.stderr
    assert not (tmp_path / "x").exists()


def test_compact_counts_what_is_broken_and_reads_the_same(folder: Path, tmp_path: Path) -> None:
    packed = tmp_path / "old.parquet"
    result = call("logs", "compact", folder / "decisions.jsonl", folder / "labels.jsonl", "--out", packed, "--json")
    told = json.loads(result.stdout)
    assert (told["rows"], told["broken_lines"], told["files"]) == (400 + RECORDS, 1, 2)
    loose = ("--logs", folder / "labels.jsonl", "--logs", folder / "decisions.jsonl")
    told = [call("evaluate", folder / "base", *logs, "--json").stdout for logs in (loose, ("--logs", packed))]
    assert json.loads(told[0]) == json.loads(told[1])


def test_label_puts_raters_together_and_says_how_it_read_the_tables(tmp_path: Path) -> None:
    out = tmp_path / "labels.jsonl"
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    said = [f"a.png,{who},{label}" for who, label in zip("abcde", ["complex"] * 4 + ["simple"], strict=True)]
    (tmp_path / "people.csv").write_text("\n".join(["path,annotator,label", *said]) + "\n")
    (tmp_path / "votes.csv").write_text("request_id,rating,time_s\nr,up,2024-05-01 10:00\n")
    found = call(
        "label", "--human", tmp_path / "people.csv", "--feedback", tmp_path / "votes.csv", "--out", out, "--json"
    )
    assert found.exit_code == 0
    told = json.loads(found.stdout)
    assert (told["human"], told["feedback"], told["failed"]) == (1, 1, [])
    assert [note in found.stderr for note in told["notes"]] == [True, True]
    assert "column 'annotator'" in told["notes"][0] and "taken for UTC" in told["notes"][1]
    person = ("label", "--human", tmp_path / "fay.csv", "--rater", "fay", "--out", out)
    (tmp_path / "fay.csv").write_text("path,label\na.png,simple\n")
    assert call(*person).exit_code == call(*person).exit_code == 0  # said twice, counted once
    data = build_dataset([out], cheap=CHEAP, rungs=RUNGS)
    assert (data.y.tolist(), data.target.tolist(), data.report["pooled"]) == ([1.0], [1.0], 2)
    assert data.weight[0] == pytest.approx(2 / 6)
