"""The web UI of a gateway in a real browser, before a real server of the reference model."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import CHROMIUM, ask, attach, chat_of, open_tab, page_of, shoot, slide, taken
from gateway import gateway
from PIL import Image, ImageDraw
from server import serving
from upstream import engine

from adaptive_fusion import AdaptiveRunner
from adaptive_fusion.rollout.arms import Arms
from adaptive_fusion.rollout.experiment import Experiment
from adaptive_fusion.rollout.live import Live
from adaptive_fusion.serving.run import DrainingServer

pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytest.importorskip("gradio", reason="the extra ui is not installed")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")


@pytest.fixture(scope="module")
def log_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ui") / "gateway.jsonl"


@pytest.fixture(scope="module")
def before(log_file: Path) -> Iterator[DrainingServer]:
    """A gateway with pages before a server without."""
    runner = AdaptiveRunner.from_pretrained("reference", policy="native")
    with serving(runner, mode="adaptive") as behind:
        upstream = f"http://127.0.0.1:{behind.port}"
        with gateway(upstream, "balanced", log_file, processor="qwen3-vl", ui=True) as found:
            yield found


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture of plain shapes, of which few pixels are enough."""
    path = tmp_path_factory.mktemp("media") / "large.png"
    image = Image.new("RGB", (1600, 1200), (240, 240, 240))
    for place, colour in enumerate(("red", "navy", "green")):
        left, top = 150 + 450 * place, 100 + 250 * place
        ImageDraw.Draw(image).rectangle((left, top, left + 400, top + 400), fill=colour)
    image.save(path)
    return path


def test_a_gateway_shows_its_own_plan_beside_the_engines_answer(
    browser: Any, before: DrainingServer, large: Path, log_file: Path
) -> None:
    with chat_of(browser, before) as page:
        answer = ask(page, "What colour is it?", large)
        assert answer.strip() and page.locator("#conversation img").count() == 1
        told = json.loads(page.locator("label", has_text="As JSON").locator("textarea").first.input_value())
        rows = [json.loads(line) for line in log_file.read_text("utf-8").splitlines()]
        logged = next(row for row in rows if row.get("request_id") == told["request_id"])
        assert logged["point"] == told["point"] and told["plan"] != "native@1" and told["policy"] == "balanced"
        shown = page.inner_text("#decision")
        for said in ("Lane", told["plan"], "P(complex)", "Predicted", "Actual", told["media"][0]["given"]):
            assert said in shown
        assert "GiB" not in shown and page.locator("#decision .af-pictures img").count() == 2
        page.click("#down")
        page.wait_for_function("document.querySelector('#said').innerText.includes('in the log')")
        shoot(page, "ui-gateway", "#decision")


def test_controls_are_those_that_a_gateway_can_keep(browser: Any, before: DrainingServer, large: Path) -> None:
    with chat_of(browser, before) as page:
        attach(page, "#message", large)
        page.wait_for_function("document.querySelectorAll('#points tr').length > 3")
        assert page.locator("#latency").is_visible() and page.locator("#ttft").is_visible()
        for name in ("vram", "policy", "model"):
            assert not page.locator(f"#{name}").is_visible()
        free = taken(page)
        slide(page, "latency", 1)
        page.wait_for_function(
            "free => document.querySelector('#points tr.af-marked th')?.innerText !== free", arg=free
        )


def test_the_other_pages_have_what_a_gateway_says(browser: Any, before: DrainingServer, large: Path) -> None:
    with chat_of(browser, before) as page:
        open_tab(page, "Compare")
        attach(page, "#compare-message", large)
        page.fill("#compare-message textarea", "What colour is it?")
        page.press("#compare-message textarea", "Enter")
        page.wait_for_selector("#differences p")
        native, adaptive = (page.inner_text(f"#compare-{side}") for side in ("native", "adaptive"))
        assert "native@1\n" in native and "native@1\n" not in adaptive and "First token" in native
        open_tab(page, "Live")
        page.wait_for_selector("#live table")
        page.locator("#live button[data-request]").first.click()
        page.wait_for_selector("#live-decision dl")
        open_tab(page, "Explain a folder")
        page.set_input_files("#folder-files input[type=file]", [large])
        page.wait_for_function("document.querySelector('#folder-files').innerText.includes('large')")
        page.click("#explain")
        page.wait_for_selector("#gallery li img")
        assert "Visual tokens" in page.inner_text("#gallery")
        open_tab(page, "Rollout")
        page.wait_for_function("document.querySelector('#rollout').innerText.includes('no experiments')")


def test_an_engine_that_has_gone_is_told_and_the_question_stays(browser: Any) -> None:
    with gateway("http://127.0.0.1:1", ui=True) as alone, page_of(browser, alone) as page:
        page.wait_for_selector("#message textarea")
        page.wait_for_selector("#said [role=alert]")
        page.fill("#message textarea", "Hello?")
        page.press("#message textarea", "Enter")
        page.wait_for_function("document.querySelector('#message textarea').value === 'Hello?'")
        assert "upstream_unreachable" in page.inner_text("#said")


def test_the_rollout_page_moves_an_experiment_of_the_gateway(browser: Any, tmp_path: Path) -> None:
    live = Live(tmp_path / "rollout.db")
    with (
        engine() as behind,  # which lists no models
        gateway(behind.url, "balanced", None, lambda side: Arms(side, live), api_key="k-123", ui=True) as server,
        page_of(browser, server) as page,
    ):
        live.start(Experiment("try", "ab", "quality", steps=(0.5,), least=()))
        page.fill("#key", "k-123")
        page.press("#key", "Enter")
        page.wait_for_function("document.querySelector('#said')?.innerText.includes('names no model')")
        open_tab(page, "Rollout")
        page.wait_for_function("document.querySelector('#rollout').innerText.includes('try (ab)')")
        page.locator("#rollout-sure input").check()
        page.click("#promote")
        page.wait_for_function("document.querySelector('#rollout').innerText.includes('promoted')")
