"""Work in a thread that lets others go first."""

import asyncio
import os
import sys
import threading

import pytest

from adaptive_fusion.serving.gently import NICE, gently


def priority() -> int:
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


@pytest.mark.skipif(sys.platform != "linux", reason="threads have priorities of their own on Linux alone")
def test_only_the_work_lets_others_go_first() -> None:
    async def scene() -> tuple[int, int, int, int]:
        before, inside = priority(), await gently(priority)
        return before, inside, priority(), await asyncio.to_thread(priority)

    before, inside, after, other = asyncio.run(scene())
    assert inside == max(NICE, before) and after == other == before


def test_what_the_work_raises_arrives() -> None:
    with pytest.raises(ValueError, match="base 10"):
        asyncio.run(gently(int, "x"))
