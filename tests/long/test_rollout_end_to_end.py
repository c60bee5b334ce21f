"""Rollouts with real requests, through the server and through the gateway: what is worse goes by itself, what is better
gets everything, and `rollout status`, `history` and the UI's page in a real browser say so."""

import base64
import io
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import pytest
from gateway import gateway
from PIL import Image
from server import asking, image, serving, text
from typer.testing import CliRunner
from upstream import engine
from waits import MOST_S

from adaptive_fusion import AdaptiveRunner
from adaptive_fusion.cli import app
from adaptive_fusion.rollout.arms import Arms
from adaptive_fusion.rollout.experiment import Experiment
from adaptive_fusion.rollout.guardrails import guardrails_from
from adaptive_fusion.rollout.live import Live

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
KEY = "a key of these tests"
SENT = {"authorization": f"Bearer {KEY}"}
WAIT_MS = 120_000
MOST = 600
"""Requests after which a rollout that has not ended has failed."""
NEW, OLD = "reference-balanced", "native"
"""Policies of the server: full compute, and what takes a fraction of its time."""


@dataclass
class Place:
    """Where requests go, and whose answers people like there.

    Attributes:
        file: Of the experiments.
        port: Of a server or gateway on this machine.
        size: Of the images, width and height.
        deadline_ms: What requests ask for: full compute is too slow for it.
    """

    file: Path
    port: int
    size: tuple[int, int]
    deadline_ms: float = 1e6

    def call(self, method: str, path: str, body: Any = None) -> httpx.Response:
        return httpx.request(method, f"http://127.0.0.1:{self.port}{path}", json=body, headers=SENT, timeout=MOST_S)

    def ask(self, number: int) -> None:
        """One real request with a deadline; one that is refused as too late is missed too."""
        shown, said = image(*self.size), text(f"Picture {number}. What colour is it?")
        body = {"model": "reference", "messages": asking(shown, said), "max_tokens": 1}
        self.call("POST", "/v1/chat/completions", {**body, "adaptive_fusion": {"latency_ms": self.deadline_ms}})

    def rate(self, number: int, liked: str) -> None:
        """One request, whose answer is liked if it is by that policy."""
        self.ask(number)
        own = "/v1/adaptive_fusion"
        row = self.call("GET", f"{own}/decisions?n=1").json()["decisions"][0]
        rating = "up" if row["policy"] == liked else "down"
        said = self.call("POST", f"{own}/feedback", {"request_id": row["request_id"], "rating": rating})
        assert said.json()["recorded"]

    def until_it_ends(self, ask: Callable[[int], None]) -> dict[str, Any]:
        """What `status` says once the experiment that runs has ended."""
        for number in range(MOST):
            ask(number)
            if self.live["status"] != "running":
                return self.rollout("status", "--json")[0]
        pytest.fail(f"after {MOST} requests it still runs: {self.live}")

    @property
    def live(self) -> dict[str, Any]:
        return dict(self.call("GET", "/v1/adaptive_fusion/rollout").json())

    def rollout(self, *arguments: str) -> list[dict[str, Any]]:
        """What the command prints, as JSON."""
        done = CliRunner().invoke(app, ["rollout", *arguments, "--file", str(self.file)])
        assert done.exit_code == 0, done.output
        return [json.loads(line) for line in done.stdout.splitlines()]

    def start(self, name: str, canary: str, *rails: dict[str, Any], **options: Any) -> None:
        given = {"kind": "ab", "steps": (0.5,), "least": (), **options}
        Live(self.file).start(Experiment(name, canary=canary, guardrails=guardrails_from(list(rails)), **given))


@contextmanager
def a_server(folder: Path, policy: str, ui: bool = False) -> Iterator[Place]:
    """The reference model behind a server; its deadline lies between what the two policies take on this machine."""
    runner = AdaptiveRunner.from_pretrained("reference", policy=policy, log=folder / "log.jsonl")
    place = Place(folder / "rollout.db", 0, (320, 240))
    with serving(runner, Arms(runner, Live(place.file)), api_key=KEY, ui=ui) as server:
        place.port = server.port
        took = []
        for name in (OLD, NEW):
            body = {"model": "reference", "messages": asking(image(*place.size), text("?")), "max_tokens": 1}
            body["adaptive_fusion"] = {"policy": name}
            each = [place.call("POST", "/v1/chat/completions", body).json()["adaptive_fusion"] for _ in range(4)]
            took.append(median(answer["actual"]["latency_ms"] for answer in each[1:]))
        assert took[0] > 1.5 * took[1]
        place.deadline_ms = (took[0] * took[1]) ** 0.5
        yield place


@contextmanager
def a_gateway(folder: Path, policy: str) -> Iterator[Place]:
    """An engine that takes too long for images of full size, and a gateway before it."""
    place = Place(folder / "rollout.db", 0, (1600, 1200), 150.0)

    def words(body: Any) -> list[str]:
        url = body["messages"][0]["content"][0]["image_url"]["url"]
        with Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) as shown:
            if shown.size == place.size:
                time.sleep(0.2)
        return ["one"]

    log = folder / "log.jsonl"
    with (
        engine(words=words) as behind,
        gateway(behind.url, policy, log, lambda side: Arms(side, Live(place.file)), api_key=KEY) as server,
    ):
        place.port = server.port
        yield place


WAYS = {"server": (a_server, NEW), "gateway": (a_gateway, "balanced")}
MISSES, LIKED = {"name": "deadline_misses"}, {"name": "ratings"}


