"""A model in a wrapper answers through a runner as it answers itself: PEFT, accelerate's offloading, other dtypes.

At native the tokens are those of the wrapped model's own ``generate``, at every other point those of the same point on
the bare model with the same weights.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from peft import LoraConfig, PromptTuningConfig, XLoraConfig, get_peft_model
from torch import nn

from adaptive_fusion.errors import UnsupportedModelError
from adaptive_fusion.models import adapter_for
from adaptive_fusion.models.fingerprint import fingerprint
from adaptive_fusion.models.unwrap import lock_of
from adaptive_fusion.point import NATIVE, OperatingPoint
from adaptive_fusion.runner import AdaptiveRunner

POINTS = tuple(map(OperatingPoint.parse, ("native", "gated12r8@0.5", "weighted6r4", "sum9", "top")))
LORA: dict[str, Any] = {
    "r": 4,
    "target_modules": ["q_proj", "down_proj", "qkv", "linear_fc1"],  # of language model, vision tower and mergers
    "init_lora_weights": False,
}


@pytest.fixture(scope="module")
def inputs(reference_model: Any, processor: Any, noise_image: Any) -> dict[str, Any]:
    content = [{"type": "image", "image": noise_image(96, 64)}, {"type": "text", "text": "Describe the screen."}]
    return adapter_for(reference_model, processor).prepare([{"role": "user", "content": content}], NATIVE)


@pytest.fixture
def fresh(reference_model: Any) -> Any:
    """A reference model of this test's own."""
    return copy.deepcopy(reference_model)


Ask = Callable[[Any], dict[str, list[int]]]


@pytest.fixture(scope="module")
def ask(processor: Any, inputs: dict[str, Any]) -> Ask:
    """The tokens that a model answers with at every point, through a runner."""

    def tokens(model: Any) -> dict[str, list[int]]:
        runner = AdaptiveRunner(model, processor, policy="reference-balanced", seed=0)
        return {point.name: runner.generate(**inputs, point=point, max_new_tokens=3)[0].tolist() for point in POINTS}

    return tokens


@pytest.fixture(scope="module")
def bare(ask: Ask, reference_model: Any) -> dict[str, list[int]]:
    return ask(reference_model)


def with_lora(model: Any, seed: int = 0, **more: Any) -> Any:
    kind = {key: more.pop(key) for key in ("mixed",) if key in more}
    torch.manual_seed(seed)
    return get_peft_model(model, LoraConfig(**{**LORA, **more}), **kind).eval()


@pytest.mark.parametrize("kind", [{}, {"task_type": "CAUSAL_LM"}, {"mixed": True}], ids=["plain", "causal", "mixed"])
def test_a_model_with_lora_answers_as_merged_and_switched_off_as_without(
    kind: dict[str, Any], fresh: Any, ask: Ask, bare: dict[str, list[int]], inputs: dict[str, Any]
) -> None:
    model = with_lora(fresh, **kind)
    answers = ask(model)
    assert answers["native@1"] == model.generate(**inputs, max_new_tokens=3)[0].tolist()
    assert answers != bare
    with model.disable_adapter():
        assert ask(model) == bare
    assert ask(model) == answers
    assert ask(copy.deepcopy(model).merge_and_unload()) == answers


@pytest.mark.parametrize("more", [{}, {"use_dora": True}, {"modules_to_save": ["merger"]}], ids=repr)
def test_a_fingerprint_is_of_the_model_without_its_adapters(more: dict[str, Any], fresh: Any, processor: Any) -> None:
    before = fingerprint(adapter_for(fresh, processor))
    wrapped = with_lora(fresh, **more)
    assert before.digest and fingerprint(adapter_for(wrapped, processor)) == before
    assert AdaptiveRunner(wrapped, processor).policy.name == "reference-balanced"


def test_the_adapter_in_use_is_the_one_that_answers(fresh: Any, ask: Ask, processor: Any) -> None:
    model = with_lora(fresh)
    model.add_adapter("second", LoraConfig(**LORA))
    runner = AdaptiveRunner(model, processor)
    first = ask(model)
    runner.set_adapter("second")
    second = ask(model)
    assert second != first and second == ask(copy.deepcopy(model).merge_and_unload(adapter_names=["second"]))


def test_a_vision_tower_of_pefts_own_is_the_one_that_is_fused(fresh: Any, ask: Ask, bare: dict[str, list[int]]) -> None:
    """``modules_to_save`` keeps two towers; which of them runs depends on the adapter."""
    model = with_lora(fresh, target_modules=["q_proj"], modules_to_save=["visual"])
    with torch.no_grad():
        for parameter in model.base_model.model.model.visual.modules_to_save["default"].parameters():
            parameter.mul_(1.2)
    answers = ask(model)
    assert answers == ask(copy.deepcopy(model).merge_and_unload())
    with model.disable_adapter():
        assert ask(model) == bare


