"""The official client, unmodified, against a real server on the reference model."""

import json
import re
import socket
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI
from server import asking, client_of, data_url, image, mp4, png, serving, text
from waits import MOST_S, joined, until

from adaptive_fusion.policy.escalation import ANY, Escalation, Threshold
from adaptive_fusion.policy.policy import LANES, Policy
from adaptive_fusion.policy.rungs import Rung
from adaptive_fusion.runner import AdaptiveRunner
from adaptive_fusion.serving import connection as connection_module
from adaptive_fusion.serving import http
from adaptive_fusion.serving.access_log import AccessLog
from adaptive_fusion.serving.connection import MAX_HEAD
from adaptive_fusion.serving.run import DrainingServer
from adaptive_fusion.serving.service import PREPARERS

MODEL = "reference"
KEY = "k-123"
JSON = {"content-type": "application/json"}
get, post = partial(httpx.get, timeout=MOST_S), partial(httpx.post, timeout=MOST_S)


@pytest.fixture(scope="module")
def log_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("serve") / "log.jsonl"


@pytest.fixture(scope="module")
def runner(reference_model: Any, processor: Any, log_file: Path) -> AdaptiveRunner:
    return AdaptiveRunner(reference_model, processor, policy="reference-balanced", log=log_file)


@pytest.fixture(scope="module")
def server(runner: AdaptiveRunner) -> Iterator[DrainingServer]:
    with serving(runner, api_key=f"{KEY}\n", max_new_tokens=8) as found:
        yield found


@pytest.fixture(scope="module")
def client(server: DrainingServer) -> OpenAI:
    return client_of(server, KEY)


def ask(client: OpenAI, messages: Any, **options: Any) -> Any:
    return client.chat.completions.create(model=MODEL, messages=messages, **{"max_tokens": 4, **options})


def test_an_image_is_answered_as_the_runner_does(client: OpenAI, runner: AdaptiveRunner) -> None:
    raw = client.chat.completions.with_raw_response.create(
        model=MODEL, messages=asking(image(), text("Describe the image.")), max_tokens=6, extra_body={"flavour": 1}
    )
    reply = raw.parse()
    own = runner.chat(png(64, 48), "Describe the image.", max_new_tokens=6)
    choice, fusion = reply.choices[0], reply.model_extra["adaptive_fusion"]
    assert (choice.message.content, choice.finish_reason) == (own.text, own.finish_reason)
    assert choice.logprobs is None and reply.object == "chat.completion" and reply.model == MODEL
    took = own.measurement
    assert reply.usage.prompt_tokens == took.prompt_tokens and reply.usage.completion_tokens == took.new_tokens
    assert reply.usage.prompt_tokens_details.image_tokens == took.visual_tokens
    assert fusion["plan"] == own.decision.point.name and fusion["policy"] == "reference-balanced"
    tokens = fusion["tokens"]
    assert tokens["visual_saved"] == tokens["visual_native"] - tokens["visual_used"] >= 0
    assert fusion["ignored"] == ["flavour"] and fusion["escalated"] is False
    assert fusion["actual"]["latency_ms"] >= fusion["actual"]["ttft_ms"] > 0
    headers = raw.headers
    assert reply.id == f"chatcmpl-{headers['x-request-id']}" == f"chatcmpl-{fusion['request_id']}"
    assert headers["x-adaptive-fusion-plan"] == fusion["plan"] and headers["x-adaptive-fusion-escalated"] == "false"
    assert float(headers["x-adaptive-fusion-latency-ms"]) == pytest.approx(fusion["actual"]["latency_ms"], abs=0.1)
    assert float(headers["x-adaptive-fusion-predicted-latency-ms"]) > 0


CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "text": [{"role": "user", "content": "hi"}],
    "system": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}],
    "developer": [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "hi"}],
    "images": asking(text("first"), image(), text("second"), image(80, 40), image(40, 80), text("Which is red?")),
    "video": asking({"type": "video_url", "video_url": {"url": data_url(mp4(6), "video/mp4")}}, text("What moves?")),
    "turns": [
        *asking(image(), text("What is it?")),
        {"role": "assistant", "content": "red"},
        *asking(image(48, 48), text("And this?")),
    ],
    "answered": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}],
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_a_stream_says_what_the_whole_answer_says(client: OpenAI, name: str) -> None:
    whole = ask(client, CONVERSATIONS[name])
    chunks = list(ask(client, CONVERSATIONS[name], stream=True, stream_options={"include_usage": True}))
    said = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert said.strip() == whole.choices[0].message.content.strip()
    assert chunks[0].choices[0].delta.role == "assistant" and {c.id for c in chunks} == {chunks[0].id}
    assert [c.choices[0].finish_reason for c in chunks[:-1]][-1] == whole.choices[0].finish_reason
    assert chunks[-1].usage == whole.usage and all(c.usage is None for c in chunks[:-1])
    for last in chunks[-2:]:
        assert last.model_extra["adaptive_fusion"]["actual"]["latency_ms"] > 0


def test_a_stream_ends_with_done_and_its_headers_have_the_plan(server: DrainingServer) -> None:
    body = {"model": MODEL, "messages": asking(image(), text("?")), "stream": True, "max_tokens": 2}
    url, auth = f"http://127.0.0.1:{server.port}/v1/chat/completions", {"authorization": f"bearer {KEY}"}
    with httpx.stream("POST", url, json=body, headers=auth, timeout=MOST_S) as response:
        lines = [line for line in response.iter_lines() if line]
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["x-adaptive-fusion-plan"] and "x-adaptive-fusion-latency-ms" not in response.headers
    assert lines[-1] == "data: [DONE]" and all("usage" not in json.loads(line[6:]) for line in lines[:-1])


def test_logprobs_are_those_of_the_tokens_said(client: OpenAI) -> None:
    reply = ask(client, asking(image(), text("?")), logprobs=True, top_logprobs=3)
    rows = reply.choices[0].logprobs.content
    assert "".join(row.token for row in rows).strip() == reply.choices[0].message.content
    for row in rows:
        tops = [top.logprob for top in row.top_logprobs]
        assert len(tops) == 3 and tops == sorted(tops, reverse=True) and tops[0] == row.logprob <= 0
        assert bytes(row.bytes).decode() == row.token
    chunks = list(ask(client, asking(image(), text("?")), logprobs=True, top_logprobs=3, stream=True))
    streamed = [row for c in chunks if c.choices[0].logprobs for row in c.choices[0].logprobs.content]
    assert [row.token for row in streamed] == [row.token for row in rows]


