"""Memory meters: how much a request took above the resting set, and how much can still be had.

Knows the counters of CUDA (XPU has the same ones) and of Linux. Knows nothing of models, requests or budgets.
A meter never raises: a probe that fails gives None, "unknown", which the controller takes as no reading
and the caller as no measurement. All figures are GiB.
"""

import ctypes
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

GIB = float(1 << 30)


class Meter(Protocol):
    """What the runner asks for. One request at a time: requests that overlap share one high-water mark."""

    free_of_charge: bool
    """Whether measuring a request costs next to nothing; else only those with a memory budget are measured."""

    def start(self) -> None:
        """Begin a request: note the resting set and reset the high-water mark."""
        ...

    def stop(self) -> float | None:
        """GiB above the resting set at the highest since `start`; None if unknown."""
        ...

    def free_gb(self) -> float | None:
        """GiB that a request can still have, headroom taken off; None if unknown."""
        ...


def _size(value: float | None) -> float | None:
    """A reading in GiB, or None for one that cannot be true."""
    return value if value is not None and math.isfinite(value) and 0.0 <= value < 1e6 else None


class CudaMeter:
    """Statistics of torch's caching allocator and the driver.

    Peak: ``max_memory_allocated`` less what was allocated at the start. Free: what the driver has, of
    other processes too (``mem_get_info``; the limit of a MIG slice is the driver's own), plus what the
    cache holds unused, less the split blocks in it (``inactive_split_bytes``: fragments that cannot be
    counted on for a large tensor), less a headroom for the kernels' workspaces.

    Args:
        probe: ``torch.cuda``, ``torch.xpu``, or anything with their memory functions.
        device: The device as torch names it; None is the current one.
        headroom_gb: Kept back.
    """

    free_of_charge = True

    def __init__(self, probe: Any, device: Any = None, *, headroom_gb: float = 0.25) -> None:
        self.probe, self.device, self.headroom_gb = probe, device, headroom_gb
        self.failures = 0
        self._resting: float | None = None

    def start(self) -> None:
        """See `Meter`."""
        self._resting = None
        try:
            self.probe.reset_peak_memory_stats(self.device)
            self._resting = float(self.probe.memory_allocated(self.device))
        except Exception:
            self.failures += 1

    def stop(self) -> float | None:
        """See `Meter`."""
        resting, self._resting = self._resting, None
        if resting is None:
            return None
        try:
            return _size((float(self.probe.max_memory_allocated(self.device)) - resting) / GIB)
        except Exception:
            self.failures += 1
            return None

    def free_gb(self) -> float | None:
        """See `Meter`. What was measured but does not fit into the headroom is 0, not unknown."""
        try:
            free = float(self.probe.mem_get_info(self.device)[0])
            cached = float(self.probe.memory_reserved(self.device)) - float(self.probe.memory_allocated(self.device))
            lost = float(self.probe.memory_stats(self.device).get("inactive_split_bytes.all.current", 0))
        except Exception:
            self.failures += 1
            return None
        total = (free + max(cached - max(lost, 0.0), 0.0)) / GIB - self.headroom_gb
        return _size(max(total, 0.0)) if free >= 0.0 and cached >= 0.0 else None


def _read(path: str) -> str:
    return Path(path).read_text()


def _write(path: str, text: str) -> None:
    Path(path).write_text(text)


def _fields(text: str) -> dict[str, float]:
    """``Name:  123 kB`` lines of /proc, in bytes."""
    result: dict[str, float] = {}
    for line in text.splitlines():
        name, _, value = line.partition(":")
        words = value.split()
        if len(words) == 2 and words[1] == "kB":
            result[name] = float(words[0]) * 1024
    return result


_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of <malloc.h>
_LARGE = 128 << 10
"""Bytes from which a block has pages of its own: glibc's first value, kept from growing to 32 MiB as it does."""


def _settler() -> Callable[[], None]:
    """Makes large blocks of the heap go back when they are freed, and gives back what is free now; with another C
    library than glibc nothing.
    """
    try:
        library = ctypes.CDLL(None)
        trim, option = library.malloc_trim, library.mallopt
    except (OSError, AttributeError):
        return lambda: None

    def call() -> None:
        option(ctypes.c_int(_MMAP_THRESHOLD), ctypes.c_int(_LARGE))
        trim(ctypes.c_size_t(0))

    return call


