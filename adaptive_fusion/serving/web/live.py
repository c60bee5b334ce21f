"""The live page: what the server did lately, in numbers; nothing of what was asked or answered.

Knows ``/v1/adaptive_fusion/decisions``, ``policy`` and the names of metrics. Must not know of other pages.
"""

import json
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import gradio as gr

from adaptive_fusion.serving.web.decision import Say, panel
from adaptive_fusion.serving.web.markup import Safe, element, facts, join, lines, notice, shares, table
from adaptive_fusion.serving.web.web import Trouble, Web, ms

SHOWN, LISTED = 200, 25
EVERY_S = 2.0
_METRIC = re.compile(r"^([a-zA-Z_:][\w:]*)(?:\{[^}]*\})? (\S+)$", re.M)


_OPENING = """element.addEventListener("click", (event) => {
  const button = event.target.closest("button[data-request]");
  if (button) trigger("click", { request: button.dataset.request });
});"""


def live_page(web: Web, selected: Any) -> Any:
    """Lay the page out and connect it; the timer that reads it while it is open."""
    say, page = web.say, _Live(web)
    gr.HTML(element("p", say("live_why")))
    with gr.Row():
        follow = gr.Checkbox(True, label=say("follow"), elem_id="follow")
        refresh = gr.Button(say("refresh"), elem_id="refresh", min_width=80)
    numbers = gr.HTML(elem_id="live", js_on_load=_OPENING)
    chosen = gr.Dropdown([], label=say("open_request"), elem_id="open-request")
    shown, raw = (
        gr.HTML(elem_id="live-decision"),
        gr.Textbox(label=say("as_json"), lines=2, max_lines=12, interactive=False, buttons=["copy"]),
    )
    timer = gr.Timer(EVERY_S, active=False)
    outputs = [numbers, chosen]
    for event in (timer.tick, refresh.click, selected.select):
        event(page.look, chosen, outputs, concurrency_limit=None, show_progress="hidden")
    selected.select(lambda on: gr.update(active=on), follow, timer, show_progress="hidden")
    follow.change(lambda on: gr.update(active=on), follow, timer, show_progress="hidden")
    numbers.click(page.open_row, None, [chosen, shown, raw], concurrency_limit=None, show_progress="hidden")
    chosen.input(page.open, chosen, [shown, raw], concurrency_limit=None, show_progress="hidden")
    return timer


class _Live:
    def __init__(self, web: Web) -> None:
        self._web = web

    async def look(self, request: gr.Request, chosen: str | None) -> tuple[Any, Any]:
        """The numbers as they are now, and which requests there are to open."""
        try:
            with self._web.telling():
                api = self._web.api(request)
                rows = (await api.call("decisions", n=SHOWN))["decisions"]
                metrics = read_metrics(await api.text("metrics"))
        except Trouble as trouble:
            return notice(str(trouble)), gr.skip()
        choices = [(_named(row), row["request_id"]) for row in rows[:LISTED]]
        kept = chosen if chosen in {row["request_id"] for row in rows[:LISTED]} else None
        return numbers(rows, metrics, self._web.say), gr.update(choices=choices, value=kept)

    async def open_row(self, request: gr.Request, event: gr.EventData) -> tuple[Any, str, str]:
        """The decision of the request whose button in the table was pressed."""
        named = event._data.get("request")
        return named, *await self.open(request, named)

    async def open(self, request: gr.Request, chosen: str | None) -> tuple[str, str]:
        """One request's decision."""
        if not chosen:
            return "", ""
        try:
            with self._web.telling():
                api = self._web.api(request)
                whole = await api.call("decisions", below=chosen)
                policy = await api.call("policy")
        except Trouble as trouble:
            return notice(str(trouble)), ""
        return panel(whole, policy, [], self._web.say), json.dumps(whole, indent=1)


