"""What stands before replicas, with replicas in this process: real applications, asked by messages."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Message

from adaptive_fusion.serving.front import TRIES, Front
from adaptive_fusion.serving.http import ELAPSED
from adaptive_fusion.serving.replica import Replica
from adaptive_fusion.serving.replica_options import ReplicaOptions


class Died(Exception):
    """A replica is gone."""


class Absent(Exception):
    """No replica can be started."""


class Asked:
    """Messages of a replica that may die after some of them."""

    def __init__(self, messages: AsyncIterator[list[Message]], after: int | None, scene: "Scene") -> None:
        self._messages, self._after, self._log, self._error = messages, after, scene.log, scene.error

    async def __aiter__(self) -> AsyncIterator[list[Message]]:
        try:
            if self._after == 0:
                raise self._error
            count = 0
            async for found in self._messages:
                yield found
                count += 1
                if count == self._after:
                    raise self._error
        finally:
            await self._messages.aclose()  # type: ignore[attr-defined]

    def cancel(self) -> None:
        self._log.append("cancelled")


class Shared:
    async def replicas(self) -> list[dict[str, Any]]:
        return [{"replica": "r"}]

    async def metrics(self) -> dict[str, str]:
        return {"r": "# TYPE x counter\nx 1\n"}


class Scene:
    """A front before one application; `deaths` are after how many messages each of the first asked dies."""

    def __init__(self, deaths: list[int | None] | None = None, error: type[Exception] = Died) -> None:
        self.error = error
        self.deaths, self.log, self.elapsed = list(deaths or []), [], []
        self.log: list[str] = []
        self.elapsed: list[float] = []
        self.hold = asyncio.Event()
        self.replica = Replica("r", ReplicaOptions(), lambda *_: None, self._nothing)
        self.replica.app = Starlette(
            routes=[
                Route("/v1/echo", self._echo, methods=["POST"]),
                Route("/v1/stream", self._stream, methods=["POST"]),
                Route("/ready", lambda request: JSONResponse({"status": "ready"})),
            ]
        )
        self.now = 10.0
        self.front = Front(self._ask, Shared(), (Died,), (Absent,), 1, lambda: self.now)

    async def _nothing(self, *_: Any) -> None:
        return None

    def _ask(self, told: dict[str, Any], body: bytes, key: str) -> Asked:
        self.log.append(key[:4])
        self.now += 0.25
        return Asked(self.replica.answer(told, body), self.deaths.pop(0) if self.deaths else None, self)

    async def _echo(self, request: Request) -> Response:
        self.elapsed.append(request.scope[ELAPSED])
        return JSONResponse(
            {"said": (await request.body()).decode(), "query": request.url.query}, headers={"x-request-id": "mine"}
        )

    async def _stream(self, request: Request) -> Response:
        async def events() -> AsyncIterator[str]:
            for number in range(3):
                yield f"data: {number}\n\n"
                await asyncio.sleep(0)
            if request.query_params.get("wait"):
                try:
                    await self.hold.wait()
                except asyncio.CancelledError:
                    self.log.append("stopped")
                    raise

        return StreamingResponse(events(), media_type="text/event-stream")

    def client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(transport=httpx.ASGITransport(self.front), base_url="http://localhost")


async def post(scene: Scene, path: str, **more: Any) -> httpx.Response:
    async with scene.client() as client:
        return await client.post(path, json={"url": "data:x"}, **more)


def test_an_answer_passes_unchanged_and_time_counts_from_the_front() -> None:
    async def scene() -> None:
        found = Scene()
        response = await post(found, "/v1/echo?a=1")
        assert response.json() == {"said": '{"url":"data:x"}', "query": "a=1"}
        assert "x-request-id" not in response.headers  # the proxy before it puts its own
        async with found.client() as client:
            assert (await client.get("/health")).json() == {"status": "ok"}
            assert (await client.get("/ready")).json() == {"status": "ready"}
            assert (await client.get("/v1/adaptive_fusion/replicas")).json() == {"replicas": [{"replica": "r"}]}
            text = (await client.get("/metrics")).text
            assert 'x{replica="r"} 1' in text and "adaptive_fusion:front_requests 2" in text
            assert (await client.post("/v1/echo", content=b"x")).status_code == 415
            large = await client.post("/v1/echo", json={"url": "x" * (2 << 20)})
            assert large.status_code == 413 and large.json()["error"]["code"] == "body_too_large"

    asyncio.run(scene())


def test_who_waited_for_a_replica_that_died_is_answered_by_another() -> None:
    """And the time that was lost with it counts."""

    async def scene() -> None:
        found = Scene([0, 0])
        response = await post(found, "/v1/echo")
        assert response.status_code == 200 and found.front.counts["asked_again"] == 2
        assert found.elapsed == [0.5]
        all_dead = Scene([0] * TRIES)
        response = await post(all_dead, "/v1/echo")
        assert response.status_code == 503 and response.json()["error"]["code"] == "replica_died"
        assert response.headers["retry-after"] == "1" and not all_dead.elapsed

    asyncio.run(scene())


def test_a_stream_that_has_begun_says_that_it_is_cut_off() -> None:
    async def scene() -> None:
        found = Scene([1])
        response = await post(found, "/v1/stream")
        assert response.status_code == 200 and response.text.startswith("data: 0\n\n")
        assert '"replica_died"' in response.text.rstrip().splitlines()[-1]
        assert found.front.counts["cut_off"] == 1 and len([word for word in found.log if word != "cancelled"]) == 1

    asyncio.run(scene())


def test_a_client_that_goes_ends_the_work() -> None:
    async def scene() -> None:
        found = Scene()
        gone = asyncio.Event()
        given = False

        async def receive() -> Message:
            nonlocal given
            if not given:
                given = True
                return {"type": "http.request", "body": b"{}", "more_body": False}
            await gone.wait()
            return {"type": "http.disconnect"}

        sent: list[Message] = []

        async def send(message: Message) -> None:
            sent.append(message)
            if b"data: 2" in message.get("body", b""):
                gone.set()

        scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/stream",
            "raw_path": b"/v1/stream",
            "query_string": b"wait=1",
            "headers": [(b"content-type", b"application/json")],
            "scheme": "http",
            "http_version": "1.1",
            "client": None,
        }
        async with asyncio.timeout(60):
            await found.front(scope, receive, send)
            while "stopped" not in found.log:
                await asyncio.sleep(0.001)
        assert "cancelled" in found.log
        assert await found.front.drain(1.0)

    asyncio.run(scene())


def test_draining_lets_nobody_in_and_waits_for_who_is() -> None:
    async def scene() -> None:
        found = Scene()
        async with found.client() as client:
            open_one = asyncio.create_task(client.post("/v1/stream?wait=1", json={}))
            while found.front.counts["requests"] == 0:
                await asyncio.sleep(0.001)
            assert not await found.front.drain(0.001)
            refused = await client.post("/v1/echo", json={})
            assert refused.status_code == 503 and refused.json()["error"]["code"] == "draining"
            found.hold.set()
            assert await found.front.drain(60.0)
            assert (await open_one).status_code == 200

    asyncio.run(scene())


@pytest.mark.parametrize(("error", "status", "code"), [(Absent, 503, "not_ready"), (KeyError, 500, "internal_error")])
def test_what_goes_wrong_on_the_way_is_said_and_not_asked_again(error: type[Exception], status: int, code: str) -> None:
    """Before an answer as an error in OpenAI's form, in a stream as its last event."""
    scene = Scene([0], error)
    refused = asyncio.run(post(scene, "/v1/echo"))
    assert refused.status_code == status and refused.json()["error"]["code"] == code
    scene = Scene([1], error)
    stream = asyncio.run(post(scene, "/v1/stream")).text
    events = [line[6:] for line in stream.splitlines() if line.startswith("data: ")]
    assert json.loads(events[-1])["error"]["code"] == code and "[DONE]" not in stream
    assert scene.front.counts == {"requests": 1, "asked_again": 0, "cut_off": 1, "refused": 0}
