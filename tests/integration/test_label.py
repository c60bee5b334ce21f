"""Labels from a real model: rungs share work yet answer as single requests do; the command, scenes and shadows."""

import json
import pickle
import runpy
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from label_scenes import open_on_one_thread
from PIL import Image
from typer.testing import CliRunner, Result

from adaptive_fusion.cli import app
from adaptive_fusion.errors import ConfigError, Interrupted, MediaError
from adaptive_fusion.evaluation.likelihood import after_prompt, prefill
from adaptive_fusion.evaluation.questions import Question
from adaptive_fusion.evaluation.scenes import scene_questions
from adaptive_fusion.execution.request import build_request
from adaptive_fusion.features.prompts import prompt_features
from adaptive_fusion.learning.data.matrix import build_dataset
from adaptive_fusion.learning.labelling.labeller import RunnerModel, describe
from adaptive_fusion.learning.labelling.scoring import NATIVE_RUNG, ModelScorer
from adaptive_fusion.point import OperatingPoint
from adaptive_fusion.policy.policy import COMPLEX, Policy
from adaptive_fusion.policy.rungs import Rung
from adaptive_fusion.reference.screens import make_scene
from adaptive_fusion.rollout.shadow import ShadowedRunner
from adaptive_fusion.runner import AdaptiveRunner

ROOT = Path(__file__).parents[2]
CHEAP = Rung(OperatingPoint("weighted", 6, 0.5, adapter_rank=4), pixel_share=0.25)
RUNGS = [
    NATIVE_RUNG,
    Rung(OperatingPoint("top", downsample=0.5)),
    CHEAP,
    Rung(OperatingPoint("gated", 12, adapter_rank=8)),
    Rung(OperatingPoint("gated", 12, 0.25, adapter_rank=8, max_fps=1), pixel_share=0.5),
]


@pytest.fixture(scope="module")
def runner(reference_model: Any, processor: Any) -> AdaptiveRunner:
    """With fusion modules that are not the identity."""
    found = AdaptiveRunner(reference_model, processor, policy="reference-balanced", seed=0)
    generator = torch.Generator().manual_seed(0)
    for rung in RUNGS:
        if (fusion := found.adapter.build(rung.point)) is not None:
            with torch.no_grad():
                for parameter in fusion.parameters():
                    parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return found


@pytest.fixture(scope="module")
def screen() -> Image.Image:
    return make_scene("dense", 1, "train", (112, 144)).image


@pytest.fixture
def kinds(screen: Image.Image, clip: Any) -> dict[str, Any]:
    return {"image": screen, "video": clip}


def resolved(runner: AdaptiveRunner, media: Any, prompt: str, rung: Rung) -> tuple[Any, OperatingPoint]:
    request = build_request(media, prompt)
    return request, rung.resolve(max(runner.adapter.native_pixels(size) for size in request.sizes))


@pytest.mark.parametrize("kind", ["image", "video"])
def test_answers_are_those_of_single_requests(runner: AdaptiveRunner, kinds: dict[str, Any], kind: str) -> None:
    model, media = RunnerModel(runner, max_new_tokens=10), kinds[kind]
    for prompt in ("Describe the screen.", "Read the text."):  # the second one from the first one's encoder passes
        found = model.answers(Question(media, prompt), RUNGS)
        for rung in RUNGS:
            _, point = resolved(runner, media, prompt, rung)
            reply = runner.chat(media, prompt, point=point, max_new_tokens=10, do_sample=False)
            text, took = found[rung.name]
            measured = reply.measurement
            assert text == reply.text
            assert (took.visual_tokens, took.patches) == (measured.visual_tokens, measured.patches)
            assert took.new_tokens == measured.new_tokens
            assert took.latency_ms is not None and 0 < took.ttft_ms <= took.latency_ms


