"""The loop: from logs to a candidate, whatever kills it on the way; what is not better is refused with figures."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from learning_data import RUNGS, base_policy, oracle_labels, subject, write_jsonl
from typer.testing import CliRunner, Result

from adaptive_fusion.cli import app
from adaptive_fusion.errors import ConfigError
from adaptive_fusion.features.complexity import VERSION
from adaptive_fusion.learning.data.labels import shadow_record
from adaptive_fusion.learning.loop.learn import CANDIDATE, SNAPSHOT, STEPS, Loop
from adaptive_fusion.learning.loop.onward import SHADOWED, Seen
from adaptive_fusion.learning.loop.settings import Settings
from adaptive_fusion.learning.loop.state import READY, REFUSED, RELEASED, ROLLED_BACK, RUNNING, WAITING
from adaptive_fusion.policy.policy import Policy
from adaptive_fusion.rollout.events import Pair
from adaptive_fusion.rollout.experiment import Experiment
from adaptive_fusion.rollout.handover import WHO, Handover
from adaptive_fusion.rollout.ledger import Ledger
from adaptive_fusion.rollout.store import Store

TIME_S = 1_700_000_000.0


def decided(n: int, seed: int, policy: str = "base", propensity: float = 1 / 3) -> list[dict[str, Any]]:
    """Decisions that were drawn, each with a shadow run: the strong rung keeps more."""
    rng = np.random.default_rng(seed)
    found: list[dict[str, Any]] = []
    for i in range(n):
        known, taken, name = subject(rng.normal(size=4), seed * 10**6 + i), RUNGS[rng.integers(3)], f"{seed}-{i}"
        found.append(
            {
                "schema": 1,
                "time_s": TIME_S + i,
                "request_id": name,
                "content_hash": known.content_hash,
                "kind": "image",
                "features": dict(known.features),
                "features_version": VERSION,
                "lane": "weighted",
                "rung": taken,
                "policy": policy,
                "propensity": propensity,
                "explored": propensity < 1,
            }
        )
        quality = float(np.clip(0.95 - 0.1 * RUNGS.index(taken) + 0.05 * rng.normal(), 0, 1))
        found.append(shadow_record(name, {taken: quality}, time_s=TIME_S + i))
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loop")
    (folder / "logs").mkdir()
    write_jsonl(folder / "logs" / "labels.jsonl", oracle_labels(700, 1))
    write_jsonl(folder / "logs" / "decisions.jsonl", decided(200, 7))
    base_policy().save(folder / "base")
    return folder


def settings(policy: Path) -> Settings:
    return Settings(str(policy), estimators=("logistic",), n=40, jobs=1)


def a_loop(folder: Path, out: Path, **more: Any) -> Loop:
    return Loop([folder / "logs"], out, settings(folder / "base"), clock=lambda: TIME_S, **more)


@pytest.fixture(scope="module")
def whole(folder: Path) -> tuple[Path, dict[str, Any]]:
    """A round that nothing stopped."""
    loop = a_loop(folder, folder / "whole")
    state = loop.run()
    assert (state.status, state.round, set(state.done)) == (READY, 1, set(STEPS[:5])), state.reason
    return folder / "whole", state.done


def test_a_better_candidate_passes_and_what_is_needed_is_there(whole: tuple[Path, dict[str, Any]]) -> None:
    out, done = whole
    policy = Policy.load(out / "round-0001" / CANDIDATE)
    assert policy.name == done["train"]["candidate"] == "base-r1"
    assert done["judge"]["gain"]["low"] > 0
    assert 0 < done["judge"]["estimate"]["doubly_robust"]["low"] < done["judge"]["estimate"]["doubly_robust"]["high"]
    assert done["judge"]["in_service"]["decisions"] == done["judge"]["estimate"]["decisions"]
    assert not (out / "round-0001" / SNAPSHOT).exists()  # the copy of the logs goes with the round
    assert (out / "round-0001" / "drift.png").exists()


class Killed(BaseException):
    """A kill: nothing after it runs."""


@pytest.mark.parametrize("at", range(1, 5))
def test_a_run_that_is_killed_at_any_step_goes_on_and_ends_the_same(
    at: int, folder: Path, tmp_path: Path, whole: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed once its work is done and before that is noted, which is the worst moment."""
    loop = a_loop(folder, tmp_path)
    step = ("_collect", "_drift", "_train", "_judge")[at - 1]
    work: Callable[..., Any] = getattr(loop, step)

    def die(*given: Any) -> Any:
        work(*given)
        raise Killed

    monkeypatch.setattr(loop, step, die)
    with pytest.raises(Killed):
        loop.run()
    again = a_loop(folder, tmp_path)
    ahead = again.ahead()
    assert (ahead.round, ahead.resumes) == (1, STEPS[at - 1])
    state = again.run()
    assert (state.status, state.round) == (READY, 1) and state.done == whole[1]
    for name in ("policy.toml", "router.json", "training.json"):
        mine, other = (each / "round-0001" / CANDIDATE / name for each in (tmp_path, whole[0]))
        assert mine.read_bytes() == other.read_bytes()


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(folder: Path, tmp_path: Path) -> None:
    ahead = a_loop(folder, tmp_path / "new").ahead()
    assert (ahead.records, ahead.decisions, ahead.explored) == (1100, 200, 200)
    assert ahead.labels == {"oracle": 700, "shadow": 200} and ahead.policies == {"base": 200}
    assert (ahead.candidate, ahead.resumes, ahead.new) == ("base-r1", "", 1100)
    assert any("base stays in service" in change for change in ahead.changes)
    assert not (tmp_path / "new").exists()


