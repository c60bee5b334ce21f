"""Another process on the same device: matrix products without end.

    python -m benchmarks.gpu.load --device cuda

It says ``ready`` once it runs, and ends with its parent. Knows a device and processes.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
SIDE, PER_WAIT = 4096, 8


@contextmanager
def matrix_load(device: torch.device) -> Iterator[None]:
    """Inside this context the device is shared with such a process.

    Raises:
        RuntimeError: If the process does not come to run.
    """
    command = [sys.executable, "-m", "benchmarks.gpu.load", "--device", str(device)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        if process.stdout.readline().strip() != "ready":
            raise RuntimeError("the load beside did not start")
        yield
    finally:
        process.kill()
        process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    device = torch.device(parser.parse_args().device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    side = SIDE if device.type == "cuda" else 256
    left = torch.randn(side, side, device=device, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)
    out, parent = torch.empty_like(left), os.getppid()
    torch.mm(left, left, out=out)
    print("ready", flush=True)
    while os.getppid() == parent:
        for _ in range(PER_WAIT):
            torch.mm(left, left, out=out)
        if device.type == "cuda":
            torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
