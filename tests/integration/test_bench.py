"""The benchmarks on real models, small: what they print is what ran."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from adaptive_fusion.bench.answers import ADAPTIVE, CHANCE, KNOB_ROWS, SHUFFLED, SUM, TOP, gated, rows_for, weighted
from adaptive_fusion.bench.cost import Workload, build_random, cost_rows, measure_costs
from adaptive_fusion.bench.quality import evaluate
from adaptive_fusion.bench.scores import MIXED
from adaptive_fusion.bench.shapes import Shape, ShapeProcessor, Vision
from adaptive_fusion.commands.bench import app
from adaptive_fusion.evaluation.likelihood import after_prompt, prefill
from adaptive_fusion.evaluation.scenes import reference_questions
from adaptive_fusion.fusion import DeepStackFusion, FusionSpec
from adaptive_fusion.models import adapter_for
from adaptive_fusion.point import NATIVE, OperatingPoint
from adaptive_fusion.policy.policy import Policy
from adaptive_fusion.runner import AdaptiveRunner

SMALL = Shape(64, 4, 2, 1, 96, Vision(64, 8, 96, (1, 3, 5), 2), tied=True)


@pytest.mark.parametrize("point", [NATIVE, OperatingPoint("top", downsample=0.5)], ids=lambda p: p.name)
@pytest.mark.parametrize("kind", ["image", "video"])
def test_likelihoods_equal_one_full_forward_each(
    tiny_dense: Any, processor: Any, noise_image: Any, clip: Any, kind: str, point: OperatingPoint
) -> None:
    adapter = adapter_for(tiny_dense, processor)
    part = {"type": kind, kind: clip if kind == "video" else noise_image(96, 64)}
    messages = [{"role": "user", "content": [part, {"type": "text", "text": "Describe the screen."}]}]
    encoded = adapter.encode(adapter.prepare(messages, point), point)
    captions = ["red circle top", "b3 blue ring K7, c4 green bar 2", "A"]
    tokenizer, ids = processor.tokenizer, encoded.inputs["input_ids"]
    tails = [[*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id] for text in captions]
    found = after_prompt(tiny_dense, prefill(tiny_dense, encoded.inputs), tails)
    for tail, likelihood in zip(tails, found, strict=True):
        full = torch.cat([ids, torch.tensor([tail])], dim=1)
        types = torch.nn.functional.pad(encoded.inputs["mm_token_type_ids"], (0, len(tail)))
        inputs = {**encoded.inputs, "input_ids": full, "mm_token_type_ids": types}
        inputs["attention_mask"] = torch.ones_like(full)
        with torch.no_grad():
            logits = tiny_dense(**inputs).logits[0, ids.shape[1] - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(tail)[:, None]).sum()
        assert likelihood.total == pytest.approx(float(expected), abs=1e-3)
        assert likelihood.mean == pytest.approx(float(expected) / len(tail), abs=1e-3)
        assert likelihood.ranked_first == pytest.approx(float((logits.argmax(-1) == torch.tensor(tail)).float().mean()))


def test_every_scene_is_encoded_once_per_row(tiny_dense: Any, processor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = AdaptiveRunner(tiny_dense, processor, policy="reference-latency", escalate=False)
    questions = reference_questions(2, (64, 96))
    rows = rows_for(runner.adapter, [*KNOB_ROWS[1:2], gated(0.25)])
    seen: list[str] = []
    encode = runner.adapter.encode

    def counting(inputs: Any, point: OperatingPoint) -> Any:
        seen.append(point.name)
        return encode(inputs, point)

    monkeypatch.setattr(runner.adapter, "encode", counting)
    steps: list[int] = []
    result = evaluate(
        runner.adapter,
        questions,
        rows,
        runner.decide,
        max_new_tokens=4,
        progress=lambda done, _total, _stage: steps.append(done),
    )
    assert list(rows) == ["native@1", "native@0.5", "gated12r8@0.25"]
    assert steps == list(range(len(questions) * 4 + 1)) and len(seen) == steps[-1] + len(
        rows
    )  # each row once more to warm up
    mixed = {record["row"]: record for record in result["slices"][MIXED]}
    assert set(mixed) == {*rows, ADAPTIVE, SHUFFLED, CHANCE}
    assert mixed["native@1"]["visual_tokens"] > 3 * mixed["native@0.5"]["visual_tokens"]
    assert mixed["native@1"]["patches"] == mixed["native@0.5"]["patches"] > mixed[ADAPTIVE]["patches"]
    assert mixed[CHANCE]["matching"]["mean"] == 0.25
    timed = mixed[ADAPTIVE]
    parts = sum(timed[key]["mean"] for key in ("preprocess_ms", "encode_ms", "prefill_ms"))
    assert parts == pytest.approx(timed["ttft_ms"]["mean"], rel=1e-6)
    json.dumps(result, allow_nan=False)


def test_quality_of_a_captioned_folder_from_the_command_line(tmp_path: Path, noise_image: Any) -> None:
    for index in range(2):
        noise_image(64, 64, index).save(tmp_path / f"{index}.png")
    captions = {
        "images": [{"id": i, "file_name": f"{i}.png"} for i in range(2)],
        "annotations": [{"image_id": i, "caption": f"noise number {i}"} for i in range(2)],
    }
    (tmp_path / "captions.json").write_text(json.dumps(captions))
    rung = Policy.load("reference-balanced").lanes["weighted"][0]
    cheap, weights = rung.name, Policy.load("reference-balanced").fusion_weights[0]
    data = ["--data", str(tmp_path), "--captions", str(tmp_path / "captions.json"), "--max-new-tokens", "4"]
    options = ["--points", "native@0.5/25%", "--weights", str(weights), "--plot", str(tmp_path / "out.png")]
    done = CliRunner().invoke(app, ["quality", *data, *options, "--json"])
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout.splitlines()[-1])
    assert [record["row"] for record in result["slices"]["captions"]] == [
        "native@1", "native@0.5/25%", cheap, ADAPTIVE, SHUFFLED, CHANCE,
    ]  # fmt: skip
    assert result["cheap"] == cheap and result["weights"] == {cheap: weights.name}
    assert result["slices"]["captions"][-1]["quality"] is None and result["pareto"]
    with Image.open(tmp_path / "out.png") as image:
        assert image.format == "PNG"
    other = tmp_path / "other.safetensors"
    DeepStackFusion(replace(FusionSpec.read(weights), rank=16, elastic=())).save(other)
    options[3] = str(other)
    for wrong in (
        *(["--data", str(tmp_path)], [*data, *options], [*data, "--plot", str(tmp_path / "out.jpg")]),
        *([*data, "--scenes", "1"], [*data, "--knobs", "--points", "top"]),
    ):
        refused = CliRunner().invoke(app, ["quality", *wrong])
        assert refused.exit_code == 2, refused.output


def test_cost_from_the_command_line() -> None:
    arguments = ["--size", "reference", "--image", "128", "--repeats", "1", "--points", "top"]
    done = CliRunner().invoke(app, ["cost", *arguments, "--json"])
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout.splitlines()[-1])
    rows = {row["row"]: row for row in result["rows"]}
    assert result["shortfalls"] is None  # nothing is asked of the reference model
    lane = {rung.name for rung in Policy.load("reference-balanced").lanes["weighted"]}
    assert set(rows) == {"native@1", "top@1", *lane}
    assert rows["native@1"]["runs"] == 2 and rows["top@1"]["encode_prefill_ms_ratio"]["median"] > 0
    assert all(rows[name]["lane"] and rows[name]["patches"] < rows["native@1"]["patches"] for name in lane)
    for option, wrong in (
        *(("--size", "3b"), ("--points", "quick@1"), ("--policy", "none-such"), ("--dtype", "int8")),
        *(("--device", "abacus"), ("--device", "cpu:x"), ("--device", "cuda:999")),
    ):
        refused = CliRunner().invoke(app, ["cost", *arguments, option, wrong])
        assert refused.exit_code == 2 and wrong.partition("@")[0] in refused.stderr, refused.stderr


def test_a_random_model_of_a_shape_runs_every_row() -> None:
    model = build_random(SMALL)
    assert model.dtype == torch.bfloat16 and model.lm_head.weight is model.model.language_model.embed_tokens.weight
    assert all(bool(torch.isfinite(p).all()) and bool(p.any()) for p in model.parameters())
    adapter = adapter_for(model, ShapeProcessor())
    rows = cost_rows(Policy.load("reference-balanced"), [TOP, SUM, gated(), weighted(0.25)])
    found = measure_costs(adapter, rows, Workload(side=256, new_tokens=2), repeats=1)
    assert {run.row for run in found} == set(rows) and len(found) == len(rows) + 2  # native thrice
    for run in found:
        plan, measured = adapter.plan([Workload(256).size()], rows[run.row].resolve(256 * 256)), run.measurement
        assert (measured.patches, measured.visual_tokens) == (plan.patches, plan.tokens), run.row
        assert measured.new_tokens == 2
