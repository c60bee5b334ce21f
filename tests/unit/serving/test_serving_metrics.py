"""What the server counts is what happened, under names that Prometheus and dashboards know."""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families
from records import OFFERED, SECRET, reply, settled

from adaptive_fusion.budget import Budget
from adaptive_fusion.execution.encoder_cache import CacheCounts
from adaptive_fusion.serving.metrics import CODES, EVENTS, OTHER, PREFIX, STAGES, Metrics

DASHBOARD = Path(__file__).parents[3] / "deploy/grafana/adaptive-fusion.json"
SETTLED = settled()
CACHED = CacheCounts(hits=3, misses=5, evicted=2, too_large=1, nbytes=4096, entries=2)
NOT_SHOWN: dict[str, str] = {}
"""Our metrics that no panel shows, and why."""


def samples(metrics: Metrics) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Every sample by name, without our prefix, and labels."""
    text = metrics.render()[0].decode()
    return {
        (sample.name.removeprefix(PREFIX), tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


def value(metrics: Metrics, name: str, **labels: str) -> float:
    return samples(metrics)[name, tuple(sorted(labels.items()))]


def served() -> Metrics:
    """Metrics after some requests of every fate."""
    metrics = Metrics(["half", "full"])
    for _ in range(6):
        metrics.arrived()
    metrics.queued(3)
    metrics.rejected("queue_full")
    metrics.media_refused("address")
    metrics.failed("invalid_json")
    for one, native, escalated in ((reply(), 400, False), (reply("full", "gated", 200.0), None, True)):
        metrics.decided(0.002)
        metrics.started(0.05)
        metrics.finished(one, one.finish_reason, 0.05, 0.05 + one.measurement.latency_ms / 1e3,
                         native_visual_tokens=native, escalated=escalated)  # fmt: skip
        metrics.ended()
    metrics.started(0.01)
    metrics.failed("out_of_memory")
    metrics.ended()
    metrics.started(0.02)
    metrics.observe_controller(SETTLED)
    metrics.observe_cache(CACHED)
    return metrics


def test_counts_are_those_of_what_happened() -> None:
    metrics = served()
    assert value(metrics, "requests_total") == 6
    assert value(metrics, "num_requests_running") == 1 and value(metrics, "num_requests_waiting") == 2
    assert value(metrics, "request_success_total", finished_reason="stop") == 2
    assert value(metrics, "requests_rejected_total", reason="queue_full") == 1
    assert value(metrics, "request_errors_total", kind="out_of_memory") == 1
    assert value(metrics, "media_refused_total", reason="address") == 1
    assert value(metrics, "decisions_total", lane="weighted", plan="half") == 1
    assert value(metrics, "decisions_total", lane="gated", plan="full") == 1
    assert value(metrics, "escalations_total") == 1 and value(metrics, "infeasible_decisions_total") == 0
    assert value(metrics, "budget_requests_total", met="true") == 1  # 120 of 150 ms
    assert value(metrics, "budget_requests_total", met="false") == 1  # 200 of 150 ms
    assert value(metrics, "prompt_tokens_total") == 260 and value(metrics, "generation_tokens_total") == 26
    assert value(metrics, "visual_tokens_total") == 200 and value(metrics, "visual_tokens_native_total") == 500


def test_times_are_those_of_the_request_with_its_wait() -> None:
    metrics = served()
    assert value(metrics, "e2e_request_latency_seconds_sum") == pytest.approx(0.17 + 0.25)
    assert value(metrics, "time_to_first_token_seconds_sum") == pytest.approx(2 * (0.05 + 0.06))
    assert value(metrics, "request_time_per_output_token_seconds_sum") == pytest.approx(2 * 0.06 / 12)
    assert value(metrics, "request_queue_time_seconds_count") == 4
    assert value(metrics, "request_preprocess_time_seconds_sum") == 0.0  # all of it was waiting
    assert value(metrics, "request_prefill_time_seconds_sum") == pytest.approx(2 * 0.025)
    assert value(metrics, "decision_seconds_bucket", le="0.0025") == 2


def test_the_controller_is_read_and_its_counts_only_grow() -> None:
    metrics, controller = served(), settled()
    assert value(metrics, "controller_drift_ratio", time="latency") == pytest.approx(2.0, rel=0.05)
    assert value(metrics, "miss_price") > 0 and value(metrics, "controller_memory_envelope_ratio") > 0
    for _ in range(3):
        metrics.observe_controller(controller)
    assert value(metrics, "controller_events_total", event="decisions") == 300
    controller.choose(OFFERED, Budget())
    metrics.observe_controller(controller)
    assert value(metrics, "controller_events_total", event="decisions") == 301
    assert {dict(labels)["event"] for name, labels in samples(metrics) if name == "controller_events_total"} == {
        *EVENTS
    }


def test_the_cache_is_read_and_its_counts_only_grow() -> None:
    metrics = served()
    for _ in range(2):
        metrics.observe_cache(CACHED)
    metrics.observe_cache(replace(CACHED, hits=4, nbytes=0))
    assert value(metrics, "mm_cache_queries_total") == 9 and value(metrics, "mm_cache_hits_total") == 4
    assert value(metrics, "encoder_cache_evictions_total") == 2 and value(metrics, "encoder_cache_bytes") == 0


def test_names_and_the_text_are_as_prometheus_has_them() -> None:
    text, content_type = served().render()
    assert content_type.startswith("text/plain; version=")
    families = list(text_string_to_metric_families(text.decode()))
    for family in families:
        assert re.fullmatch(r"[a-zA-Z_:][a-zA-Z0-9_:]*", family.name) and family.documentation
        if family.type == "histogram":
            unit = family.name.rsplit("_", 1)[-1]
            assert unit in ("seconds", "tokens", "requests")
    assert SECRET not in text.decode()


@settings(max_examples=40, deadline=None)
@given(st.text().filter(lambda text: text not in CODES), st.floats(), st.floats(), st.integers() | st.just(10**400))
def test_no_request_makes_a_new_series_or_an_error(text: str, wait_s: float, e2e_s: float, tokens: int) -> None:
    metrics = served()
    strange = reply(text, text, math.nan, visual_tokens=tokens, decode_ms=wait_s, prompt_tokens=tokens)
    known = {*samples(served())}
    for _ in range(2):
        metrics.rejected(text)
        metrics.media_refused(text)
        metrics.queued(tokens)
        metrics.decided(wait_s)
        metrics.started(wait_s)
        metrics.finished(strange, text, wait_s, e2e_s, native_visual_tokens=tokens)
        metrics.failed(text)
    added = {*samples(metrics)} - known
    assert all(OTHER in dict(labels).values() for _, labels in added) and len(added) <= 6
    assert all(math.isfinite(found) for found in samples(metrics).values())


def panels(node: Any) -> Iterator[dict[str, Any]]:
    for panel in node["panels"]:
        yield panel
        yield from panels(panel) if "panels" in panel else ()


def test_the_dashboard_shows_what_is_exported_and_nothing_else() -> None:
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    asked = [target["expr"] for panel in panels(dashboard) for target in panel.get("targets", ())]
    asked += [variable["definition"] for variable in dashboard["templating"]["list"] if variable["type"] == "query"]
    labels: dict[str, set[str]] = {}
    for name, pairs in samples(served()):
        labels.setdefault(PREFIX + name if not name.startswith("process_") else name, set()).update(dict(pairs))
    used: set[str] = set()
    for expression in asked:
        named = re.findall(r"(?:adaptive_fusion:|process_)[a-z0-9_]+", expression)
        assert named and set(named) <= labels.keys(), expression
        used |= set(named)
        wanted = {word for group in re.findall(r"by \(([^)]*)\)", expression) for word in re.split(r", *", group)}
        wanted |= set(re.findall(r"(\w+)(?:=~?|!=|!~)\"", expression)) - {"job", "instance"}
        assert all(wanted <= labels[name] for name in named), expression
        assert expression.count("(") == expression.count(")") and expression.count("{") == expression.count("}")
    families = {re.sub(r"_(bucket|sum|count)$", "", name) for name in labels if name.startswith(PREFIX)}
    shown = {re.sub(r"_(bucket|sum|count)$", "", name) for name in used}
    assert families - shown == set(NOT_SHOWN)
    # What is made by `Metrics` is exported from the first scrape on, or by the requests above.
    assert {f"{PREFIX}request_{stage}_time_seconds" for stage in STAGES} <= families


def test_every_panel_has_a_unit_a_description_and_a_place_of_its_own() -> None:
    found = [panel for panel in panels(json.loads(DASHBOARD.read_text(encoding="utf-8")))]
    drawn = [panel for panel in found if panel["type"] != "row"]
    assert len({panel["id"] for panel in found}) == len(found)
    assert all(panel["description"] and panel["fieldConfig"]["defaults"]["unit"] for panel in drawn)
    cells = [
        (x, y)
        for panel in found
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(cells) == len(set(cells)) and max(x for x, _ in cells) < 24
