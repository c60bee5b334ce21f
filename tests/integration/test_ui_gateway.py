"""The web UI in a gateway, without a browser: the same pages, fed by what a gateway says."""

import asyncio
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from gateway import gateway, url_of
from server import asking, data_url, mp4, png, text
from upstream import Engine, engine
from waits import MOST_S, until

from adaptive_fusion.serving.run import DrainingServer

pytest.importorskip("gradio", reason="the extra ui is not installed")
from adaptive_fusion.serving.web.asking import Turn
from adaptive_fusion.serving.web.budget import points_table
from adaptive_fusion.serving.web.client import Api, ApiError
from adaptive_fusion.serving.web.decision import panel
from adaptive_fusion.serving.web.growing import growing
from adaptive_fusion.serving.web.live import numbers, read_metrics
from adaptive_fusion.serving.web.texts import text as said_in

KEY = "k-123"
SENT = {"authorization": f"Bearer {KEY}"}


def say(key: str, **values: object) -> str:
    return said_in(key, "en", **values)


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[DrainingServer, Engine]]:
    log = tmp_path_factory.mktemp("ui") / "log.jsonl"
    with engine() as behind, gateway(behind.url, "balanced", log, api_key=KEY, ui=True) as server:
        yield server, behind


@pytest.fixture
def client(before: tuple[DrainingServer, Engine]) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url_of(before[0], ""), timeout=MOST_S) as found:
        yield found


def body(*parts: Any, **fields: Any) -> dict[str, Any]:
    return {"model": "m", "messages": asking(*parts, text("What colour is it?")), "max_tokens": 4, **fields}


def shown(data: bytes) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_url(data)}}


def answered(server: DrainingServer, asked: dict[str, Any], name: str = "growing") -> Any:
    """What the pages' own way to the endpoints gives, on the gateway's event loop."""

    async def ask() -> tuple[Turn, dict[str, Any], dict[str, Any], dict[str, Any], list[Any], str]:
        api, answer = Api(server.config.app, KEY), Turn("assistant")
        async for _ in growing(api, asked, answer, asyncio.Event()):
            pass
        whole = await api.call("decisions", below=answer.request_id)
        rows = (await api.call("decisions", n=200))["decisions"]
        offered = await api.call("points", asked)
        return answer, whole, offered, await api.call("policy"), rows, await api.text("metrics")

    assert server.loop is not None
    return asyncio.run_coroutine_threadsafe(ask(), server.loop).result(MOST_S)


def test_an_answer_through_the_gateway_has_its_decision_drawn(before: tuple[DrainingServer, Engine]) -> None:
    server, _ = before
    answer, whole, offered, policy, rows, metrics = answered(server, body(shown(png(1600, 1200))))
    assert answer.text == "one two three" and answer.request_id and answer.fields["plan"] == whole["plan"]
    assert {"features", "rejected", "p_complex", "actual", "tokens", "met", "media", "created"} <= set(whole)
    assert whole["actual"]["latency_ms"] >= whole["actual"]["ttft_ms"] > 0
    drawn = panel(whole, policy, [], say)
    assert whole["plan"] in drawn and whole["media"][0]["given"] in drawn and "GiB" not in drawn
    assert rows[0]["request_id"] == answer.request_id
    live = numbers(rows, read_metrics(metrics), say)
    assert answer.request_id in live and "nan" not in live.lower()
    assert offered["decision"]["plan"] in points_table(offered, say) and "GiB" not in points_table(offered, say)


def test_answers_and_failures_without_times_are_shown_too(
    before: tuple[DrainingServer, Engine], client: httpx.Client
) -> None:
    server, behind = before
    client.headers.update(SENT)
    whole = client.post("/v1/chat/completions", json=body(adaptive_fusion={"ttft_ms": 5000}))
    behind.status = 500
    try:
        failed = client.post("/v1/chat/completions", json=body())
        with pytest.raises(ApiError):
            answered(server, body())
    finally:
        behind.status = 200
    for response, actual in ((whole, {"queue_ms", "latency_ms"}), (failed, set())):
        named = response.headers["x-adaptive-fusion-request-id"]
        row = client.get(f"/v1/adaptive_fusion/decisions/{named}").json()
        assert actual <= set(row.get("actual", {})) and "ttft_ms" not in row.get("actual", {})
        assert row.get("met") is None  # nobody saw the first token
    rows = client.get("/v1/adaptive_fusion/decisions", params={"n": 50}).json()["decisions"]
    assert rows[-1] and all(row["request_id"] in numbers(rows, {}, say) for row in rows[:20])
    unknown = client.get("/v1/adaptive_fusion/decisions/another")
    assert unknown.status_code == 404 and unknown.json()["error"]["code"] == "unknown_request"


def test_a_decision_shows_its_media_and_the_policy_says_what_can_be_limited(client: httpx.Client) -> None:
    client.headers.update(SENT)
    clip = {"type": "video_url", "video_url": {"url": data_url(mp4(4), "video/mp4")}}
    away = {"type": "image_url", "image_url": {"url": "https://images.example/a.png"}}
    asked = body(shown(png(640, 480)), clip, away)
    decided = client.post("/v1/adaptive_fusion/decide", params={"pictures": "true"}, json=asked).json()
    assert [(row["kind"], row["width"]) for row in decided["pictures"]] == [("image", 640), ("video", 64)]
    assert decided["features"] and "rejected" in decided and decided["tokens"]["visual_planned"] > 0
    assert decided["media"][2] == {"given": "native", "why": "sent by address"}
    policy = client.get("/v1/adaptive_fusion/policy").json()
    assert policy["policies"] == ["balanced"] and policy["ranges"]
    assert policy["limits"] == ["latency_ms", "ttft_ms", "attainment", "on_infeasible"]


def test_pages_are_let_in_by_the_key_and_are_the_gateways_own(
    before: tuple[DrainingServer, Engine], client: httpx.Client
) -> None:
    _, behind = before
    came = len(behind.got)
    page = client.get("/ui", follow_redirects=True, headers={"accept-language": "zh"})
    assert page.url.path == "/ui/zh/" and 'id="key"' in page.text
    assert client.get("/ui/en/config").status_code == 401
    assert client.get("/v1/models").status_code == 401
    assert len(behind.got) == came  # nothing of all this went to the engine
    assert client.post("/ui/enter", headers=SENT).json() == {"entered": True}
    page = client.get("/ui/en/")
    assert page.status_code == 200 and "gradio_config" in page.text and KEY not in page.text
    assert "default-src 'self'" in page.headers["content-security-policy"]
    assert client.get("/uix", headers=SENT).json()["path"] == "/uix"  # the engine's


def test_without_pages_their_path_is_the_engines_and_with_them_a_gateway_ends() -> None:
    with engine() as behind, gateway(behind.url) as server:
        assert httpx.get(url_of(server, "/ui/x"), timeout=MOST_S).json()["path"] == "/ui/x"
    with engine() as behind, gateway(behind.url, ui=True) as server, httpx.Client(base_url=url_of(server, "")) as page:
        assert page.get("/ui/en/", timeout=MOST_S).status_code == 200  # no key is asked for where there is none
        with page.stream("GET", "/ui/en/gradio_api/heartbeat/a", timeout=MOST_S) as open_page:  # as long as it is open
            assert open_page.status_code == 200
            assert server.loop is not None
            server.loop.call_soon_threadsafe(server.stop)
            until(lambda: server.should_exit, "the end of the gateway")
