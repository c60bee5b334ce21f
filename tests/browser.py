"""A page of the web UI in Chromium, and what people do there."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from adaptive_fusion.serving.run import DrainingServer

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SHOTS = os.environ.get("ADAPTIVE_FUSION_SCREENSHOTS")
"""Set to a folder, such as docs/img, the tests leave pictures for the docs there."""
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
WAIT_MS = 120_000

LEAVING = ("BodyStreamBuffer was aborted", "Connection errored out", "signal is aborted without reason")
"""What Gradio's script says of calls that are open as a page is left."""


@contextmanager
def page_of(
    browser: Any, server: DrainingServer, path: str = "en/", leaves: bool = False, **options: Any
) -> Iterator[Any]:
    """An open page in a browser session of its own, which asks no other site and has no error in its console; but for
    what is said of open calls where the page `leaves`."""
    context = browser.new_context(**{"viewport": DESKTOP, **options})
    page = context.new_page()
    page.set_default_timeout(WAIT_MS)
    faults: list[str] = []
    page.on("console", lambda said: faults.append(said.text) if said.type == "error" else None)
    page.on("pageerror", lambda error: faults.append(str(error)))
    home = f"http://127.0.0.1:{server.port}/"
    own = (home, f"blob:{home}", "data:")
    page.on("request", lambda asked: None if asked.url.startswith(own) else faults.append(asked.url))
    page.goto(f"{home}ui/{path}")
    try:
        yield page
        unexpected = [said for said in faults if not (leaves and any(words in said for words in LEAVING))]
        assert not unexpected, unexpected
    finally:
        context.close()


@contextmanager
def chat_of(browser: Any, server: DrainingServer, **options: Any) -> Iterator[Any]:
    """The chat page, once its points are there."""
    with page_of(browser, server, **options) as page:
        page.wait_for_selector("#message textarea")
        page.wait_for_selector("#points table")
        yield page


def attach(page: Any, box: str, *files: Path | dict[str, Any]) -> None:
    """Bring files to a message box, and wait until they are there."""
    page.set_input_files(f"{box} input[type=file]", list(files))
    page.wait_for_function(
        "([box, n]) => document.querySelectorAll(`${box} .thumbnail-item`).length >= n", arg=[box, len(files)]
    )


def ask(page: Any, question: str, *files: Path | dict[str, Any]) -> str:
    """Ask, and wait for the whole answer and its decision."""
    before = page.locator("#conversation .bot.message").count()
    if files:
        attach(page, "#message", *files)
    page.fill("#message textarea", question)
    page.press("#message textarea", "Enter")
    page.wait_for_function("n => document.querySelectorAll('#conversation .bot.message').length > n", arg=before)
    page.wait_for_function("n => document.querySelector('#chosen input')?.value === String(n + 1)", arg=before)
    page.wait_for_selector("#decision dl")
    return str(page.locator("#conversation .bot.message").last.inner_text())


def open_tab(page: Any, name: str) -> None:
    """Open a page by its tab, which may stand in the menu of those that have no room."""
    tab = page.get_by_role("tab", name=name)
    if not tab.count() or not tab.first.is_visible():
        page.locator(".overflow-menu > button").first.click()
        page.locator(".overflow-dropdown button", has_text=name).click()
    else:
        tab.first.click()


def slide(page: Any, name: str, value: float) -> None:
    box = page.locator(f"#{name} input[type=number]")
    box.fill(str(value))
    box.press("Tab")


def taken(page: Any) -> str:
    """The plan that would be taken."""
    return str(page.inner_text("#points tr.af-marked th"))


def shoot(page: Any, name: str, part: str = "") -> None:
    """A picture for the docs, of the page or a part of it."""
    if SHOTS is not None:
        Path(SHOTS).mkdir(parents=True, exist_ok=True)
        page.evaluate("scrollTo(0, 0)")
        (page.locator(part) if part else page).screenshot(path=Path(SHOTS) / f"{name}.png")
