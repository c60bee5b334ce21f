"""The budget beside the chat: limits, and the points that are on offer with them right now.

Knows the fields of a budget and of ``/v1/adaptive_fusion/points``. Must not know of answers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from adaptive_fusion.serving.web.asking import Limits, Manner, Turn, body_of
from adaptive_fusion.serving.web.decision import Say
from adaptive_fusion.serving.web.markup import Safe, element, join, notice, table
from adaptive_fusion.serving.web.web import Trouble, Web, ms

MOST_MS, MOST_GB = 10_000, 80.0


@dataclass
class BudgetControls:
    """The components, in the order of the fields of `Limits`."""

    limits: list[Any]
    offered: Any


def budget_controls(web: Web) -> BudgetControls:
    """Sliders and choices, and a place for the points."""
    say = web.say
    limits: list[Any] = [
        gr.Slider(0, MOST_MS, 0, step=10, label=say("latency_ms"), elem_id="latency"),
        gr.Slider(0, MOST_MS, 0, step=10, label=say("ttft_ms"), elem_id="ttft"),
        gr.Slider(0, MOST_GB, 0, step=0.05, label=say("vram_gb"), elem_id="vram"),
        gr.Slider(0.5, 0.99, 0.95, step=0.01, label=say("attainment"), elem_id="attainment"),
        gr.Radio(
            [(say(f"on_deadline_{name}"), name) for name in ("finish", "stop")],
            value="finish",
            label=say("on_deadline"),
        ),
        gr.Radio(
            [(say(f"on_infeasible_{name}"), name) for name in ("cheapest", "refuse")],
            value="cheapest",
            label=say("on_infeasible"),
        ),
        gr.Dropdown([(say("policy_default"), "")], value="", label=say("policy"), elem_id="policy"),
    ]
    return BudgetControls(limits, gr.HTML(elem_id="points"))


async def offered(web: Web, turns: Sequence[Turn], manner: Manner, limits: Limits, request: gr.Request) -> Safe:
    """The points for what would be asked next, as a table."""
    try:
        api = web.api(request)
        with web.telling():
            body = await body_of(await web.model(api, manner.model), turns, manner, limits.values())
            return points_table(await api.call("points", body), web.say)
    except Trouble as trouble:
        return notice(str(trouble))


def points_table(found: Mapping[str, Any], say: Say) -> Safe:
    """What ``points`` answers, the point that would be taken first and marked."""
    rows = sorted(found["points"], key=lambda row: not row["taken"])
    shown = [
        (
            row["plan"],
            ms(row["predicted"], "latency_ms"),
            ms(row["predicted"], "ttft_ms"),
            _memory(row["predicted"]),
            f"{row['quality']:.3f}",
            say("taken") if row["taken"] else row["why_not"] or say("not_taken"),
        )
        for row in rows
    ]
    heads = [say(name) for name in ("plan", "latency", "ttft", "memory", "quality", "verdict")]
    decision = found["decision"]
    taken = element("p", element("strong", decision["plan"]), f" · {decision['lane']}: {decision['reason']}")
    marked = [index for index, row in enumerate(rows) if row["taken"]]
    return join((taken, table(say("points"), heads, shown, marked)))


def _memory(predicted: Mapping[str, Any] | None) -> str:
    """Nobody knows the memory of an engine elsewhere."""
    found = (predicted or {}).get("peak_memory_gb")
    return f"{found:.3f} GiB" if found else "–"
