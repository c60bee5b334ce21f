"""The web UI in a real browser, on the reference model: what people do with it, and what must not happen beside."""

import io
import json
import shutil
import subprocess
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import CHROMIUM, DESKTOP, PHONE, ask, attach, chat_of, open_tab, page_of, shoot, slide, taken
from PIL import Image
from server import mp4, serving

from adaptive_fusion import AdaptiveRunner
from adaptive_fusion.serving.run import DrainingServer

pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytest.importorskip("gradio", reason="the extra ui is not installed")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")
KEY = "a key of these tests"
TABS = ("Chat", "Compare", "Live", "Explain a folder", "Rollout")


@pytest.fixture(scope="module")
def log_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ui") / "decisions.jsonl"


@pytest.fixture(scope="module")
def runner(log_file: Path) -> AdaptiveRunner:
    return AdaptiveRunner.from_pretrained("reference", log=log_file)


@pytest.fixture(scope="module")
def server(runner: AdaptiveRunner) -> Iterator[DrainingServer]:
    with serving(runner, ui=True) as found:
        yield found


@pytest.fixture(scope="module")
def axe(tmp_path_factory: pytest.TempPathFactory) -> str:
    """axe-core from npm, or a reason why not."""
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed, which axe-core comes by")
    folder = tmp_path_factory.mktemp("axe")
    done = subprocess.run(["npm", "pack", "axe-core@4"], cwd=folder, capture_output=True, text=True, timeout=120)
    if done.returncode:
        pytest.skip(f"npm gives no axe-core: {done.stderr[-200:]}")
    with tarfile.open(next(folder.glob("axe-core-*.tgz"))) as packed:
        script = packed.extractfile("package/axe.min.js")
        assert script is not None
        return script.read().decode()


def rows_of(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text("utf-8").splitlines()]


def faults_of(page: Any, axe: str) -> list[str]:
    """What axe-core finds serious or critical."""
    page.evaluate(axe)
    found = page.evaluate("async () => (await axe.run(document, { resultTypes: ['violations'] })).violations")
    return [
        f"{fault['id']}: {node['html'][:200]}"
        for fault in found
        if fault["impact"] in ("serious", "critical")
        for node in fault["nodes"]
    ]


def test_a_question_about_an_image_is_answered_in_pieces_and_its_decision_is_shown(
    browser: Any, server: DrainingServer, picture: Path
) -> None:
    with chat_of(browser, server) as page:
        answer = ask(page, "What is shown?", picture)
        assert answer.strip()
        assert page.locator("#conversation img").count() == 1
        shown = page.inner_text("#decision")
        for said in ("Lane", "Plan", "P(complex)", "Predicted", "Actual", "Escalated", "Visual tokens saved"):
            assert said in shown
        assert page.locator("#decision .af-pictures img").count() == 2
        page.click("#decision summary")
        assert page.locator("#decision .af-track").count() > 20
        told = json.loads(page.locator("label", has_text="As JSON").locator("textarea").first.input_value())
        assert {"features", "rejected", "p_complex", "predicted", "actual", "tokens", "reason"} <= set(told)
        second = ask(page, "What colour is it?")  # the conversation keeps its image
        assert second.strip() and page.locator("#conversation .bot.message").count() == 2
        shoot(page, "ui-chat")


def test_a_clip_is_taken_as_a_clip(browser: Any, server: DrainingServer) -> None:
    with chat_of(browser, server) as page:
        ask(page, "What happens?", {"name": "clip.mp4", "mimeType": "video/mp4", "buffer": mp4(4)})
        assert "video" in page.inner_text("#decision")


def test_a_tighter_budget_changes_the_point(browser: Any, server: DrainingServer, picture: Path) -> None:
    with chat_of(browser, server) as page:
        attach(page, "#message", picture)
        page.wait_for_function("document.querySelectorAll('#points tr').length > 2")
        free = taken(page)
        slide(page, "latency", 20)
        page.wait_for_function(
            "free => document.querySelector('#points tr.af-marked th')?.innerText !== free", arg=free
        )
        tight = taken(page)
        ask(page, "What is shown?")
        assert tight != free and page.locator("#decision dd").nth(1).inner_text() != free


def test_native_and_adaptive_stand_side_by_side(browser: Any, server: DrainingServer, picture: Path) -> None:
    with chat_of(browser, server) as page:
        open_tab(page, "Compare")
        for order in ("one after the other", "both at once"):
            page.get_by_label(order).check()
            if order == "one after the other":
                attach(page, "#compare-message", picture)
            page.fill("#compare-message textarea", "What is shown?")
            page.press("#compare-message textarea", "Enter")
            page.wait_for_selector("#differences p", state="detached")  # those of the run before
            page.wait_for_selector("#differences p")
            native, adaptive = (page.inner_text(f"#compare-{side}") for side in ("native", "adaptive"))
            assert "native@1" in native and "native@1" not in adaptive
            assert all(said in native and said in adaptive for said in ("First token", "Latency", "Visual tokens"))
        shoot(page, "ui-compare")