@pytest.mark.parametrize("kind", ["image", "video"])
def test_likelihoods_are_those_of_each_point_alone(runner: AdaptiveRunner, kinds: dict[str, Any], kind: str) -> None:
    media, prompt, text = kinds[kind], "Describe the screen.", "b3 blue ring K7, c4 green bar 2"
    found = RunnerModel(runner).likelihoods(Question(media, prompt), text, RUNGS)
    tokenizer = runner.processor.tokenizer
    answer = [*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    for rung in RUNGS:
        request, point = resolved(runner, media, prompt, rung)
        encoded = runner.adapter.encode(runner.adapter.prepare(request.messages, point), point)
        [alone] = after_prompt(runner.model, prefill(runner.model, encoded.inputs), [answer])
        assert found[rung.name][0] == pytest.approx(alone.mean, abs=1e-3)
    empty = RunnerModel(runner).likelihoods(Question(media, prompt), "", RUNGS[:1])
    assert -50 < empty[NATIVE_RUNG.name][0] < 0


def test_without_references_native_is_worth_one_and_nothing_more(runner: AdaptiveRunner, screen: Image.Image) -> None:
    scores = ModelScorer(RunnerModel(runner, max_new_tokens=6)).score(Question(screen, "Describe."), RUNGS[1:])
    assert scores.quality["native@1"] == scores.reference_quality == 1
    assert set(scores.quality) == {rung.name for rung in RUNGS} and all(0 <= q <= 1 for q in scores.quality.values())


def test_a_cancelled_model_stops(runner: AdaptiveRunner, screen: Image.Image) -> None:
    cancelled = threading.Event()
    model = RunnerModel(runner, cancelled=cancelled, clock=iter_clock(cancelled, after=12))
    with pytest.raises(Interrupted):
        model.answers(Question(screen, "Describe the screen."), RUNGS[:1])


def iter_clock(event: threading.Event, after: int) -> Any:
    """A clock whose reading number `after` comes with the event: in the middle of the work."""
    readings = iter(range(10**9))

    def clock() -> float:
        reading = next(readings)
        if reading >= after:
            event.set()
        return float(reading)

    return clock


def test_an_input_to_label_is_one_medium(screen: Image.Image) -> None:
    subject = describe(Question(screen, "Read the text.", slices={"a": "b"}))
    assert subject.prompt_features == prompt_features("Read the text.") and subject.slices == {"a": "b"}
    assert subject.kind == "image" and subject.prompt_hash and subject.features["edge_density"] > 0
    assert describe(Question(lambda: screen, "")).content_hash == subject.content_hash
    with pytest.raises(ConfigError, match="got 2"):
        describe(Question([screen, screen], "?"))
    with pytest.raises(MediaError):
        describe(Question(b"not media", "?"))


def test_a_scorer_that_opens_its_model_travels_light_and_opens_it_once() -> None:
    scorer = ModelScorer(RunnerModel(open_on_one_thread, "reference", "native"))
    sent = pickle.dumps(scorer)
    assert len(sent) < 2000
    first, second = (pickle.loads(sent).model.runner for _ in range(2))
    assert first is second and first.policy.name == "native"


def test_scenes_ask_every_question_of_a_mix_with_sizes_from_one_distribution() -> None:
    found = list(scene_questions(24, "train", 3, (96, 192)))
    assert Counter((e.slices["scene"], e.slices["task"], e.metric) for e in found) == {
        ("simple", "describe", "elements"): 12,
        ("dense", "describe", "elements"): 4,
        ("dense", "read", "anls"): 4,
        ("reading", "read", "anls"): 4,
        ("reading", "describe", "elements"): 4,
        ("clip", "event", "exact"): 4,
    }
    one, other = [describe(e) for e in found if e.slices["scene"] == "dense"][:2]
    assert one.content_hash == other.content_hash and one.prompt_hash != other.prompt_hash
    assert [e.references for e in found] == [e.references for e in scene_questions(24, "train", 3, (96, 192))]
    answers = {e.references for e in scene_questions(24, "eval", 3, (96, 192)) if e.slices["scene"] == "dense"}
    assert answers.isdisjoint(e.references for e in found)
    for kind in ("simple", "dense"):
        sides = {side for seed in range(60) for side in make_scene(kind, seed, "train", (96, 192)).image.size}
        assert sides == set(range(96, 193, 16))
    with pytest.raises(ConfigError, match="0 scenes"):
        next(scene_questions(0, "train"))


def test_the_scene_recipe_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "labels.jsonl"
    recipe = ROOT / "training" / "policies" / "label_scenes.py"
    monkeypatch.syspath_prepend(recipe.parent)

    def run(scenes: int) -> str:
        arguments = f"{recipe} --out {out} --scenes {scenes} --sides 96 96 --split eval --points native {CHEAP.name}"
        monkeypatch.setattr("sys.argv", arguments.split())
        runpy.run_path(str(recipe), run_name="__main__")
        return capsys.readouterr().out

    assert run(1).startswith("1 questions at 2 rungs")
    again = run(2)
    assert again.startswith("2 questions at 2 rungs") and again.strip().endswith("; 1 were there already")
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [r["slices"]["scene"] for r in records] == ["simple", "dense", "dense"]
    assert records[1]["content_hash"] == records[2]["content_hash"]
    for record in records:
        assert set(record["quality"]) == set(record["cost"]) == set(record["measurement"]) == {"native@1", CHEAP.name}
        assert record["measurement"]["native@1"]["visual_tokens"] > record["measurement"][CHEAP.name]["visual_tokens"]
        assert record["source_id"] == "scenes-eval-0" and record["prompt_version"] and record["features_version"]


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["label", *map(str, arguments)])


