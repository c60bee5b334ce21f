"""Warming up changes nothing but what is in memory; `tests/long` has what it is for."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from adaptive_fusion.budget import Budget
from adaptive_fusion.point import NATIVE, OperatingPoint
from adaptive_fusion.runner import AdaptiveRunner


def test_nothing_learns_from_a_warm_up_and_answers_stay(reference_model: Any, processor: Any, tmp_path: Path) -> None:
    image = Image.effect_noise((96, 72), 80).convert("RGB")

    def answers(warm: bool) -> list[str]:
        runner = AdaptiveRunner(
            reference_model, processor, policy="reference-balanced", log=tmp_path / f"{warm}.jsonl", seed=0
        )
        before = runner.controller.state(), runner.lengths.state()
        if warm:
            runner.warm_up()
        assert (runner.controller.state(), runner.lengths.state()) == before
        assert runner.last is None and not (tmp_path / "True.jsonl").exists()
        sampled = runner.chat(image, "?", point=NATIVE, max_new_tokens=8, do_sample=True)
        return [sampled.text, *(runner.chat(image, "Describe.", max_new_tokens=8).text for _ in range(2))]

    # Modules that are built at their first use draw random numbers too: build them all before.
    AdaptiveRunner(reference_model, processor, policy="reference-balanced").warm_up()
    torch.manual_seed(3)
    state = torch.get_rng_state()
    cold = answers(False)
    torch.set_rng_state(state)
    assert answers(True) == cold


def test_a_memory_budget_warms_up_once_and_no_other_does(
    tiny_dense: Any, processor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = AdaptiveRunner(tiny_dense, processor, policy="reference-balanced")
    for ladder in runner.policy.lanes.values():
        for rung in ladder:
            runner.adapter.build(rung.point)  # untrained, they would be the native computation
    image, prepared = Image.new("RGB", (40, 40)), []
    prepare, encode = runner.adapter.prepare, runner.adapter.encode

    def counted(messages: Any, point: OperatingPoint) -> Any:
        prepared.append(point)
        return prepare(messages, point)

    def too_large(inputs: Any, point: OperatingPoint) -> Any:
        if point == NATIVE:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return encode(inputs, point)

    monkeypatch.setattr(runner.adapter, "prepare", counted)
    monkeypatch.setattr(runner.adapter, "encode", too_large)
    top = OperatingPoint("top")
    runner.chat(image, "?", point=top, max_new_tokens=2)
    assert prepared == [top]
    for _ in range(2):
        runner.chat(image, "?", point=top, budget=Budget(vram_gb=9), max_new_tokens=2)
    offered = {rung.point.fusion for ladder in runner.policy.lanes.values() for rung in ladder}
    assert {point.fusion for point in prepared} == offered | {"native", "top"}
    assert prepared.count(top) == 3 and len(set(prepared)) == len(prepared) - 2