def test_stop_ends_an_answer_and_frees_the_server(browser: Any, server: DrainingServer, picture: Path) -> None:
    # The model answers briefly and at once; an end token that it may not choose makes it go on, slowly.
    object.__setattr__(server.service.settings, "generate", {"min_new_tokens": 900})
    slowly = server.service.runner.model.register_forward_hook(lambda *_: time.sleep(0.02))
    try:
        with chat_of(browser, server) as page:
            page.click("#settings button")
            slide(page, "max-tokens", 1000)
            attach(page, "#message", picture)
            page.fill("#message textarea", "What is shown?")
            page.press("#message textarea", "Enter")
            page.wait_for_function(
                "(document.querySelector('#conversation .bot.message')?.innerText || '').length > 20"
            )
            page.click("#stop")
            page.wait_for_function("document.querySelector('#conversation').innerText.includes('(stopped)')")
            page.wait_for_function("async () => /num_requests_running 0/.test(await (await fetch('/metrics')).text())")
    finally:
        slowly.remove()
        object.__setattr__(server.service.settings, "generate", {})


def test_a_thumb_down_arrives_in_the_log(browser: Any, server: DrainingServer, picture: Path, log_file: Path) -> None:
    with chat_of(browser, server) as page:
        ask(page, "What is shown?", picture)
        told = json.loads(page.locator("label", has_text="As JSON").locator("textarea").first.input_value())
        page.click("#down")
        page.wait_for_selector("#said [role=alert]")
        rated = [row for row in rows_of(log_file) if row.get("event") == "feedback"]
        assert [(row["request_id"], row["rating"]) for row in rated] == [(told["request_id"], 0.0)]


def test_a_wrong_file_is_told_and_the_question_stays(browser: Any, server: DrainingServer) -> None:
    with chat_of(browser, server) as page:
        broken = {"name": "broken.png", "mimeType": "image/png", "buffer": b"\x89PNG\r\n\x1a\n" + b"no picture" * 9}
        attach(page, "#message", broken)
        page.fill("#message textarea", "What is shown?")
        page.press("#message textarea", "Enter")
        page.wait_for_selector("#said [role=alert]")
        assert "invalid_media" in page.inner_text("#said")
        page.wait_for_function("document.querySelector('#message textarea').value === 'What is shown?'")
        assert page.locator("#conversation .bot.message").count() == 0


def test_a_reload_keeps_nothing_and_two_browsers_do_not_mix(
    browser: Any, server: DrainingServer, picture: Path
) -> None:
    with chat_of(browser, server, leaves=True) as page, chat_of(browser, server) as other:
        ask(page, "What is shown?", picture)
        ask(other, "Where is it?", picture)
        assert "Where is it?" not in page.inner_text("#conversation")
        assert "What is shown?" not in other.inner_text("#conversation")
        address = page.locator("#conversation img").first.get_attribute("src")
        assert page.request.get(address).status == 200
        assert other.request.get(address).status == 404
        page.reload()
        page.wait_for_selector("#points table")
        assert "What is shown?" not in page.inner_text("body")
        assert page.locator("#conversation img").count() == 0


def test_live_shows_requests_and_opens_their_decisions(browser: Any, server: DrainingServer, picture: Path) -> None:
    with chat_of(browser, server) as page:
        slide(page, "latency", 5000)
        ask(page, "A secret question?", picture)
        open_tab(page, "Live")
        page.wait_for_selector("#live table")
        shown = page.inner_text("#live")
        assert all(
            said in shown for said in ("In time", "target 0.95", "Price of a miss", "Encoder cache hits", "Waiting")
        )
        assert "secret" not in page.inner_text("#live")
        page.locator("#live button[data-request]").first.click()
        page.wait_for_selector("#live-decision dl")
        assert "Plan" in page.inner_text("#live-decision")
        shoot(page, "ui-live")


def test_a_folder_becomes_a_gallery_that_can_be_sorted(
    browser: Any, server: DrainingServer, picture: Path, tmp_path: Path
) -> None:
    plain = tmp_path / "a-plain.png"
    Image.new("RGB", (64, 48), "navy").save(plain)
    (tmp_path / "m-broken.png").write_bytes(b"nothing")
    with chat_of(browser, server) as page:
        open_tab(page, "Explain a folder")
        page.set_input_files("#folder-files input[type=file]", [picture, plain, tmp_path / "m-broken.png"])
        page.wait_for_function("document.querySelector('#folder-files').innerText.includes('m-broken')")
        page.click("#explain")
        page.wait_for_function("document.querySelectorAll('#gallery li').length === 3")
        names = lambda: page.locator("#gallery li strong").all_inner_texts()  # noqa: E731
        assert names() == ["a-plain.png", "scene.png", "m-broken.png"]
        page.click("#sort input")
        page.get_by_role("option", name="visual tokens, most first").click()
        page.wait_for_function("document.querySelector('#gallery li strong').innerText === 'scene.png'")
        shoot(page, "ui-folder")