def test_the_answer_ends_before_a_stop_string(client: OpenAI) -> None:
    messages = asking(image(), text("Describe."))
    whole = ask(client, messages, max_tokens=8).choices[0].message.content
    stop = whole.split()[1]
    cut = ask(client, messages, max_tokens=8, stop=[stop])
    assert cut.choices[0].message.content.strip() == whole[: whole.index(stop)].strip()
    assert cut.choices[0].finish_reason == "stop"
    chunks = list(ask(client, messages, max_tokens=8, stop=stop, stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in chunks).strip() == whole[: whole.index(stop)].strip()


def test_the_same_seed_gives_the_same_answer(client: OpenAI) -> None:
    def drawn(seed: int) -> str:
        options = {"temperature": 2.0, "seed": seed, "max_tokens": 8}
        return str(ask(client, asking(image(), text("?")), **options).choices[0].message.content)

    first = [drawn(seed) for seed in range(4)]
    assert first == [drawn(seed) for seed in range(4)] and len(set(first)) > 1
    assert len({ask(client, asking(image(), text("?")), temperature=0).choices[0].message.content for _ in "ab"}) == 1


def test_high_detail_keeps_every_token(client: OpenAI) -> None:
    def saved(detail: str) -> Any:
        messages = asking(image(300, 200, detail=detail), text("?"))
        own = {"adaptive_fusion": {"policy": "reference-latency"}}
        return ask(client, messages, extra_body=own).model_extra["adaptive_fusion"]["tokens"]["visual_saved"]

    assert saved("auto") > 0 == saved("high")
    with pytest.raises(openai.BadRequestError, match="detail is 'medium'"):
        saved("medium")


def test_budget_policy_and_point_of_a_request(client: OpenAI) -> None:
    def fusion(**own: Any) -> Any:
        reply = ask(client, asking(image(200, 160), text("?")), extra_body={"adaptive_fusion": own})
        return reply.model_extra["adaptive_fusion"]

    assert fusion(point="native@0.5")["plan"] == "native@0.5"
    found = fusion(policy="native", latency_ms=60_000)
    assert (found["policy"], found["plan"], found["met"]) == ("native", "native@1", True)
    assert found["budget"] == {"latency_ms": 60_000.0}


REFUSED: dict[str, tuple[dict[str, Any], int, str | None]] = {
    "model": ({"model": "gpt-4o"}, 404, "model"),
    "n": ({"n": 2}, 400, "n"),
    "tools": ({"tools": [{"type": "function", "function": {"name": "f"}}]}, 400, "tools"),
    "own key": ({"extra_body": {"adaptive_fusion": {"latency": 1}}}, 400, "adaptive_fusion.latency"),
    "policy": ({"extra_body": {"adaptive_fusion": {"policy": "/etc"}}}, 400, "adaptive_fusion.policy"),
    "context": ({"messages": [{"role": "user", "content": "word " * 3000}]}, 400, "messages"),
    "answer": ({"max_tokens": 5000}, 400, "messages"),
    "address": (
        {"messages": asking({"type": "image_url", "image_url": {"url": "http://127.0.0.1/x"}})},
        400,
        "messages[0].content[0]",
    ),
    "file": (
        {"messages": asking({"type": "image_url", "image_url": {"url": "/etc/hostname"}})},
        400,
        "messages[0].content[0]",
    ),
    "bytes": (
        {"messages": asking({"type": "image_url", "image_url": {"url": data_url(b"junk")}})},
        400,
        "messages[0].content[0]",
    ),
    "tool answer": ({"messages": [{"role": "tool", "content": "5", "tool_call_id": "x"}]}, 400, "messages"),
    "continue": ({"extra_body": {"continue_final_message": True}}, 400, "continue_final_message"),
    "late": (
        {"extra_body": {"adaptive_fusion": {"latency_ms": 0.01, "on_infeasible": "refuse", "on_deadline": "stop"}}},
        400,
        "adaptive_fusion.latency_ms",
    ),
    "point": ({"extra_body": {"adaptive_fusion": {"point": "native/5%"}}}, 400, "adaptive_fusion.point"),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_answered_has_its_status(client: OpenAI, name: str, stream: bool) -> None:
    options, status, param = REFUSED[name]
    if name == "late":  # an estimate that no request has confirmed refuses nothing
        ask(client, asking(text("hi")), max_tokens=1)
    given = {"model": MODEL, "messages": asking(text("hi")), "max_tokens": 4, "stream": stream, **options}
    with pytest.raises(openai.APIStatusError) as raised:
        client.chat.completions.create(**given)
    error = raised.value
    assert isinstance(error.body, dict)
    if name == "late" and error.status_code == 429:  # where the machine is busy, so short a time passes in the queue
        assert error.body["code"] == "deadline_passed"
        return
    assert error.status_code == status
    assert error.body["param"] == param and error.body["code"] and error.body["type"]
    assert "/etc" not in str(error.body) or name in ("policy", "file")


def test_both_numbers_of_the_context_are_said(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match=r"prompt has about \d{4} tokens.* context is 4096 tokens"):
        ask(client, [{"role": "user", "content": "word " * 3000}])


def test_without_the_key_nothing_is_told(server: DrainingServer) -> None:
    with pytest.raises(openai.AuthenticationError):
        client_of(server, "wrong").models.list()
    base = f"http://127.0.0.1:{server.port}"
    for path in ("/v1/models", "/metrics", "/openapi.json", "/v1/adaptive_fusion/decisions", "/nowhere"):
        assert get(base + path).status_code == 401
    assert get(f"{base}/health").status_code == get(f"{base}/ready").status_code == 200


def test_paths_methods_and_bodies_that_there_are_not(server: DrainingServer) -> None:
    base, auth = f"http://127.0.0.1:{server.port}", {"authorization": f"Bearer {KEY}"}
    chat = f"{base}/v1/chat/completions"
    found = [
        get(f"{base}/v1/nothing", headers=auth),
        get(f"{base}/v1/models/", headers=auth),
        get(f"{base}/v1/models/other", headers=auth),
        get(chat, headers=auth),
        post(chat, headers={**auth, **JSON}, content=b"{"),
        post(chat, headers=auth, json=[]),
        post(chat, headers={**auth, "content-type": "text/plain"}, content=b"{}"),
        post(chat, headers=auth, content=b"{}"),
        post(f"{base}/v1/adaptive_fusion/feedback", headers={**auth, **JSON}, content=b"x" * (2 << 20)),
    ]
    assert [response.status_code for response in found] == [404, 404, 404, 405, 400, 400, 415, 415, 413]
    assert all(response.json()["error"]["message"] for response in found)


def test_the_model_can_be_asked_for_by_its_name(client: OpenAI) -> None:
    assert client.models.retrieve(MODEL) == next(iter(client.models.list()))


def test_a_body_that_does_not_come_is_given_up(server: DrainingServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "BODY_S", 0.01)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {KEY}\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=MOST_S) as connection:
        connection.sendall(f"{head}content-type: application/json\r\ncontent-length: 9\r\n\r\n{{".encode())
        assert connection.recv(4096).startswith(b"HTTP/1.1 408")


def answered(server: DrainingServer, sent: bytes) -> tuple[int, dict[str, Any]]:
    """Status and error of what comes back until the server hangs up."""
    said = b""
    with socket.create_connection(("127.0.0.1", server.port), timeout=MOST_S) as connection:
        connection.sendall(sent)
        while piece := connection.recv(4096):
            said += piece
    head, _, body = said.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]


