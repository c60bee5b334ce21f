"""`adaptive-fusion learn`, killed for good at random moments, comes to the same policy as one that nothing stopped."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from learning_data import base_policy, oracle_labels, write_jsonl

from adaptive_fusion.learning.loop.state import RUNNING, Folder

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
    subprocess.run(command(tmp_path, tmp_path / "whole"), capture_output=True, timeout=MOST_S, check=True)
    took = time.monotonic() - began
    rng, kills, killed = random.Random(0), 0, Folder(tmp_path / "killed")
    for _ in range(share_of(100)):
        with subprocess.Popen(
            command(tmp_path, killed.path), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as process:
            try:
                process.wait(rng.uniform(0.05, 0.6) * took)
            except subprocess.TimeoutExpired:
                os.kill(process.pid, signal.SIGKILL)
                kills += 1
        if killed.load().status not in ("", RUNNING):  # the round is over, even if its process was killed after that
            break
    else:
        subprocess.run(command(tmp_path, killed.path), capture_output=True, timeout=MOST_S, check=True)
    first, second = Folder(tmp_path / "whole").load(), killed.load()
    assert kills and second.round == first.round == 1
    assert (second.done, second.status) == (first.done, first.status)
    for name in FILES:
        a, b = (tmp_path / each / "round-0001" / "candidate" / name for each in ("whole", "killed"))
        assert a.read_bytes() == b.read_bytes()
