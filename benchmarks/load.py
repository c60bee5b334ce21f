"""``adaptive-fusion serve`` as a process of its own, and a load generator with a clock of its own."""

import asyncio
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
READY_S = 600.0
"""How long a server may take to be ready, even on a machine with other work."""
ANSWERS_S = 1800.0
"""How long a load may last; a server that does not answer must not hold who waits for it."""

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
        if found is None:
            raise RuntimeError("the process has no resident memory: it has ended")
        return int(found[1]) / 1024


@contextmanager
def server_process(folder: Path, *arguments: str) -> Iterator[ServerProcess]:
    """A server that is ready; it is killed at the end if it still runs. What it says is in ``stderr.txt``. It has no
    pages unless they are asked for."""
    pages = () if "--ui" in arguments else ("--no-ui",)
    command = [sys.executable, "-m", "adaptive_fusion.cli", "serve", "--port", "0", *pages, *arguments]
    said = folder / "stderr.txt"
    with said.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env={**os.environ, **_ENV})
    try:
        ends = time.monotonic() + READY_S
        while (found := re.search(r"ready: .*:(\d+)/v1", said.read_text())) is None:
            if process.poll() is not None or time.monotonic() > ends:
                raise RuntimeError(f"the server is not ready: {said.read_text()[-2000:]}")
            time.sleep(0.1)
        yield ServerProcess(process, said, int(found[1]))
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        process.wait(60)


@dataclass
class Outcome:
    """What came of one request: status, seconds, the response's JSON and headers."""

    status: int
    took_s: float
    values: Mapping[str, Any] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)


Body = Mapping[str, Any] | Sequence[Mapping[str, Any]]


def _written(body: Mapping[str, Any]) -> bytes:
    """A request as it goes over the wire."""
    text = json.dumps(body).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        f"content-length: {len(text)}\r\n\r\n"
    )
    return head.encode() + text


class Line:
    """One open connection on which the same request is sent again and again, which takes next to nothing of the caller.

    Args:
        port: Of the server.
        body: Of the request.
    """

    def __init__(self, port: int, body: Mapping[str, Any]) -> None:
        self._request = _written(body)
        self._socket = socket.create_connection(("127.0.0.1", port))
        self._file = self._socket.makefile("rb")

    def __call__(self) -> bytes:
        """Send it, and read all of the answer's body.

        Raises:
            RuntimeError: For another status than 200.
        """
        self._socket.sendall(self._request)
        status, length = self._file.readline(), 0
        while line := self._file.readline().strip().lower():
            if line.startswith(b"content-length:"):
                length = int(line.partition(b":")[2])
        answer = self._file.read(length)
        if b" 200 " not in status:
            raise RuntimeError(f"the server says {status!r}: {answer[:200]!r}")
        return answer


class Offering:
    """A load generator that takes little of the machine: bodies made beforehand, connections kept open.

    Args:
        port: Of the server.
        body: Of every request, or those of all, taken in turn.
        progress: Called whenever a request was sent.
    """

    def __init__(self, port: int, body: Body, progress: Callable[[], None] = lambda: None) -> None:
        self.port, self._progress = port, progress
        self._requests = itertools.cycle([_written(one) for one in ([body] if isinstance(body, Mapping) else body)])
        self._free: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def at_rate(self, rate: float, seconds: float) -> list[Outcome]:
        """Send `rate` requests a second, whatever becomes of those before; the outcomes in order of sending."""
        tasks, began = [], time.perf_counter()
        for number in range(max(1, round(rate * seconds))):
            await asyncio.sleep(max(0.0, began + number / rate - time.perf_counter()))
            tasks.append(asyncio.create_task(self._send()))
            self._progress()
        return await self._closing(tasks)

    async def by_clients(self, clients: int, each: int) -> list[Outcome]:
        """`clients` that send `each` requests, one after the other's answer."""

        async def one() -> list[Outcome]:
            found = []
            for _ in range(each):
                found.append(await self._send())
                self._progress()
            return found

        return [o for found in await self._closing([asyncio.create_task(one()) for _ in range(clients)]) for o in found]

    async def _closing(self, tasks: "list[asyncio.Task[T]]") -> list[T]:
        try:
            async with asyncio.timeout(ANSWERS_S):
                return await asyncio.gather(*tasks)
        finally:
            for _, writer in self._free:
                writer.close()

    async def _send(self) -> Outcome:
        began = time.perf_counter()
        reader, writer = self._free.pop() if self._free else await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(next(self._requests))
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        lines = [line.partition(": ") for line in head.splitlines()[1:] if line]
        headers = {name.lower(): value for name, _, value in lines}
        body = await reader.readexactly(int(headers["content-length"]))
        took_s = time.perf_counter() - began
        self._free.append((reader, writer))
        return Outcome(int(head.split()[1]), took_s, json.loads(body), headers)


def offer(
    port: int, body: Body, rate: float, seconds: float, progress: Callable[[], None] = lambda: None
) -> list[Outcome]:
    """See `Offering.at_rate`."""
    return asyncio.run(Offering(port, body, progress).at_rate(rate, seconds))


def saturate(
    port: int, body: Body, clients: int, each: int, progress: Callable[[], None] = lambda: None
) -> list[Outcome]:
    """See `Offering.by_clients`."""
    return asyncio.run(Offering(port, body, progress).by_clients(clients, each))
