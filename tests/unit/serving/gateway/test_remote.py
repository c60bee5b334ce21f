"""A model behind an address, asked from Python, against an engine of this test's own that says what it was sent."""

import base64
import io
import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from pictures import encoded, opened, scene
from typer.testing import CliRunner

from adaptive_fusion.cli import app
from adaptive_fusion.decision_log import DecisionLog
from adaptive_fusion.errors import ConfigError, MediaError, UnsupportedModelError
from adaptive_fusion.point import OperatingPoint
from adaptive_fusion.policy.escalation import Escalation, Threshold
from adaptive_fusion.policy.policy import Policy
from adaptive_fusion.runner import AdaptiveRunner
from adaptive_fusion.serving.gateway.probe import examine_upstream
from adaptive_fusion.serving.gateway.remote import Remote, UpstreamError

SURE = [{"token": "A", "logprob": -1e-6, "top_logprobs": [{"token": "A", "logprob": -1e-6}]}]
UNSURE = [{"token": "A", "logprob": -1.1, "top_logprobs": [{"token": t, "logprob": -1.1} for t in "ABC"]}]


class Engine(ThreadingHTTPServer):
    """Answers with the size of the first image that it sees; unsure below `trusted` pixels."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.bodies: list[dict[str, Any]] = []
        self.trusted, self.cut, self.status = 0, False, 200


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None: ...

    def do_POST(self) -> None:
        engine: Any = self.server
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        engine.bodies.append({**body, "authorization": self.headers.get("authorization")})
        if engine.status != 200:
            return self._send(b"no such model", "text/plain", engine.status)
        size = (sizes(body) or [(0, 0)])[0]
        if body.get("stream"):
            words = [f"{size[0]}", "x", f"{size[1]}"]
            events = [{"choices": [{"delta": {"content": word}}]} for word in words]
            if not engine.cut:
                events.append({"choices": [{"delta": {}, "finish_reason": "stop"}]})
                events.append({"choices": [], "usage": {"prompt_tokens": 70, "completion_tokens": 3}})
            return self._send(b"".join(b"data: %s\n\n" % json.dumps(e).encode() for e in events), "text/event-stream")
        choice: dict[str, Any] = {"message": {"content": f"{size[0]}x{size[1]}"}, "finish_reason": "stop"}
        if body.get("logprobs"):
            sure = size[0] * size[1] >= engine.trusted
            choice["logprobs"] = {"content": SURE if sure else UNSURE}
        details = {"image_tokens": 55}
        usage = {"prompt_tokens": 70, "completion_tokens": 3, "prompt_tokens_details": details}
        self._send(json.dumps({"choices": [choice], "usage": usage}).encode(), "application/json")

    def _send(self, data: bytes, kind: str, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def sizes(body: dict[str, Any]) -> list[tuple[int, int]]:
    parts = [p for m in body["messages"] if isinstance(m["content"], list) for p in m["content"]]
    urls = [p["image_url"]["url"] for p in parts if p["type"] == "image_url"]
    return [opened(base64.b64decode(url.partition(",")[2])).size for url in urls]


@pytest.fixture
def engine() -> Iterator[Engine]:
    server = Engine()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def remote(server: Engine, **options: Any) -> Remote:
    url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    return AdaptiveRunner.remote(url, "m", **{"processor": "qwen3-vl", "engine": "transformers", **options})


PICTURE = encoded(scene(2400, 1800), "JPEG", quality=85)


def test_a_plan_is_applied_to_what_is_sent_and_logged(engine: Engine, tmp_path: Path) -> None:
    log = DecisionLog(tmp_path / "log.jsonl")
    with remote(engine, policy="reference-latency", log=log, key="secret") as runner:
        decided = runner.decide(PICTURE, "What is shown?", max_new_tokens=8)
        reply = runner.chat(PICTURE, "What is shown?", max_new_tokens=8, temperature=0)
        body = engine.bodies[-1]
        assert (body["max_tokens"], body["temperature"], body["authorization"]) == (8, 0, "Bearer secret")
        assert reply.decision.point == decided.point and decided.point.max_pixels is not None
        assert sizes(body) == [runner.grid.size(2400, 1800, reply.decision.point.max_pixels)]
        assert reply.text == "x".join(map(str, sizes(body)[0])) and reply.finish_reason == "stop"
        assert reply.measurement.prompt_tokens == 70 and reply.measurement.new_tokens == 3
        assert reply.measurement.latency_ms > 0
    record = json.loads((tmp_path / "log.jsonl").read_text())
    assert record["request_id"] == reply.decision.request_id and record["rung"] == reply.decision.rung


def test_at_native_every_form_of_a_medium_arrives_as_it_was(engine: Engine, tmp_path: Path) -> None:
    path = tmp_path / "picture.jpg"
    path.write_bytes(PICTURE)
    data_url = "data:image/jpeg;base64," + base64.b64encode(PICTURE).decode()
    with remote(engine, policy="latency") as runner:
        for source in (path, str(path), PICTURE, data_url):
            runner.chat(source, "?", point=OperatingPoint())
            url = engine.bodies[-1]["messages"][0]["content"][0]["image_url"]["url"]
            assert base64.b64decode(url.partition(",")[2]) == PICTURE
        runner.chat(scene(64, 48), "?", point=OperatingPoint())
        assert sizes(engine.bodies[-1]) == [(64, 48)]
        messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": [{"type": "image",
                    "image": PICTURE, "detail": "high"}, {"type": "text", "text": "?"}]}]  # fmt: skip
        runner.chat(messages)
        sent = engine.bodies[-1]["messages"]
        assert sent[0]["content"] == "Be short." and sent[1]["content"][0]["image_url"]["detail"] == "high"


def test_a_stream_gives_pieces_and_then_the_reply(engine: Engine) -> None:
    with remote(engine, policy="latency", engine="vllm") as runner:
        stream = runner.stream(PICTURE, "What is shown?")
        assert "".join(stream) == stream.reply.text and "x" in stream.reply.text
        assert engine.bodies[-1]["stream_options"] == {"include_usage": True}
        assert 0 < stream.reply.measurement.ttft_ms <= stream.reply.measurement.latency_ms
        assert stream.reply.measurement.prompt_tokens == 70
        assert "logprobs" not in engine.bodies[-1], "what a stream begins with stands"
        engine.cut = True
        with pytest.raises(UpstreamError, match="middle"):
            list(runner.stream(PICTURE, "What is shown?"))


@pytest.mark.parametrize("trusted, escalated", [(0, False), (1 << 30, True)])
def test_the_better_plan_runs_where_the_engine_is_not_sure(engine: Engine, trusted: int, escalated: bool) -> None:
    engine.trusted = trusted
    learned = Threshold(0.1, auc=0.9, rows=50, loss=0.3, left=0.0, share=0.3)
    policy = replace(Policy.load("reference-latency"), escalation=Escalation(thresholds={"*": {"*": learned}}))
    with remote(engine, engine="openai", policy=policy) as runner:
        reply = runner.chat(PICTURE, "What is shown?")
    assert reply.decision.escalated is escalated and reply.measurement.visual_tokens == 55
    if escalated:
        first, second = (sizes(body)[0] for body in engine.bodies[-2:])
        assert first[0] * first[1] < second[0] * second[1] and "logprobs" not in engine.bodies[-1]
        assert reply.text == f"{second[0]}x{second[1]}" and "went on" in reply.decision.reason


def test_what_cannot_be_is_said_in_words(engine: Engine) -> None:
    with remote(engine) as runner:
        engine.status = 404
        with pytest.raises(UpstreamError, match="404: no such model"):
            runner.chat(PICTURE, "?")
        with pytest.raises(UnsupportedModelError, match="downsample"):
            runner.chat(PICTURE, "?", point=OperatingPoint(downsample=0.5))
        with pytest.raises(ConfigError, match="max_pixels"):
            runner.chat([{"role": "user", "content": [{"type": "image", "image": PICTURE, "max_pixels": 5000}]}])
        with pytest.raises(MediaError):
            runner.chat(b"no picture", "?")
        with pytest.raises(ConfigError, match="no JSON"):
            runner.chat(PICTURE, "?", stop=io.BytesIO())
    gone = AdaptiveRunner.remote("http://127.0.0.1:9", "m", processor="reference")
    with pytest.raises(UpstreamError, match="reached"):
        gone.chat(PICTURE, "?")


def test_doctor_finds_out_what_the_engine_takes(engine: Engine) -> None:
    url = f"http://127.0.0.1:{engine.server_address[1]}"
    found = {each.name: each for each in examine_upstream(url, model="m", processor="qwen3-vl")}
    assert found["chat"].status == found["logprobs"].status == found["stream_options"].status == "ok"
    assert found["images"].status == "note", "this engine counts 70 tokens whatever it sees"
    assert (
        found["processor"].status == "broken" and "differ by 0 tokens, by --processor 192" in found["processor"].found
    )
    assert "counted apart: 55" in found["image tokens"].found and "without [DONE]" in found["stream"].found
    engine.status = 422
    (models, chat) = examine_upstream(url, model="m")
    assert models.status == "note" and chat.status == "broken" and "422: no such model" in chat.found


def test_labels_compare_texts_with_the_full_answer(engine: Engine, tmp_path: Path) -> None:
    picture, out = tmp_path / "a.jpg", tmp_path / "labels.jsonl"
    picture.write_bytes(PICTURE)
    url = f"http://127.0.0.1:{engine.server_address[1]}"
    said = ["label", str(picture), "--out", str(out), "--upstream", url, "--model", "m", "--engine", "vllm"]
    done = CliRunner().invoke(app, [*said, "--points", "native@1/25%", "--points", "native@1/50%", "--json"])
    assert done.exit_code == 0, done.output
    (label,) = map(json.loads, out.read_text().splitlines())
    assert set(label["quality"]) == {"native@1", "native@1/25%", "native@1/50%"}
    assert label["quality"]["native@1"] == label["reference_quality"] == 1.0
    assert label["quality"]["native@1/25%"] < 1, "this engine says the size that it sees"
    assert label["measurement"]["native@1/25%"]["visual_tokens"] < label["measurement"]["native@1"]["visual_tokens"]
    whole, *_ = sorted((sizes(body)[0] for body in engine.bodies), reverse=True)
    assert whole == (2400, 1800) and all(body["temperature"] == 0 for body in engine.bodies)
