"""A runner, its model and the policy: what is chosen, what is said where they do not fit, what is never used then."""

import copy
import json
import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, Qwen3VLForConditionalGeneration
from typer.testing import CliRunner

from adaptive_fusion.cli import app
from adaptive_fusion.cost.model import CostModel
from adaptive_fusion.cost.profiles import profile_key
from adaptive_fusion.errors import PolicyMismatchWarning
from adaptive_fusion.fusion import DeepStackFusion
from adaptive_fusion.models import adapter_for
from adaptive_fusion.models.fingerprint import fingerprint
from adaptive_fusion.point import NATIVE, OperatingPoint
from adaptive_fusion.policy import Policy
from adaptive_fusion.policy.auto import NO_USER_POLICY
from adaptive_fusion.policy.fitted import Fitted
from adaptive_fusion.reference import model_path
from adaptive_fusion.runner import AdaptiveRunner
from tests.conftest import _random

NONE = "no policy was fitted to this model: general balanced"


def told(model: Any, processor: Any, **options: Any) -> tuple[AdaptiveRunner, list[str]]:
    """A runner, and what it warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        runner = AdaptiveRunner(model, processor, **options)
        runner.decide(None, "Anything?")
    return runner, [str(each.message) for each in caught if issubclass(each.category, PolicyMismatchWarning)]


@pytest.fixture(scope="module")
def same_shape(reference_model: Any) -> Any:
    """The reference model's shape with other weights."""
    return _random(Qwen3VLForConditionalGeneration(copy.deepcopy(reference_model.config)), seed=7)


# Fingerprints


def test_a_fingerprint_is_of_the_weights_not_of_how_they_are_held(reference_model: Any, processor: Any) -> None:
    own = fingerprint(adapter_for(reference_model, processor))
    fitted = Policy.load("reference-balanced").fitted.model
    assert own == fitted and own.digest and own.processor["max_pixels"] == 147_456
    half = AutoModelForImageTextToText.from_pretrained(model_path(), dtype=torch.bfloat16)
    assert fingerprint(adapter_for(half, processor)) == own
    assert fingerprint(adapter_for(torch.compile(reference_model), processor)) == own


def test_other_weights_of_a_shape_have_another_digest_and_unread_ones_none(
    reference_model: Any, same_shape: Any, processor: Any
) -> None:
    own = fingerprint(adapter_for(reference_model, processor))
    other = fingerprint(adapter_for(same_shape, processor))
    assert (other.architecture, other.vision, other.text) == (own.architecture, own.vision, own.text)
    assert other.digest != own.digest
    quantised = copy.copy(same_shape)
    quantised.config = copy.deepcopy(same_shape.config)
    quantised.config.quantization_config = {"quant_method": "bitsandbytes"}
    by_hand = copy.deepcopy(same_shape)
    layer = by_hand.model.language_model.layers[0].mlp.up_proj
    layer.weight = torch.nn.Parameter((layer.weight * 64).to(torch.int8), requires_grad=False)
    away = copy.deepcopy(same_shape).to("meta")
    for model, why in ((quantised, "quantised"), (by_hand, "quantised"), (away, "offloaded")):
        found = fingerprint(adapter_for(model, processor))
        assert found.digest == "" and why in found.unread and found.vision == own.vision


# The choice


def test_the_reference_model_gets_its_own_policy(reference_model: Any, processor: Any) -> None:
    runner, warned = told(reference_model, processor)
    assert runner.policy == Policy.load("reference-balanced") and warned == []
    assert "reference-balanced" in repr(runner) and "shipped, fitted to this model" in repr(runner)
    decision = runner.decide(None, "Anything?")
    assert "fitted" not in decision.reason and "untrained" not in decision.reason
    assert runner.adapter.fusion(OperatingPoint("gated", 12, adapter_rank=8)) is not None


@pytest.mark.parametrize("which", ["tiny_dense", "tiny_moe", "same_shape"])
def test_another_model_gets_the_general_policy_and_nothing_of_the_references(
    which: str, processor: Any, noise_image: Any, request: pytest.FixtureRequest
) -> None:
    runner, warned = told(request.getfixturevalue(which), processor)
    general = Policy.load("balanced")
    assert runner.policy == general and not general.fusion_weights and len(warned) == 1
    assert "no policy was fitted to this model" in warned[0] and NONE in repr(runner)
    reply = runner.chat(noise_image(96, 64), "Describe.", max_new_tokens=2)
    assert reply.decision.reason.endswith(NONE)
    assert all(runner.adapter.fusion(rung.point) is None for lane in general.lanes.values() for rung in lane)
    with warnings.catch_warnings(action="error"):
        named = AdaptiveRunner(runner.model, processor, policy="balanced")
    assert "fitted" not in named.decide(None, "Anything?").reason


