"""Work that may take long, in a thread that lets others of the machine go first.

Knows threads and their priority. Must not know the work: a new replica imports, loads and warms up its model by it, so
that those which answer meanwhile keep their deadlines where all share a few cores.
"""

import asyncio
import contextlib
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")
NICE = 10
"""As much less of a core that is wanting: a tenth of what a thread of ordinary priority gets."""


async def gently(work: Callable[P, R], *arguments: P.args, **named: P.kwargs) -> R:
    """Do `work` in a thread of its own at low priority; the thread ends with it, and nobody waits for one that is no
    longer asked for."""
    pool = ThreadPoolExecutor(1, "gently", _lower)
    done = pool.submit(work, *arguments, **named)
    pool.shutdown(wait=False)
    return await asyncio.wrap_future(done)


def _lower() -> None:
    """Linux has priorities of threads; elsewhere they are those of processes, which must stay as they are."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            thread = threading.get_native_id()
            os.setpriority(os.PRIO_PROCESS, thread, max(NICE, os.getpriority(os.PRIO_PROCESS, thread)))
