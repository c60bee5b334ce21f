"""Compiled models: what `torch.compile` keeps of a model must not hide its levels, nor make other answers."""

import copy
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from adaptive_fusion.models import adapter_for
from adaptive_fusion.point import NATIVE, OperatingPoint
from adaptive_fusion.runner import AdaptiveRunner

POINTS = tuple(map(OperatingPoint.parse, ("native", "gated12r8@0.5", "top", "weighted6r4", "native@0.5")))
COMPILED: list[int] = []
"""Sizes of the graphs that were compiled."""


def counting(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
    """A backend that runs graphs as they are."""
    COMPILED.append(len(graph.graph.nodes))
    return graph.forward


HOW: dict[str, Any] = {"backend": counting, "dynamic": True}


@pytest.fixture(autouse=True)
def compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def inputs(tiny_dense: Any, processor: Any, noise_image: Any) -> dict[str, Any]:
    content = [{"type": "image", "image": noise_image(96, 64)}, {"type": "text", "text": "Describe the screen."}]
    return adapter_for(tiny_dense, processor).prepare([{"role": "user", "content": content}], NATIVE)


@pytest.fixture
def ask(processor: Any, inputs: dict[str, Any]) -> Callable[[Any], dict[str, list[int]]]:
    def tokens(model: Any) -> dict[str, list[int]]:
        runner = AdaptiveRunner(model, processor, seed=0)
        return {point.name: runner.generate(**inputs, point=point, max_new_tokens=4)[0].tolist() for point in POINTS}

    return tokens


def whole(model: Any) -> Any:
    return torch.compile(model, **HOW)


def in_place(model: Any) -> Any:
    model.compile(**HOW)
    return model


def forward(model: Any) -> Any:
    model.forward = torch.compile(model.forward, **HOW)
    return model


def tower(model: Any) -> Any:
    model.model.visual.compile(**HOW)
    return model


def wrapped_tower(model: Any) -> Any:
    model.model.visual = torch.compile(model.model.visual, **HOW)
    return model


def blocks(model: Any) -> Any:
    for block in model.model.visual.blocks:
        block.compile(**HOW)
    return model


def generated_code(model: Any) -> Any:
    """With kernels of inductor's own, which a compiler of C++ has to build."""
    if not shutil.which("g++") and not shutil.which("clang++"):
        pytest.skip("needs a C++ compiler")
    model.forward = torch.compile(model.forward, dynamic=True)
    return model


@pytest.mark.parametrize("wrap", [whole, in_place, forward, tower, wrapped_tower, blocks, generated_code])
def test_a_compiled_model_answers_as_it_does_uncompiled(
    wrap: Callable[[Any], Any], tiny_dense: Any, inputs: dict[str, Any], ask: Callable[[Any], dict[str, list[int]]]
) -> None:
    model = copy.deepcopy(tiny_dense)
    plain = ask(model)
    compiled = wrap(model)
    compiled.generate(**inputs, max_new_tokens=2)  # compiled before any hook was there
    assert ask(compiled) == plain
    assert ask(compiled) == plain  # and again, with other hooks than the first time


@pytest.mark.parametrize("wrap", [tower, wrapped_tower, blocks])
def test_taking_levels_does_not_compile_a_tower_anew(
    wrap: Callable[[Any], Any], tiny_dense: Any, inputs: dict[str, Any], ask: Callable[[Any], dict[str, list[int]]]
) -> None:
    model = wrap(copy.deepcopy(tiny_dense))
    model.generate(**inputs, max_new_tokens=2)
    before = len(COMPILED)
    assert before > 0
    ask(model)
    ask(model)
    assert len(COMPILED) == before
