"""Experiments before an engine: arms have policies and controllers of their own, what is worse is taken back."""

import asyncio
import base64
import io
from pathlib import Path
from typing import Any

import httpx
from gateway import client_of, gateway, inside, url_of
from PIL import Image
from server import asking, image, text
from upstream import engine
from waits import MOST_S, until

from adaptive_fusion.rollout.arms import Arms
from adaptive_fusion.rollout.experiment import Experiment
from adaptive_fusion.rollout.guardrails import guardrails_from
from adaptive_fusion.rollout.live import Live

KEY = "k-123"
SENT = {"authorization": f"Bearer {KEY}"}


def test_a_canary_that_people_dislike_is_taken_back_by_itself(tmp_path: Path) -> None:
    file = tmp_path / "r.db"

    def made(side: Any) -> Arms:
        return Arms(side, Live(file))

    with engine() as behind, gateway(behind.url, "balanced", tmp_path / "log.jsonl", made, api_key=KEY) as server:
        rails = guardrails_from([{"name": "ratings"}])
        Live(file).start(Experiment("try", "ab", "quality", steps=(0.5,), least=(), guardrails=rails))
        client, own = client_of(server).with_options(api_key=KEY), url_of(server, "/v1/adaptive_fusion")
        arms, status = {}, "running"
        for _ in range(60):
            raw = client.chat.completions.with_raw_response.create(
                model="m", messages=asking(image(), text("What is shown?")), max_tokens=4
            )
            arm = raw.headers["x-adaptive-fusion-arm"]
            arms[arm] = raw.headers["x-adaptive-fusion-policy"]
            rating = "down" if arm == "canary" else "up"
            decided = httpx.get(f"{own}/decisions?n=1", headers=SENT, timeout=MOST_S).json()["decisions"][0]
            said = {"request_id": decided["request_id"], "rating": rating}
            assert httpx.post(f"{own}/feedback", json=said, headers=SENT, timeout=MOST_S).json()["recorded"]
            found = httpx.get(f"{own}/rollout", headers=SENT, timeout=MOST_S).json()
            status = found["status"]
            if status != "running":
                break
        assert status == "rolled_back" and "ratings is worse" in found["history"][-1]["why"]
        assert arms == {"control": "balanced", "canary": "quality"}
        trials = inside(server).trials
        assert isinstance(trials, Arms) and trials.begin().runner() is inside(server).side


def test_an_engine_that_fails_for_the_canary_alone_takes_it_back(tmp_path: Path) -> None:
    """A failure of the engine counts for the arm whose request it was."""
    arms = Arms(None, Live(tmp_path / "r.db"))  # type: ignore[arg-type]
    arms.live.start(Experiment("try", "ab", "quality", steps=(0.5,), least=()))
    for _ in range(40):
        trial = arms.begin()
        if trial.given.arm == "canary":
            trial.failed(RuntimeError("the engine answered with status 502"), {})
        else:
            arms.live.finished(trial.given, None, {"errors": 0.0, "dead": 0.0})
    status = arms.status()
    assert status["status"] == "rolled_back" and status["arms"]["canary"]["requests"] <= 10


def test_a_shadow_asks_the_engine_again_and_answers_nobody(tmp_path: Path) -> None:
    """What the old policy makes smaller is seen worse here; the new one sends everything as it came."""
    file, size = tmp_path / "r.db", (1600, 1200)

    def words(body: Any) -> list[str]:
        url = body["messages"][0]["content"][0]["image_url"]["url"]
        with Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) as shown:
            return ["a red square"] if shown.size == size else ["a red circle"]

    with (
        engine(words=words) as behind,
        gateway(behind.url, "balanced", None, lambda side: Arms(side, Live(file))) as at,
    ):
        rails = guardrails_from([{"name": "quality"}, {"name": "errors"}])
        live = Live(file)
        live.start(Experiment("beside", "shadow", "native", steps=(1.0,), least=(), guardrails=rails))
        for number in range(3):
            said = client_of(at).chat.completions.create(
                model="m",
                messages=asking(image(*size), text(f"Picture {number}. What colour is it?")),
                max_tokens=4,
                temperature=0.7,
            )
            assert said.choices[0].message.content == "a red circle"
            until(lambda: live.status()["arms"]["canary"]["requests"] == number + 1, "the pair")  # noqa: B023
        rows = {row["name"]: row for row in live.status()["guardrails"]}
        assert rows["quality"]["canary"]["mean"] == 1.0 and abs(rows["quality"]["control"]["mean"] - 2 / 3) < 1e-6
        assert rows["errors"]["canary"]["mean"] == 0.0
        asked = [got.json for got in behind.got]
        assert [each["temperature"] for each in asked] == [0.7, 0, 0] * 3  # full size once for both uses of it


def test_a_shadow_makes_room_for_whoever_comes(tmp_path: Path) -> None:
    file = tmp_path / "r.db"
    with engine() as behind, gateway(behind.url, "balanced", None, lambda side: Arms(side, Live(file))) as at:
        answer = behind._whole

        async def slow(got: Any, asked: Any, receive: Any, send: Any) -> None:
            if asked["temperature"] == 0:
                await asyncio.Event().wait()  # until it is cut off
            await answer(got, asked, receive, send)

        behind._whole = slow  # type: ignore[method-assign]
        live = Live(file)
        live.start(Experiment("beside", "shadow", "native", steps=(1.0,), least=()))

        def ask() -> Any:
            messages = asking(image(1600, 1200), text("What colour is it?"))
            return client_of(at).chat.completions.create(model="m", messages=messages, max_tokens=4, temperature=1)

        ask()
        until(lambda: len(behind.got) == 2, "the shadow's first question")
        trials = inside(at).trials
        assert isinstance(trials, Arms)
        assert ask().choices[0].message.content and live.status()["arms"]["canary"]["requests"] == 0
        until(lambda: trials._beside is not None and trials._beside.interrupted, "the shadow to end")  # type: ignore[attr-defined]
        until(lambda: len(behind.got) >= 4, "the shadow to begin again")