HALF = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\n"


def test_what_is_no_http_and_heads_without_end_are_answered_like_all_else(
    server: DrainingServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for sent in (
        b"nonsense\r\n\r\n",
        b"\x16\x03\x01\x02\x00",
        HALF + b"broken\r\n\r\n",
        HALF + b"x: " + b"y" * MAX_HEAD,
    ):
        assert (answered(server, sent)[0], answered(server, sent)[1]["code"]) == (400, "invalid_http")
    chunked = f"{HALF.decode()}authorization: Bearer {KEY}\r\ncontent-type: application/json\r\n".encode()
    assert answered(server, chunked + b"transfer-encoding: chunked\r\n\r\nzz\r\n")[1]["code"] == "invalid_http"
    monkeypatch.setattr(connection_module, "HEAD_S", 0.05)
    status, error = answered(server, HALF)
    assert status == 408 and error["code"] == "head_too_slow"
    with socket.create_connection(("127.0.0.1", server.port), timeout=MOST_S) as silent:
        assert silent.recv(4096) == b""
    monkeypatch.setattr(connection_module, "HEAD_S", MOST_S)
    with httpx.Client(timeout=MOST_S) as client:  # a connection that is kept has as long for its next head
        url = f"http://127.0.0.1:{server.port}/health"
        assert [client.get(url).status_code for _ in range(3)] == [200] * 3


def test_more_connections_than_there_may_be_are_told_to_come_back(
    server: DrainingServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    until(lambda: not server.server_state.connections, "the connections of other tests to end")
    monkeypatch.setattr(connection_module, "MAX_CONNECTIONS", 2)
    with ExitStack() as held:
        for _ in range(2):
            held.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=MOST_S))
        until(lambda: len(server.server_state.connections) == 2, "two connections")
        status, error = answered(server, b"")
        assert status == 503 and error["code"] == "too_many_connections"
    until(lambda: not server.server_state.connections, "the connections to end")
    assert get(f"http://127.0.0.1:{server.port}/health").status_code == 200


