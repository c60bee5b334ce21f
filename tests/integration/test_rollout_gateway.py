"""Experiments before an engine: arms have policies and controllers of their own, what is worse is taken back."""

from pathlib import Path
from typing import Any

import httpx
from gateway import client_of, gateway, inside, url_of
from server import asking, image, text
from upstream import engine
from waits import MOST_S

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
