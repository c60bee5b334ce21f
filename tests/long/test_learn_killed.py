"""`adaptive-fusion learn`, killed for good at random moments, comes to the same policy as one that nothing stopped."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from learning_data import base_policy, oracle_labels, write_jsonl

FILES = ("policy.toml", "router.json", "report.json", "training.json")
MOST_S = 600.0


def command(folder: Path, out: Path) -> list[str]:
    given = (folder / "logs", "--policy", folder / "base", "--out", out, "--yes", "--json")
    return [sys.executable, "-m", "adaptive_fusion.cli", "learn", *map(str, given)]


def test_a_run_that_is_killed_again_and_again_ends_the_same(tmp_path: Path, share_of: Callable[[int], int]) -> None:
    (tmp_path / "logs").mkdir()
    write_jsonl(tmp_path / "logs" / "labels.jsonl", oracle_labels(500, 1))
    base_policy().save(tmp_path / "base")
    began = time.monotonic()
    whole = subprocess.run(command(tmp_path, tmp_path / "whole"), capture_output=True, timeout=MOST_S, check=True)
    took = time.monotonic() - began
    rng = random.Random(0)
    kills, told = 0, b""
    for _ in range(share_of(100)):
        with subprocess.Popen(
            command(tmp_path, tmp_path / "killed"), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        ) as process:
            try:
                told, _ = process.communicate(timeout=rng.uniform(0.05, 0.6) * took)
                if process.returncode == 0:
                    break
            except subprocess.TimeoutExpired:
                os.kill(process.pid, signal.SIGKILL)
                kills += 1
    else:
        told = subprocess.run(
            command(tmp_path, tmp_path / "killed"), capture_output=True, timeout=MOST_S, check=True
        ).stdout
    first, second = (json.loads(text.splitlines()[-1]) for text in (whole.stdout, told))
    assert kills and second["steps"] == first["steps"] and second["round"] == 1
    for name in FILES:
        a, b = (tmp_path / each / "round-0001" / "candidate" / name for each in ("whole", "killed"))
        assert a.read_bytes() == b.read_bytes()
