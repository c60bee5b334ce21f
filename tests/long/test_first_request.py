"""The first request of a process, whose libraries and kernels are not in memory yet."""

import json
import os
import subprocess
import sys

import pytest

FIRST = """
import json
from adaptive_fusion import AdaptiveRunner, Budget
from adaptive_fusion.point import OperatingPoint
from adaptive_fusion.reference.screens import make_scene

runner = AdaptiveRunner.from_pretrained("reference", policy="reference-balanced")
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
    done = subprocess.run(
        [sys.executable, "-c", FIRST], capture_output=True, text=True, check=True, env=environ, timeout=600
    )
    for first, *later in json.loads(done.stdout.splitlines()[-1]):
        # Half a MiB for what the heap keeps at the first image of a size.
        assert 0 < first <= 1.05 * max(later) + 0.5 / 1024, (first, later)