def read_metrics(text: str) -> dict[str, float]:
    """Values by name in Prometheus' text format, summed over labels."""
    found: dict[str, float] = {}
    for name, value in _METRIC.findall(text):
        found[name] = found.get(name, 0.0) + float(value)
    return found


def numbers(rows: Sequence[Mapping[str, Any]], metrics: Mapping[str, float], say: Say) -> Safe:
    """All that there is to see, newest last in the curve and first in the table."""
    if not rows:
        return join((_state(rows, metrics, say), element("p", say("no_requests"))))
    in_order = list(reversed(rows))
    curve = lines(
        say("latency_over_time"),
        {
            f"{say('latency')} ({say('ms')})": [row.get("actual", {}).get("latency_ms") for row in in_order],
            f"{say('limit')} ({say('ms')})": [row["budget"].get("latency_ms") for row in in_order],
        },
    )
    mix = element(
        "div",
        shares(say("lanes"), Counter(row["lane"] for row in rows)),
        shares(say("plans"), Counter(row["rung"] or row["plan"] for row in rows)),
        class_="af-mix",
    )
    return join((_state(rows, metrics, say), curve, mix, _listed(rows[:LISTED], say)))


def _state(rows: Sequence[Mapping[str, Any]], metrics: Mapping[str, float], say: Say) -> Safe:
    def metric(name: str) -> float:
        return metrics.get(f"adaptive_fusion:{name}", 0.0)

    met = [row for row in rows if row.get("met") is not None]
    judged, targets = [row["met"] for row in met], sorted({row["budget"].get("attainment", 0.95) for row in met})
    kept = "–" if not judged else f"{sum(judged) / len(judged):.3f} ({sum(judged)}/{len(judged)})"
    target = ", ".join(say("target", target=f"{value:g}") for value in targets)
    looked = metric("mm_cache_queries_total")
    hits = "–" if not looked else f"{metric('mm_cache_hits_total') / looked:.2f} ({looked:.0f})"
    peak = max((row.get("actual", {}).get("peak_memory_gb") or 0.0 for row in rows), default=0.0)
    limits = [row["budget"]["vram_gb"] for row in rows if row["budget"].get("vram_gb")]
    of = f" / {limits[0]:g} GiB" if limits else ""
    return facts(
        [
            (say("attained"), f"{kept} {target}"),
            (say("price"), f"{metric('miss_price'):.3g}"),
            (say("running"), f"{metric('num_requests_running'):.0f}"),
            (say("waiting_count"), f"{metric('num_requests_waiting'):.0f}"),
            (say("cache_hits"), hits),
            (say("vram_peak"), f"{peak:.3f} GiB{of}" if peak else "–"),
            (say("resident"), f"{metrics.get('process_resident_memory_bytes', 0) / (1 << 30):.2f} GiB"),
        ]
    )


def _listed(rows: Sequence[Mapping[str, Any]], say: Say) -> Safe:
    cells = [
        (
            _clock(row),
            element("button", row["request_id"][:8], type="button", class_="af-open", data_request=row["request_id"]),
            row["lane"],
            row["plan"],
            ms(row.get("actual"), "latency_ms"),
            "–" if not row["budget"].get("latency_ms") else f"{row['budget']['latency_ms']:,.0f} ms",
            "–" if row.get("met") is None else say("yes" if row["met"] else "no"),
            "–" if "visual_used" not in row["tokens"] else f"{row['tokens']['visual_used']:,}",
        )
        for row in rows
    ]
    heads = [say(name) for name in ("time", "request", "lane", "plan", "latency", "limit", "met", "tokens")]
    return table(say("requests"), heads, cells)


def _clock(row: Mapping[str, Any]) -> str:
    return time.strftime("%H:%M:%S", time.localtime(row["created"]))


def _named(row: Mapping[str, Any]) -> str:
    return f"{_clock(row)} · {row['request_id'][:8]} · {row['lane']} · {row['plan']}"
