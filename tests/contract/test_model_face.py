"""A runner in the place of a model: every method, attribute and question of a module reaches the model and the runner
stays."""

import copy
import inspect
import logging
import pickle
from collections.abc import Callable
from typing import Any, Self

import joblib
import pytest
import torch
from torch import nn
from transformers import PreTrainedModel, Qwen3VLForConditionalGeneration, pipeline

from adaptive_fusion.budget import Budget
from adaptive_fusion.errors import AdaptiveFusionError, ConfigError
from adaptive_fusion.point import NATIVE, OperatingPoint
from adaptive_fusion.runner import AdaptiveRunner

ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "apply": (lambda module: None,),
    "cuda": (),
    "to_empty": ("cpu",),
    "type": (torch.float64,),
    "to": ("cpu", torch.float64),
    "train": (True,),
    "requires_grad_": (False,),
}


def giving_themselves() -> list[str]:
    """Methods with which the installed torch's module gives itself back."""
    found = [
        name
        for name, method in inspect.getmembers(nn.Module, inspect.isfunction)
        if not name.startswith("_") and inspect.signature(method).return_annotation in (Self, "Self", "T")
    ]
    assert len(found) > 10
    return found


@pytest.fixture
def runner(tiny_dense: Any, processor: Any) -> AdaptiveRunner:
    return AdaptiveRunner(copy.deepcopy(tiny_dense), processor, policy="reference-latency", seed=0)


@pytest.mark.parametrize("name", giving_themselves())
def test_what_gives_a_module_back_gives_the_runner_back(name: str, runner: AdaptiveRunner) -> None:
    def state(model: Any) -> Any:
        return model.training, [(p.dtype, p.device.type, p.requires_grad, p.is_shared()) for p in model.parameters()]

    def call(model: Any) -> Any:
        try:
            return getattr(model, name)(*ARGUMENTS.get(name, ()))
        except Exception as error:  # a device that this machine lacks: for both
            return repr(error)

    plain = copy.deepcopy(runner.model)
    expected, found = call(plain), call(runner)
    assert state(runner.model) == state(plain)
    assert found is runner if expected is plain else found == expected
    assert inspect.signature(getattr(AdaptiveRunner, name)).return_annotation is not inspect.Signature.empty


def test_a_cast_runner_still_decides_and_fuses(runner: AdaptiveRunner, noise_image: Any) -> None:
    cheap = runner.eval().bfloat16().requires_grad_(False)
    reply = cheap.chat(noise_image(96, 64), "?", budget=Budget(latency_ms=0.001), max_new_tokens=2)
    assert reply.decision.point != NATIVE and cheap.last is not None
    assert cheap.dtype == torch.bfloat16 and runner.model.dtype == torch.bfloat16


def test_attributes_of_the_model_are_read_set_and_deleted_on_it(runner: AdaptiveRunner) -> None:
    face: Any = runner
    model = face.model
    for name, value in {"generation_config": copy.deepcopy(model.generation_config), "training": True}.items():
        setattr(face, name, value)
        assert getattr(model, name) is value and name not in vars(face)
    model.note = "its own"
    face.note = "changed"
    assert model.note == "changed"
    del face.note
    assert not hasattr(model, "note") and not hasattr(face, "note")
    face.mine = 1  # of neither: the runner's
    assert face.mine == 1 and not hasattr(model, "mine")
    face.budget = Budget(latency_ms=7)
    assert face.decide(None, "?").budget["latency_ms"] == 7 and not hasattr(model, "budget")
    assert {"chat", "mine", "forward", "lm_head"} <= set(dir(face))
    with pytest.raises(AttributeError, match=r"AdaptiveRunner and the Qwen3VLForConditional.* no attribute 'chatt'"):
        _ = face.chatt


@pytest.mark.parametrize("name", ["model", "policy", "processor"])
def test_what_a_runner_was_made_of_is_not_exchanged_in_silence(name: str, runner: AdaptiveRunner) -> None:
    setattr(runner, name, getattr(runner, name))
    with pytest.raises(ConfigError, match=f"{name} cannot be changed; expected a new AdaptiveRunner"):
        setattr(runner, name, copy.copy(getattr(runner, name)))