def test_the_command_labels_each_input_once_by_the_models_own_answer(tmp_path: Path, screen: Image.Image) -> None:
    out, folder = tmp_path / "out" / "labels.jsonl", tmp_path / "in"
    folder.mkdir()
    screen.save(folder / "a.png")
    screen.save(folder / "again.png")
    screen.transpose(Image.Transpose.ROTATE_90).save(folder / "b.png")
    (folder / "broken.png").write_bytes(b"-")
    options = ("--out", out, "--points", "native", "--points", CHEAP.name, "--max-new-tokens", 6, "--json")
    first = call(folder, *options)
    assert first.exit_code == 2, first.output
    summary = json.loads(first.stdout)
    assert (summary["scored"], summary["repeated"], summary["resumed"]) == (2, 1, 0)
    assert [failed["input"] for failed in summary["failed"]] == ["broken.png"] and "broken.png" in first.stderr
    second = json.loads(call(folder / "a.png", folder / "b.png", *options).stdout)
    assert (second["scored"], second["resumed"], second["failed"]) == (0, 2, [])
    data = build_dataset([out], cheap=CHEAP.name, rungs=["native@1", CHEAP.name])
    assert len(data) == 2 and (data.quality[:, 0] == 1).all() and (data.cost > 0).all() and not data.report["no_label"]