def test_a_model_has_one_lock_in_all_its_wrappers(fresh: Any, processor: Any) -> None:
    model = with_lora(fresh)
    locks = [lock_of(each) for each in (fresh, model, torch.compile(fresh), torch.compile(model))]
    assert len(set(map(id, locks))) == 1
    with AdaptiveRunner(model, processor).exclusive() as held:
        assert held is model and locks[0]._is_owned()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (lambda m: get_peft_model(m, PromptTuningConfig("CAUSAL_LM", num_virtual_tokens=2)), "'default' is PROMPT_TUN"),
        (nn.DataParallel, "is a DataParallel, .*expected the model in it, its .module"),
        (lambda m: torch.compile(nn.DataParallel(m)), "is a DataParallel"),
        (lambda m: nn.Sequential(m), "Sequential cannot be driven"),
    ],
    ids=["prompt", "parallel", "compiled parallel", "unknown"],
)
def test_wrappers_that_cannot_be_followed_are_refused_by_name(
    wrap: Callable[[Any], Any], message: str, fresh: Any, processor: Any
) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        AdaptiveRunner(wrap(fresh), processor)


def test_an_adapter_in_pefts_own_forward_is_refused_by_name(fresh: Any, processor: Any, tmp_path: Path) -> None:
    with_lora(copy.deepcopy(fresh)).save_pretrained(tmp_path)
    fresh.config.use_cache = False  # PEFT asks for it
    config = XLoraConfig("CAUSAL_LM", hidden_size=8, adapters={"a": str(tmp_path)})
    with pytest.raises(UnsupportedModelError, match="'default' is XLORA"):
        AdaptiveRunner(get_peft_model(fresh, config), processor)


# Weights that are somewhere else


def dispatched(model: Any, folder: Path) -> Any:
    places = {"model.visual": "cpu", "model.language_model": "disk", "lm_head": "cpu"}
    return dispatch_model(model, places, main_device="cpu", offload_dir=folder)


OFFLOADED: dict[str, Callable[[Any, Path], Any]] = {
    "cpu": lambda model, _: cpu_offload(model, torch.device("cpu")),
    "disk": disk_offload,
    "dispatched": dispatched,
    "on one device": lambda model, _: dispatch_model(model, {"": "cpu"}, force_hooks=True),
    "lora, then cpu": lambda model, _: cpu_offload(with_lora(model, init_lora_weights=True)),
}


@pytest.mark.parametrize("name", OFFLOADED)
def test_an_offloaded_model_answers_where_it_computes(
    name: str, fresh: Any, ask: Ask, bare: dict[str, list[int]], processor: Any, noise_image: Any, tmp_path: Path
) -> None:
    model = OFFLOADED[name](fresh, tmp_path)
    assert ask(model) == bare
    runner = AdaptiveRunner(model, processor)
    assert runner.policy.name == "reference-balanced"  # also where the weights cannot be read
    assert bool(runner.fingerprint.digest) != bool(runner.fingerprint.unread)
    assert runner.device == torch.device("cpu") and runner.profile.key["device"].startswith("cpu:")
    reply = runner.chat(noise_image(64, 64), "Describe.", max_new_tokens=2)
    assert reply.measurement.new_tokens == 2


def test_a_model_can_be_offloaded_while_it_is_loaded(ask: Ask, bare: dict[str, list[int]], tmp_path: Path) -> None:
    places = {"model.visual": "disk", "model.language_model": "cpu", "lm_head": "cpu"}
    runner = AdaptiveRunner.from_pretrained("reference", device_map=places, offload_folder=tmp_path)
    assert ask(runner.model) == bare


# Other numbers


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_every_point_runs_in_a_dtype_and_native_is_the_models_own(
    dtype: torch.dtype, fresh: Any, ask: Ask, processor: Any, inputs: dict[str, Any]
) -> None:
    runner = AdaptiveRunner(fresh, processor)
    assert runner.profile.key["dtype"] == "float32"
    runner.to(dtype)
    answers = ask(runner.model)
    assert answers["native@1"] == fresh.generate(**inputs, max_new_tokens=3)[0].tolist()
    # Untrained, they are the native model up to rounding, which this answer does not hang on.
    assert answers["weighted6r4@1"] == answers["native@1"]
    runner.decide(None, "Anything?")
    assert runner.profile.key["dtype"] == str(dtype).removeprefix("torch.")


def test_fusion_modules_follow_a_model_that_moves(fresh: Any, processor: Any) -> None:
    """Whether it was moved through the runner or behind its back; ``meta`` is the one other device of any machine."""
    runner = AdaptiveRunner(fresh, processor, policy="reference-balanced")
    fusion = runner.adapter.fusion(OperatingPoint.parse("gated12r8"))
    assert fusion is not None and {p.device.type for p in fusion.parameters()} == {"cpu"}
    fresh.to("meta")
    runner.decide(None, "Anything?")
    assert {p.device.type for p in fusion.parameters()} == {"meta"}
    assert runner.profile.key["device"].startswith("meta:")
    assert {p.dtype for p in fusion.parameters()} == {torch.float32}
