"""Load on purpose: processes that keep cores busy, and delays injected into a runner's model.

Knows processes and a runner's adapter and model. Must not know of traces, nor what is measured meanwhile.
"""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from adaptive_fusion.execution.timing import synchronize
from adaptive_fusion.runner import AdaptiveRunner

_SPIN_S = 0.001
_BUSY = """
import os
parent = os.getppid()
while os.getppid() == parent:
    for _ in range(1_000_000):
        pass
"""


@contextmanager
def background_load(count: int) -> Iterator[None]:
    """Processes that do nothing but keep `count` cores busy; they end with this one, whatever becomes of it."""
    with ExitStack() as stack:
        for _ in range(count):
            process = subprocess.Popen([sys.executable, "-S", "-c", _BUSY])
            stack.callback(process.wait)
            stack.callback(process.kill)
        yield


class Delay:
    """Stretches by `factor` what a runner's model does: preprocessing, encoding and every forward.

    A context manager; afterwards model and adapter are as they were. It sleeps, and spins for the last millisecond.
    """

    def __init__(self, runner: AdaptiveRunner) -> None:
        self.runner, self.factor = runner, 1.0
        self._began = 0.0
        self._stack = ExitStack()

    def _now(self) -> float:
        """The time, once an accelerator has done what it was given: calls return before that."""
        if self.factor > 1.0:
            synchronize(self.runner.adapter.device)
        return time.perf_counter()

    def _wait(self, began: float) -> None:
        until = began + (self._now() - began) * self.factor
        if self.factor > 1.0:
            time.sleep(max(0.0, until - time.perf_counter() - _SPIN_S))
            while time.perf_counter() < until:
                pass

    def _stretched(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def slow(*args: Any, **kwargs: Any) -> Any:
            began = self._now()
            result = call(*args, **kwargs)
            self._wait(began)
            return result

        return slow

    def _before(self, *_: Any) -> None:
        self._began = self._now()

    def _after(self, *_: Any) -> None:
        self._wait(self._began)

    def __enter__(self) -> "Delay":
        adapter = self.runner.adapter
        for name in ("prepare", "encode"):
            setattr(adapter, name, self._stretched(getattr(adapter, name)))
            self._stack.callback(delattr, adapter, name)
        self._stack.callback(adapter.model.register_forward_pre_hook(self._before).remove)
        self._stack.callback(adapter.model.register_forward_hook(self._after).remove)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
