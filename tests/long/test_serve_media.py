"""Ten thousand damaged media and bodies through the server's check: the library's own errors alone, and no growth."""

import asyncio
import base64
import multiprocessing
import re
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np
from memory import peak_mib
from mutants import mutate, seeds

from adaptive_fusion.errors import AdaptiveFusionError, MediaError
from adaptive_fusion.execution.messages import read_messages
from adaptive_fusion.serving.media import check_media
from adaptive_fusion.serving.media_limits import MediaLimits

GROWTH_MIB = 50
WARM = 300
"""Bodies before memory is looked at: decoders and their buffers come with the first ones."""
STRANGE = [
    None, True, 0, -1, 10**400, float("nan"), "", "/etc/passwd", "file:///etc/passwd", "https://169.254.169.254/",
    "\ud800", [], {}, [[]], {"url": "/etc/passwd"}, "data:", "data:,", "data:image/png;base64,", "x" * 100_000,
    b"/etc/passwd",
]  # fmt: skip


def body(data: bytes, rng: np.random.Generator) -> list[Any]:
    """A conversation that shows `data`; half of them with keys and values dropped, swapped or strange."""
    url = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    kind = ("image_url", "video_url")[int(rng.integers(0, 2))]
    shown = {"type": kind, kind: {"url": url, "detail": ("low", "high", "auto")[int(rng.integers(0, 3))]}}
    messages: list[Any] = [
        {"role": "system", "content": "Answer briefly."},
        {"role": "user", "content": [{"type": "text", "text": "What is it?"}, shown]},
    ]
    return messages if rng.random() < 0.5 else damaged(messages, rng)


def damaged(value: Any, rng: np.random.Generator) -> Any:
    """`value` with some of what is in it dropped or put in another's place."""
    if rng.random() < 0.04:
        return STRANGE[int(rng.integers(0, len(STRANGE)))]
    if isinstance(value, Mapping):
        kept = {key: damaged(entry, rng) for key, entry in value.items() if rng.random() > 0.03}
        return kept | ({"path": "/etc/passwd"} if rng.random() < 0.03 else {})
    if isinstance(value, list):
        return [damaged(entry, rng) for entry in value if rng.random() > 0.03] * int(rng.choice([1, 1, 1, 2]))
    if isinstance(value, str) and rng.random() < 0.03:
        at = int(rng.integers(0, len(value) + 1))
        return value[:at] + ("%", "\n", "=", "é", "\0", "")[int(rng.integers(0, 6))] + value[at + 1 :]
    return value


def checked(count: int) -> tuple[dict[str, int], float]:
    """Check `count` bodies; how many passed and were refused, and by how many MiB the process has grown."""
    warnings.simplefilter("ignore")  # Pillow warns of corrupt metadata, as it should
    limits, rng = MediaLimits(allowed_domains=("media.example.com",)), np.random.default_rng(5)
    report = {"passed": 0, "refused": 0}
    before_mib = 0.0

    async def run() -> None:
        nonlocal before_mib
        for i in range(WARM + count):
            if i == WARM:
                before_mib = peak_mib()
            messages = body(mutate(seeds()[i % len(seeds())], rng), rng)
            if isinstance(messages, list):
                report[await outcome(messages, limits)] += 1

    asyncio.run(run())
    return report, peak_mib() - before_mib


async def outcome(messages: list[Any], limits: MediaLimits) -> str:
    """Whether a conversation passed; anything but the library's own error, without a place in it, fails."""
    try:
        found = await check_media(messages, limits)
        media = [part for message in read_messages(found) for part in message.media]
        assert all(isinstance(medium.source, bytes) for medium in media)
        return "passed"
    except AdaptiveFusionError as error:
        assert len(str(error)) < 1000 and not re.search(r" at 0x|site-packages|/home/|\.py", str(error))
        # A value that is no medium may be told back to whoever sent it; where a medium is wanted, nothing is.
        assert not isinstance(error, MediaError) or not re.search(r"/etc|169\.254", str(error))
        return "refused"


def test_mutants_end_in_bytes_or_in_the_librarys_own_error_and_memory_stays(share_of: Callable[[int], int]) -> None:
    """In a process of its own: what other tests have taken and given back would hide what this takes."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        report, grown_mib = pool.submit(checked, share_of(10_000)).result(timeout=1800)
    print(report, f"{grown_mib:.1f} MiB")
    assert report["passed"] and report["refused"]
    assert grown_mib < GROWTH_MIB