def test_a_candidate_that_is_not_better_is_refused_with_figures(
    folder: Path, tmp_path: Path, whole: tuple[Path, dict[str, Any]]
) -> None:
    """The second round has the same logs, so it can only find what the first one found."""
    out = whole[0]
    same = settings(out / "round-0001" / CANDIDATE)
    state = Loop([folder / "logs"], tmp_path, same).run()
    assert state.status == REFUSED and state.done["train"]["candidate"] == "base-r1"
    assert "not better" in state.reason and "95 % interval" in state.reason
    following = Loop([folder / "logs"], tmp_path, same).run()
    assert following.round == 2 and [past["status"] for past in following.history] == [REFUSED]


def test_too_little_to_learn_from_is_said(folder: Path, tmp_path: Path) -> None:
    log = write_jsonl(tmp_path / "few.jsonl", oracle_labels(30, 2))
    state = Loop([log], tmp_path / "out", settings(folder / "base")).run()
    assert state.status == WAITING and "nothing can be learned yet" in state.reason


def test_folders_of_something_else_and_two_runs_at_once_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds a policy"):
        a_loop(folder, folder / "base")
    with pytest.raises(ConfigError, match="a file"):
        a_loop(folder, folder / "logs" / "labels.jsonl")
    loop = a_loop(folder, tmp_path)
    with loop.folder.alone(), pytest.raises(ConfigError, match="another run is at work"):
        loop.run()
    (tmp_path / "state.json").write_text("[]")
    with pytest.raises(ConfigError, match="no state of a loop"):
        loop.ahead()


class Experiments:
    """Experiments in memory, as the loop sees them."""

    def __init__(self) -> None:
        self.begun: dict[str, Seen] = {}
        self.told: list[tuple[str, ...]] = []

    def start(self, kind: str, name: str, candidate: str, control: str, estimate: object = None) -> None:
        assert Policy.load(candidate).name == name.removesuffix(f"-{kind}")
        self.told.append((kind, name, control))
        self.begun[name] = Seen("running", "", 0)

    def look(self, name: str) -> Seen | None:
        return self.begun.get(name)

    def end(self, name: str, why: str) -> None:
        self.begun[name] = Seen("aborted", why, 0)


