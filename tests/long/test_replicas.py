"""Two replicas under Ray Serve and load: one is killed, all are replaced, and at the end who was admitted is answered.
How soon they are in time again is measured by ``benchmarks/replicas.py``."""

import asyncio
import json
import os
import signal
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from server import asking, image, text
from waits import MOST_S, until

from benchmarks.load import ServerProcess, server_process
from benchmarks.scale import tree

pytest.importorskip("ray.serve", reason="needs the extra ray")

IMAGES = 6
CLIENTS = 4


def body(number: int, stream: bool) -> dict[str, Any]:
    """One of a few images, so that they belong to different replicas."""
    messages = asking(image(120 + 20 * (number % IMAGES), 100), text("Describe the image."))
    return {"model": "reference", "messages": messages, "max_tokens": 6, "min_tokens": 6, "stream": stream}


@dataclass
class Seen:
    """What clients saw: ids of whole answers and of streams that were ended by [DONE], and everything else."""

    whole: list[str] = field(default_factory=list)
    streams: list[str] = field(default_factory=list)
    cut_off: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)

    @property
    def answered(self) -> list[str]:
        return [*self.whole, *self.streams]

    async def ask(self, client: httpx.AsyncClient, number: int) -> None:
        stream = number % 3 == 0
        response = await client.post("/v1/chat/completions", json=body(number, stream))
        if response.status_code != 200:
            self.others.append(f"{response.status_code}: {response.text[:200]}")
        elif not stream:
            self.whole.append(response.json()["id"])
        else:
            events = [line[6:] for line in response.text.splitlines() if line.startswith("data: ")]
            name = json.loads(events[0]).get("id", "none")
            if events[-1] == "[DONE]" and not any('"error"' in event for event in events):
                self.streams.append(name)
            else:  # it must say so
                self.cut_off.append(json.loads(events[-1])["error"]["code"])


@asynccontextmanager
async def load(server: ServerProcess) -> AsyncIterator[Seen]:
    """Clients that each send one request after the other, until the end of the block; all are answered then."""
    seen, stop, numbers = Seen(), asyncio.Event(), iter(range(10**6))
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}", timeout=MOST_S) as client:

        async def one() -> None:
            while not stop.is_set():
                await seen.ask(client, next(numbers))

        tasks = [asyncio.create_task(one()) for _ in range(CLIENTS)]
        try:
            yield seen
        finally:
            stop.set()
            await asyncio.gather(*tasks)


async def reached(condition: Callable[[], object], what: str) -> None:
    await asyncio.to_thread(until, condition, what)


def replicas(server: ServerProcess) -> dict[str, dict[str, Any]]:
    found = httpx.get(f"http://127.0.0.1:{server.port}/v1/adaptive_fusion/replicas", timeout=MOST_S).json()["replicas"]
    return {row["replica"]: row for row in found}


def logged(folder: Path) -> tuple[Counter[str], int]:
    """How often each request is in the logs of all replicas, and how many lines are torn."""
    names: Counter[str] = Counter()
    torn = 0
    for path in folder.glob("log-*.jsonl"):
        for line in path.read_text(errors="replace").splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                torn += 1
                continue
            if record.get("event", "decision") == "decision":
                names[record["request_id"]] += 1
    return names, torn


def must_be_whole(seen: Seen, folder: Path, torn: int) -> None:
    """No answer is there twice, and each is in the logs, once."""
    names = [name.removeprefix("chatcmpl-") for name in seen.answered]
    found, broken = logged(folder)
    assert names and len(names) == len(set(names))
    assert {name: found[name] for name in names} == dict.fromkeys(names, 1)
    assert broken <= torn


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """Two replicas; at the end a signal comes in the middle of requests, and all are answered."""
    folder = tmp_path_factory.mktemp("replicas")
    options = ("--replicas", "2", "--encoder-cache-mb", "32", "--log", str(folder / "log.jsonl"))
    with server_process(folder, *options) as found:
        yield found
        answers: list[int] = []
        address = f"http://127.0.0.1:{found.port}"
        asked = [{**body(number, False), "min_tokens": 60, "max_tokens": 60} for number in range(6)]

        def request(wanted: dict[str, Any]) -> None:
            answers.append(httpx.post(f"{address}/v1/chat/completions", json=wanted, timeout=MOST_S).status_code)

        before = passed(found)
        threads = [threading.Thread(target=request, args=(wanted,)) for wanted in asked]
        for thread in threads:
            thread.start()
        until(lambda: passed(found) >= before + len(asked), "six requests that are let in")
        found.process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join(MOST_S)
        assert answers == [200] * len(asked)
        assert found.process.wait(MOST_S) == 0


