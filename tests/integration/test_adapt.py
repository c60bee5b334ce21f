"""`adapt` from a model and a folder of images to a policy that is used: a small model that no policy was fitted to."""

import json
import re
import resource
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from adaptive_fusion.cli import app
from adaptive_fusion.cost.model import Profile
from adaptive_fusion.cost.profiles import save_profile
from adaptive_fusion.policy.auto import NO_USER_POLICY
from adaptive_fusion.policy.policy import Policy
from adaptive_fusion.reference.screens import Kind, make_scene
from adaptive_fusion.runner import AdaptiveRunner

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "adapt.md"
TRANSFER = ROOT / "training" / "transfer"
BLOCK = re.compile(r"^```(python|bash)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
IMAGES = 24


@pytest.fixture(scope="module")
def model(
    request: pytest.FixtureRequest, tiny_dense: Any, processor: Any, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A random one, or a trained one that no shipped policy was fitted to."""
    name = getattr(request, "param", "")
    if name and not (TRANSFER / name / "config.json").exists():
        pytest.skip(f"training/transfer/{name} has no model yet")
    if name:
        return TRANSFER / name
    folder = tmp_path_factory.mktemp("models") / "my-model"
    tiny_dense.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def profile(model: Path) -> Profile:
    """The model's costs, as if they had been measured here."""
    estimate = AdaptiveRunner.from_pretrained(model, policy="native").profile
    return Profile.from_dict({**estimate.to_dict(), "samples": 100})


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for seed in range(IMAGES):
        kind: Kind = "simple" if seed % 2 else "reading"
        make_scene(kind, seed, "train", sides=(64, 96)).image.save(folder / f"{seed:02}.png")
    return folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, profile: Profile) -> Path:
    """A user's cache of its own, with the profile."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(NO_USER_POLICY)
    folder = tmp_path / "cache" / "adaptive_fusion"
    save_profile(folder, profile)
    return folder


def installed(cache: Path) -> list[Path]:
    return sorted((cache / "policies").glob("*")) if (cache / "policies").exists() else []


def run(*words: Any) -> Result:
    return CliRunner().invoke(app, [*map(str, words)])


def adapt(model: Path, images: Path, tmp: Path, *more: Any) -> Result:
    (tmp / "questions.txt").write_text("Describe the screen.\n\n")
    options = ["--prompts", tmp / "questions.txt", "--out", tmp / "work", "--max-new-tokens", 2, *more]
    return run("adapt", model, images, *options)


@pytest.mark.parametrize("model", ["", "plain"], indirect=True, ids=["random", "plain"])
def test_the_pages_commands_make_a_policy_that_is_used_and_a_run_that_was_stopped_goes_on(
    model: Path, images: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(images, "photos")
    shutil.copytree(model, "my-model")
    shutil.copy(images / "00.png", "photos/again.png")
    Path("photos/broken.png").write_bytes(b"no image at all")
    Path("questions.txt").write_text("\ufeffDescribe the screen.\n\n")  # as some editors begin a file
    said = {}
    for language, code in BLOCK.findall(PAGE.read_text(encoding="utf-8")):
        if language == "python":
            exec(compile(code, PAGE.name, "exec"), said)
            continue
        for line in code.splitlines():
            program, command, *arguments = shlex.split(line)
            few = ["--max-new-tokens", "2", "--out", "work"] if command == "adapt" else []
            found = run(command, *arguments, *few)
            assert program == "adaptive-fusion" and found.exit_code == 0, f"{line}\n{found.output}"
            said[command] = found

    told = said["adapt"].stderr
    assert f"{IMAGES} images, {IMAGES} questions, 1 came twice" in told and "broken.png" in told
    assert "passes of the model: about" in told and "quality kept" in said["adapt"].stdout
    [folder] = installed(cache)
    policy = Policy.load(folder)
    assert policy.name.startswith("adapted-my-model-") and said["runner"].policy == policy
    assert policy.fitted.fits(said["runner"].fingerprint) and not said["runner"].chosen.remark
    # The panel may break the name where a line ends.
    assert policy.name in re.sub(r"[^\w-]", "", said["explain"].stdout)
    doctor = " ".join(said["doctor"].stdout.split())
    assert policy.name in doctor and "days old" in doctor and "of the user's own" in doctor
    assert "What it buys" in (folder / "README.md").read_text()

    # As a kill leaves it: no policy yet, and answers up to the middle of one.
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    shutil.rmtree(folder)
    [labels] = Path("work").glob("labels-*.jsonl")
    lines = labels.read_bytes().splitlines(keepends=True)
    labels.write_bytes(b"".join(lines[:-2]) + lines[-2][:200])
    again = adapt(Path("my-model"), Path("photos"), Path(), "--json")
    assert again.exit_code == 0, again.output
    found_again = json.loads(again.stdout)
    assert found_again["ahead"]["answered"] == IMAGES - 2 and found_again["installed"]
    [folder] = installed(cache)
    for name in ("policy.toml", "router.json", "sufficiency.json"):
        assert folder.joinpath(name).read_bytes() == before[name], name
    qualities = [json.loads(line)["quality"] for line in labels.read_bytes().splitlines()]
    assert qualities == [json.loads(line)["quality"] for line in lines]


def test_what_cannot_be_adapted_ends_at_once_and_leaves_nothing(
    model: Path, images: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty, few = tmp_path / "empty", tmp_path / "few"
    empty.mkdir()
    few.mkdir()
    for name in ("00.png", "01.png", "02.png"):
        shutil.copy(images / name, few / name)
    without = tmp_path / "without-template"
    shutil.copytree(model, without)
    for name in ("chat_template.jinja", "chat_template.json"):
        (without / name).unlink(missing_ok=True)
    for refused, why in (
        (adapt(model, empty, tmp_path), "there are no images"),
        (adapt(model, few, tmp_path), "3 different images can be used; expected at least"),
        (adapt(without, images, tmp_path), "chat template"),
        (adapt(tmp_path / "nothing", images, tmp_path), "which is no folder"),
        (adapt(model, images, tmp_path, "--base", "reference-balanced"), "expected a general one"),
        (adapt(model, images, tmp_path, "--out", few / "00.png"), "a file; expected a folder"),
        (adapt(model, images, tmp_path, "--prompts", "no.txt"), "'no.txt' cannot be read"),
    ):
        assert refused.exit_code == 2 and why in refused.stderr, refused.output
    _, hard = limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, hard))
    try:
        full = adapt(model, images, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert full.exit_code == 2 and "nothing was installed" in full.stderr
    assert installed(cache) == []
