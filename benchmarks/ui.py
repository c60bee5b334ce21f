"""How soon the web UI is seen, and how much a page that stays open costs the server.

    python benchmarks/ui.py [--gateway] [--loads 5] [--requests 1000] [--json]

Against one server in a process of its own, or with ``--gateway`` a gateway before one, with a headless Chromium on the
same machine (playwright is needed, and chromium on the path):

- ``paint``: of ``--loads`` loads, each in a browser session without a cache, seconds until something is painted, until
  most of it is, and until the message box can be used;
- ``memory``: MiB by which the server grows while a page is open that shows what happens live, over ``--requests``
  answers with an image, half of them asked on a page and half by other clients, after a tenth as many that warm up.

Run it on an otherwise idle machine. Exit code 1 if anything falls short of its target.
"""

import argparse
import io
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, only this folder is on it

import httpx
from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

from benchmarks.load import ServerProcess, server_process
from benchmarks.serving import body, picture

PAINT_S, GROWTH_MIB = 2.0, 50.0
WAIT_MS = 120_000
TURNS = 20
"""Questions of a conversation on the page, after which a new one begins."""
_PAINTED = """() => new Promise((resolve) => new PerformanceObserver((list) => {
  const last = list.getEntries().at(-1).startTime;
  const first = performance.getEntriesByName("first-contentful-paint")[0];
  resolve([(first ? first.startTime : last) / 1e3, last / 1e3]);
}).observe({ type: "largest-contentful-paint", buffered: true }))"""


@contextmanager
def opened(browser: Browser, server: ServerProcess) -> Iterator[Page]:
    """The chat page in a session of its own, once a message can be written."""
    context = browser.new_context()
    page = context.new_page()
    page.set_default_timeout(WAIT_MS)
    try:
        page.goto(f"http://127.0.0.1:{server.port}/ui/en/")
        page.wait_for_selector("#message textarea")
        yield page
    finally:
        context.close()


def paint(browser: Browser, server: ServerProcess, loads: int) -> dict[str, float]:
    """Medians in seconds from the start of a load."""
    rows = []
    for _ in range(loads):
        with opened(browser, server) as page:
            usable = page.evaluate("performance.now() / 1e3")
            rows.append((*page.evaluate(_PAINTED), usable))
    first, most, usable = map(median, zip(*rows, strict=True))
    return {"first_paint_s": first, "largest_paint_s": most, "usable_s": usable}


def memory(browser: Browser, server: ServerProcess, requests: int) -> dict[str, float]:
    """MiB before and after the requests."""
    with opened(browser, server) as page, opened(browser, server) as live, httpx.Client(timeout=WAIT_MS) as client:
        live.get_by_role("tab", name="Live").click()
        ask(page, client, server, requests // 10)
        before = server.resident_mib()
        ask(page, client, server, requests)
        after = server.resident_mib()
    return {"requests": requests, "before_mib": before, "after_mib": after, "growth_mib": after - before}


def ask(page: Page, client: httpx.Client, server: ServerProcess, requests: int) -> None:
    """Half of them on the page, with an image at the beginning of each conversation."""
    shown = picture(160, 120)
    for index in range(requests // 2):
        client.post(server.url, json={**body(shown, 4), "model": "reference"}).raise_for_status()
        if index % TURNS == 0:
            if page.locator("#conversation .bot.message").count():  # else nothing says when it is cleared
                page.click("#clear")
                page.wait_for_function("document.querySelectorAll('#conversation .bot.message').length === 0")
            page.set_input_files(
                "#message input[type=file]", [{"name": f"{index}.png", "mimeType": "image/png", "buffer": drawn(index)}]
            )
            page.wait_for_selector("#message .thumbnail-item")
        page.fill("#message textarea", "What is shown?")
        page.press("#message textarea", "Enter")
        number = str(index % TURNS + 1)
        page.wait_for_function("n => document.querySelector('#chosen input')?.value === n", arg=number)


def drawn(index: int) -> bytes:
    """A picture that was not shown before."""
    buffer = io.BytesIO()
    Image.new("RGB", (160, 120), (index % 256, 100, 50)).save(buffer, "PNG")
    return buffer.getvalue()


def shortfalls(found: dict[str, Any]) -> list[str]:
    """What misses its target, in words."""
    said = []
    if found["paint"]["first_paint_s"] > PAINT_S:
        said.append(f"first paint after {found['paint']['first_paint_s']:.2f} s; expected {PAINT_S:g} s")
    if found["memory"]["growth_mib"] > GROWTH_MIB:
        said.append(f"the server grew by {found['memory']['growth_mib']:.0f} MiB; expected {GROWTH_MIB:g}")
    return said


@contextmanager
def served(folder: Path, *, gateway: bool) -> Iterator[ServerProcess]:
    """What has the pages."""
    if not gateway:
        with server_process(folder, "--ui", "--model", "reference") as server:
            yield server
        return
    before = folder / "gateway"
    before.mkdir()
    with (
        server_process(folder, "--model", "reference") as engine,
        server_process(before, "--ui", "--upstream", f"http://127.0.0.1:{engine.port}") as server,
    ):
        yield server


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gateway", action="store_true")
    parser.add_argument("--loads", type=int, default=5)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        with served(Path(folder), gateway=given.gateway) as server:
            found: dict[str, Any] = {"paint": paint(browser, server, given.loads)}
            found["memory"] = memory(browser, server, given.requests)
        browser.close()
    if given.json:
        print(json.dumps(found, indent=2))
    else:
        for part, values in found.items():
            print(part, ", ".join(f"{name} {value:.2f}" for name, value in values.items()))
    missed = shortfalls(found)
    for said in missed:
        print(said, file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
