"""``adaptive-fusion serve`` as a process of its own, and a load generator with a clock of its own."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_ENV = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


@dataclass
class ServerProcess:
    """A running server."""

    process: "subprocess.Popen[bytes]"
    said: Path
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
        yield ServerProcess(process, said, int(found[1]))
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        process.wait()


@dataclass
class Outcome:
    """What came of one request: status, seconds, the response's JSON and headers."""

    status: int
    took_s: float
    values: Mapping[str, Any] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)


class Offering:
    """A load generator that takes little of the machine: bodies made beforehand, connections kept open.

    Args:
        port: Of the server.
    """

    def __init__(self, port: int) -> None:
        self.port = port
        self._free: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def run(self, body: dict[str, Any], rate: float, seconds: float) -> list[Outcome]:
        """Send `rate` requests a second, whatever becomes of those before; the outcomes in order of sending."""
        text = json.dumps(body).encode()
        head = (
            "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
            f"content-length: {len(text)}\r\n\r\n"
        )
        tasks, began = [], time.perf_counter()
        for number in range(round(rate * seconds)):
            await asyncio.sleep(max(0.0, began + number / rate - time.perf_counter()))
            tasks.append(asyncio.create_task(self._send(head.encode() + text)))
        outcomes = await asyncio.gather(*tasks)
        for _, writer in self._free:
            writer.close()
        return outcomes

    async def _send(self, request: bytes) -> Outcome:
        began = time.perf_counter()
        reader, writer = self._free.pop() if self._free else await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(request)
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        lines = [line.partition(": ") for line in head.splitlines()[1:] if line]
        headers = {name.lower(): value for name, _, value in lines}
        body = await reader.readexactly(int(headers["content-length"]))
        took_s = time.perf_counter() - began
        self._free.append((reader, writer))
        return Outcome(int(head.split()[1]), took_s, json.loads(body), headers)


def offer(port: int, body: dict[str, Any], rate: float, seconds: float) -> list[Outcome]:
    """See `Offering.run`."""
    return asyncio.run(Offering(port).run(body, rate, seconds))