def test_a_candidate_goes_through_shadow_and_canary_into_service(
    folder: Path, tmp_path: Path, whole: tuple[Path, dict[str, Any]]
) -> None:
    experiments = Experiments()
    loop = a_loop(folder, tmp_path, rollout=experiments)
    state = loop.run()
    assert state.status == RUNNING and "shadow base-r1-shadow is under way" in state.reason
    assert loop.run().status == RUNNING and experiments.told == [("shadow", "base-r1-shadow", "base")]
    experiments.begun["base-r1-shadow"] = Seen("running", "", SHADOWED)
    assert loop.run().status == RUNNING and experiments.told[1:] == [("canary", "base-r1-canary", "base")]
    assert experiments.begun["base-r1-shadow"].status == "aborted"
    experiments.begun["base-r1-canary"] = Seen("promoted", "no sign that it is worse", 700)
    state = loop.run()
    assert (state.status, state.reason) == (RELEASED, "no sign that it is worse")
    auto = Loop([folder / "logs"], tmp_path, Settings())
    assert auto.ahead().policy == "base-r1" and auto.ahead().candidate == "base-r2"
    # What the model gets counts only where nothing was released.
    gets = Settings(served=replace(base_policy(), name="gets"))
    assert Loop([folder / "logs"], tmp_path, gets).ahead().policy == "base-r1"
    assert Loop([folder / "logs"], tmp_path / "other", gets).ahead().policy == "gets"
    # What it was worth stands beside what was estimated.
    write_jsonl(tmp_path / "later.jsonl", decided(300, 9, "base-r1", 1.0))
    [found] = Loop([tmp_path / "later.jsonl"], tmp_path, Settings()).compared()
    assert found["candidate"] == "base-r1" and found["labels"] == 300
    assert found["agrees"] == (found["before"]["low"] <= found["after"]["mean"] <= found["before"]["high"])


def test_what_a_rollout_takes_back_ends_the_round(folder: Path, tmp_path: Path) -> None:
    experiments = Experiments()
    loop = a_loop(folder, tmp_path, rollout=experiments)
    loop.run()
    experiments.begun["base-r1-shadow"] = Seen("rolled_back", "misses went up", 40)
    state = loop.run()
    assert (state.status, state.reason) == (ROLLED_BACK, "shadow: misses went up")


# On a real ledger


def test_a_ledger_takes_candidates_on(folder: Path, tmp_path: Path) -> None:
    ledger = Ledger(Store(tmp_path / "rollout.db"))
    other = Experiment("other", "ab", "balanced", steps=(0.5,))
    ledger.start(other)
    loop = a_loop(folder, tmp_path / "loop", rollout=Handover(Ledger(Store(tmp_path / "rollout.db"))))
    assert "shadow base-r1-shadow waits: experiment 'other' is running" in loop.run().reason
    ledger.command("abort")
    assert "is under way, 0 requests so far" in loop.run().reason
    course = ledger.status()
    assert (course["experiment"]["kind"], course["experiment"]["control"]) == ("shadow", "base")
    assert course["started_by"] == WHO and Path(course["experiment"]["canary"]).name == CANDIDATE
    same = dict.fromkeys(("quality", "late"), 0.0)
    for i in range(SHADOWED):
        ledger.append(course["number"], Pair(same, same), f"request-{i}")
    assert "canary base-r1-canary is under way" in loop.run().reason
    ledger.refresh()
    assert [row["status"] for row in ledger.status()["history"]] == ["running"]
    assert ledger.store.history(course["number"])[-1]["who"] == WHO
    ledger.command("promote", why="by the test")
    state = loop.run()
    assert (state.status, state.reason) == (RELEASED, "by the test")


# The command


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["learn", *(str(argument) for argument in arguments)])


def test_the_command_asks_first_and_ends_at_the_gate_with_the_next_one(folder: Path, tmp_path: Path) -> None:
    given = (folder / "logs", "--policy", folder / "base", "--out", tmp_path / "out")
    dry = call(*given, "--json")
    assert dry.exit_code == 0 and json.loads(dry.stdout)["dry_run"] is True
    shown = call(*given)
    assert "nothing was written; --yes does it" in shown.stdout and not (tmp_path / "out").exists()
    timed = call(*given, "--every", "1")
    assert timed.exit_code == 2 and "every needs --yes" in timed.stderr
    done = call(*given, "--yes", "--json")
    assert done.exit_code == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["status"] == READY and told["next"].endswith("--name base-r1-shadow")
    assert told["steps"]["judge"]["estimate"]["decisions"] > 0