def test_a_policy_of_another_model_runs_and_says_so(tiny_dense: Any, processor: Any, noise_image: Any) -> None:
    runner, warned = told(tiny_dense, processor, policy="reference-balanced")
    (said,) = warned
    assert "reference-balanced was fitted to another model" in said and "depth 12, here 8" in said
    assert re.search(r"gated12r8.safetensors \(taps 2,5,8, here 1,3,5; levels .*; d_vision 64, here 32", said)
    image = noise_image(96, 64)
    inputs = runner.adapter.prepare([{"role": "user", "content": [{"type": "image", "image": image}]}], NATIVE)
    runner.chat(image, "Describe.", max_new_tokens=2)
    decisions = [runner.decide(image, "Describe."), runner.last[0] if runner.last else None]
    runner.generate(**inputs, max_new_tokens=1)
    decisions.append(runner.last[0] if runner.last else None)
    with runner.native():  # goes to the model as it is
        runner.generate(**inputs, max_new_tokens=1)
    decisions.append(runner.last[0] if runner.last else None)
    for decision in decisions:
        assert decision is not None
        assert "fitted to another model: another vision shape, another text shape" in decision.reason
        assert "weighted12r4.safetensors, gated12r8.safetensors" in decision.reason
    careful = runner.decide(image, "Describe.")
    assert careful.point.is_full and "not trusted" in careful.reason
    assert careful.escalation["doubt"] == "it was fitted to another model"
    with pytest.warns(PolicyMismatchWarning):
        trusting = AdaptiveRunner(tiny_dense, processor, policy="reference-balanced", escalate=False)
    assert trusting.decide(image, "Describe.").escalation == {}
    fused = trusting.chat(image, "Describe.", point=OperatingPoint("gated", 12, 0.5, adapter_rank=8), max_new_tokens=1)
    assert "untrained for this model" in fused.decision.reason


def test_other_weights_of_the_shape_are_a_note_and_the_fusion_weights_are_used(same_shape: Any, processor: Any) -> None:
    runner, warned = told(same_shape, processor, policy="reference-balanced")
    assert warned == [] and "other weights of this shape" in runner.decide(None, "Anything?").reason
    assert runner.adapter.fusion(OperatingPoint("gated", 12, adapter_rank=8)) is not None


def test_moving_the_model_changes_nothing_of_it(processor: Any, tiny_dense: Any) -> None:
    runner, _ = told(copy.deepcopy(tiny_dense), processor)
    before = runner.policy, runner.policy_note, runner.fingerprint
    with warnings.catch_warnings(action="error"):
        runner.to(torch.bfloat16)
        assert runner.decide(None, "Anything?").reason.endswith(NONE)
    assert (runner.policy, runner.policy_note, runner.fingerprint) == before


