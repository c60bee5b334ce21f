"""Waits that end, whatever goes wrong: long enough for the busiest machine, and with words about what did not come."""

import threading
import time
from collections.abc import Callable, Iterable

MOST_S = 300.0


def until(condition: Callable[[], object], what: str) -> None:
    """Ask again and again, and fail if it does not come true."""
    ends = time.monotonic() + MOST_S
    while not condition():
        assert time.monotonic() < ends, f"after {MOST_S:.0f} s still waiting for: {what}"
        threading.Event().wait(0.005)


def joined(threads: Iterable[threading.Thread]) -> None:
    """Wait for the ends of threads."""
    for thread in threads:
        thread.join(MOST_S)
        assert not thread.is_alive(), f"after {MOST_S:.0f} s thread {thread.name} still runs"
