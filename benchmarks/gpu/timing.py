"""How things are timed on a device, how fast it copies, and what it is.

Knows devices and calls. Must not know of models.
"""

import datetime
import platform
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch

from adaptive_fusion.execution.timing import synchronize

PACKAGES = ("transformers", "triton", "flash-attn", "adaptive-fusion")
COPIED = 1 << 30
"""Bytes of the tensor whose copy gives the bandwidth: many times the last-level cache."""
AHEAD, MOST_AHEAD = 24, 192
"""Such copies that are queued before a call whose kernels alone are timed: ten milliseconds and more. Twice as many
each time that it takes longer to launch, at most so many."""


def times_ms(call: Callable[[], Any], device: torch.device, *, repeats: int = 10, warm: int = 3) -> list[float]:
    """Milliseconds of each of `repeats` calls after `warm` that do not count: CUDA events around each call on a GPU,
    the clock of this process elsewhere.
    """
    for _ in range(warm):
        call()
    synchronize(device)
    if device.type != "cuda":
        taken = []
        for _ in range(repeats):
            began = time.perf_counter()
            call()
            taken.append((time.perf_counter() - began) * 1e3)
        return taken
    pairs = []
    for _ in range(repeats):
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        call()
        last.record()
        pairs.append((first, last))
    synchronize(device)
    return [first.elapsed_time(last) for first, last in pairs]


def device_times_ms(
    call: Callable[[], Any], device: torch.device, *, repeats: int = 10, warm: int = 3
) -> tuple[list[float], list[float]]:
    """Milliseconds that a GPU takes for a call's kernels, one after the other as launched, and that the host takes to
    launch them, each of `repeats` times.

    Copies of 1 GiB are queued before each call, so that the device finds all of it there when it comes to it, and
    nothing of it in its cache. Elsewhere both are the time of the call.
    """
    if device.type != "cuda":
        taken = times_ms(call, device, repeats=repeats, warm=warm)
        return taken, taken
    source = torch.empty(COPIED, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    for _ in range(warm):
        call()
    own: list[float] = []
    host: list[float] = []
    ahead = AHEAD
    while len(own) < repeats:
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        synchronize(device)
        for _ in range(ahead):
            target.copy_(source)
        began = time.perf_counter()
        first.record()
        call()
        last.record()
        host.append((time.perf_counter() - began) * 1e3)
        if first.query():
            ahead *= 2
            if ahead > MOST_AHEAD:
                raise RuntimeError("the call waits for the device: what was queued before it was done by then")
            host.pop()
            continue
        synchronize(device)
        own.append(first.elapsed_time(last))
    return own, host


def spread(values: Sequence[float], digits: int = 4) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = np.percentile(np.asarray(values, dtype=float), [25, 50, 75]).tolist()
    return {"median": round(middle, digits), "low": round(low, digits), "high": round(high, digits)}


def copy_bandwidth(device: torch.device, size: int = COPIED) -> dict[str, float]:
    """Bytes a second, read and written, of copying a tensor of random bytes; median of ten with quartiles."""
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    taken = times_ms(lambda: target.copy_(source), device)
    return spread([2 * size / ms * 1e3 for ms in taken], digits=0)


def header(device: torch.device, tiny: bool) -> dict[str, Any]:
    """What is measured on: card, driver, versions, date, and whether the shapes are tiny."""
    found: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": device.type,
        "card": platform.processor() or platform.machine(),
        "driver": None,
        "cuda": torch.version.cuda,
        "memory_gb": None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name.replace("-", "_"): _version(name) for name in PACKAGES},
        "tiny": tiny,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "card": properties.name,
            "driver": _driver(),
            "memory_gb": round(properties.total_memory / (1 << 30), 1),
            "multiprocessors": properties.multi_processor_count,
            "cudnn": torch.backends.cudnn.version(),
        }
    return found


SAME = ("device", "card", "driver", "torch", "transformers", "adaptive_fusion", "tiny")
"""What of the header must be the same for rows to go together."""


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _driver() -> str | None:
    """The driver's version as the kernel module says it."""
    try:
        with open("/proc/driver/nvidia/version", encoding="ascii") as file:
            words = file.readline().split()
    except OSError:
        return _driver_by_tool()
    return next((word for word in words if word[0].isdigit() and word.count(".") >= 1), None)


def _driver_by_tool() -> str | None:
    import subprocess

    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return (said.splitlines() or [None])[0]
