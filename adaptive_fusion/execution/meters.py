"""Memory meters: how much a request took above the resting set, and how much can still be had.

Knows the counters of CUDA (XPU has the same ones) and of Linux. Knows nothing of models, requests or budgets.
A meter never raises: a probe that fails gives None, "unknown", which the controller takes as no reading
and the caller as no measurement. All figures are GiB.
"""

import ctypes
import math
import sys
from abc import ABC, abstractmethod
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

    def skip(self) -> None:
        """Begin a request that is not measured."""
        ...

    def free_gb(self) -> float | None:
        """GiB that a request can still have, headroom taken off; None if unknown."""
        ...


def _size(value: float | None) -> float | None:
    """A reading in GiB, or None for one that cannot be true."""
    return value if value is not None and math.isfinite(value) and 0.0 <= value < 1e6 else None


class _Marked(ABC):
    """Start and stop of a meter with a resting set and a high-water mark in bytes; reading either may raise."""

    def __init__(self, headroom_gb: float) -> None:
        self.headroom_gb = headroom_gb
        self.failures = 0
        self._resting: float | None = None

    def start(self) -> None:
        """See `Meter`."""
        self._resting = None
        try:
            self._resting = self._rest()
        except Exception:
            self.failures += 1

    def stop(self) -> float | None:
        """See `Meter`."""
        resting, self._resting = self._resting, None
        if resting is None:
            return None
        try:
            highest = self._highest()
        except Exception:
            self.failures += 1
            return None
        return None if highest is None else _size(max(highest - resting, 0.0) / GIB)

    @abstractmethod
    def _rest(self) -> float:
        """Reset the high-water mark and return the resting set."""

    @abstractmethod
    def _highest(self) -> float | None:
        """The high-water mark; None if it is older than the request."""


class CudaMeter(_Marked):
    """Statistics of torch's caching allocator and the driver.

    Peak: ``max_memory_allocated`` less what was allocated at the start. Free: what the driver has, of
    other processes too (``mem_get_info``; the limit of a MIG slice is the driver's own), plus what the
    cache holds unused, less the split blocks in it (``inactive_split_bytes``: fragments that cannot be
    counted on for a large tensor), and no more than the process's own share of the device
    (``set_per_process_memory_fraction``) leaves, less a headroom for the kernels' workspaces.

    Args:
        probe: ``torch.cuda``, ``torch.xpu``, or anything with their memory functions.
        device: The device as torch names it; None is the current one.
        headroom_gb: Kept back.
    """

    free_of_charge = True

    def __init__(self, probe: Any, device: Any = None, *, headroom_gb: float = 0.25) -> None:
        super().__init__(headroom_gb)
        self.probe, self.device = probe, device

    def _rest(self) -> float:
        self.probe.reset_peak_memory_stats(self.device)
        return float(self.probe.memory_allocated(self.device))

    def skip(self) -> None:
        """See `Meter`."""

    def _highest(self) -> float:
        return float(self.probe.max_memory_allocated(self.device))

    def free_gb(self) -> float | None:
        """See `Meter`. What was measured but does not fit into the headroom is 0, not unknown."""
        try:
            free = float(self.probe.mem_get_info(self.device)[0])
            cached = float(self.probe.memory_reserved(self.device)) - float(self.probe.memory_allocated(self.device))
            lost = float(self.probe.memory_stats(self.device).get("inactive_split_bytes.all.current", 0))
        except Exception:
            self.failures += 1
            return None
        usable = min(free + max(cached - max(lost, 0.0), 0.0), self._limit() - max(lost, 0.0))
        total = usable / GIB - self.headroom_gb
        return _size(max(total, 0.0)) if free >= 0.0 and cached >= 0.0 else None

    def _limit(self) -> float:
        """What the process may still have by its own share of the device (``set_per_process_memory_fraction``), which
        the driver does not know; infinite where that cannot be asked."""
        try:
            share = float(self.probe.get_per_process_memory_fraction(self.device))
            total = float(self.probe.mem_get_info(self.device)[1])
            taken = float(self.probe.memory_allocated(self.device))
        except Exception:
            return math.inf
        return share * total - taken if 0.0 < share < 1.0 else math.inf


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