def test_the_command_scores_against_references_and_takes_what_people_said(tmp_path: Path, screen: Image.Image) -> None:
    out = tmp_path / "labels.jsonl"
    screen.save(tmp_path / "a.png")
    (tmp_path / "answers.csv").write_text("path,reference,prompt,metric\na.png,x,Read the text.,anls\na.png,y,,\n")
    (tmp_path / "people.csv").write_text("path,label\na.png,complex\nmissing.png,simple\n")
    (tmp_path / "votes.csv").write_text("request_id,rating\nr,up\n")
    found = call(
        tmp_path / "a.png", "--out", out, "--points", CHEAP.name, "--max-new-tokens", 4, "--references",
        tmp_path / "answers.csv", "--human", tmp_path / "people.csv", "--feedback", tmp_path / "votes.csv",
    )  # fmt: skip
    assert found.exit_code == 2 and "missing.png" in found.stderr
    assert found.stdout.startswith("1 human, 1 feedback, 2 scored, 0 resumed, 0 repeated; 1 left out.")
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [record.get("source", record["event"]) for record in records] == ["human", "feedback", "oracle", "oracle"]
    assert records[2]["prompt_hash"] != records[3]["prompt_hash"] and set(records[2]["quality"]) == {
        "native@1",
        CHEAP.name,
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "nothing to label"),
        (("{}/a.png", "--policy", "none"), "PolicyError"),
        (("{}/a.png", "--points", "fast"), "fusion is 'fast'"),
        (("{}/a.png", "--model", "{}/none"), "is no folder"),
        (("{}/a.png", "--references", "{}/none.csv"), "'none.csv' cannot be read"),
        (("{}",), "no images or clips"),
    ],
)
def test_the_command_refuses_what_cannot_be_labelled(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    found = call(*(text.format(tmp_path) for text in arguments), "--out", tmp_path / "labels.jsonl")
    assert found.exit_code == 2 and message in found.stderr and not (tmp_path / "labels.jsonl").exists()


@pytest.fixture
def shadowed(reference_model: Any, processor: Any, tmp_path: Path) -> Iterator[ShadowedRunner]:
    live = AdaptiveRunner(reference_model, processor, policy="reference-balanced", log=tmp_path / "log.jsonl", seed=0)
    with ShadowedRunner(live, 1.0, waiting=2, seed=0) as front:
        yield front


def test_shadows_label_what_users_got_and_leave_requests_alone(
    shadowed: ShadowedRunner, screen: Image.Image, tmp_path: Path
) -> None:
    images = [screen, screen.transpose(Image.Transpose.ROTATE_90), screen.transpose(Image.Transpose.ROTATE_180)]
    plain = AdaptiveRunner(shadowed.model, shadowed.processor, policy="reference-balanced", seed=0)
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    expected = [plain.chat(image, "Describe the screen.", **options).text for image in images]
    replies = [shadowed.chat(image, "Describe the screen.", **options) for image in images[:2]]
    with shadowed.stream(images[2], "Describe the screen.", **options) as stream:
        pieces = list(stream)
    assert shadowed.drain(120)
    texts = [reply.text for reply in replies] + ["".join(pieces).strip()]
    assert texts == expected and stream.reply.text == expected[2]
    shadowed.chat(None, "Hello", **options)  # nothing to see
    shadowed.chat(screen, "Describe.", point=OperatingPoint(), **options)  # nobody decided
    assert shadowed.drain(120)
    counts = shadowed.counts
    assert counts.labelled + counts.dropped == 3 and counts.labelled >= 2 and counts.failed == 0, counts
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    rungs = {r["request_id"]: r["rung"] for r in records if "event" not in r}
    shadows = [r for r in records if r.get("event") == "shadow"]
    assert len(shadows) == counts.labelled
    for shadow in shadows:
        assert list(shadow["quality"]) == [rungs[shadow["request_id"]]] and shadow["reference_quality"] == 1
    names = sorted({rungs[s["request_id"]] for s in shadows})
    data = build_dataset([tmp_path], cheap=names[0], rungs=names)
    assert len(data) == counts.labelled and data.report["unjoined"] == 0


def test_shadows_of_both_arms_say_which_was_enough(
    reference_model: Any, processor: Any, screen: Image.Image, tmp_path: Path
) -> None:
    policy = Policy.load("reference-balanced")
    live = AdaptiveRunner(reference_model, processor, policy=policy, log=tmp_path / "log.jsonl")
    with ShadowedRunner(live, 1.0, arms=True) as front:
        front.chat(screen, "Describe the screen.", max_new_tokens=2)
        assert front.drain(120) and front.counts.labelled == 1
    *_, shadow = (json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines())
    arms = {policy.cheap_rung.name, policy.lanes[COMPLEX][0].name}
    assert arms <= set(shadow["quality"]) and all(0 <= each <= 1 for each in shadow["quality"].values())
    data = build_dataset([tmp_path], cheap=policy.cheap_rung.name, rungs=sorted(arms))
    assert np.isfinite(data.y).all() and data.taken[0] in (-1, 0, 1)


def test_shadows_that_fail_or_do_not_fit_are_counted_and_a_closed_front_still_answers(
    shadowed: ShadowedRunner, screen: Image.Image, tmp_path: Path
) -> None:
    asked: dict[str, Any] = {"max_new_tokens": 2}
    gone = tmp_path / "gone.png"
    screen.save(gone)
    with shadowed._living():  # a request that does not end: shadows wait
        for media in (gone, screen, screen, screen):
            shadowed.chat(media, "Describe the screen.", **asked)
        assert shadowed.counts.dropped == 2 and not shadowed.drain(0)
        gone.unlink()
    assert shadowed.drain(120)
    assert (shadowed.counts.labelled, shadowed.counts.failed) == (1, 1)
    assert shadowed.counts.last_error.startswith("MediaError: 'gone.png'")
    for refused in (lambda: shadowed.chat(b"-", "?"), lambda: shadowed.stream(b"-", "?").reply):
        with pytest.raises(MediaError):
            refused()
    shadowed.close()
    shadowed.chat(screen, "Describe the screen.", **asked)
    assert shadowed.drain(0) and shadowed.counts.labelled == 1


def test_shadows_need_a_log_and_a_share(runner: AdaptiveRunner) -> None:
    with pytest.raises(ConfigError, match="no log"):
        ShadowedRunner(runner, 0.1)
