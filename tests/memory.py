"""Memory of this process."""

import re
from pathlib import Path


def peak_mib() -> float:
    """The most that was resident since the process began. Not `getrusage`: a process that was started by another begins
    there with the other's peak, which hides its own."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024