class CpuMeter:
    """Resident memory of this process on Linux.

    Writing 5 to ``/proc/self/clear_refs`` resets the high-water mark of the resident set, for the whole
    process, so that requests that overlap see each other's peaks. Where that is refused, the process's
    all-time high is used: then only a request that sets a new one has a known peak, and every other gives
    None. Free heap is given back first (malloc_trim), else a request that reuses it would seem to take
    nothing; with the pages that must then be had again that takes one to two milliseconds.

    From the first measured request on, blocks of 128 KiB and more have pages of their own in this process (mallopt).
    Otherwise the holes that a request leaves in the heap stay resident until its end, and what it takes depends on the
    sizes of the requests before it: a third more than its tensors need, or not, at random. That costs time: about 15 %
    on the largest images of the reference model, little on small ones. In a process that ran requests unmeasured
    before, the holes of those remain, and peaks are a fifth to a third higher until the controller has learned it.

    Free: ``MemAvailable`` or what the control group leaves, whichever is less, less a headroom.
    Steps of the kernel's counters: about 0.1 MiB a thread.

    Args:
        headroom_gb: Kept back.
        read: Text of a file, for tests.
        write: Replaces the text of a file, for tests.
        settle: Brings the heap into the state that peaks are measured from.
    """

    free_of_charge = False

    def __init__(
        self,
        *,
        headroom_gb: float = 0.25,
        read: Callable[[str], str] = _read,
        write: Callable[[str, str], None] = _write,
        settle: Callable[[], None] | None = None,
    ) -> None:
        self.headroom_gb = headroom_gb
        self.failures = 0
        self._read, self._write = read, write
        self._settle = settle if settle is not None else _settler()
        self._resting: float | None = None
        self._floor = 0.0

    def start(self) -> None:
        """See `Meter`."""
        self._resting = None
        try:
            self._settle()
            try:
                self._write("/proc/self/clear_refs", "5")
                self._floor = 0.0
            except OSError:
                self.failures += 1
                self._floor = self._status()["VmHWM"]
            self._resting = self._status()["VmRSS"]
        except Exception:
            self.failures += 1

    def stop(self) -> float | None:
        """See `Meter`."""
        resting, self._resting = self._resting, None
        if resting is None:
            return None
        try:
            peak = self._status()["VmHWM"]
        except Exception:
            self.failures += 1
            return None
        return _size(max(peak - resting, 0.0) / GIB) if peak > self._floor else None

    def free_gb(self) -> float | None:
        """See `Meter`."""
        try:
            free = _fields(self._read("/proc/meminfo"))["MemAvailable"]
        except Exception:
            self.failures += 1
            return None
        group = self._group_free()
        left = (free if group is None else min(free, group)) / GIB - self.headroom_gb
        return _size(max(left, 0.0)) if math.isfinite(free) and free >= 0.0 else None

    def _status(self) -> dict[str, float]:
        return _fields(self._read("/proc/self/status"))

    def _group_free(self) -> float | None:
        """What the control group (version 2) leaves, page cache that can be dropped included; None if it
        sets no limit.
        """
        try:
            limit = self._read("/sys/fs/cgroup/memory.max").strip()
            if limit == "max":
                return None
            used = float(self._read("/sys/fs/cgroup/memory.current"))
            stat = dict(line.split(None, 1) for line in self._read("/sys/fs/cgroup/memory.stat").splitlines())
            return float(limit) - used + float(stat.get("inactive_file", 0))
        except (OSError, ValueError):
            return None


class NoMeter:
    """Where nothing can be measured: everything is unknown."""

    free_of_charge = True

    def start(self) -> None:
        """See `Meter`."""

    def stop(self) -> None:
        """See `Meter`."""

    def free_gb(self) -> None:
        """See `Meter`."""


def meter_for(device: str, *, headroom_gb: float = 0.25) -> Meter:
    """The meter of a torch device, such as ``cuda:0``, ``xpu`` or ``cpu``."""
    kind = device.partition(":")[0]
    if kind in ("cuda", "xpu"):
        import torch

        return CudaMeter(getattr(torch, kind), device, headroom_gb=headroom_gb)
    if kind == "cpu" and sys.platform == "linux":
        return CpuMeter(headroom_gb=headroom_gb)
    return NoMeter()
