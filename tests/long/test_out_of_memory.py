"""A thousand requests in a row that run out of memory: the process has no more of it taken than before."""

import json
import os
import subprocess
import sys

import pytest

STARVED = """
import gc, json
from PIL import Image
from starving import starving
from adaptive_fusion.execution.meters import CpuMeter
from adaptive_fusion.runner import AdaptiveRunner

meter = CpuMeter()

def resting_kib():
    gc.collect()
    meter.start()
    return meter._resting / 1024

runner = AdaptiveRunner.from_pretrained("reference", policy="native")
with starving(runner, Image.new("RGB", (48, 48))) as fail:
    fail(150)
    before = resting_kib()
    fail(1000)
    print(json.dumps(resting_kib() - before))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_a_thousand_in_a_row_take_no_memory() -> None:
    """In a process of its own: what other tests have left makes full collections rare, and garbage spreads the heap."""
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-c", STARVED]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environ, timeout=600)
    assert json.loads(done.stdout.splitlines()[-1]) < 1024