def passed(server: ServerProcess) -> int:
    """Requests that were given to replicas."""
    lines = httpx.get(f"http://127.0.0.1:{server.port}/metrics", timeout=MOST_S).text.splitlines()
    return next(int(line.split()[-1]) for line in lines if line.startswith("adaptive_fusion:front_requests"))


def test_a_killed_replica_loses_no_answer(server: ServerProcess, share_of: Callable[[int], int]) -> None:
    """Who waited for it is answered by another; only a stream that had begun ends, and says why."""

    async def scene() -> tuple[Seen, dict[str, dict[str, Any]]]:
        await reached(lambda: len(replicas(server)) == 2, "two replicas")
        async with load(server) as seen:
            await reached(lambda: len(seen.answered) >= share_of(60), "answers before the kill")
            await reached(lambda: all(row["updates"] for row in replicas(server).values()), "both at work")
            victim, row = next(iter(replicas(server).items()))
            os.kill(row["pid"], signal.SIGKILL)
            count = len(seen.answered)
            await reached(lambda: len(seen.answered) >= count + share_of(60), "answers after the kill")
            await reached(
                lambda: len(set(replicas(server)) - {victim}) == 2, "another in the place of the one that was killed"
            )
            return seen, {name: row for name, row in replicas(server).items() if name != victim}

    seen, there = asyncio.run(scene())
    assert not seen.others
    assert set(seen.cut_off) <= {"replica_died"} and len(seen.cut_off) <= CLIENTS
    # The new one has gone on with what the other had learned.
    assert all(row["updates"] for row in there.values())
    must_be_whole(seen, server.said.parent, torn=1)


def test_only_replicas_load_the_model_stack(server: ServerProcess) -> None:
    """What starts them, what stands before them and what they share stay small."""
    pids = {pid: name for pid, name in tree(server.process.pid).items() if "ReplicaServer" not in name}
    assert {"Commons", "FrontServer"} <= {name[5:].split(".")[0].split(":")[-1].strip() for name in pids.values()}
    maps = {name: Path(f"/proc/{pid}/maps") for pid, name in pids.items()}
    assert not [name for name, path in maps.items() if path.exists() and "libtorch" in path.read_text()]


def test_a_rolling_update_drops_nothing(server: ServerProcess, share_of: Callable[[int], int]) -> None:
    async def scene() -> tuple[Seen, set[str]]:
        before, said = set(replicas(server)), server.said.read_text().count("replaced:")
        async with load(server) as seen:
            await reached(lambda: len(seen.answered) >= share_of(20), "answers before the update")
            server.process.send_signal(signal.SIGHUP)
            await reached(lambda: server.said.read_text().count("replaced:") > said, "new replicas")
            count = len(seen.answered)
            await reached(lambda: len(seen.answered) >= count + share_of(20), "answers after the update")
        await reached(lambda: not before & set(replicas(server)), "the end of the old ones")
        return seen, set(replicas(server))

    seen, after = asyncio.run(scene())
    assert not seen.others and not seen.cut_off
    assert len(after) == 2
    must_be_whole(seen, server.said.parent, torn=1)


def test_what_is_one_for_all(server: ServerProcess) -> None:
    """An image goes to one replica and is found there; ratings are taken wherever they arrive, once, for any id that
    was served and for no other."""
    with httpx.Client(base_url=f"http://127.0.0.1:{server.port}", timeout=MOST_S) as client:
        served: dict[int, list[str]] = {}
        hits = 0
        for _ in range(3):
            for number in range(1, 1 + IMAGES):
                answer = client.post("/v1/chat/completions", json=body(number, False)).raise_for_status().json()
                served.setdefault(number, []).append(answer["adaptive_fusion"]["request_id"])
                hits += answer["adaptive_fusion"]["encoder_cache"] == "hit"
        wanted = {name for names in served.values() for name in names}
        rows = client.get("/v1/adaptive_fusion/decisions", params={"n": 200}).json()["decisions"]
        where = {row["request_id"]: row["replica"] for row in rows}
        assert wanted <= set(where) and hits
        for names in served.values():
            assert len({where[name] for name in names}) == 1
        for name in wanted:
            said = [
                client.post("/v1/adaptive_fusion/feedback", json={"request_id": name, "rating": "up"}).json()
                for _ in range(3)
            ]
            assert [row["recorded"] for row in said] == [True, False, False]
        refused = client.post("/v1/adaptive_fusion/feedback", json={"request_id": "never-served", "rating": "up"})
        assert refused.status_code == 404
    ratings: Counter[str] = Counter()
    for path in server.said.parent.glob("log-*.jsonl"):
        for line in path.read_text(errors="replace").splitlines():
            if '"feedback"' in line:
                ratings[json.loads(line)["request_id"]] += 1
    assert {name: ratings[name] for name in wanted} == dict.fromkeys(wanted, 1)
