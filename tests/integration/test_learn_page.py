"""The commands of docs/learn.md, run in their order on labels with known truth."""

import re
import shlex
from pathlib import Path

import pytest
from learning_data import base_policy, oracle_labels, write_jsonl
from typer.testing import CliRunner

from adaptive_fusion.cli import app
from adaptive_fusion.learning.loop.state import STATE_FILE
from adaptive_fusion.policy.policy import Policy

PAGE = Path(__file__).resolve().parents[2] / "docs" / "learn.md"


def test_every_command_of_the_page_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "logs").mkdir()
    write_jsonl(tmp_path / "logs" / "labels.jsonl", oracle_labels(600, 1))
    base_policy().save(tmp_path / "my-policy")
    said = {}
    for block in re.findall(r"^```bash\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
        for line in block.splitlines():
            program, *arguments = shlex.split(line)
            assert program == "adaptive-fusion"
            # Without a policy it is the shipped one that the labels are for, and these are for none of them.
            given = [*arguments, "--policy", "./my-policy"] if arguments == ["learn", "logs"] else arguments
            found = CliRunner().invoke(app, given)
            assert found.exit_code == 0, f"{line}\n{found.output}\n{found.exception!r}"
            said[line] = found.stdout
    dry, done, drift, doctor = said.values()
    assert "nothing was written; --yes does it" in dry and "600 oracle" in dry
    assert "round 1: ready" in done and "go on with: adaptive-fusion rollout start" in done
    assert (tmp_path / "loop" / STATE_FILE).exists()
    assert Policy.load(tmp_path / "loop" / "round-0001" / "candidate").name == "base-r1"
    assert "too little to compare" in drift and (tmp_path / "drift.png").exists()
    assert "drift" in doctor and "too little to compare" in doctor
