"""`adapt --upstream`: a policy for a model that an engine serves, from the texts of its answers alone."""

import base64
import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner
from upstream import engine

from adaptive_fusion.cli import app
from adaptive_fusion.policy.auto import NO_USER_POLICY
from adaptive_fusion.reference.screens import make_scene
from adaptive_fusion.runner import AdaptiveRunner

IMAGES = 24
ENOUGH = 0.6
"""Share of the pixels from which this engine's model sees everything."""
NATIVE = 384 * 384


def sees(body: Any) -> list[str]:
    """Four words, of which the last are wrong below what is enough."""
    parts = [
        part for message in body["messages"] if isinstance(message["content"], list) for part in message["content"]
    ]
    (url,) = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
    width, height = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).size
    return ["red", " button", " left", " below" if width * height >= ENOUGH * NATIVE else " perhaps"]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for seed in range(IMAGES):
        image = make_scene("simple", seed, "train", sides=(128, 128)).image
        image.resize((384, 384)).save(folder / f"{seed:02}.jpg", quality=90)
    return folder


def test_answers_of_an_engine_make_a_policy_that_its_runner_uses(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(NO_USER_POLICY)
    (tmp_path / "questions.txt").write_text("Describe the screen.\n")
    with engine(words=sees) as upstream:
        words = ["adapt", "served", images, "--prompts", tmp_path / "questions.txt", "--out", tmp_path / "work"]
        words += ["--upstream", upstream.url, "--engine", "transformers", "--json"]
        found = CliRunner().invoke(app, list(map(str, words)))
        assert found.exit_code == 0, found.output
        said, asked = json.loads(found.stdout), len(upstream.got)
        # Nothing was learned of escalation, since this engine gives no log-probabilities.
        assert "no log-probabilities" in said["parts"]["escalation"] and said["images"] == IMAGES
        assert said["parts"]["needs"].startswith("own")
        again = CliRunner().invoke(app, list(map(str, words)))
        assert again.exit_code == 0 and len(upstream.got) == asked + 1, "all but the first question's trial is kept"
        with AdaptiveRunner.remote(upstream.url, "served", engine="transformers") as runner:
            assert runner.policy.name == "adapted-served" and not runner.upstream.warning
            reply = runner.chat(images / "00.jpg", "Describe the screen.", max_new_tokens=8)
    assert reply.text == "red button left below"
    assert reply.decision.point.max_pixels and ENOUGH * NATIVE <= reply.decision.point.max_pixels < NATIVE


def test_an_engine_that_refuses_ends_it_before_anything_is_planned(images: Path, tmp_path: Path) -> None:
    with engine(status=404) as upstream:
        words = ["adapt", "served", images, "--out", tmp_path / "work", "--upstream", upstream.url]
        found = CliRunner().invoke(app, list(map(str, words)))
        assert found.exit_code == 2 and "404" in found.stderr and not (tmp_path / "work").exists()
        distilled = CliRunner().invoke(app, list(map(str, [*words, "--distil"])))
        assert distilled.exit_code == 2 and "expected a model that runs here" in distilled.stderr