def test_the_users_own_policy_is_taken_unless_the_environment_says_no(
    tiny_dense: Any, processor: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    point, own = OperatingPoint("gated", 6), adapter_for(tiny_dense, processor)
    module = own.build(point)
    assert module is not None
    module.save(tmp_path / "gated6.safetensors")
    DeepStackFusion(replace(module.spec, d_text=64)).save(tmp_path / "wide.safetensors")
    files = (tmp_path / "gated6.safetensors", tmp_path / "wide.safetensors")
    mine = replace(
        Policy.load("balanced"), name="mine", fitted=Fitted(fingerprint(own), ("receipts",)), fusion_weights=files
    )
    folder = mine.save(tmp_path / "adaptive_fusion" / "policies" / "mine")
    (folder.parent / "torn").mkdir()
    (folder.parent / "torn" / "policy.toml").write_text("schema = ")
    monkeypatch.delenv(NO_USER_POLICY)
    runner, warned = told(tiny_dense, processor)
    assert runner.policy.name == "mine" and runner.adapter.fusion(point) is not None
    assert len(warned) == 1 and "wide.safetensors (d_text 64, here 32)" in warned[0]
    assert "wide.safetensors" in runner.decide(None, "Anything?").reason

    tiny_dense.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    result = CliRunner().invoke(app, ["doctor", "--model", str(tmp_path / "model"), "--json"])
    checks = [check for check in json.loads(result.stdout)["checks"] if check["name"] in ("policy", "own policy")]
    assert result.exit_code == 0 and "reference-balanced: shipped, fitted to this model" in checks[0]["found"]
    found = next(check["found"] for check in checks if check["found"].startswith("mine"))
    assert "0 days old" in found and "receipts" in found and "wide.safetensors" in found
    assert any("'torn' cannot be read" in check["found"] for check in checks)
    monkeypatch.setenv(NO_USER_POLICY, "1")
    assert told(tiny_dense, processor)[0].policy.name == "balanced"

    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    shown = CliRunner().invoke(app, ["explain", str(tmp_path / "a.png"), "--model", str(tmp_path / "model"), "--json"])
    (line,) = shown.stderr.splitlines()  # not a place in the code
    assert line.startswith("warning: no policy was fitted to this model, Qwen3VL")
    assert json.loads(shown.stdout)["reason"].endswith(NONE)


# Untrained fusion


@pytest.mark.parametrize("ratio", [1.0, 0.5])
@pytest.mark.parametrize("fusion", ["weighted", "gated"])
def test_untrained_fusion_is_the_native_computation_and_costs_no_more(
    tiny_dense: Any, processor: Any, noise_image: Any, fusion: Any, ratio: float
) -> None:
    runner, _ = told(tiny_dense, processor, policy="balanced")
    adapter, point = runner.adapter, OperatingPoint(fusion, 6, ratio, adapter_rank=4)
    image = noise_image(96, 64)
    parts = [{"type": "image", "image": image}, {"type": "text", "text": "Describe."}]
    inputs = adapter.prepare([{"role": "user", "content": parts}], NATIVE)
    assert adapter.computed(point) == OperatingPoint(downsample=ratio) and adapter.levels(point) == adapter.taps
    recorded = adapter.record(inputs, point, adapter.levels(point))
    native = adapter.encode(inputs, OperatingPoint(downsample=ratio)).inputs["mm_encoder_outputs"]["image"]
    for held in (None, recorded):
        found = adapter.encode(inputs, point, held).inputs["mm_encoder_outputs"]["image"]
        assert torch.equal(torch.cat(found.pooler_output), torch.cat(native.pooler_output))
        for ours, theirs in zip(found.deepstack_features, native.deepstack_features, strict=True):
            assert torch.equal(torch.cat(ours), torch.cat(theirs))
    assert adapter.fusion(point) is None
    reply = runner.chat(image, "Describe.", point=point, max_new_tokens=2)
    assert f"{fusion} is untrained for this model: the native computation" in reply.decision.reason
    cost = CostModel(runner.profile)
    work = runner.work(image, "Describe.", point, 2)
    with adapter.built([point]):  # as a trained one would
        assert adapter.fusion(point) is not None and adapter.computed(point) == point
        trained = runner.chat(image, "Describe.", point=point, max_new_tokens=2).decision
        assert "untrained" not in trained.reason and trained.predicted is not None
    assert adapter.fusion(point) is None and reply.decision.predicted is not None
    assert cost.predict(point, work).encode_ms > cost.predict(replace(NATIVE, downsample=ratio), work).encode_ms
    plain = runner.chat(image, "Describe.", point=replace(NATIVE, downsample=ratio), max_new_tokens=2).decision
    assert plain.predicted == reply.decision.predicted and trained.predicted.encode_ms > plain.predicted.encode_ms
    adapter.add_fusion(DeepStackFusion(adapter.spec(point)))  # added: from now on it counts as trained
    assert adapter.fusion(point) is not None and adapter.computed(point) == point


def test_sum_and_top_stay_what_they_are(tiny_dense: Any, processor: Any) -> None:
    adapter = adapter_for(tiny_dense, processor)
    for point in (OperatingPoint("sum", 6), OperatingPoint("top"), NATIVE):
        assert adapter.computed(point) == point and not adapter.untrained(point)
    assert adapter.fusion(OperatingPoint("sum", 6)) is not None and len(adapter.levels(OperatingPoint("sum", 6))) == 6


def test_policies_are_listed_with_what_they_were_fitted_to() -> None:
    rows = [json.loads(line) for line in CliRunner().invoke(app, ["policies", "--json"]).stdout.splitlines()]
    fitted = {row["name"]: Fitted.from_dict(row["fitted"]) for row in rows}
    assert fitted == {name: Policy.load(name).fitted for name in Policy.shipped()}
    assert {name for name, each in fitted.items() if each.model} == {n for n in fitted if n.startswith("reference-")}
    assert "no model: general" in " ".join(CliRunner().invoke(app, ["policies"]).stdout.replace("│", "").split())


def test_costs_are_of_the_model_wherever_it_lies(tiny_dense: Any, processor: Any, tmp_path: Path) -> None:
    keys = []
    for name in ("here", "there"):
        tiny_dense.save_pretrained(tmp_path / name)
        processor.save_pretrained(tmp_path / name)
        keys.append(profile_key(AdaptiveRunner.from_pretrained(tmp_path / name, policy="native").adapter))
    assert keys[0] == keys[1]
    config = tmp_path / "there" / "config.json"
    told = json.loads(config.read_text())
    told["text_config"]["rms_norm_eps"] = 1e-3
    config.write_text(json.dumps(told))
    other = profile_key(AdaptiveRunner.from_pretrained(tmp_path / "there", policy="native").adapter)
    assert {name for name in other if other[name] != keys[0][name]} == {"model"}
