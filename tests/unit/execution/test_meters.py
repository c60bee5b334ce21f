import math
import subprocess
import sys
from typing import Any

import pytest

from adaptive_fusion.execution.meters import CpuMeter, CudaMeter, NoMeter, meter_for

GIB = 1 << 30
linux = pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")


class Probe:
    """The memory functions of torch.cuda (names and units as in torch 2.14), for machines without one."""

    def __init__(self, **values: float) -> None:
        self.allocated = values.get("allocated", 2.0) * GIB
        self.reserved = values.get("reserved", 4.0) * GIB
        self.peak = values.get("peak", 2.0) * GIB
        self.free = values.get("free", 6.0) * GIB
        self.split = values.get("split", 0.0) * GIB
        self.broken: set[str] = set()
        self.devices: list[Any] = []

    def _get(self, name: str, value: Any, device: Any) -> Any:
        self.devices.append(device)
        if name in self.broken:
            raise RuntimeError("NVML_SUCCESS == r INTERNAL ASSERT FAILED")
        return value

    def reset_peak_memory_stats(self, device: Any = None) -> None:
        self.peak = self._get("reset", self.allocated, device)

    def memory_allocated(self, device: Any = None) -> float:
        return self._get("allocated", self.allocated, device)

    def max_memory_allocated(self, device: Any = None) -> float:
        return self._get("peak", self.peak, device)

    def memory_reserved(self, device: Any = None) -> float:
        return self._get("reserved", self.reserved, device)

    def mem_get_info(self, device: Any = None) -> tuple[float, float]:
        return self._get("info", (self.free, 24 * GIB), device)

    def memory_stats(self, device: Any = None) -> dict[str, float]:
        return self._get("stats", {"inactive_split_bytes.all.current": self.split}, device)


def test_cuda_peak_is_above_the_resting_set() -> None:
    probe = Probe()
    meter = CudaMeter(probe, "cuda:1")
    probe.peak = 20 * GIB  # an earlier request's
    meter.start()
    probe.peak = 3.5 * GIB
    assert meter.stop() == 1.5
    assert set(probe.devices) == {"cuda:1"}


def test_cuda_free_counts_the_cache_but_not_its_fragments() -> None:
    assert CudaMeter(Probe(), headroom_gb=0.5).free_gb() == 6 + (4 - 2) - 0.5
    assert CudaMeter(Probe(split=1.5), headroom_gb=0.5).free_gb() == 6 + (4 - 2 - 1.5) - 0.5
    assert CudaMeter(Probe(split=99), headroom_gb=0.5).free_gb() == 5.5
    assert CudaMeter(Probe(free=0.1, reserved=2.0), headroom_gb=0.5).free_gb() == 0.0


class Limited(Probe):
    """A process that may take only a share of the device, which the driver does not tell."""

    share = 1.0

    def get_per_process_memory_fraction(self, device: Any = None) -> float:
        return self._get("share", self.share, device)


def test_cuda_free_is_no_more_than_the_process_may_take() -> None:
    import torch

    probe = Limited()
    assert callable(torch.cuda.get_per_process_memory_fraction)
    meter = CudaMeter(probe, headroom_gb=0.5)
    assert meter.free_gb() == 7.5  # no limit
    probe.share = 0.25  # 6 GiB of 24, of which 2 are taken
    assert meter.free_gb() == 6 - 2 - 0.5
    probe.split = 1.0 * GIB
    assert meter.free_gb() == 6 - 2 - 1 - 0.5
    probe.share = 0.05
    assert meter.free_gb() == 0.0
    probe.broken = {"share"}  # an older torch: what the driver says
    assert meter.free_gb() == 6.5 and meter.failures == 0


def test_the_real_torch_module_has_what_the_cuda_meter_calls() -> None:
    import torch

    for name in [n for n in vars(Probe) if not n.startswith("_")]:
        assert callable(getattr(torch.cuda, name)) and callable(getattr(torch.xpu, name))


@pytest.mark.parametrize("broken", ["reset", "allocated", "peak", "info", "reserved", "stats"])
def test_a_raising_cuda_probe_is_unknown_never_an_error(broken: str) -> None:
    probe = Probe()
    probe.broken = {broken}
    meter = CudaMeter(probe)
    meter.start()
    peak, free = meter.stop(), meter.free_gb()
    assert meter.failures >= 1
    assert peak is None or free is None
    assert all(value is None or value >= 0 for value in (peak, free))


@pytest.mark.parametrize("lie", [math.nan, math.inf, -5.0])
def test_a_lying_cuda_probe_is_unknown_or_finite(lie: float) -> None:
    for name in ("allocated", "reserved", "peak", "free", "split"):
        probe = Probe(**{name: lie})
        meter = CudaMeter(probe)
        meter.start()
        if name == "peak":
            probe.peak = lie
        for value in (meter.stop(), meter.free_gb()):
            assert value is None or 0 <= value < math.inf


def status(rss_kb: float, peak_kb: float) -> str:
    return f"Name:\tpython\nVmHWM:\t{peak_kb} kB\nVmRSS:\t{rss_kb} kB\nThreads:\t4\n"


