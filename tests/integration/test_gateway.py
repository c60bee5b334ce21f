"""A gateway before a small engine: what reaches the engine, what comes back, and what is said when one of them ends."""

import asyncio
import io
import json
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from gateway import client_of, gateway, inside, url_of
from openai import APIError
from PIL import Image
from server import asking, data_url, image, mp4, text
from serving.test_fetcher import HOSTILE
from upstream import Engine, engine
from waits import MOST_S, until

from adaptive_fusion.decision_log import text_hash
from adaptive_fusion.media.clips import Video
from adaptive_fusion.media.inline import data_url_bytes
from adaptive_fusion.media.load import load_media
from adaptive_fusion.media.pixels import Limits
from adaptive_fusion.point import NATIVE
from adaptive_fusion.policy.escalation import ANY, Escalation, Threshold
from adaptive_fusion.policy.policy import LANES, Policy
from adaptive_fusion.policy.router import constant_router
from adaptive_fusion.policy.rungs import Rung
from adaptive_fusion.serving.run import DrainingServer


def photo(width: int, height: int, form: str = "JPEG") -> bytes:
    """Large shapes of plain colours, others for each size: what few pixels are enough for."""
    rng = np.random.default_rng(width)
    picture = Image.new("RGB", (width, height), (240, 240, 240))
    for colour in rng.integers(0, 200, (3, 3)).tolist():
        left, top = int(rng.integers(0, width // 2)), int(rng.integers(0, height // 2))
        picture.paste(tuple(colour), (left, top, left + width // 3, top + height // 3))
    buffer = io.BytesIO()
    picture.save(buffer, form)
    return buffer.getvalue()


def shown(data: bytes, kind: str = "image/jpeg") -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_url(data, kind)}}


def sent_images(body: Any) -> list[bytes]:
    """Encoded images of a request, in order."""
    parts = [
        part for message in body["messages"] if isinstance(message["content"], list) for part in message["content"]
    ]
    return [data_url_bytes(part["image_url"]["url"]) for part in parts if part["type"] == "image_url"]


def post(server: DrainingServer, body: Any, **options: Any) -> httpx.Response:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"content-type": "application/json", **options.pop("headers", {})}
    return httpx.post(url_of(server), content=data, headers=headers, timeout=MOST_S, **options)


@pytest.fixture(scope="module")
def before() -> Iterator[tuple[DrainingServer, Engine]]:
    with engine() as behind, gateway(behind.url) as server:
        yield server, behind


def test_with_the_plan_native_bytes_and_chunks_pass_as_they_are() -> None:
    body = b'{ "messages":[{"role":"user","content":[{"image_url":{"url":"data:image\\/png;base64,iVBO\\u002bRw0="},'
    body += b'"type":"image_url"},{"type":"text","text":"\\u00e9\xc3\xa9?"}]}],"x":1e2,"x":1E+2, "stream":true }\n'
    with engine() as behind, gateway(behind.url, "native") as server:
        direct = httpx.post(f"{behind.url}/v1/chat/completions", content=body, timeout=MOST_S)
        passed = post(server, body, headers={"authorization": "Bearer k", "x-mine": "1", "te": "trailers"})
        got = behind.got[-1]
    assert got.body == body and passed.content == direct.content
    assert got.header("authorization") == "Bearer k" and got.header("x-mine") == "1" and got.header("te") is None
    assert passed.headers["x-engine"] == "yes" and "takes nothing away" in passed.headers["x-adaptive-fusion-media"]
    assert passed.headers["content-type"] == direct.headers["content-type"]


def test_an_image_is_sent_no_larger_than_its_question_needs(before: tuple[DrainingServer, Engine]) -> None:
    server, behind = before
    parts = [shown(photo(1600, 1200)), text("Describe it."), {"type": "text", "text": "What colour is it?"}]
    body = {"model": "m", "messages": asking(*parts), "max_tokens": 5, "seed": 3, "unknown": {"a": [1, None]}}
    answer = post(server, body)
    assert answer.status_code == 200 and answer.headers["x-adaptive-fusion-plan"] != "native@1"
    got = behind.got[-1].json
    (small,) = sent_images(got)
    picture = Image.open(io.BytesIO(small))
    assert picture.format == "JPEG" and picture.width * picture.height < 0.8 * 1600 * 1200
    patches = (picture.width // 32) * (picture.height // 32)
    assert answer.headers["x-adaptive-fusion-visual-tokens"] == str(patches)
    got["messages"][0]["content"][0] = parts[0]
    assert got == body
    # The same plan is the same bytes.
    post(server, body)
    assert sent_images(behind.got[-1].json) == [small]


def test_a_clip_is_sent_with_fewer_frames_at_their_own_times(before: tuple[DrainingServer, Engine]) -> None:
    server, behind = before
    every = Limits(video_fps=1000, max_frames=64, min_frames=2)
    data = mp4(12)
    whole = load_media(data, limits=every)
    part = {"type": "video_url", "video_url": {"url": data_url(data, "video/mp4")}}
    body = {"model": "m", "messages": asking(part, text("What happens?"))}
    for point, same in (("native", True), ("native/1fps", False)):
        answer = post(server, {**body, "adaptive_fusion": {"point": point}})
        sent = behind.got[-1].json["messages"][0]["content"][0]["video_url"]["url"]
        assert answer.status_code == 200 and (sent == part["video_url"]["url"]) is same
    assert sent.startswith("data:video/mp4;base64,")
    small = load_media(data_url_bytes(sent), limits=every)
    assert isinstance(whole, Video) and isinstance(small, Video) and 2 <= len(small.frames) < len(whole.frames)
    assert small.duration_s == pytest.approx(whole.duration_s, abs=0.01)
    times = [min(whole.timestamps_s, key=lambda t: abs(t - shown_s)) for shown_s in small.timestamps_s]
    assert list(small.timestamps_s) == pytest.approx(times, abs=1e-3)
    assert "1fps" in answer.headers["x-adaptive-fusion-media"]


def test_own_fields_are_read_and_do_not_reach_the_engine(before: tuple[DrainingServer, Engine]) -> None:
    server, behind = before
    data = photo(1600, 1200, "PNG")
    for point, same in (("native", True), ("native/262144px", False)):
        body = {"adaptive_fusion": {"point": point}, "messages": asking(shown(data, "image/png")), "model": "m"}
        answer = post(server, body)
        got = behind.got[-1].json
        assert list(got) == ["messages", "model"] and answer.headers["x-adaptive-fusion-lane"] == "fixed"
        assert (sent_images(got) == [data]) is same
    wrong = post(server, {**body, "adaptive_fusion": {"ponit": 1}})
    assert wrong.status_code == 400 and "ponit" in wrong.json()["error"]["message"]
    cannot = post(server, {**body, "adaptive_fusion": {"point": "weighted@0.5"}})
    assert cannot.status_code == 400 and "pixels and frames" in cannot.json()["error"]["message"]


def test_images_by_address_and_sized_by_the_client_pass_and_it_is_said(before: tuple[DrainingServer, Engine]) -> None:
    server, behind = before
    address = {"type": "image_url", "image_url": {"url": "http://169.254.169.254/latest/meta-data"}}
    body = {"model": "m", "messages": asking(address, shown(photo(1600, 1200)), text("What is it?"))}
    answer = post(server, body)
    assert behind.got[-1].json["messages"][0]["content"][0] == address
    assert "sent by address" in answer.headers["x-adaptive-fusion-reason"]
    assert answer.headers["x-adaptive-fusion-media"].startswith("sent by address, ")
    kept = {**body, "mm_processor_kwargs": {"max_pixels": 100_000}}
    answer = post(server, json.dumps(kept).encode())
    assert behind.got[-1].json == kept and "mm_processor_kwargs" in answer.headers["x-adaptive-fusion-reason"]


def test_errors_and_other_paths_are_the_engines_own() -> None:
    with engine(status=418) as behind, gateway(behind.url) as server:
        direct = httpx.post(f"{behind.url}/v1/chat/completions", content=b"{}", timeout=MOST_S)
        passed = post(server, b"{}")
        assert (passed.status_code, passed.content) == (direct.status_code, direct.content)
        for bad in (b"", b"{", b"\xff", b"[1]", b'"x"', b"{}{}"):
            assert post(server, bad).status_code == 418 and behind.got[-1].body == bad
        other = httpx.put(url_of(server, "/some/path%2Fx?a=1&b=%20"), content=b"raw\0bytes", timeout=MOST_S)
        got = behind.got[-1]
        assert other.status_code == 418 and got.body == b"raw\0bytes" and got.query == b"a=1&b=%20"
        assert got.method == "PUT" and got.path == "/some/path/x"
        assert httpx.get(url_of(server, "/v1/models"), timeout=MOST_S).status_code == 418
        assert httpx.get(url_of(server, "/health"), timeout=MOST_S).json() == {"status": "ok"}
        assert httpx.get(url_of(server, "/ready"), timeout=MOST_S).status_code == 200
    with engine() as behind, gateway(behind.url, max_body_mib=1) as server:
        assert post(server, b"x" * (1 << 20) + b"x").status_code == 413 and not behind.got


def test_a_dead_engine_is_an_error_and_never_a_silent_end() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with gateway(nobody) as server:
            answer = post(server, {"model": "m", "messages": asking(text("?"))})
            assert answer.status_code == 502 and answer.json()["error"]["code"] == "upstream_unreachable"
            assert httpx.get(url_of(server, "/ready"), timeout=MOST_S).status_code == 502
    with engine(dies_at=2) as behind, gateway(behind.url) as server:
        answer = post(server, {"model": "m", "stream": True, "messages": asking(text("?"))})
        events = [event for event in answer.text.split("\n\n") if event]
        assert len(events) == 3 and json.loads(events[-1][6:])["error"]["code"] == "upstream_failed"
        with pytest.raises(APIError):
            list(client_of(server).chat.completions.create(model="m", messages=asking(text("?")), stream=True))
        with pytest.raises(httpx.RemoteProtocolError):
            post(server, {"model": "m", "messages": asking(text("?"))})
        assert inside(server).deciding.controller.state()["counts"]["updates"] == 0


def test_of_an_event_under_way_when_the_engine_dies_nothing_comes() -> None:
    with engine(dies_at=2, dies_with=40) as behind, gateway(behind.url, "native") as server:
        answer = post(server, {"model": "m", "stream": True, "messages": asking(text("?"))})
        events = [json.loads(event[6:]) for event in answer.text.split("\n\n") if event]
        assert [set(event) & {"choices", "error"} for event in events] == [{"choices"}, {"choices"}, {"error"}]


def test_an_engine_that_says_nothing_is_given_up() -> None:
    async def never(index: int) -> None:
        await asyncio.sleep(MOST_S)

    with engine(before=never) as behind, gateway(behind.url, timeout_s=0.3) as server:
        answer = post(server, {"model": "m", "stream": True, "messages": asking(text("?"))})
        assert "upstream_failed" in answer.text  # the head had come


def test_a_client_that_goes_away_ends_its_request_upstream() -> None:
    async def slowly(index: int) -> None:
        await asyncio.sleep(0.02)

    with engine(before=slowly, words=lambda body: ["w"] * 10_000) as behind, gateway(behind.url) as server:
        body = {"model": "m", "stream": True, "messages": asking(text("?"))}
        with httpx.stream("POST", url_of(server), json=body, timeout=MOST_S) as answer:
            next(answer.iter_raw())
        until(lambda: behind.got[-1].gone, "the engine to be told")
        counts = inside(server).deciding.controller.state()["counts"]
        until(lambda: inside(server).deciding.controller.state()["counts"]["cancelled"] == 1, f"a cancel in {counts}")


def test_what_the_gateway_is_at_waits_and_what_the_engine_has_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, planned = threading.Event(), threading.Event()

    async def held(index: int) -> None:
        await asyncio.to_thread(asked.wait, MOST_S)

    def gauges(server: DrainingServer) -> tuple[float, float, float]:
        found = httpx.get(url_of(server, "/metrics"), timeout=MOST_S).text
        names = ("num_requests_waiting", "num_requests_running", "request_queue_time_seconds_count")
        lines = dict(line.rsplit(" ", 1) for line in found.splitlines() if not line.startswith("#"))
        return tuple(float(lines[f"adaptive_fusion:{name}"]) for name in names)  # type: ignore[return-value]

    with engine(before=held) as behind, gateway(behind.url) as server, ThreadPoolExecutor(2) as pool:
        plans = inside(server).side.plans
        decide = plans.decide
        monkeypatch.setattr(plans, "decide", lambda *call: planned.wait(MOST_S) and decide(*call))
        try:
            body = {"model": "m", "stream": True, "messages": asking(shown(photo(64, 64)), text("?"))}
            first = pool.submit(post, server, body)
            until(lambda: gauges(server) == (1, 0, 0), "the first to wait for its plan")
            planned.set()
            until(lambda: gauges(server) == (0, 1, 1), "the first to be sent")
            assert httpx.get(url_of(server, "/ready"), timeout=MOST_S).status_code == 200
            assert gauges(server) == (0, 1, 1)  # a probe is no request
        finally:
            planned.set(), asked.set()
        assert first.result(MOST_S).status_code == 200
        until(lambda: gauges(server) == (0, 0, 1), "all to be over")


def test_a_slow_reader_holds_back_the_engine() -> None:
    words = ["w" * 60_000] * 1_600  # 96 MB; the kernel takes some 20 on the two ways
    with engine(words=lambda body: words) as behind, gateway(behind.url) as server:
        body = {"model": "m", "stream": True, "messages": asking(text("?"))}
        with httpx.stream("POST", url_of(server), json=body, timeout=MOST_S) as answer:
            pieces = answer.iter_raw()
            size = len(next(pieces))
            before, stays = -1, 0
            while stays < 20:  # until the engine cannot go on
                stays = stays + 1 if behind.sent == before else 0
                before = behind.sent
                threading.Event().wait(0.05)
            assert behind.sent < 48 << 20
            size += sum(map(len, pieces))
        assert size >= 96_000_000


def test_32_streams_at_once_lose_and_swap_nothing() -> None:
    def words(body: Any) -> list[str]:
        return [f" {body['seed']}-{index}" for index in range(60)]

    async def pause(index: int) -> None:
        await asyncio.sleep(0.001 * (index % 3))

    with engine(words=words, before=pause) as behind, gateway(behind.url) as server:
        client = client_of(server)

        def ask(number: int) -> str:
            found = client.chat.completions.create(model="m", messages=asking(text("?")), seed=number, stream=True)
            return "".join(chunk.choices[0].delta.content or "" for chunk in found)

        with ThreadPoolExecutor(32) as pool:
            answers = list(pool.map(ask, range(64)))
    assert answers == ["".join(f" {number}-{index}" for index in range(60)) for number in range(64)]


def test_earlier_images_of_a_conversation_keep_their_bytes_unless_their_plan_rises() -> None:
    pictures = [shown(photo(1600, 1200)), shown(photo(900, 700)), shown(photo(2400, 1800))]
    messages: list[Any] = []
    seen: list[list[bytes]] = []
    said = list[str]()
    turns = [
        ([pictures[0]], "Describe it."),
        ([pictures[1]], "And this?"),
        ([], "What is the colour of the sky?"),
        ([pictures[2]], "Read the text."),
        ([], "Describe the first one."),
    ]
    with engine() as behind, gateway(behind.url) as server:
        for parts, question in turns:
            messages = [*messages, {"role": "user", "content": [*parts, text(question)]}]
            answer = post(server, {"model": "m", "messages": messages})
            seen.append(sent_images(behind.got[-1].json))
            said.append(answer.headers["x-adaptive-fusion-reason"])
            messages = [*messages, {"role": "assistant", "content": "one two three"}]

    def pixels(data: bytes) -> int:
        found = Image.open(io.BytesIO(data))
        return found.width * found.height

    assert [len(images) for images in seen] == [1, 2, 2, 3, 3]
    for earlier, later, reason in zip(seen, seen[1:], said[1:], strict=False):
        for old, new in zip(earlier, later, strict=False):
            assert new == old or (pixels(new) > pixels(old) and "rise" in reason)
    assert seen[4] == seen[3] and "stays" in said[4]


def asking_policy() -> Policy:
    """A policy that begins cheaply and asks the model whether that was enough."""
    rule = Threshold(0.1, auc=0.9, rows=100, loss=0.4, left=0.0, share=0.1)
    lanes = dict.fromkeys(LANES, (Rung(NATIVE), Rung(NATIVE, 0.6, 0.25)))
    return Policy("asking", constant_router(), 0.5, lanes, escalation=Escalation(thresholds={ANY: {ANY: rule}}))


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(("top", "escalates"), [([-0.001, -8.0], False), ([-0.7, -0.7], True)])
def test_where_the_model_is_not_sure_the_better_plan_answers(
    stream: bool, top: list[float], escalates: bool, tmp_path: Path
) -> None:
    log = tmp_path / "log.jsonl"
    with (
        engine(logprobs=lambda body: top) as behind,
        gateway(behind.url, asking_policy(), log, engine="vllm") as server,
    ):
        data = photo(1600, 1200)
        body = {"model": "m", "stream": stream, "messages": asking(shown(data), text("What is it?"))}
        answer = post(server, body)
        direct = httpx.post(f"{behind.url}/v1/chat/completions", json=body, timeout=MOST_S)
        first, *more = behind.got[:-1]
        rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert first.json["logprobs"] is True and first.json["top_logprobs"] == 20
    assert answer.content.replace(b" ", b"") == direct.content.replace(b" ", b"")
    assert answer.headers["x-adaptive-fusion-escalated"] == str(escalates).lower()
    assert len(more) == escalates and rows[0]["escalated"] is escalates
    if escalates:
        assert "logprobs" not in more[0].json
        assert sent_images(more[0].json)[0] != sent_images(first.json)[0]


def test_an_engine_that_refuses_logprobs_is_asked_without_and_not_again() -> None:
    with engine(logprobs=400) as behind, gateway(behind.url, asking_policy(), engine="vllm") as server:
        body = {"model": "m", "messages": asking(shown(photo(1600, 1200)), text("?"))}
        assert [post(server, body).status_code for _ in range(2)] == [200, 200]
        assert ["logprobs" in got.json for got in behind.got] == [True, False, False]


def test_a_request_that_is_refused_with_and_without_a_look_says_nothing_of_looks() -> None:
    with engine(logprobs=400) as behind, gateway(behind.url, asking_policy(), engine="vllm") as server:
        body = {"model": "m", "messages": asking(shown(photo(1600, 1200)), text("?"))}
        behind.status = 400
        assert post(server, body).status_code == 400
        behind.status, behind.logprobs = 200, lambda body: [-0.001]
        assert post(server, body).headers["x-adaptive-fusion-escalated"] == "false"


def test_audit_does_not_wait_for_the_decision_and_takes_nothing_away_for_low_detail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with engine() as behind, gateway(behind.url, log=tmp_path / "log.jsonl", mode="audit") as server:
        sizes, came = inside(server).sizing, list[bool]()
        measure = sizes.measure

        def once_the_engine_has_it(*arguments: Any) -> Any:
            until(lambda: behind.got, "what was sent as it came")
            came.append(True)
            return measure(*arguments)

        monkeypatch.setattr(sizes, "measure", once_the_engine_has_it)
        part = shown(photo(1600, 1200))
        part["image_url"]["detail"] = "low"
        body = {"model": "m", "messages": asking(part, text("?")), "adaptive_fusion": {"latency_ms": 5000}}
        answer = post(server, body)
        assert answer.status_code == 200 and came and len(behind.got) == 1
        assert behind.got[0].json == {"model": "m", "messages": body["messages"]}
        assert answer.headers["x-adaptive-fusion-media"] == "native"
        wrong = post(server, {**body, "adaptive_fusion": {"point": "weighted@0.5"}})
        assert wrong.status_code == 400 or wrong.headers["x-adaptive-fusion-media"] == "native"


def test_audit_sends_everything_as_it_came_and_logs_the_plan(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    with engine() as behind, gateway(behind.url, log=log, mode="audit") as server:
        body = json.dumps({"model": "m", "messages": asking(shown(photo(1600, 1200)), text("Secret?"))}).encode()
        assert post(server, body).status_code == 200 and behind.got[-1].body == body
        until(lambda: log.exists() and log.read_text().endswith("\n"), "the log")
    (row,) = [json.loads(line) for line in log.read_text().splitlines()]
    assert row["audit"]["saved"]["tokens"] > 0 and row["point"]["fusion"] == "native"
    assert row["prompt_hash"] == text_hash("Secret?") and "Secret" not in log.read_text()
    assert row["measurement"]["latency_ms"] > 0


def test_decisions_can_be_asked_for_and_rated(before: tuple[DrainingServer, Engine], tmp_path: Path) -> None:
    server, behind = before
    body = {"model": "m", "messages": asking(shown(photo(1600, 1200)), text("What is it?"))}
    count = len(behind.got)
    outlook = httpx.post(url_of(server, "/v1/adaptive_fusion/decide"), json=body, timeout=MOST_S).json()
    offers = httpx.post(url_of(server, "/v1/adaptive_fusion/points"), json=body, timeout=MOST_S).json()
    assert len(behind.got) == count
    assert outlook["tokens"]["visual_planned"] < outlook["tokens"]["visual_native"]
    assert offers["decision"]["plan"] == outlook["plan"] and sum(row["taken"] for row in offers["points"]) == 1
    answer = post(server, body)
    found = httpx.get(url_of(server, "/v1/adaptive_fusion/decisions?n=1"), timeout=MOST_S).json()["decisions"]
    assert found[0]["request_id"] == answer.headers["x-adaptive-fusion-request-id"]
    assert httpx.get(url_of(server, "/v1/adaptive_fusion/nothing"), timeout=MOST_S).status_code == 404
    metrics = httpx.get(url_of(server, "/metrics"), timeout=MOST_S).text
    assert "adaptive_fusion:visual_tokens_native_total" in metrics


def test_costs_are_learned_and_kept_over_a_restart(tmp_path: Path) -> None:
    state = tmp_path / "state.json"
    sizes = [(320, 240), (1600, 1200)]
    with engine() as behind:
        with gateway(behind.url, state=state) as server:
            for index in range(17):
                part = image(*sizes[index % 2])
                body = {"model": "m", "stream": True, "messages": asking(part, text("Read the text."))}
                assert post(server, body).status_code == 200
            deciding = inside(server).deciding
            until(lambda: deciding.controller.state()["counts"]["updates"] >= 16, "what was learned")
            assert deciding.profile.samples >= 16
        with gateway(behind.url, state=state) as server:
            assert inside(server).deciding.profile == deciding.profile


def test_a_host_that_others_reach_needs_a_key(before: tuple[DrainingServer, Engine]) -> None:
    from adaptive_fusion.errors import ConfigError
    from adaptive_fusion.serving.gateway.settings import GatewaySettings

    with pytest.raises(ConfigError, match="key"):
        GatewaySettings(host="0.0.0.0", upstream="http://127.0.0.1:1")
    server, _ = before
    assert post(server, b"{}", headers={"host": "evil.example"}).status_code == 403


def test_no_address_leads_to_a_host_that_is_not_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    with engine() as behind, gateway(behind.url, allowed_media_domains=("media.example.com",)) as server:
        fetcher = inside(server)._fetcher
        assert fetcher is not None
        asked_for: list[Any] = []

        async def fetched(address: Any, *rest: Any) -> bytes:
            asked_for.append(address)
            return b""

        monkeypatch.setattr(fetcher, "fetch", fetched)
        for address in HOSTILE:
            part = {"type": "image_url", "image_url": {"url": address}}
            body = json.dumps({"model": "m", "messages": asking(part, text("?"))}).encode()
            answer = httpx.post(url_of(server), content=body, timeout=MOST_S)
            assert answer.status_code == 200 and behind.got[-1].body == body
        assert len(HOSTILE) >= 30 and not asked_for
