"""The web UI without a browser: its texts, its way to the server, and who gets which of its paths."""

import ast
import asyncio
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from server import png, serving

from adaptive_fusion import AdaptiveRunner
from adaptive_fusion.policy.policy import Policy
from adaptive_fusion.policy.ranges import feature_ranges
from adaptive_fusion.serving.run import DrainingServer
from adaptive_fusion.serving.web import texts

pytest.importorskip("gradio", reason="the extra ui is not installed")
from adaptive_fusion.serving.web.client import ENDPOINTS, Api
from adaptive_fusion.serving.web.compare import differences
from adaptive_fusion.serving.web.live import read_metrics
from adaptive_fusion.serving.web.markup import element, safe
from adaptive_fusion.serving.web.streams import Streams

WEB = Path(texts.__file__).parent
KEY = "k-123"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DrainingServer]:
    runner = AdaptiveRunner.from_pretrained("reference", log=tmp_path_factory.mktemp("ui") / "log.jsonl")
    with serving(runner, ui=True, api_key=KEY) as found:
        yield found


@pytest.fixture
def client(server: DrainingServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"http://127.0.0.1:{server.port}", timeout=60) as found:
        yield found


def entered(client: httpx.Client) -> httpx.Client:
    assert client.post("/ui/enter", headers={"authorization": f"Bearer {KEY}"}).json() == {"entered": True}
    return client


def upload(client: httpx.Client, name: str = "a.png", data: bytes = b"") -> httpx.Response:
    return client.post("/ui/en/gradio_api/upload", files={"files": (name, data or png(8, 8), "image/png")})


def test_every_text_is_there_in_each_language_with_the_same_values_and_is_used() -> None:
    code = "\n".join(path.read_text("utf-8") for path in WEB.glob("*.py") if path.name != "texts.py")
    prefixes = ("on_deadline_", "on_infeasible_", "sort_", "tab_")
    for key, said in texts.TEXTS.items():
        assert len(said) == len(texts.LANGUAGES) and all(text.strip() for text in said), key
        assert len({tuple(re.findall(r"\{\w+\}", text)) for text in said}) == 1, key
        assert re.search(f"[\"']{key}[\"']", code) or key.startswith(prefixes), f"{key} is said nowhere"
    asked = {
        node.args[0].value
        for path in WEB.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in ("say", "text")
        and node.args and isinstance(node.args[0], ast.Constant) and isinstance(node.args[0].value, str)
    }  # fmt: skip
    assert asked - {""} <= set(texts.TEXTS) | set(ENDPOINTS)


@pytest.mark.parametrize(
    ("header", "language"),
    [("", "en"), ("zh-CN,zh;q=0.9,en;q=0.8", "zh"), ("en-GB,zh;q=0.9", "en"), ("de, zh;q=0.2, en;q=0.1", "zh"),
     ("fr", "en"), ("zh;q=0", "en"), (",;q=x,", "en")],
)  # fmt: skip
def test_the_browsers_language_is_taken_where_it_is_one_of_ours(header: str, language: str) -> None:
    assert texts.preferred(header) == language


@given(st.text())
def test_what_is_said_never_becomes_markup(said: str) -> None:
    drawn = element("p", said, title=said)
    inside = drawn.removeprefix("<p title=").removesuffix("</p>")
    assert "<" not in inside and inside.count('"') == 2
    assert safe(drawn) is drawn


@given(st.text(), st.text())
def test_differences_hold_all_of_both_answers(native: str, adaptive: str) -> None:
    assert "<script" not in differences(native, adaptive + "<script>", str)


def test_metrics_are_read_by_name_and_summed_over_labels() -> None:
    text = '# HELP a b\n# TYPE a counter\na_total{x="1"} 2.0\na_total{x="2"} 3\nb 1e-3\n'
    assert read_metrics(text) == {"a_total": 5.0, "b": 0.001}


def test_the_pages_ask_for_nothing_but_public_endpoints(server: DrainingServer) -> None:
    described = server.config.app.openapi()["paths"]  # type: ignore[union-attr]
    for name, (method, path) in ENDPOINTS.items():
        assert method.lower() in described[path], name
    for path in WEB.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("adaptive_fusion"):
                assert str(node.module).startswith("adaptive_fusion.serving.web"), path.name