def cpu(files: dict[str, str], written: dict[str, str] | None = None) -> CpuMeter:
    def read(path: str) -> str:
        if path not in files:
            raise FileNotFoundError(path)
        return files[path]

    def write(path: str, text: str) -> None:
        if written is None:
            raise PermissionError(path)
        written[path] = text

    return CpuMeter(headroom_gb=0.0, read=read, write=write, settle=lambda measured: None)


def test_cpu_peak_from_the_high_water_mark() -> None:
    files = {"/proc/self/status": status(1 << 20, 1 << 20)}
    written: dict[str, str] = {}
    meter = cpu(files, written)
    meter.start()
    assert written == {"/proc/self/clear_refs": "5"}
    files["/proc/self/status"] = status(1 << 20, 3 << 20)
    assert meter.stop() == 2.0
    assert meter.stop() is None, "a second stop has no start"


def test_the_heap_is_set_for_measured_requests_and_left_alone_for_others() -> None:
    settled: list[bool] = []
    files = {"/proc/self/status": status(1, 1)}
    meter = CpuMeter(read=files.__getitem__, write=files.__setitem__, settle=settled.append)
    meter.skip()
    assert settled == []
    for _ in range(2):
        meter.start()
        meter.stop()
    assert settled == [True, True], "what happens between two measured requests counts for the second"
    meter.skip()
    meter.skip()
    assert settled == [True, True, False]


def test_cpu_without_the_reset_knows_only_new_highs() -> None:
    files = {"/proc/self/status": status(1 << 20, 4 << 20)}
    meter = cpu(files)
    meter.start()
    assert meter.stop() is None
    meter.start()
    files["/proc/self/status"] = status(1 << 20, 5 << 20)
    assert meter.stop() == 4.0 and meter.failures == 2


def test_cpu_free_is_the_tighter_of_machine_and_control_group() -> None:
    files = {"/proc/meminfo": f"MemTotal: 99 kB\nMemAvailable: {8 << 20} kB\n"}
    meter = cpu(files, {})
    assert meter.free_gb() == 8.0
    files |= {
        "/sys/fs/cgroup/memory.max": f"{6 * GIB}\n",
        "/sys/fs/cgroup/memory.current": f"{5 * GIB}\n",
        "/sys/fs/cgroup/memory.stat": f"anon 1\ninactive_file {2 * GIB}\n",
    }
    assert meter.free_gb() == 3.0
    files["/sys/fs/cgroup/memory.max"] = "max\n"
    assert meter.free_gb() == 8.0


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"/proc/self/status": "", "/proc/meminfo": ""},
        {"/proc/self/status": status(math.nan, math.nan), "/proc/meminfo": "MemAvailable: nan kB"},
        {"/proc/self/status": status(5, math.inf), "/proc/meminfo": "MemAvailable: inf kB"},
        {"/proc/self/status": "VmRSS: x kB\nVmHWM: 1 kB", "/proc/meminfo": "MemAvailable: -4 kB"},
    ],
)
def test_broken_proc_files_are_unknown_never_an_error(files: dict[str, str]) -> None:
    meter = cpu(files, {})
    meter.start()
    assert meter.stop() is None and meter.free_gb() is None


@linux
def test_a_real_request_is_measured() -> None:
    import torch

    meter = meter_for("cpu")
    peaks = []
    for mib in (64, 256, 64):
        meter.start()
        block = torch.ones(mib << 18)
        total = float(block.sum())
        del block
        peaks.append(meter.stop())
        assert total == mib << 18
    for mib, peak in zip((64, 256, 64), peaks, strict=True):
        assert peak is not None and abs(peak * 1024 - mib) < 0.1 * mib + 4
    free = meter.free_gb()
    assert free is not None and 0 <= free < 1e5


def test_other_devices_have_no_meter() -> None:
    meter = meter_for("meta")
    meter.start()
    assert isinstance(meter, NoMeter) and meter.stop() is None and meter.free_gb() is None
    assert isinstance(meter_for("cuda:0"), CudaMeter)


HOLES = """
import numpy as np
from adaptive_fusion.execution.meters import CpuMeter

np.ones(16 << 20, np.uint8)  # freed at once: from now on glibc would keep blocks up to this size in the heap
meter = CpuMeter()
meter.start()
assert meter.stop() is not None
blocks = [np.ones(1 << 16, np.uint8) for _ in range(256)]
above = np.ones(1 << 10, np.uint8)
before = meter._status()["VmRSS"]
blocks.clear()
print(int(before - meter._status()["VmRSS"]))
"""


@linux
def test_a_large_block_goes_back_when_it_is_freed_once_a_request_was_measured() -> None:
    """Below a block that stays, 16 MiB in blocks of 64 KiB that glibc would else keep as holes of the heap.

    In a process of its own: holes that earlier work left would take the blocks in.
    """
    done = subprocess.run([sys.executable, "-c", HOLES], capture_output=True, text=True, check=True, timeout=300)
    assert int(done.stdout) > 12 * (1 << 20)
