"""`adapt --distil`: modules are trained first, the lanes run them, and the installed policy brings them along."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from adaptive_fusion.cli import app
from adaptive_fusion.cost.model import Profile
from adaptive_fusion.cost.profiles import save_profile
from adaptive_fusion.learning.adapting import modules
from adaptive_fusion.policy.auto import NO_USER_POLICY
from adaptive_fusion.reference.screens import make_scene
from adaptive_fusion.runner import AdaptiveRunner


def test_lanes_run_modules_that_were_trained_for_the_model(
    tiny_dense: Any, processor: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(NO_USER_POLICY)
    monkeypatch.setattr(modules, "STEPS", 2)
    model, images = tmp_path / "my-model", tmp_path / "images"
    tiny_dense.save_pretrained(model)
    processor.save_pretrained(model)
    images.mkdir()
    for seed in range(72):
        make_scene("simple", seed, "train", sides=(64, 96)).image.save(images / f"{seed:02}.png")
    (tmp_path / "questions.txt").write_text("Describe the screen.\n")
    estimate = AdaptiveRunner.from_pretrained(model, policy="native").profile
    save_profile(tmp_path / "cache" / "adaptive_fusion", Profile.from_dict({**estimate.to_dict(), "samples": 100}))
    command = ["adapt", model, images, "--prompts", tmp_path / "questions.txt", "--out", tmp_path / "work"]
    command += ["--max-new-tokens", 2, "--distil", "--json"]
    found = CliRunner().invoke(app, [*map(str, command)])
    assert found.exit_code == 0, found.output
    said = json.loads(found.stdout)
    assert said["ahead"]["training"] == 2 * 2 * modules.BATCH
    runner = AdaptiveRunner.from_pretrained(model)
    assert runner.policy.name == said["policy"] and not runner.chosen.warning
    assert [path.name for path in runner.policy.fusion_weights] == ["weighted6r4.safetensors", "gated12r8.safetensors"]
    for lane, point in modules.POINTS.items():
        full, spared = (rung for rung in runner.policy.lanes[lane] if rung.pixel_share == 1)
        assert (full.name, spared.name) == ("native@1", "native@1/2blank")
        assert {rung.point for rung in runner.policy.lanes[lane] if rung.pixel_share < 1} == {point}
        assert not runner.adapter.untrained(point)
    again = CliRunner().invoke(app, [*map(str, command)])
    assert again.exit_code == 0, again.output
    rest = json.loads(again.stdout)["ahead"]
    assert rest["answered"] >= 24  # of the images that modules are not trained on
    assert rest == {**said["ahead"], "training": 0, "answered": rest["answered"], "passes": 0, "seconds": 0.0}