def test_without_the_key_there_is_the_entrance_and_no_data(client: httpx.Client) -> None:
    page = client.get("/ui", follow_redirects=True, headers={"accept-language": "zh"})
    assert page.status_code == 200 and page.url.path == "/ui/zh/" and 'id="key"' in page.text
    assert client.get("/ui/en/config").status_code == 401
    assert upload(client).status_code == 401
    assert client.post("/ui/en/gradio_api/queue/join", json={"data": [], "session_hash": "a"}).status_code == 401
    assert client.post("/ui/enter", headers={"authorization": "Bearer x"}).json() == {"entered": False}
    assert client.get("/v1/models").status_code == 401  # below /ui alone is without one


def test_with_the_key_the_page_comes_and_asks_no_other_site(client: httpx.Client) -> None:
    page = entered(client).get("/ui/en/")
    assert page.status_code == 200 and "gradio_config" in page.text
    assert not re.findall(r'(?:src|href)="(?:https?:)?//', page.text)
    policy = page.headers["content-security-policy"]
    assert "default-src 'self'" in policy and "http" not in policy
    cookies = page.headers.get_list("set-cookie")
    assert cookies and all("HttpOnly" in cookie and "samesite=strict" in cookie.lower() for cookie in cookies)
    assert all("Path=/ui;" in cookie for cookie in cookies)  # of all languages
    assert KEY not in page.text and KEY not in str(page.headers)
    config = client.get("/ui/en/config").json()
    assert config["analytics_enabled"] is False


@pytest.mark.parametrize(
    "path",
    [
        "file=/etc/passwd", "proxy=https://a.hf.space/x", "info", "openapi.json", "app_id", "token", "user", "runs",
        "dev/reload", "stream/a/b/c/playlist.m3u8", "call/ask", "run/ask", "api/ask", "custom_component/a/client/c/d",
        "file/etc/passwd", "vibe-code", "process_recording",
    ],
)  # fmt: skip
def test_paths_of_gradio_that_no_page_needs_are_not_there(client: httpx.Client, path: str) -> None:
    entered(client)
    for method in ("GET", "POST"):
        assert client.request(method, f"/ui/en/gradio_api/{path}").status_code in (400, 404, 405)
    for beside in ("monitoring", "login", "logout", "pwa_icon", "robots.txt", "gradio_api/deep_link"):
        assert client.get(f"/ui/en/{beside}").status_code == 404
    assert client.get("/ui/en/static/%2e%2e/%2e%2e/package.json").status_code in (403, 404)


def test_a_file_is_its_sessions_alone(server: DrainingServer, client: httpx.Client) -> None:
    (path,) = upload(entered(client), "../../x y.png").json()
    assert Path(path).is_file() and Path(path).is_relative_to(server.config.app.state.ui.sessions.folder)  # type: ignore[union-attr]
    address = f"/ui/en/gradio_api/file={path}"
    assert client.get(address).content == png(8, 8)
    joined = {"session_hash": "mine", "fn_index": 0, "data": [{"path": path, "meta": {"_type": "gradio.FileData"}}]}
    with httpx.Client(base_url=client.base_url) as other:
        entered(other)
        assert other.get(address).status_code == 404
        assert other.post("/ui/en/gradio_api/queue/join", json={**joined, "session_hash": "b"}).status_code == 400
        away = json.loads(json.dumps(joined).replace(path, "http://10.0.0.1/x"))
        assert other.post("/ui/en/gradio_api/queue/join", json={**away, "session_hash": "b"}).status_code == 400
        assert client.post("/ui/en/gradio_api/queue/join", json=joined).status_code != 404  # the page is this one's now
        assert other.post("/ui/en/gradio_api/queue/join", json={**joined, "data": []}).status_code == 404
        assert other.get("/ui/en/gradio_api/queue/data", params={"session_hash": "mine"}).status_code == 404
    client.post("/ui/leave")
    assert not Path(path).exists() and client.get("/ui/en/config").status_code == 401