def test_an_export_has_the_conversation_and_its_decisions(browser: Any, server: DrainingServer, picture: Path) -> None:
    with chat_of(browser, server) as page:
        answer = ask(page, "What is shown?", picture)
        with page.expect_download() as waiting:
            page.click("#export")
        saved = json.loads(Path(waiting.value.path()).read_text("utf-8"))
        assert [message["role"] for message in saved["messages"]] == ["user", "assistant"]
        assert saved["messages"][0]["content"][0]["image_url"]["url"].startswith("data:image/png;base64,")
        assert answer.strip().startswith(saved["messages"][1]["content"].strip()[:10])
        assert saved["decisions"][0]["plan"]


def test_languages_come_from_the_browser_and_from_the_control(browser: Any, server: DrainingServer) -> None:
    with page_of(browser, server, "", leaves=True, locale="zh-CN") as page:
        page.wait_for_selector("#points table")  # Gradio complains of calls that are open as a page is left
        assert page.url.endswith("/ui/zh/") and "预算" in page.inner_text("body")
        page.wait_for_function("document.documentElement.lang === 'zh-Hans'")
        page.get_by_role("link", name="English").click()
        page.wait_for_url("**/ui/en/")
        page.wait_for_selector("#points table")
        assert page.url.endswith("/ui/en/") and "Budget" in page.inner_text("body")
        page.goto(page.url.removesuffix("en/"))
        assert page.url.endswith("/ui/en/")  # what was chosen holds


def test_a_question_can_be_asked_by_keyboard_alone(browser: Any, server: DrainingServer) -> None:
    with chat_of(browser, server) as page:
        page.keyboard.press("Tab")
        for _ in range(60):
            if page.evaluate("document.activeElement.matches('#message textarea')"):
                break
            page.keyboard.press("Tab")
        else:
            pytest.fail("the message box is not reached")
        page.keyboard.type("What is a square?")
        page.keyboard.press("Enter")
        page.wait_for_selector("#conversation .bot.message")
        page.wait_for_selector("#decision dl")


@pytest.mark.parametrize(("scheme", "size"), [("light", DESKTOP), ("dark", PHONE)], ids=["light", "dark-phone"])
def test_axe_finds_no_serious_fault_and_no_page_is_wider_than_the_screen(
    browser: Any, server: DrainingServer, picture: Path, axe: str, scheme: str, size: dict[str, int]
) -> None:
    # axe is put into the page, which the page's own policy for scripts would refuse.
    with chat_of(browser, server, color_scheme=scheme, viewport=size, bypass_csp=True) as page:
        attach(page, "#message", picture)
        found = faults_of(page, axe)
        ask(page, "What is shown?")
        page.click("#settings button")
        for name in TABS:
            open_tab(page, name)
            page.get_by_role("tabpanel").locator("visible=true").first.wait_for()
            found += [f"{name}: {fault}" for fault in faults_of(page, axe)]
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), name
        assert not found
        if scheme == "dark":
            open_tab(page, "Chat")
            shoot(page, "ui-chat-phone")


def test_with_a_key_the_page_asks_for_it_once_and_forgets_it_when_told(
    browser: Any, runner: AdaptiveRunner, axe: str
) -> None:
    with serving(runner, ui=True, api_key=KEY) as server:
        with page_of(browser, server, leaves=True, bypass_csp=True) as page:
            page.wait_for_selector("#key")
            assert not faults_of(page, axe)
            page.fill("#key", "another")
            page.press("#key", "Enter")
            page.wait_for_function("document.querySelector('#said').textContent.length > 0")
            page.fill("#key", KEY)
            page.press("#key", "Enter")
            page.wait_for_selector("#points table")
            page.reload()
            page.wait_for_selector("#points table")  # of this browser session, asked for once
            assert KEY not in json.dumps(page.evaluate("[{...localStorage}, {...sessionStorage}, document.cookie]"))
            page.click("#leave button")
            page.wait_for_selector("#key")
        with page_of(browser, server) as other:
            other.wait_for_selector("#key")


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("way", ["paste", "drop"])
def test_an_image_can_be_pasted_and_dropped(browser: Any, server: DrainingServer, way: str) -> None:
    bytes_of = list(png(Image.new("RGB", (64, 48), "teal")))
    with chat_of(browser, server) as page:
        page.evaluate(
            """([way, bytes]) => {
              const data = new DataTransfer();
              data.items.add(new File([new Uint8Array(bytes)], "brought.png", { type: "image/png" }));
              const box = document.querySelector("#message textarea");
              const event = way === "paste"
                ? new ClipboardEvent("paste", { clipboardData: data, bubbles: true, cancelable: true })
                : new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true });
              box.dispatchEvent(event);
            }""",
            [way, bytes_of],
        )
        page.wait_for_selector("#message .thumbnail-item")