def test_who_reads_nothing_is_cut_off_and_who_reads_late_gets_all(
    server: DrainingServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    until(lambda: not server.server_state.connections, "the connections of other tests to end")
    asked = 200
    request = f"GET /openapi.json HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {KEY}\r\n".encode()
    requests = (request + b"\r\n") * (asked - 1) + request + b"connection: close\r\n\r\n"

    def deaf() -> socket.socket:
        """A connection whose client wants far more than lies in buffers on the way, and reads nothing."""
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(MOST_S)
        connection.connect(("127.0.0.1", server.port))
        connection.sendall(requests)
        return connection

    def stuck() -> list[Any]:
        return [each for each in server.server_state.connections if each.flow.write_paused]

    with deaf() as late:
        until(lambda: bool(stuck()), "an answer that is not read")
        said = bytearray()
        while piece := late.recv(1 << 20):
            said += piece
        assert said.count(b"HTTP/1.1 200") == asked
    until(lambda: not server.server_state.connections, "the connection to end")
    monkeypatch.setattr(connection_module, "UNREAD_S", 0.05)
    monkeypatch.setattr(connection_module, "UNREAD_RATE", 1 << 30)
    with deaf():
        until(lambda: bool(stuck()), "an answer that is not read")
        until(lambda: not server.server_state.connections, "the connection to be cut off")


def test_decisions_without_answers(client: OpenAI) -> None:
    body = {"model": MODEL, "messages": asking(image(200, 160), text("?")), "adaptive_fusion": {"latency_ms": 9e5}}
    decided: Any = client.post("/adaptive_fusion/decide", body=body, cast_to=object)
    offered: Any = client.post("/adaptive_fusion/points", body=body, cast_to=object)
    assert decided["plan"] == offered["decision"]["plan"] and decided["budget"] == {"latency_ms": 9e5}
    assert [row["plan"] for row in offered["points"] if row["taken"]] == [decided["plan"]]
    qualities = [row["quality"] for row in offered["points"]]
    assert qualities == sorted(qualities, reverse=True) and all(
        r["predicted"]["latency_ms"] > 0 for r in offered["points"]
    )


def test_the_last_decisions_can_be_asked_for_and_rated_once(client: OpenAI, log_file: Path) -> None:
    reply = ask(client, asking(image(), text("a secret question")))
    rows: Any = client.get("/adaptive_fusion/decisions?n=1", cast_to=object)
    assert rows["decisions"][0]["request_id"] == reply.id.removeprefix("chatcmpl-")
    assert "secret" not in json.dumps(rows)

    def rate(request_id: str, rating: Any) -> Any:
        body = {"request_id": request_id, "rating": rating}
        return client.post("/adaptive_fusion/feedback", body=body, cast_to=object)

    assert [rate(reply.id, "up")["recorded"] for _ in range(2)] == [True, False]
    with pytest.raises(openai.NotFoundError, match="not known"):
        rate("chatcmpl-0", "up")
    with pytest.raises(openai.BadRequestError, match="rating is 7"):
        rate(reply.id, 7)
    records = [json.loads(line) for line in log_file.read_text().splitlines()]
    rated = [record for record in records if record.get("event") == "feedback"]
    assert [(row["request_id"], row["rating"]) for row in rated] == [(reply.id.removeprefix("chatcmpl-"), 1.0)]
    assert sum(record["request_id"] == rated[0]["request_id"] for record in records) == 2


def test_metrics_and_log_tell_what_happened_and_nothing_that_was_said(
    server: DrainingServer, client: OpenAI, capsys: pytest.CaptureFixture[str]
) -> None:
    def count(name: str) -> float:
        text = get(f"http://127.0.0.1:{server.port}/metrics", headers={"authorization": f"Bearer {KEY}"}).text
        return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(f"adaptive_fusion:{name}"))

    names = ("requests_total", "request_success_total", "requests_rejected_total", "media_refused_total")
    before = {name: count(name) for name in names}
    server.service.access_log = AccessLog(sys.stderr)  # the stream that is captured now
    reply = ask(client, asking(image(), text("a secret question")))
    list(ask(client, asking(text("a secret question")), stream=True))
    for messages in (asking(text("a secret question")), asking(image(7, 5, detail="secret"))):
        with pytest.raises(openai.BadRequestError):
            ask(client, messages, n=2 if messages[0]["content"][0]["type"] == "text" else 1)
    with pytest.raises(openai.BadRequestError):
        ask(client, asking({"type": "image_url", "image_url": {"url": "https://secret.example/a.png"}}))
    assert {name: count(name) - before[name] for name in names} == dict(zip(names, (5, 2, 3, 1), strict=True))
    said = capsys.readouterr().err
    rows = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    assert "secret" not in said and "base64" not in said
    assert [row["status"] for row in rows if row["event"] == "request"] == [200, 200, 400, 400, 400]
    told = [row for row in rows if row["event"] == "answer"]
    assert told[0]["request_id"] == reply.id.removeprefix("chatcmpl-") and [r["stream"] for r in told] == [False, True]


