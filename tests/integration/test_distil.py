"""Distillation on real models: batches, recorded levels, training, resuming, and the command."""

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from adaptive_fusion.commands import distil as command
from adaptive_fusion.errors import ConfigError, UnsupportedModelError
from adaptive_fusion.evaluation.questions import Question
from adaptive_fusion.fusion import FusionSpec
from adaptive_fusion.learning.distillation.distil import DistillationReport, distil
from adaptive_fusion.learning.distillation.levels import LevelCache
from adaptive_fusion.learning.distillation.settings import Settings
from adaptive_fusion.learning.distillation.teacher import Teacher, answer_logits, fingerprint, greedy, prepare
from adaptive_fusion.models import GridAdapter, Recorded, adapter_for
from adaptive_fusion.point import NATIVE, OperatingPoint
from adaptive_fusion.policy.policy import Policy
from adaptive_fusion.reference.screens import make_scene
from adaptive_fusion.runner import AdaptiveRunner

POINT = OperatingPoint("gated", 6, 0.5, adapter_rank=4)
SMALL = Settings(steps=6, batch=2, every=3, holdout=0.3, max_new_tokens=5, lr=1e-2, ratios={1.0: 1.0, 0.5: 1.0})


@pytest.fixture
def adapter(tiny_dense: Any, processor: Any) -> GridAdapter:
    found = adapter_for(tiny_dense, processor)
    assert isinstance(found, GridAdapter)
    return found


@pytest.fixture
def asked(noise_image: Any) -> list[Question]:
    sizes = [(64, 48), (96, 64), (48, 80), (64, 64), (80, 80), (112, 48)]
    return [Question(noise_image(*size, seed), "Describe the screen.") for seed, size in enumerate(sizes)]


def test_levels_are_kept_up_to_the_bound_and_those_that_came_first_stay(
    adapter: GridAdapter, asked: list[Question]
) -> None:
    levels = (1, 3)
    sizes = [LevelCache(adapter, levels, 1.0).of(question)[1].nbytes for question in asked[:3]]
    cache = LevelCache(adapter, levels, (sizes[0] + sizes[1]) / 2**30)
    first = [cache.of(question)[1] for question in asked[:3]]
    again = [cache.of(question)[1] for question in asked[:3]]
    assert [a is b for a, b in zip(first, again, strict=True)] == [True, True, False]
    assert cache.of(asked[0], 0.5)[1] is not first[0]


@pytest.mark.parametrize("point", [NATIVE, POINT, OperatingPoint("weighted", 6, 0.25)], ids=lambda p: p.name)
def test_a_batch_of_unequal_rows_says_what_each_row_says_alone(
    adapter: GridAdapter, asked: list[Question], clip: Any, point: OperatingPoint
) -> None:
    """Stills and a clip together, against ``generate`` and a plain forward of one row each."""
    rows = [prepare(adapter, question) for question in (asked[0], Question(clip, "What happens?"), asked[4])]
    answers = greedy(adapter, rows, point, 6)
    with torch.no_grad():
        logits = answer_logits(adapter, rows, answers, point)
    for row, answer, own in zip(rows, answers, logits, strict=True):
        encoded = adapter.encode(row, point).inputs
        length = encoded["input_ids"].shape[1]
        expected = adapter.model.generate(**encoded, max_new_tokens=6, do_sample=False, output_logits=True,
                                          return_dict_in_generate=True)  # fmt: skip
        assert answer.tolist() == expected.sequences[0, length:].tolist()
        torch.testing.assert_close(own, torch.cat(expected.logits), rtol=1e-3, atol=1e-4)


