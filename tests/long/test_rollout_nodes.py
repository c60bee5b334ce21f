"""A rollout on two Ray nodes, a process on each: one file on the head, which both go by. How soon they see what was
decided is measured by ``benchmarks/rollout_nodes.py``."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner
from waits import MOST_S

from adaptive_fusion.cli import app
from adaptive_fusion.rollout.ledger import Ledger
from adaptive_fusion.rollout.store import Store

ray = pytest.importorskip("ray", reason="needs the extra ray")


def test_what_is_decided_on_one_node_holds_on_the_other(tmp_path: Path) -> None:
    from benchmarks.rollout_nodes import two_nodes

    file, keys = tmp_path / "r.db", [str(index) for index in range(60)]
    get = partial(ray.get, timeout=MOST_S)

    def rollout(*arguments: str) -> Any:
        done = CliRunner().invoke(app, ["rollout", *arguments, "--file", str(file), "--json"])
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout.splitlines()[-1])

    with two_nodes(file) as processes:

        def seen(name: str, status: str) -> None:
            found = get([each.seen_s.remote(name, status) for each in processes])
            assert all(when < float("inf") for when in found), (name, status)

        def arms() -> list[dict[str, str]]:
            return list(get([each.arms.remote(keys) for each in processes]))

        assert len(set(get([each.node.remote() for each in processes]))) == 2
        rollout("start", "reference-quality", "--name", "one", "--kind", "ab")
        seen("one", "running")
        head, other = arms()
        assert head == other and set(head.values()) == {"control", "canary"}
        rollout("abort", "--why", "enough")
        seen("one", "aborted")
        assert {arm for found in arms() for arm in found.values()} == {"control"}
        # A canary that fails on the one node alone goes from both.
        rollout("start", "reference-quality", "--name", "two", "--kind", "ab")
        seen("two", "running")
        for number in range(60):
            get(processes[1].answered.remote(number, True))
            if Ledger(Store(file)).status(series=False)["status"] != "running":
                break
        seen("two", "rolled_back")
        assert {arm for found in arms() for arm in found.values()} == {"control"}
        assert [row["status"] for row in Ledger(Store(file)).store.history()] == [
            "running", "aborted", "running", "rolled_back",
        ]  # fmt: skip
        assert 0 < rollout("status")["arms"]["canary"]["requests"] <= 10
