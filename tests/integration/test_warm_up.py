"""Warming up: the first request with a memory budget takes what later ones take, and nothing else changes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from adaptive_fusion.budget import Budget
from adaptive_fusion.point import NATIVE, OperatingPoint
from adaptive_fusion.runner import AdaptiveRunner

FIRST = """
import json
from adaptive_fusion import AdaptiveRunner, Budget
from adaptive_fusion.point import OperatingPoint
from adaptive_fusion.reference.screens import make_scene

runner = AdaptiveRunner.from_pretrained("reference", policy="balanced")
requests = [
    (160, OperatingPoint("weighted", 6, 0.5, adapter_rank=4)),
    (224, OperatingPoint("gated", 12, adapter_rank=8)),
]
peaks = []
for turn in range(3):
    for seed, (side, point) in enumerate(requests):
        image = make_scene("dense", 10 * turn + seed, "eval", (400, 400)).image.resize((side, side))
        reply = runner.chat(image, "Describe.", point=point, budget=Budget(vram_gb=1), max_new_tokens=3)
        peaks.append(reply.measurement.peak_memory_gb)
print(json.dumps([peaks[i::2] for i in range(2)]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peaks on the CPU are Linux's")
def test_the_first_request_with_a_memory_budget_takes_what_later_ones_take() -> None:
    """In a process of its own, whose libraries and kernels are not in memory yet."""
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", FIRST], capture_output=True, text=True, check=True, env=environ)
    for first, *later in json.loads(done.stdout.splitlines()[-1]):
        # Half a MiB for what the heap keeps at the first image of a size.
        assert 0 < first <= 1.05 * max(later) + 0.5 / 1024, (first, later)


def test_nothing_learns_from_a_warm_up_and_answers_stay(reference_model: Any, processor: Any, tmp_path: Path) -> None:
    image = Image.effect_noise((96, 72), 80).convert("RGB")

    def answers(warm: bool) -> list[str]:
        runner = AdaptiveRunner(reference_model, processor, policy="balanced", log=tmp_path / f"{warm}.jsonl", seed=0)
        before = runner.controller.state(), runner.lengths.state()
        if warm:
            runner.warm_up()
        assert (runner.controller.state(), runner.lengths.state()) == before
        assert runner.last is None and not (tmp_path / "True.jsonl").exists()
        sampled = runner.chat(image, "?", point=NATIVE, max_new_tokens=8, do_sample=True)
        return [sampled.text, *(runner.chat(image, "Describe.", max_new_tokens=8).text for _ in range(2))]

    # Modules that are built at their first use draw random numbers too: build them all before.
    AdaptiveRunner(reference_model, processor, policy="balanced").warm_up()
    torch.manual_seed(3)
    state = torch.get_rng_state()
    cold = answers(False)
    torch.set_rng_state(state)
    assert answers(True) == cold


def test_a_memory_budget_warms_up_once_and_no_other_does(
    tiny_dense: Any, processor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = AdaptiveRunner(tiny_dense, processor, policy="balanced")
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
