"""`adaptive-fusion adapt`, killed for good at random moments, comes to the same policy as one that nothing stopped, and
at no moment is half of one installed."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from adaptive_fusion.cost.model import Profile
from adaptive_fusion.cost.profiles import save_profile
from adaptive_fusion.policy.auto import NO_USER_POLICY
from adaptive_fusion.policy.policy import Policy
from adaptive_fusion.reference.screens import Kind, make_scene
from adaptive_fusion.runner import AdaptiveRunner

FILES = ("policy.toml", "router.json", "sufficiency.json")
IMAGES = 24
MOST_S = 600.0


def started(folder: Path, name: str) -> "subprocess.Popen[bytes]":
    """The command, with a cache and a work folder of that name."""
    given = [folder / "my-model", folder / "images", "--prompts", folder / "questions.txt", "--out", folder / name]
    command = [
        sys.executable,
        "-m",
        "adaptive_fusion.cli",
        "adapt",
        *map(str, given),
        "--max-new-tokens",
        "2",
        "--json",
    ]
    env = {key: value for key, value in os.environ.items() if key != NO_USER_POLICY}
    env["XDG_CACHE_HOME"] = str(folder / f"cache-{name}")
    env["OMP_NUM_THREADS"] = "1"  # as here, where the profile is from: with another number it would be measured anew
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)


def installed(folder: Path, name: str) -> list[Path]:
    """What would be used, by name; what stands there can be loaded."""
    found = sorted((folder / f"cache-{name}" / "adaptive_fusion" / "policies").glob("[!.]*"))
    for each in found:
        Policy.load(each)
    return found


def answered(folder: Path) -> int:
    """Whole answers that the work folder has."""
    return sum(path.read_bytes().count(b"\n") for path in (folder / "killed").glob("labels-*.jsonl"))


def test_a_run_that_is_killed_again_and_again_ends_the_same(
    tiny_dense: Any, processor: Any, tmp_path: Path, share_of: Callable[[int], int]
) -> None:
    tiny_dense.save_pretrained(tmp_path / "my-model")
    processor.save_pretrained(tmp_path / "my-model")
    (tmp_path / "images").mkdir()
    for seed in range(IMAGES):
        kind: Kind = "simple" if seed % 2 else "reading"
        make_scene(kind, seed, "train", sides=(64, 96)).image.save(tmp_path / "images" / f"{seed:02}.png")
    (tmp_path / "questions.txt").write_text("Describe the screen.\n")
    estimate = AdaptiveRunner.from_pretrained(tmp_path / "my-model", policy="native").profile
    for name in ("whole", "killed"):
        save_profile(
            tmp_path / f"cache-{name}" / "adaptive_fusion", Profile.from_dict({**estimate.to_dict(), "samples": 100})
        )
    with started(tmp_path, "whole") as process:
        whole, _ = process.communicate(timeout=MOST_S)
    rng, attempts, kills, before = random.Random(0), share_of(20), 0, 0
    for attempt in range(attempts):
        goal = (attempt + 1) * IMAGES // attempts
        with started(tmp_path, "killed") as process:
            ends = time.monotonic() + MOST_S
            while process.poll() is None and answered(tmp_path) < goal and time.monotonic() < ends:
                time.sleep(0.01)
            time.sleep(rng.uniform(0.0, 0.5))
            if process.poll() is None:
                os.kill(process.pid, signal.SIGKILL)
                kills += 1
        assert len(installed(tmp_path, "killed")) <= 1
        assert answered(tmp_path) >= before
        before = answered(tmp_path)
    with started(tmp_path, "killed") as process:
        told, _ = process.communicate(timeout=MOST_S)
    assert kills
    first, second = (json.loads(text.splitlines()[-1]) for text in (whole, told))
    assert first["installed"] and second["installed"] and second["ahead"]["answered"] >= before
    [one], [other] = installed(tmp_path, "whole"), installed(tmp_path, "killed")
    # The last part of the name is of the whole folder, with the times that were measured.
    assert one.name.rpartition("-")[0] == other.name.rpartition("-")[0]
    for name in FILES:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
