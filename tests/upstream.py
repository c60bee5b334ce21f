"""A small engine with OpenAI's API in a thread of its own: it keeps what it was sent, and answers as it is told to."""

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from waits import MOST_S


@dataclass
class Got:
    """A request as it came."""

    method: str
    path: str
    query: bytes
    headers: list[tuple[bytes, bytes]]
    body: bytes
    gone: bool = False

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    def header(self, name: str) -> str | None:
        return next((v.decode() for k, v in self.headers if k.decode().lower() == name), None)


@dataclass
class Engine:
    """The engine and how it answers.

    Attributes:
        words: Of its answers; a function of the body may choose them.
        before: Awaited before each piece of a stream, with its number.
        dies_at: Number of the piece of a stream in whose place the connection is cut off.
        dies_with: How many bytes of that piece are sent before.
        logprobs: Of the first token's likeliest, by the body; None gives none, an int is a status to refuse with.
        status: Of answers; their body is an error unless it is 200.
    """

    got: list[Got] = field(default_factory=list)
    words: Callable[[Any], list[str]] = lambda body: ["one", " two", " three"]
    before: Callable[[int], Any] | None = None
    dies_at: int | None = None
    dies_with: int = 0
    logprobs: Callable[[Any], list[float] | None] | int | None = None
    status: int = 200
    sent: int = 0
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body, more = bytearray(), True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
        got = Got(scope["method"], scope["path"], scope["query_string"], scope["headers"], bytes(body))
        self.got.append(got)
        if scope["path"] != "/v1/chat/completions" or self.status != 200:
            kind = [(b"content-type", b"application/json"), (b"x-engine", b"yes"), (b"set-cookie", b"a=b")]
            answer = json.dumps({"path": scope["path"], "error" if self.status != 200 else "echo": len(body)}).encode()
            await send({"type": "http.response.start", "status": self.status, "headers": kind})
            await send({"type": "http.response.body", "body": answer})
            return
        try:
            asked = json.loads(got.body)
            stream = bool(asked.get("stream"))
        except (ValueError, AttributeError):
            await send({"type": "http.response.start", "status": 400, "headers": [(b"x-engine", b"yes")]})
            await send({"type": "http.response.body", "body": b"what is this"})
            return
        if asked.get("logprobs") and isinstance(self.logprobs, int):
            await send({"type": "http.response.start", "status": self.logprobs, "headers": []})
            await send({"type": "http.response.body", "body": b'{"error": "logprobs is not supported"}'})
            return
        await (self._stream if stream else self._whole)(got, asked, receive, send)

    def rows(self, asked: Any, word: str, first: bool) -> Any:
        top = self.logprobs(asked) if callable(self.logprobs) else None
        if not asked.get("logprobs") or top is None:
            return None
        values = top if first else [-0.001]
        named = [{"token": f"t{i}", "logprob": each, "bytes": None} for i, each in enumerate(values)]
        return {"content": [{"token": word, "logprob": values[0], "bytes": None, "top_logprobs": named}]}

    async def _whole(self, got: Got, asked: Any, receive: Any, send: Any) -> None:
        words = self.words(asked)
        rows = [self.rows(asked, word, index == 0) for index, word in enumerate(words)]
        said = None if not rows or rows[0] is None else {"content": [row["content"][0] for row in rows]}
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": "".join(words)},
            "logprobs": said,
            "finish_reason": "stop",
        }
        usage = {"prompt_tokens": 50, "completion_tokens": len(words), "total_tokens": 50 + len(words)}
        answer = {
            "id": "x",
            "object": "chat.completion",
            "created": 1,
            "model": "m",
            "choices": [choice],
            "usage": usage,
        }
        data = json.dumps(answer).encode()
        head = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(data)), (b"x-engine", b"yes")]
        await send({"type": "http.response.start", "status": 200, "headers": head})
        if self.dies_at is not None:
            await send({"type": "http.response.body", "body": data[: self.dies_at], "more_body": True})
            raise ConnectionError("cut off")
        await send({"type": "http.response.body", "body": data})

    async def _stream(self, got: Got, asked: Any, receive: Any, send: Any) -> None:
        watching = asyncio.create_task(self._watch(got, receive))
        head = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"x-engine", b"yes")]
        await send({"type": "http.response.start", "status": 200, "headers": head})
        for index, event in enumerate(self.events(asked)):
            if self.before is not None:
                await self.before(index)
            if self.dies_at == index:
                watching.cancel()
                if self.dies_with:
                    part = event[: self.dies_with]
                    await send({"type": "http.response.body", "body": part, "more_body": True})
                raise ConnectionError("cut off")
            if got.gone:
                break
            self.sent += len(event)
            await send({"type": "http.response.body", "body": event, "more_body": True})
        watching.cancel()
        await send({"type": "http.response.body", "body": b""})

    def events(self, asked: Any) -> Iterator[bytes]:
        words = self.words(asked)
        for index, word in enumerate(["", *words]):
            delta = {"role": "assistant", "content": ""} if index == 0 else {"content": word}
            end = "stop" if index == len(words) else None
            choice = {"index": 0, "delta": delta, "finish_reason": end}
            if index:
                choice["logprobs"] = self.rows(asked, word, index == 1)
            chunk = {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]}
            yield b"data: " + json.dumps(chunk).encode() + b"\n\n"
        yield b"data: [DONE]\n\n"

    async def _watch(self, got: Got, receive: Any) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        got.gone = True


@contextmanager
def engine(**how: Any) -> Iterator[Engine]:
    """An engine that listens; it is cut off at the end."""
    found = Engine(**how)
    config = uvicorn.Config(found, port=0, log_level="critical", lifespan="off", ws="none", timeout_keep_alive=5)
    server = uvicorn.Server(config)
    ready = threading.Event()

    async def startup(sockets: Any = None) -> None:
        await uvicorn.Server.startup(server, sockets)
        found.port = int(server.servers[0].sockets[0].getsockname()[1])
        ready.set()

    server.startup = startup  # type: ignore[method-assign]
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    assert ready.wait(MOST_S)
    try:
        yield found
    finally:
        server.should_exit = server.force_exit = True
        thread.join(MOST_S)
        assert not thread.is_alive()
