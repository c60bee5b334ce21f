"""A server in a process of its own under more than it can do: what it lets in it answers in time, and it ends well."""

import asyncio
import contextlib
import json
import random
import signal
import statistics
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from serve_process import Outcome, ServerProcess, offer, server_process
from server import asking, image, text

LIMIT = 5.0
"""Deadline, in times of a request alone on the machine."""


def body(latency_ms: float | None = None, **more: Any) -> dict[str, Any]:
    own = {"adaptive_fusion": {"latency_ms": latency_ms}} if latency_ms else {}
    messages = asking(image(300, 200), text("Describe the image."))
    return {"model": "reference", "messages": messages, "max_tokens": 8, **own, **more}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ServerProcess]:
    with server_process(tmp_path, "--queue", "32", "--log", str(tmp_path / "log.jsonl")) as found:
        yield found


def alone_s(server: ServerProcess, latency_ms: float | None = None, count: int = 30) -> float:
    """Median seconds of a request with nobody before it."""
    with httpx.Client(timeout=60) as client:
        took = [client.post(server.url, json=body(latency_ms)).elapsed.total_seconds() for _ in range(count)]
    return statistics.median(took[count // 3 :])


def met(outcomes: list[Outcome]) -> list[bool]:
    return [bool(o.values["adaptive_fusion"]["met"]) for o in outcomes if o.status == 200]


def test_below_saturation_deadlines_hold(server: ServerProcess, share_of: Callable[[int], int]) -> None:
    alone = alone_s(server)
    outcomes = offer(server.port, body(LIMIT * alone * 1e3), 0.7 / alone, share_of(60))
    kept = met(outcomes)
    assert Counter(o.status for o in outcomes).keys() <= {200, 429}
    assert statistics.mean(kept) >= 0.95 and len(kept) >= 0.95 * len(outcomes)


def test_overload_is_refused_at_once_and_what_is_let_in_is_in_time(
    server: ServerProcess, share_of: Callable[[int], int]
) -> None:
    alone = alone_s(server)
    limit_ms = LIMIT * alone * 1e3
    alone_s(server, limit_ms)
    outcomes = offer(server.port, body(limit_ms), 10 / alone, max(15, share_of(30)))
    refused = sorted(o.took_s * 1e3 for o in outcomes if o.status == 429)
    assert Counter(o.status for o in outcomes).keys() == {200, 429} and len(refused) > len(outcomes) / 2
    assert all(int(o.headers["retry-after"]) >= 1 for o in outcomes if o.status == 429)
    assert statistics.mean(met(outcomes)) >= 0.95
    assert statistics.median(refused) <= 10 and refused[int(0.99 * len(refused))] <= 50
    assert alone_s(server, count=6) < 2 * alone  # normal again


def test_nothing_is_lost_or_answered_twice(
    server: ServerProcess, tmp_path: Path, share_of: Callable[[int], int]
) -> None:
    """Clients that lose patience at random: each answer that arrived is in the log, once."""
    rng = random.Random(0)

    async def storm() -> list[str]:
        async with httpx.AsyncClient() as client:

            async def one() -> str | None:
                try:
                    response = await client.post(server.url, json=body(), timeout=rng.choice((0.05, 0.3, 60.0)))
                except httpx.TimeoutException:
                    return None
                return str(response.json()["id"]) if response.status_code == 200 else None

            found: list[str | None] = []
            for _ in range(share_of(100)):
                found += await asyncio.gather(*(one() for _ in range(8)))
            return [name for name in found if name is not None]

    answered = asyncio.run(storm())
    alone_s(server, count=1)
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    logged = Counter(record["request_id"] for record in records)
    assert answered and max(logged.values()) == 1
    assert {name.removeprefix("chatcmpl-") for name in answered} <= set(logged) and len(set(answered)) == len(answered)


def test_at_sigterm_who_was_admitted_is_answered(server: ServerProcess) -> None:
    outcomes: list[tuple[int, str]] = []

    def request(stream: bool) -> None:
        response = httpx.post(server.url, json=body(stream=stream, min_tokens=40, max_tokens=40), timeout=60)
        outcomes.append((response.status_code, response.text))

    threads = [threading.Thread(target=request, args=(bool(n % 2),)) for n in range(8)]
    for thread in threads:
        thread.start()
    with httpx.Client() as client:
        while _waiting(client, server) < 8:
            pass
        server.process.send_signal(signal.SIGTERM)
        while client.get(f"http://127.0.0.1:{server.port}/ready").status_code != 503:
            pass
        late = client.post(server.url, json=body())
    for thread in threads:
        thread.join()
    assert late.status_code == 503 and late.json()["error"]["code"] == "draining"
    assert [status for status, _ in outcomes] == [200] * 8
    assert sum(answer.rstrip().endswith("data: [DONE]") for _, answer in outcomes) == 4
    assert server.process.wait(30) == 0


def _waiting(client: httpx.Client, server: ServerProcess) -> float:
    text_of = client.get(f"http://127.0.0.1:{server.port}/metrics").text
    found = [line for line in text_of.splitlines() if line.startswith("adaptive_fusion:num_requests_")]
    return sum(float(line.split()[-1]) for line in found)


def test_kill_loses_at_most_one_record(tmp_path: Path, share_of: Callable[[int], int]) -> None:
    log = tmp_path / "log.jsonl"
    answered: set[str] = set()
    for round_ in range(share_of(5)):
        with server_process(tmp_path, "--log", str(log)) as server:
            kill = threading.Timer(1.0 + 0.1 * round_, server.process.kill)
            kill.start()
            with httpx.Client(timeout=60) as client:
                try:
                    while True:
                        response = client.post(server.url, json=body(max_tokens=1))
                        answered.add(response.json()["adaptive_fusion"]["request_id"])
                except httpx.TransportError:
                    pass
            kill.join()
    records = set()
    for line in log.read_text().splitlines():
        with contextlib.suppress(ValueError):  # the one that was under way
            records.add(json.loads(line)["request_id"])
    assert len(answered) > share_of(5) and answered <= records


def test_random_cancels_leave_no_place_taken(tmp_path: Path, share_of: Callable[[int], int]) -> None:
    """Connections that end at random moments, most of them while nothing was sent yet."""
    rng = random.Random(1)
    payload = json.dumps(body(max_tokens=1)).encode()

    async def cut(port: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        head = "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        sent = f"{head}content-length: {len(payload)}\r\n\r\n".encode() + payload
        writer.write(sent[: rng.choice((len(sent), len(sent), rng.randrange(len(sent))))])
        await writer.drain()
        await asyncio.sleep(rng.choice((0.0, 0.0, 0.001, 0.01, 0.1)))
        writer.close()
        del reader

    async def storm(port: int, count: int) -> None:
        for _ in range(count // 50):
            await asyncio.gather(*(cut(port) for _ in range(50)), return_exceptions=True)

    with server_process(tmp_path, "--queue", "8") as server:
        asyncio.run(storm(server.port, max(100, share_of(10_000))))
        with httpx.Client(timeout=60) as client:
            while _waiting(client, server):
                pass
            assert client.post(server.url, json=body()).status_code == 200
        assert "internal" not in (tmp_path / "stderr.txt").read_text()
