"""What is one for all replicas, without Ray."""

import json
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from adaptive_fusion.serving.commons import ALIVE_S, SAVE_S, Commons, kind_of, merged
from adaptive_fusion.serving.metrics import Metrics


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def state(updates: int, profile: str = "one") -> dict[str, Any]:
    return {"profile": {"name": profile}, "controller": {"counts": {"updates": updates}}, "lengths": {}}


def test_a_new_replica_starts_from_a_healthy_one_of_its_kind() -> None:
    """Not from the one that has learned most, where that misses its limits, nor from another kind."""
    commons = Commons()
    commons.publish("sick", {}, state(900), "")
    commons.publish("well", {}, state(100), "")
    commons.publish("young", {}, state(5), "")
    commons.publish("other", {}, state(5000, "two"), "")
    for number in range(20):
        commons.add("sick", f"s{number}", {"met": number % 2 == 0})
        commons.add("well", f"w{number}", {"met": True})
    commons.publish("young", {}, state(6), "")
    assert commons.snapshot(kind_of(state(0))) == state(100)
    assert commons.snapshot(kind_of(state(0, "two"))) == state(5000, "two")
    assert commons.snapshot(kind_of(state(0, "three"))) is None


def test_who_is_gone_is_not_listed_but_what_was_learned_stays() -> None:
    clock = Clock()
    commons = Commons(clock=clock)
    commons.publish("a", {"pid": 1}, state(7), "x 1\n")
    clock.now = ALIVE_S / 2
    commons.publish("b", {"pid": 2}, state(3), "x 2\n")
    assert [row["replica"] for row in commons.replicas()] == ["a", "b"] and set(commons.metrics()) == {"a", "b"}
    clock.now = ALIVE_S
    assert [row["pid"] for row in commons.replicas()] == [2]
    commons.ended("b")
    assert not commons.replicas() and not commons.metrics()
    assert commons.snapshot(kind_of(state(0))) is not None


def test_what_was_learned_is_kept_over_a_restart(tmp_path: Path) -> None:
    clock, path = Clock(), tmp_path / "deep" / "state.json"
    commons = Commons(state=str(path), clock=clock)
    commons.publish("a", {}, state(7), "")
    assert not path.exists()
    clock.now = SAVE_S
    commons.publish("a", {}, state(8), "")
    assert Commons(state=str(path)).snapshot(kind_of(state(0))) == state(8)
    for broken in ("", "[]", '{"schema": 99, "kinds": {}}', '{"schema": 1, "kinds": 3}'):
        path.write_text(broken)
        found = Commons(state=str(path))
        assert found.snapshot(kind_of(state(0))) is None and "not used" in found.trouble


def test_the_last_are_kept_and_a_rating_counts_once() -> None:
    commons = Commons(keep=2)
    for name in ("a", "b", "c"):
        commons.add("r", name, {"request_id": name})
    assert [row["request_id"] for row in commons.last(5)] == ["c", "b"]
    assert not commons.knows("a") and commons.knows("c")
    said = [commons.rated("c", source, rating) for source, rating in ((None, 1.0), (None, 1.0), ("x", 1.0), (None, 0))]
    assert said == [True, False, True, True]


def test_metrics_of_all_are_one_text_that_prometheus_reads() -> None:
    texts = {}
    for name in ("a", "b"):
        metrics = Metrics(["rung"])
        metrics.arrived()
        metrics.rejected("queue_full")
        texts[name] = metrics.render()[0].decode()
    found = list(text_string_to_metric_families(merged(texts)))
    alone = {family.name: family for family in text_string_to_metric_families(texts["a"])}
    assert [family.name for family in found] == list(alone)
    for family in found:
        assert family.type == alone[family.name].type and family.documentation == alone[family.name].documentation
        assert len(family.samples) == 2 * len(alone[family.name].samples)
        if family.samples:
            assert {sample.labels["replica"] for sample in family.samples} == {"a", "b"}
    assert sum(len(family.samples) for family in found) > 100
    assert json.dumps(merged({})) == '""'
