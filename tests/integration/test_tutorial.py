"""The tutorial's blocks run in the order of the page, on few and small screens.

A handful of images is too little to fit anything, so labels of made-up screens at the same points join those that
the model made; no other setting differs from the page.
"""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from adaptive_fusion.cli import app
from adaptive_fusion.features.complexity import FEATURE_NAMES, VERSION
from adaptive_fusion.jsonl import append_records
from adaptive_fusion.learning.data.labels import Subject, label_record
from adaptive_fusion.policy.policy import LANES, Policy

PAGE = Path(__file__).resolve().parents[2] / "docs" / "tutorial-policy.md"
BLOCK = re.compile(r"^```(python|bash)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
IMAGES = 4
SMALLER = {"range(240)": f"range({IMAGES})", "sides=(256, 384)": "sides=(64, 64)"}


def made_up_labels(count: int) -> list[dict]:
    """Stills at every point of the shipped ladder; the busier half loses by tokens, the other half nothing."""
    rng = np.random.default_rng(0)
    rungs = [rung for lane in LANES for rung in Policy.load("reference-balanced").ladder(lane)]
    records = []
    for i in range(count):
        edges = rng.random()
        known = Subject(f"made-up-{i}", "image", {**dict.fromkeys(FEATURE_NAMES, 0.0), "edge_density": edges}, VERSION)
        share = {rung.name: rung.pixel_share * rung.point.downsample**2 for rung in rungs} | {"native@1": 1.0}
        lost = 0.8 if edges + rng.normal(0, 0.1) > 0.5 else 0.0
        quality = {name: 0.9 - lost * (1 - part) for name, part in share.items()}
        cost = {name: 10 + 90 * part for name, part in share.items()}
        records.append(label_record(known, "oracle", quality=quality, reference_quality=0.9, cost=cost))
    return records


def blocks() -> list[tuple[str, str]]:
    found = BLOCK.findall(PAGE.read_text(encoding="utf-8"))
    assert [language for language, _ in found].count("python") == 1 and len(found) >= 6
    return found


def run(line: str) -> str:
    program, *arguments = shlex.split(line)
    assert program == "adaptive-fusion"
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, f"{line}\n{result.output}\n{result.exception!r}"
    return result.stdout


def test_every_command_of_the_page_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    said = {}
    for language, code in blocks():
        if language == "python":
            for text, smaller in SMALLER.items():
                assert text in code
                code = code.replace(text, smaller)
            exec(compile(code, PAGE.name, "exec"), {})
            assert len(list(Path("screens").iterdir())) == IMAGES
            continue
        for line in code.splitlines():
            said[line.split()[1]] = run(line)
            if line.startswith("adaptive-fusion label"):
                rows = [json.loads(text) for text in Path("logs/labels.jsonl").read_text().splitlines()]
                cheap = Policy.load("reference-balanced").lanes["weighted"][0].name
                assert len(rows) == IMAGES and all(cheap in row["quality"] for row in rows)
                append_records(made_up_labels(240), "logs/labels.jsonl")
    assert said["logs"].startswith("2 records of 1 files")
    assert "## Gate" in said["train"] and "accepted" in said["train"] and "--base reference-" in said["train"]
    assert "APGR" in said["evaluate"] and "balanced" in said["evaluate"]
    assert Policy.load("./my-policy").name == "trained" and Path("curve.png").stat().st_size > 0
    assert '"policy":"trained"' in Path("logs/decisions.jsonl").read_text().splitlines()[-1]


def test_the_page_names_only_options_that_exist() -> None:
    text = PAGE.read_text(encoding="utf-8")
    shown = CliRunner().invoke(app, ["train", "--help"], env={"COLUMNS": "200", "TERM": "dumb"}).output
    for option in set(re.findall(r"^- `(--[a-z-]+)", text, re.MULTILINE)):
        assert option in shown, option