def test_a_client_that_goes_away_frees_the_model(
    server: DrainingServer, client: OpenAI, runner: AdaptiveRunner
) -> None:
    with runner.exclusive():  # nobody is answered meanwhile
        with pytest.raises(openai.APITimeoutError):
            ask(client, asking(text("hi")), timeout=0.3)
        with pytest.raises(openai.APITimeoutError):
            ask(client, asking(text("hi")), timeout=0.3)
        late = {"adaptive_fusion": {"latency_ms": 100}}
        with pytest.raises(openai.RateLimitError, match="deadline"):
            ask(client, asking(text("hi")), extra_body=late)
    assert ask(client, asking(text("hi"))).choices[0].finish_reason
    stream = ask(client, asking(text("hi")), stream=True, max_tokens=2000)
    next(iter(stream))
    stream.close()
    assert ask(client, asking(text("hi"))).choices[0].finish_reason
    assert server.service.scheduler.admitted == 0


def test_audit_runs_natively_and_says_what_would_have_been(
    reference_model: Any, processor: Any, tmp_path: Path
) -> None:
    log = tmp_path / "audit.jsonl"
    runner = AdaptiveRunner(reference_model, processor, policy="reference-latency", log=log)
    with serving(runner, mode="audit") as server:
        fusion = ask(client_of(server), asking(image(300, 200), text("?"))).model_extra["adaptive_fusion"]
    row = json.loads(log.read_text().splitlines()[0])
    assert fusion["plan"] == "native@1" and row["point"]["fusion"] == "native"
    assert fusion["audit"] == row["audit"] and row["audit"]["rung"] != "native@1"
    assert row["audit"]["saved"]["tokens"] > 0 and row["audit"]["saved"]["latency_ms"] > 0


def test_what_was_learned_is_kept_over_a_restart(reference_model: Any, processor: Any, tmp_path: Path) -> None:
    state = tmp_path / "state.json"

    def fresh() -> AdaptiveRunner:
        return AdaptiveRunner(reference_model, processor, policy="reference-balanced")

    first, second, third = fresh(), fresh(), fresh()
    with serving(first, state=state) as server:
        ask(client_of(server), asking(image(), text("?")))
    with serving(second, state=state):
        assert second.state() == first.state() and second.controller.informed
    values = json.loads(state.read_text())
    values["profile"]["decode"][0] += 1
    state.write_text(json.dumps(values))
    with serving(third, state=state) as server:
        assert not third.controller.informed
        assert "another model" in server.service.state.restore()


def test_who_was_admitted_is_answered_at_the_end(reference_model: Any, processor: Any) -> None:
    runner = AdaptiveRunner(reference_model, processor, policy="reference-balanced")
    answers: list[str] = []
    with serving(runner) as server:
        client = client_of(server)

        def request() -> None:
            chunks = ask(client, asking(text("hi")), stream=True)
            answers.append("".join(chunk.choices[0].finish_reason or "" for chunk in chunks))

        with runner.exclusive():
            threads = [threading.Thread(target=request) for _ in range(3)]
            for thread in threads:
                thread.start()
            until(lambda: server.service.scheduler.admitted == 3, "three requests that are admitted")
            assert server.loop is not None
            server.loop.call_soon_threadsafe(server.stop)
            until(lambda: server.service.scheduler.draining, "the server to drain")
            with pytest.raises(openai.InternalServerError, match="shutting down"):
                ask(client, asking(text("hi")))
        joined(threads)
    assert answers == ["stop" if answer == "stop" else "length" for answer in answers] and len(answers) == 3


def test_who_is_not_answered_in_time_is_cut_off_at_the_end(reference_model: Any, processor: Any) -> None:
    runner = AdaptiveRunner(reference_model, processor, policy="native")
    asked = {"max_tokens": 900, "extra_body": {"ignore_eos": True, "repetition_penalty": 1.01}}  # alone
    with serving(runner, drain_s=0.01) as server, ThreadPoolExecutor(1) as pool:
        client = client_of(server)
        stream = ask(client, asking(text("hi")), stream=True, **asked)
        chunks = [next(iter(stream))]
        waiting = pool.submit(ask, client, asking(text("hi")), **asked)
        until(lambda: server.service.scheduler.admitted == 2, "one that waits for the model")
        assert server.loop is not None
        server.loop.call_soon_threadsafe(server.stop)
        chunks += list(stream)
        with pytest.raises(openai.InternalServerError) as refused:
            waiting.result(MOST_S)
    assert refused.value.status_code == 503 and refused.value.code == "draining"
    last = chunks[-1]
    assert (
        last.choices[0].finish_reason == "length"
        and last.model_extra["adaptive_fusion"]["finish_reason"] == "cancelled"
    )
    assert 1 < len(chunks) < 900 and last.model_extra["adaptive_fusion"]["tokens"]["new"] < 900


