"""Experiments through a real server: what is worse is taken back by itself, what is no worse gets everything."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import OpenAI
from server import asking, client_of, image, serving, text
from typer.testing import CliRunner
from waits import MOST_S, until

from adaptive_fusion.cli import app
from adaptive_fusion.policy.policy import Policy
from adaptive_fusion.rollout.arms import Arms
from adaptive_fusion.rollout.experiment import Experiment
from adaptive_fusion.rollout.guardrails import guardrails_from
from adaptive_fusion.rollout.live import Live
from adaptive_fusion.runner import AdaptiveRunner

KEY = "k-123"
SENT = {"authorization": f"Bearer {KEY}"}
get, post = partial(httpx.get, timeout=MOST_S, headers=SENT), partial(httpx.post, timeout=MOST_S, headers=SENT)


@pytest.fixture
def runner(reference_model: Any, processor: Any, tmp_path: Path) -> AdaptiveRunner:
    return AdaptiveRunner(reference_model, processor, policy="reference-balanced", log=tmp_path / "log.jsonl")


@contextmanager
def served(runner: AdaptiveRunner, file: Path) -> Iterator[tuple[OpenAI, str]]:
    with serving(runner, Arms(runner, Live(file)), api_key=KEY, max_new_tokens=1) as server:
        yield client_of(server, KEY), f"http://127.0.0.1:{server.port}/v1/adaptive_fusion"


def ask(client: OpenAI, said: str = "What is shown?", **options: Any) -> dict[str, Any]:
    reply = client.chat.completions.create(
        model="reference", messages=asking(image(32, 32), text(said)), max_tokens=1, **options
    )
    found: dict[str, Any] = (reply.model_extra or {})["adaptive_fusion"]
    return found


def trial(canary: str, *rails: dict[str, Any], **options: Any) -> Experiment:
    given = {"kind": "ab", "steps": (0.5,), "least": (), **options}
    return Experiment("try", canary=canary, guardrails=guardrails_from(list(rails)), **given)


def test_a_canary_that_people_dislike_is_taken_back_by_itself(runner: AdaptiveRunner, tmp_path: Path) -> None:
    file = tmp_path / "r.db"
    with served(runner, file) as (client, own):
        assert "rollout" not in ask(client)
        Live(file).start(trial("reference-quality", {"name": "ratings"}))
        policies, rated = {}, []
        for _ in range(60):
            found = ask(client)
            arm = found["rollout"]["arm"]
            policies[arm] = found["policy"]
            rating = {"request_id": found["request_id"], "rating": "down" if arm == "canary" else "up"}
            rated.append(post(f"{own}/feedback", json={**rating, "comment": "of somebody"}).json())
            if get(f"{own}/rollout").json()["status"] != "running":
                break
        status = get(f"{own}/rollout").json()
        assert status["status"] == "rolled_back" and "ratings is worse" in status["history"][-1]["why"]
        assert policies == {"control": "reference-balanced", "canary": "reference-quality"}
        assert {ask(client)["rollout"]["arm"] for _ in range(3)} == {"control"}
        # The same rating again changes nothing, an unknown request is refused, a comment is not kept.
        assert not post(f"{own}/feedback", json=rating).json()["recorded"]
        assert post(f"{own}/feedback", json={**rating, "request_id": "x"}).status_code == 404
        assert post(f"{own}/feedback", json={**rating, "comment": 7}).status_code == 400
        assert rated[0] == {**rated[0], "recorded": True, "comment_kept": False}
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert sum(line.get("event") == "feedback" for line in lines) == len(rated)
    assert "of somebody" not in (tmp_path / "log.jsonl").read_text()


def test_a_canary_that_is_no_worse_gets_everything_and_keeps_it_over_a_restart(
    runner: AdaptiveRunner, tmp_path: Path
) -> None:
    file, rail = tmp_path / "r.db", {"name": "errors", "tolerance": None}
    with served(runner, file) as (client, own):
        Live(file).start(trial("reference-quality", rail, kind="canary", steps=(0.4, 0.7, 1.0), least=(2, 3)))
        for _ in range(60):
            ask(client)
            if get(f"{own}/rollout").json()["status"] == "promoted":
                break
        status = get(f"{own}/rollout").json()
        assert [row["share"] for row in status["history"]] == [0.4, 0.7, 1.0]
        assert ask(client)["policy"] == "reference-quality"
        # Who names a policy or a point is in no experiment.
        named = ask(client, extra_body={"adaptive_fusion": {"policy": "native"}})
        assert named["policy"] == "native" and "rollout" not in named
    with served(runner, file) as (client, own):
        assert ask(client)["policy"] == "reference-quality"
        back = post(f"{own}/rollout/abort", json={"why": "enough"}).json()
        assert (back["changed"], back["status"], back["history"][-1]["who"]) == (True, "aborted", "over HTTP")
        assert ask(client)["policy"] == "reference-balanced"
        assert post(f"{own}/rollout/abort", json={"reason": "?"}).status_code == 400


def test_each_arm_has_its_own_controller_and_an_audit_runs_natively(runner: AdaptiveRunner, tmp_path: Path) -> None:
    arms = Arms(runner, Live(tmp_path / "r.db"))
    arms.live.start(trial("reference-quality", {"name": "errors"}))
    trials = [arms.begin() for _ in range(20)]
    canary = next(each.runner() for each in trials if each.given.arm == "canary")
    assert canary.controller is not runner.controller and canary.conversations is not runner.conversations
    assert canary.model is runner.model and canary.state() == runner.state()
    before = runner.state()
    canary.chat(None, "?", max_new_tokens=1)
    assert canary.state() != before == runner.state()
    arms.save()
    again = Arms(runner, Live(tmp_path / "r.db"))
    given = next(each.given for each in trials if each.given.arm == "canary")
    assert again.runner_for(given).state() == canary.state()
    arms.live.abort()
    arms.live.start(Experiment("look", "audit", "reference-quality", steps=(1.0,), least=()))
    audit = arms.begin()
    assert audit.audit and audit.runner().policy.name == "reference-quality"


def test_a_canary_that_cannot_be_loaded_is_taken_back_at_its_first_request(
    runner: AdaptiveRunner, tmp_path: Path
) -> None:
    folder = tmp_path / "new"
    Policy.load("reference-quality").save(folder)
    file = tmp_path / "r.db"
    with served(runner, file) as (client, own):
        Live(file).start(trial(str(folder), {"name": "errors"}, steps=(0.999,)))
        (folder / "policy.toml").write_text("broken")
        assert ask(client)["policy"] == "reference-balanced"
        said = get(f"{own}/rollout").json()["history"][-1]["why"]
        assert said.startswith("the canary cannot be loaded") and str(tmp_path) not in said


def test_without_a_file_or_a_key_there_is_nothing_to_change(runner: AdaptiveRunner, tmp_path: Path) -> None:
    with serving(runner, api_key=KEY) as server:
        own = f"http://127.0.0.1:{server.port}/v1/adaptive_fusion"
        assert get(f"{own}/rollout").json()["error"]["code"] == "no_rollout"
    with serving(runner, Arms(runner, Live(tmp_path / "r.db"))) as server:
        own = f"http://127.0.0.1:{server.port}/v1/adaptive_fusion"
        assert get(f"{own}/rollout").json()["status"] == "none"
        refused = post(f"{own}/rollout/promote", json={})
        assert refused.status_code == 403 and refused.json()["error"]["code"] == "key_required"


def test_the_command_starts_shows_and_ends_an_experiment(tmp_path: Path) -> None:
    file, run = str(tmp_path / "r.db"), CliRunner()

    def rollout(*arguments: str) -> Any:
        return run.invoke(app, ["rollout", *arguments, "--file", file])

    refused = rollout("start", "no-such-policy")
    assert refused.exit_code == 2 and "unknown policy 'no-such-policy'; expected one of" in refused.stderr
    missing = rollout("status")
    assert missing.exit_code == 2 and "r.db does not exist" in missing.stderr
    assert rollout("start", "native", "--steps", "x").exit_code == 2
    rails = tmp_path / "rails.json"
    rails.write_text('[{"name": "quality"}]')
    blind = rollout("start", "native", "--guardrails", str(rails))
    assert blind.exit_code == 2 and "of which only a shadow has values" in blind.stderr
    started = rollout("start", "native", "--name", "one", "--why", "to see", "--json")
    assert started.exit_code == 0, started.output
    found = json.loads(started.stdout)
    assert (found["status"], found["share"], found["experiment"]["canary"]) == ("running", 0.01, "native")
    assert rollout("start", "native").exit_code == 2
    shown = rollout("status")
    assert "one (canary of native): running, share 1%" in shown.stdout and "deadline_misses" in shown.stdout
    assert json.loads(rollout("promote", "--json").stdout)["status"] == "promoted"
    assert "aborted" in rollout("abort", "--why", "no").stdout
    rows = [json.loads(line) for line in rollout("history", "--json").stdout.splitlines()]
    assert [(row["status"], row["share"]) for row in rows] == [("running", 0.01), ("promoted", 1.0), ("aborted", 0.0)]
    assert rows[2]["why"] == "no" and "to see" in rollout("history").stdout


def test_a_shadow_judges_both_policies_on_the_same_requests_and_answers_none(
    runner: AdaptiveRunner, tmp_path: Path
) -> None:
    file = tmp_path / "r.db"
    with served(runner, file) as (client, own):
        Live(file).start(trial("native", {"name": "quality"}, kind="shadow", steps=(1.0,)))
        for index in range(3):
            found = ask(client, f"What is shown? {index}")
            assert (found["policy"], found["rollout"]["arm"]) == ("reference-balanced", "control")
            until(partial(labelled, own, index + 1), "its label")
        row = get(f"{own}/rollout").json()["guardrails"][0]
    assert row["canary"]["mean"] == 1.0  # what runs natively is what all else is compared with
    assert row["control"]["mean"] <= 1.0 and row["difference"]["high"] > 0.0
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert sum(line.get("event") == "shadow" for line in lines) == 3


def labelled(own: str, count: int) -> bool:
    return bool(get(f"{own}/rollout").json()["guardrails"][0]["canary"]["n"] == count)