_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # M_MMAP_THRESHOLD and M_TRIM_THRESHOLD of <malloc.h>
_MEASURED = 32 << 10
"""Bytes from which a block has pages of its own while requests are measured. At 128 KiB the tensors of images below 500
patches stay in the heap of the reference model, and those peaks are half as high again, at random."""
_USUAL = 32 << 20
"""The same otherwise: as far as glibc lets its threshold grow by itself until it is set."""


def _heap() -> Callable[[bool], None]:
    """With True, makes large blocks of the heap go back when they are freed, and gives back what is free now; with
    False, lets them stay again. With another C library than glibc nothing.
    """
    try:
        library = ctypes.CDLL(None)
        trim, option = library.malloc_trim, library.mallopt
    except (OSError, AttributeError):
        return lambda measured: None

    def settle(measured: bool) -> None:
        option(ctypes.c_int(_MMAP_THRESHOLD), ctypes.c_int(_MEASURED if measured else _USUAL))
        option(ctypes.c_int(_TRIM_THRESHOLD), ctypes.c_int(_MEASURED if measured else 2 * _USUAL))
        if measured:
            trim(ctypes.c_size_t(0))

    return settle


class CpuMeter(_Marked):
    """Resident memory of this process on Linux.

    Writing 5 to ``/proc/self/clear_refs`` resets the high-water mark of the resident set, for the whole
    process, so that requests that overlap see each other's peaks. Where that is refused, the process's
    all-time high is used: then only a request that sets a new one has a known peak, and every other gives
    None. Free heap is given back first (malloc_trim), else a request that reuses it would seem to take
    nothing; with the pages that must then be had again that takes one to two milliseconds.

    From a measured request on, blocks of 32 KiB and more have pages of their own in this process (mallopt). Otherwise
    the holes that a request leaves in the heap stay resident until its end, and what it takes depends on the sizes of
    the requests before it: a third more than its tensors need, or not, at random. That costs time: about 1.6
    times as much on the largest images of the reference model. So a request that is not measured ends it; where both
    kinds take turns, peaks are about a quarter higher than where all are measured, until the controller has learned it.

    Free: ``MemAvailable`` or what the control group leaves, whichever is less, less a headroom.
    Steps of the kernel's counters: about 0.1 MiB a processor (a thread, before Linux 6.2), so small peaks are known
    only roughly. Where the machine as a whole runs out of memory, pages of this process are taken while a request runs,
    and its peak is too low.

    Args:
        headroom_gb: Kept back.
        read: Text of a file, for tests.
        write: Replaces the text of a file, for tests.
        settle: Called with True before a request is measured, and with False before the next one that is not.
    """

    free_of_charge = False

    def __init__(
        self,
        *,
        headroom_gb: float = 0.25,
        read: Callable[[str], str] = _read,
        write: Callable[[str, str], None] = _write,
        settle: Callable[[bool], None] | None = None,
    ) -> None:
        super().__init__(headroom_gb)
        self._read, self._write = read, write
        self._settle = settle if settle is not None else _heap()
        self._floor = 0.0
        self._settled = False

    def skip(self) -> None:
        """See `Meter`."""
        if self._settled:
            self._settle(False)
            self._settled = False

    def _rest(self) -> float:
        self._settle(True)
        self._settled = True
        try:
            self._write("/proc/self/clear_refs", "5")
            self._floor = 0.0
        except OSError:
            self.failures += 1
            self._floor = self._status()["VmHWM"]
        return self._status()["VmRSS"]

    def _highest(self) -> float | None:
        peak = self._status()["VmHWM"]
        return peak if peak > self._floor else None

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

    def skip(self) -> None:
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