def test_what_expires_while_it_waits_to_be_made_ready_is_refused(reference_model: Any, processor: Any) -> None:
    """The model is free all the time; the threads that decode and measure are not."""
    runner = AdaptiveRunner(reference_model, processor, policy="reference-balanced")
    with serving(runner) as server, ThreadPoolExecutor(2) as clients:
        client, go_on, scheduler = client_of(server), threading.Event(), server.service.scheduler
        try:
            for _ in range(PREPARERS):
                server.service._pool.submit(go_on.wait, MOST_S)
            first = clients.submit(ask, client, asking(text("hi")))
            until(lambda: scheduler.admitted == 1, "the first request")
            own = {"adaptive_fusion": {"latency_ms": 1}}
            second = clients.submit(ask, client, asking(text("hi")), extra_body=own)
            until(lambda: scheduler.admitted == 2, "the second request")
            until(lambda: server.service._pool._work_queue.qsize() == 2, "both waiting for a thread")
            late = runner.clock() + 0.001
            until(lambda: runner.clock() > late, "its deadline")
        finally:
            go_on.set()
        assert first.result(MOST_S).choices[0].finish_reason
        with pytest.raises(openai.RateLimitError, match="deadline passed"):
            second.result(MOST_S)
        # Nobody before it: what becomes of a deadline that cannot be kept is the budget's business.
        assert ask(client, asking(text("hi")), extra_body=own).model_extra["adaptive_fusion"]["met"] is False


def test_a_web_page_cannot_have_its_name_point_here(reference_model: Any, processor: Any) -> None:
    runner = AdaptiveRunner(reference_model, processor, policy="native")
    with serving(runner) as server:
        url = f"http://127.0.0.1:{server.port}/v1/models"
        assert get(url).status_code == 200
        assert get(url, headers={"host": f"localhost:{server.port}"}).status_code == 200
        assert get(url, headers={"host": "127.0.0.2"}).status_code == 200
        assert get(url, headers={"host": "evil.example"}).status_code == 403
        assert get(url, headers={"host": "127.0.0.1.evil.example"}).status_code == 403


def test_the_example_of_the_docs_runs(reference_model: Any, processor: Any, capsys: pytest.CaptureFixture[str]) -> None:
    docs = Path(__file__).parents[2] / "docs" / "serving.md"
    (snippet,) = re.findall(r"```python\n(.*?)```", docs.read_text(encoding="utf-8"), re.DOTALL)
    runner = AdaptiveRunner(reference_model, processor, policy="reference-balanced")
    with serving(runner) as server:
        exec(compile(snippet.replace(":8000/", f":{server.port}/"), str(docs), "exec"), {})
    assert "visual_saved" in capsys.readouterr().out


def test_a_second_pass_is_said_wherever_it_is_told(
    reference_model: Any, processor: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    """In the answer, its header, a stream's last chunk, the metric and the server's log."""
    rung = replace(Rung.parse("weighted6r4@0.5/25%"), quality=0.5)
    policy = replace(
        Policy.load("reference-balanced"),
        lanes=dict.fromkeys(LANES, (rung,)),
        escalation=Escalation(thresholds={ANY: {ANY: Threshold(0.0)}}),
    )
    runner = AdaptiveRunner(reference_model, processor, policy=policy)
    messages = asking(image(), text("Describe the image."))
    with serving(runner, max_new_tokens=4) as server:
        asked = client_of(server)
        raw = asked.chat.completions.with_raw_response.create(model=MODEL, messages=messages)
        said = raw.parse().model_extra["adaptive_fusion"]
        *_, last = asked.chat.completions.create(model=MODEL, messages=messages, stream=True)
        told = get(f"http://127.0.0.1:{server.port}/metrics").text
    assert said["escalated"] is True and said["escalation"]["first_rung"] == rung.name and said["plan"] == "native@1"
    assert raw.headers["x-adaptive-fusion-escalated"] == "true"
    assert last.model_extra["adaptive_fusion"]["escalated"] is True
    assert "adaptive_fusion:escalations_total 2.0" in told
    answers = [json.loads(line) for line in capfd.readouterr().err.splitlines() if '"event": "answer"' in line]
    assert [line["escalated"] for line in answers] == [True, True]
