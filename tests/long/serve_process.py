"""``adaptive-fusion serve`` as a process of its own, and a load generator with a clock of its own."""

import asyncio
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

_ENV = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


@dataclass
class ServerProcess:
    """A running server."""

    process: "subprocess.Popen[bytes]"
    port: int

    @property
    def url(self) -> str:
        """Of chat completions."""
        return f"http://127.0.0.1:{self.port}/v1/chat/completions"

    def resident_mib(self) -> float:
        """Memory of the process."""
        found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{self.process.pid}/status").read_text())
        assert found is not None
        return int(found[1]) / 1024


@contextmanager
def server_process(folder: Path, *arguments: str) -> Iterator[ServerProcess]:
    """A server that is ready; it is killed at the end if it still runs. What it says is in ``stderr.txt``."""
    command = [sys.executable, "-m", "adaptive_fusion.cli", "serve", "--port", "0", *arguments]
    said = folder / "stderr.txt"
    with said.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env={**os.environ, **_ENV})
    try:
        while (found := re.search(r"ready: .*:(\d+)/v1", said.read_text())) is None:
            assert process.poll() is None, said.read_text()[-2000:]
            time.sleep(0.1)
        yield ServerProcess(process, int(found[1]))
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        process.wait()


@dataclass
class Outcome:
    """What came of one request: status (0 without a response), seconds, the response's JSON."""

    status: int
    took_s: float
    values: Mapping[str, Any] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)


async def offer(
    url: str, body: Callable[[int], dict[str, Any]], rate: float, seconds: float, timeout_s: float = 60.0
) -> list[Outcome]:
    """Send `rate` requests a second, whatever becomes of those before; the outcomes in order of sending."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=200)
    async with httpx.AsyncClient(limits=limits, timeout=timeout_s) as client:
        tasks, began = [], time.perf_counter()
        for number in range(round(rate * seconds)):
            await asyncio.sleep(max(0.0, began + number / rate - time.perf_counter()))
            tasks.append(asyncio.create_task(_send(client, url, body(number))))
        return await asyncio.gather(*tasks)


async def _send(client: httpx.AsyncClient, url: str, body: dict[str, Any]) -> Outcome:
    began = time.perf_counter()
    try:
        response = await client.post(url, json=body)
    except httpx.HTTPError:
        return Outcome(0, time.perf_counter() - began)
    return Outcome(response.status_code, time.perf_counter() - began, response.json(), response.headers)