def test_an_upload_is_bounded(server: DrainingServer, client: httpx.Client) -> None:
    most = server.service.media_limits.max_medium_bytes
    answer = upload(entered(client), data=b"\0" * (most + (1 << 17)))
    assert answer.status_code == 413 and f"{most >> 20} MiB" in answer.text
    assert client.post("/ui/en/gradio_api/upload", content=b"no form").status_code == 400


def test_a_page_that_names_another_host_is_refused() -> None:
    from adaptive_fusion.serving.http import Guard

    guard = Guard(None, None, True, lambda code: None, pages="/ui")  # type: ignore[arg-type]
    assert guard._refused({b"host": b"evil.example"}, True) is not None
    assert guard._refused({b"host": b"localhost:8000"}, True) is None
    keyed = Guard(None, KEY, True, lambda code: None, pages="/ui")  # type: ignore[arg-type]
    assert keyed._is_page("/ui/x") and not keyed._is_page("/uix") and not keyed._is_page("/v1/ui")


async def _taken_over() -> tuple[list[bytes], bool]:
    """What reaches a page of which the first connection ended before all was said, and whether the teller was told."""
    go, told = asyncio.Event(), asyncio.Event()

    async def teller(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"first", "more_body": True})
        await go.wait()
        await send({"type": "http.response.body", "body": b"second", "more_body": True})
        while (await receive())["type"] != "http.disconnect":
            pass
        told.set()

    streams, got = Streams(teller), list[bytes]()
    gone, again, left = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def connection(over: asyncio.Event, came: asyncio.Event) -> None:
        async def receive() -> dict[str, Any]:
            await over.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            if message.get("body"):
                got.append(message["body"])
                came.set()

        await streams.serve("page", {"type": "http"}, receive, send)

    first = asyncio.create_task(connection(gone, again))
    await again.wait()
    gone.set()
    await first
    go.set()  # said while nobody listens
    await asyncio.sleep(0)
    came = asyncio.Event()
    second = asyncio.create_task(connection(left, came))
    await came.wait()
    early = told.is_set()
    streams.leave("page")
    await asyncio.wait_for(told.wait(), 60)
    await second
    return got, early


def test_what_is_said_between_two_connections_of_a_page_is_not_lost() -> None:
    got, early = asyncio.run(_taken_over())
    assert got == [b"first", b"second"] and not early


async def _streamed(app: Any) -> list[dict[str, Any]]:
    body = {"model": "reference", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
    chunks = Api(app, KEY).stream(body)
    first = await anext(chunks)
    await chunks.aclose()
    whole = [chunk async for chunk in Api(app, KEY).stream(body)]
    return [first, *whole]


def test_answers_stream_through_the_endpoints_and_can_be_left(server: DrainingServer) -> None:
    assert server.loop is not None
    chunks = asyncio.run_coroutine_threadsafe(_streamed(server.config.app), server.loop).result(120)
    assert chunks[0]["object"] == "chat.completion.chunk" and "adaptive_fusion" in chunks[-1]
    assert server.service.scheduler.admitted == 0


def test_all_of_a_decision_can_be_asked_for(client: httpx.Client) -> None:
    client.headers["authorization"] = f"Bearer {KEY}"
    body = {"model": "reference", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}
    named = client.post("/v1/chat/completions", json=body).json()["id"]
    whole = client.get(f"/v1/adaptive_fusion/decisions/{named}").json()
    assert {"features", "rejected", "needs", "p_complex", "actual", "tokens", "met"} <= set(whole)
    assert client.get("/v1/adaptive_fusion/decisions/another").json()["error"]["code"] == "unknown_request"
    policy = client.get("/v1/adaptive_fusion/policy").json()
    assert policy["policy"] in policy["policies"] and policy["lanes"]
    assert all(low <= high for low, high in policy["ranges"].values())
    # Those with a record of their images, and those whose router kept mean and spread of what it was fitted on.
    assert all(feature_ranges(Policy.load(name)) for name in ("balanced", "reference-balanced"))
    decided = client.post("/v1/adaptive_fusion/decide", params={"pictures": "true"}, json=body).json()
    assert decided["pictures"] == [] and decided["tokens"]["visual_planned"] == 0
    assert client.post("/v1/adaptive_fusion/decide", params={"pictures": "1"}, json=body).status_code == 400