@pytest.mark.parametrize("way", WAYS)
def test_what_is_worse_is_taken_back_and_what_is_better_gets_everything(
    tmp_path: Path, way: str, share_of: Callable[[int], int]
) -> None:
    """Full compute misses the deadline: as canary it goes, as the old policy it makes room."""
    made, good = WAYS[way]
    folders = [tmp_path / name for name in ("good", "slow")]
    for folder in folders:
        folder.mkdir()
    with made(folders[0], good) as place:
        place.start("slow", OLD, MISSES)
        found = place.until_it_ends(place.ask)
        assert (found["status"], found["share"]) == ("rolled_back", 0.0)
        last = place.rollout("history", "--json")[-1]
        assert (last["experiment"], last["who"]) == ("slow", "adaptive-fusion")
        assert "deadline_misses is worse" in last["why"]
        place.start("disliked", OLD, LIKED)
        found = place.until_it_ends(lambda number: place.rate(number, good))
        assert found["status"] == "rolled_back" and "ratings is worse" in found["history"][-1]["why"]
        seen = found["arms"]["canary"]["requests"]
        for number in range(5):
            place.ask(number)
        assert place.live["arms"]["canary"]["requests"] == seen  # nobody is served by it any more
    with made(folders[1], OLD) as place:
        steps, least = (0.3, 0.6, 1.0), (5, share_of(50))
        errors = {"name": "errors", "tolerance": 0.05 if share_of(10) == 10 else None}
        place.start("quick", good, MISSES, errors, kind="canary", steps=steps, least=least)
        found = place.until_it_ends(place.ask)
        assert found["status"] == "promoted" and [row["share"] for row in found["history"]] == [*steps]
        place.ask(0)
        decided = place.call("GET", "/v1/adaptive_fusion/decisions?n=1").json()["decisions"][0]
        assert decided["policy"] == good


@contextmanager
def rollout_page(place: Place) -> Iterator[Any]:
    """The UI's rollout page in a browser that knows the key."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with sync_api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_context(viewport={"width": 1280, "height": 900}).new_page()
        page.set_default_timeout(WAIT_MS)
        page.goto(f"http://127.0.0.1:{place.port}/ui/en/")
        page.fill("#key", KEY)
        page.press("#key", "Enter")
        page.wait_for_selector("#points table")
        tab = page.get_by_role("tab", name="Rollout")
        if not tab.count() or not tab.first.is_visible():
            page.locator(".overflow-menu > button").first.click()
            page.locator(".overflow-dropdown button", has_text="Rollout").click()
        else:
            tab.first.click()
        page.wait_for_selector("#rollout table")
        yield page
        browser.close()


def shows(page: Any, *words: str) -> None:
    """The page comes to say all of it, by itself: it looks again and again."""
    page.wait_for_function(
        "words => words.every(word => document.querySelector('#rollout').innerText.includes(word))", arg=list(words)
    )


def press(page: Any, name: str, sure: bool, says: str) -> None:
    """Press a button, with or without the box ticked first, until the page says of it what it is to say."""
    if sure:
        page.locator("#rollout-sure input").check()
    page.click(f"#{name}")
    page.wait_for_function("said => document.querySelector('#rollout-said').innerText.includes(said)", arg=says)


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")
def test_the_page_shows_a_rollout_and_moves_it_when_told_twice(tmp_path: Path) -> None:
    pytest.importorskip("gradio", reason="the extra ui is not installed")
    numbers = count()
    with a_server(tmp_path, NEW, ui=True) as place:
        place.start("first", "reference-quality", LIKED)
        with rollout_page(place) as page:
            shows(page, "first (ab)", "running", "reference-quality", "ratings")
            press(page, "promote", sure=False, says="Tick the box")
            assert place.live["status"] == "running"
            press(page, "promote", sure=True, says="Done")
            shows(page, "promoted", "over HTTP", "100%")
            assert not page.locator("#rollout-sure input").is_checked()  # each time it is asked anew
            press(page, "abort", sure=False, says="Tick the box")
            assert place.live["status"] == "promoted"
            press(page, "abort", sure=True, says="Done")
            shows(page, "aborted")
            place.start("worse", "reference-quality", LIKED)
            found = place.until_it_ends(lambda _: place.rate(next(numbers), NEW))
            assert found["status"] == "rolled_back"
            shows(page, "worse (ab)", "rolled_back", "ratings is worse", "adaptive-fusion")
            if (shots := os.environ.get("ADAPTIVE_FUSION_SCREENSHOTS")) is not None:
                page.screenshot(path=Path(shots) / "ui-rollout.png")
        changed = [(row["experiment"], row["status"], row["who"]) for row in place.rollout("history", "--json")]
        assert changed[1:3] == [("first", "promoted", "over HTTP"), ("first", "aborted", "over HTTP")]
        refused = httpx.post(f"http://127.0.0.1:{place.port}/v1/adaptive_fusion/rollout/abort", json={}, timeout=MOST_S)
        assert refused.status_code == 401


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")
def test_the_page_shows_what_a_gateway_tries_in_the_same_file(tmp_path: Path) -> None:
    pytest.importorskip("gradio", reason="the extra ui is not installed")
    with a_server(tmp_path, NEW, ui=True) as watching, a_gateway(tmp_path, "balanced") as place:
        place.start("slow", OLD, MISSES)
        with rollout_page(watching) as page:
            shows(page, "slow (ab)", "running")
            assert place.until_it_ends(place.ask)["status"] == "rolled_back"
            shows(page, "rolled_back", "deadline_misses is worse")