def test_a_runner_of_a_runner_is_refused(runner: AdaptiveRunner) -> None:
    with pytest.raises(ConfigError, match=r"expected the model in it, its \.model"):
        AdaptiveRunner(runner, runner.processor)  # type: ignore[arg-type]


def test_a_call_is_the_models_forward(runner: AdaptiveRunner, noise_image: Any) -> None:
    content = [{"type": "image", "image": noise_image(64, 64)}, {"type": "text", "text": "?"}]
    inputs = runner.adapter.prepare([{"role": "user", "content": content}], NATIVE)
    with torch.no_grad():
        found, expected = runner(**inputs, use_cache=False), runner.model(**inputs, use_cache=False)
    assert type(found) is type(expected) and torch.equal(found.logits, expected.logits)
    positional = runner(inputs["input_ids"], attention_mask=inputs["attention_mask"])
    assert positional.logits.shape[:2] == inputs["input_ids"].shape


def test_its_class_is_the_models_and_its_type_its_own(runner: AdaptiveRunner) -> None:
    assert isinstance(runner, PreTrainedModel) and isinstance(runner, Qwen3VLForConditionalGeneration)
    assert isinstance(runner, AdaptiveRunner) and type(runner) is AdaptiveRunner
    holder = nn.Module()
    holder.held = runner  # type: ignore[assignment]
    assert len(list(holder.parameters())) == len(list(runner.model.parameters()))
    assert next(iter(holder.state_dict())).startswith("held.")
    assert holder.double().held is runner and runner.dtype == torch.float64


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps, joblib.hash])
def test_a_runner_is_neither_copied_nor_pickled(copied: Callable[[Any], Any], runner: AdaptiveRunner) -> None:
    with pytest.raises(AdaptiveFusionError, match=r"neither pickled nor copied.* one per process, loaded there"):
        copied(runner)
    assert runner.decide(None, "?").kind == "text"


def test_a_runner_says_what_it_is(runner: AdaptiveRunner) -> None:
    face = AdaptiveRunner(runner.model, runner.processor, budget=Budget(latency_ms=400), profile=runner.profile)
    text = repr(face.bfloat16())
    for fact in (
        "AdaptiveRunner(Qwen3VLForConditionalGeneration in bfloat16 on cpu, GridAdapter, policy 'balanced' (no policy ",
        "latency_ms=400.0",
        "profile: given",
    ):
        assert fact in text
    assert "\n" not in text


@pytest.mark.parametrize("point", [None, OperatingPoint(downsample=0.5)], ids=["decided", "given"])
def test_a_pipeline_takes_a_runner_without_a_word(
    point: OperatingPoint | None,
    reference_model: Any,
    processor: Any,
    noise_image: Any,
    caplog: pytest.LogCaptureFixture,
) -> None:
    runner = AdaptiveRunner(reference_model, processor, policy="reference-latency", seed=0)
    asked = [
        {
            "role": "user",
            "content": [
                {"type": "image", "image": noise_image(96, 96)},
                {"type": "text", "text": "Describe the screen."},
            ],
        }
    ]
    logging.getLogger("transformers").propagate = True
    try:
        with caplog.at_level(logging.WARNING):
            pipe = pipeline("image-text-to-text", model=runner, processor=processor)
            options = {} if point is None else {"generate_kwargs": {"point": point}}
            [found] = pipe(text=asked, max_new_tokens=6, return_full_text=False, **options)
    finally:
        logging.getLogger("transformers").propagate = False
    assert caplog.records == []
    assert pipe.model is runner and runner.last is not None
    decision, measurement = runner.last
    assert measurement.new_tokens <= 6 and decision.point == (point or decision.point) != NATIVE
    reply = runner.chat(asked, point=decision.point, max_new_tokens=6)
    assert found["generated_text"].strip() == reply.text