def test_an_answer_ends_with_its_end_token(
    reference_model: Any, processor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = adapter_for(reference_model, processor)
    assert isinstance(adapter, GridAdapter)
    scene = make_scene("simple", 3, "eval", (64, 96))
    rows = [prepare(adapter, Question(scene.image, "Describe the screen."))] * 2
    free = greedy(adapter, rows, NATIVE, 12)
    assert free[0].tolist() == free[1].tolist()
    # Any token can be made the end: the answer then stops at its first occurrence, and contains it.
    stop = int(free[0][2])
    monkeypatch.setattr(adapter.model.generation_config, "eos_token_id", [stop, processor.tokenizer.eos_token_id])
    assert greedy(adapter, rows, NATIVE, 12)[0].tolist() == free[0][: free[0].tolist().index(stop) + 1].tolist()


@pytest.mark.parametrize("ratio", [1.0, 0.5, 0.25])
@pytest.mark.parametrize("fusion", ["native", "top"])
def test_points_without_fusion_come_from_recordings_bit_for_bit(
    adapter: GridAdapter, asked: list[Question], clip: Any, fusion: str, ratio: float
) -> None:
    point = OperatingPoint(fusion, downsample=ratio)
    row = prepare(adapter, Question([asked[0].media, clip, asked[1].media], "What happens?"))
    bare = {key: value for key, value in row.items() if "pixel" not in key}
    with torch.no_grad():
        expected = adapter.encode(row, point)
        found = adapter.encode(bare, point, adapter.record(row, point, adapter.levels(point)))
    assert (found.visual_tokens, found.patches) == (expected.visual_tokens, expected.patches)
    assert all(torch.equal(found.inputs[key], expected.inputs[key]) for key in bare)
    for kind in ("image", "video"):
        ours, theirs = (encoded.inputs["mm_encoder_outputs"][kind] for encoded in (found, expected))
        streams = [(ours.pooler_output, theirs.pooler_output)]
        streams += zip(ours.deepstack_features, theirs.deepstack_features, strict=True)
        assert len(streams) == 4
        assert all(torch.equal(*pair) for parts in streams for pair in zip(*parts, strict=True))


@pytest.mark.parametrize("ratio", [1.0, 0.5, 0.25])
def test_recorded_levels_give_what_the_pixels_give(
    adapter: GridAdapter, asked: list[Question], clip: Any, ratio: float
) -> None:
    point = OperatingPoint("gated", 6, ratio, adapter_rank=4)
    module = adapter.build(point)
    assert module is not None
    torch.manual_seed(0)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    rows = [prepare(adapter, question) for question in (asked[0], Question(clip, "What happens?"), asked[1])]
    answers = [torch.tensor([5, 6, 7]), torch.tensor([8]), torch.tensor([9, 10])]
    recorded = [adapter.record(row, NATIVE, module.spec.levels) for row in rows]
    assert all(not level.requires_grad for part in recorded for kind in part.levels.values() for level in kind.values())
    bare = [{key: value for key, value in row.items() if "pixel" not in key} for row in rows]
    with torch.no_grad():
        expected = answer_logits(adapter, rows, answers, point)
        found = answer_logits(adapter, bare, answers, point, Recorded.joined(recorded))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_training_learns_resumes_and_touches_only_the_module(
    adapter: GridAdapter, asked: list[Question], tmp_path: Path
) -> None:
    model = adapter.model
    model.requires_grad_(True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    looks: list[int] = []

    def run(name: str, note: Callable[[Any], None] = lambda _: None, **options: Any) -> DistillationReport:
        return distil(
            adapter,
            asked,
            POINT,
            tmp_path / name,
            SMALL,
            answers=tmp_path / "told",
            note=note,
            **options,
        )

    whole = run("whole.safetensors", lambda entry: looks.append(entry["step"]))
    assert looks == [0, 3, 6] and (whole.steps, whole.stopped_early) == (6, False)
    assert whole.trained_on + whole.held_out == len(asked)
    assert whole.before.kl[1.0] == pytest.approx(0, abs=1e-5) and whole.before.agreement[1.0] == 1
    assert whole.before.kl[0.5] > 1e-4
    worth = [sum(judged.kl.values()) for judged in (whole.before, whole.after)]
    assert worth[1] < worth[0]

    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    model.requires_grad_(False)

    class Interrupted(Exception):
        pass

    def interrupt(entry: Any) -> None:
        if entry["step"] == 6:
            raise Interrupted

    with pytest.raises(Interrupted):
        run("broken.safetensors", interrupt)
    assert not (tmp_path / "broken.safetensors").exists()
    looks.clear()
    resumed = run("broken.safetensors", lambda entry: looks.append(entry["step"]), resume=True)
    assert looks == [6] and resumed == whole
    one, other = load_file(tmp_path / "whole.safetensors"), load_file(tmp_path / "broken.safetensors")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)

    with pytest.raises(ConfigError, match=r"broken.safetensors.work holds the state of another run"):
        distil(adapter, asked[:-1], POINT, tmp_path / "broken.safetensors", SMALL, resume=True)


def test_a_policy_runs_what_was_distilled(
    adapter: GridAdapter, asked: list[Question], processor: Any, tmp_path: Path
) -> None:
    out = tmp_path / "gated.safetensors"
    distil(adapter, asked, POINT, out, replace(SMALL, layers={6: 1.0, 3: 1.0}))
    spec = FusionSpec.read(out)
    assert (spec.strategy, len(spec.levels), spec.rank, spec.elastic) == ("gated", 6, 4, (3,))
    base = Policy.load("native")
    folder = Policy("mine", base.router, 0.5, base.lanes, fusion_weights=(out,)).save(tmp_path / "mine")
    trained = AdaptiveRunner(adapter.model, processor, policy=folder)
    fresh = AdaptiveRunner(adapter.model, processor, policy="native")
    row, answer = [prepare(adapter, asked[1])], [torch.tensor([5, 6, 7])]
    for ratio, layers in ((1.0, 6), (0.5, 6), (1.0, 3), (0.5, 3)):
        point = OperatingPoint("gated", layers, ratio, adapter_rank=4)  # type: ignore[arg-type]
        assert not trained.adapter.untrained(point)
        with torch.no_grad():
            one, other = (answer_logits(runner.adapter, row, answer, point)[0] for runner in (trained, fresh))  # type: ignore[arg-type]
        assert (one - other).abs().max() > 1e-4
    assert trained.chat(asked[1].media, "?", point=POINT, max_new_tokens=3).measurement.new_tokens >= 1


def test_answers_are_asked_for_once_and_belong_to_their_model(
    adapter: GridAdapter, asked: list[Question], tmp_path: Path
) -> None:
    calls: list[int] = []
    handle = adapter.model.model.visual.register_forward_hook(lambda *_: calls.append(1))
    try:
        first = Teacher(adapter, tmp_path, max_new_tokens=4, batch=2).ask(asked[:4])
        asked_once = len(calls)
        again = Teacher(adapter, tmp_path, max_new_tokens=4, batch=2).ask([asked[3], *asked[:3]])
        assert asked_once and len(calls) == asked_once
        for one, other in zip([first[3], *first[:3]], again, strict=True):
            assert one.tokens.tolist() == other.tokens.tolist() and torch.equal(one.logprobs, other.logprobs)
        Teacher(adapter, tmp_path, max_new_tokens=3, batch=2).ask(asked[:1])
        assert len(calls) > asked_once
    finally:
        handle.remove()
    mark = fingerprint(adapter.model)
    weight = next(iter(adapter.model.parameters()))
    with torch.no_grad():
        weight.view(-1)[0] += 1
    assert fingerprint(adapter.model) != mark
    with pytest.raises(UnsupportedModelError, match="are offloaded; expected all in memory"):
        fingerprint(copy.deepcopy(adapter.model).to("meta"))
    with torch.no_grad():
        weight.view(-1)[0] -= 1


@pytest.mark.parametrize(
    ("point", "said"),
    [(NATIVE, "fusion is 'native'; expected one of gated, weighted"), (OperatingPoint("sum", 6), "fusion is 'sum'")],
)
def test_points_without_anything_to_train_are_refused(
    adapter: GridAdapter, asked: list[Question], tmp_path: Path, point: OperatingPoint, said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        distil(adapter, asked, point, tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())


def test_the_command_trains_on_a_folder_and_prints_one_object(tmp_path: Path, noise_image: Any) -> None:
    images = tmp_path / "images"
    (images / "more").mkdir(parents=True)
    for seed in range(3):
        noise_image(48, 32, seed).save(images / f"{seed}.png")
    noise_image(32, 32, 9).save(images / "more" / "9.jpg")
    (images / "notes.txt").write_text("no image")  # a folder gives its images and clips only
    (images / "torn.png").write_text("no image")
    out = tmp_path / "weighted.safetensors"
    call = ["INPUT", "--prompt", "Read the text.", "--fusion", "weighted", "--layers", "6", "--rank", "4"]
    call += [
        "--downsample",
        "0.5",
        "--steps",
        "2",
        "--batch",
        "2",
        "--max-new-tokens",
        "4",
        "--out",
        str(out),
        "--json",
    ]
    call[0] = str(images)
    done = CliRunner().invoke(command.app, call)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert (found["point"], found["steps"], found["trained_on"] + found["held_out"]) == ("weighted6r4@1", 2, 4)
    assert list(found["before"]["kl"]) == list(found["after"]["kl"]) == ["0.5"]
    assert found["after"]["kl"]["0.5"] <= found["before"]["kl"]["0.5"]
    assert "torn.png: MediaError" in done.stderr and "left out" in done.stderr and "notes.txt" not in done.stderr
    assert FusionSpec.read(out).strategy == "weighted"
    again = json.loads(CliRunner().invoke(command.app, [*call, "--resume"]).stdout)
    assert again == found
    refused = CliRunner().invoke(command.app, [*call, "--fusion", "sum"])
    assert refused.exit_code == 2 and "fusion is 'sum'; expected one of gated, weighted" in refused.stderr


def test_a_picture_in_a_list_names_a_question_as_well(noise_image: Any) -> None:
    picture: Image.Image = noise_image(8, 8)
    assert Question([picture, picture], "?").content == "+".join([Question(picture, "?").content] * 2)
    assert Question(picture, "?").key != Question(picture, "!").key
