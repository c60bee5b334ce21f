"""The rollout page: experiments that run, their arms and what is known of each, and buttons that move them.

Knows ``/v1/adaptive_fusion/rollout`` and its two actions. Must not know how experiments are judged.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import gradio as gr

from adaptive_fusion.serving.web.client import ApiError
from adaptive_fusion.serving.web.decision import Say
from adaptive_fusion.serving.web.markup import Safe, element, facts, join, lines, notice, table
from adaptive_fusion.serving.web.web import Trouble, Web

EVERY_S = 2.0
_NOT_HERE = 404


def rollout_page(web: Web, selected: Any) -> Any:
    """Lay the page out and connect it; the timer that reads it while it is open."""
    say, page = web.say, _Rollout(web)
    shown = gr.HTML(elem_id="rollout")
    with gr.Row():
        sure = gr.Checkbox(False, label=say("rollout_confirm"), elem_id="rollout-sure")
        promote = gr.Button(say("promote"), elem_id="promote", min_width=80)
        abort = gr.Button(say("abort"), variant="stop", elem_id="abort", min_width=80)
    said = gr.HTML(elem_id="rollout-said")
    timer = gr.Timer(EVERY_S, active=False)
    gr.on([selected.select, timer.tick], page.look, None, [shown, timer], show_progress="hidden")
    for button, name in ((promote, "promote"), (abort, "abort")):
        button.click(_acting(page, name), sure, [said, sure, shown], show_progress="hidden")
    return timer


def _acting(page: "_Rollout", name: str) -> Any:
    async def act(request: gr.Request, sure: bool) -> tuple[Any, ...]:
        return await page.act(request, name, sure)

    return act


class _Rollout:
    def __init__(self, web: Web) -> None:
        self._web = web

    async def look(self, request: gr.Request) -> tuple[Any, Any]:
        """What there is now, and whether to look again."""
        say = self._web.say
        try:
            api = self._web.api(request)
            try:
                found = await api.call("rollout")
            except ApiError as error:
                if error.status == _NOT_HERE:
                    return element("p", say("rollout_none")), gr.update(active=False)
                raise Trouble(str(error)) from error
        except Trouble as trouble:
            return notice(str(trouble)), gr.update(active=False)
        return drawn(found, say), gr.update(active=True)

    async def act(self, request: gr.Request, name: str, sure: bool) -> tuple[Any, ...]:
        """Promote or abort, once it is confirmed; the confirmation holds for one act."""
        say = self._web.say
        if not sure:
            return notice(say("rollout_unconfirmed")), False, gr.skip()
        try:
            with self._web.telling():
                await self._web.api(request).call(name, {})
        except Trouble as trouble:
            return notice(str(trouble)), False, gr.skip()
        shown, _ = await self.look(request)
        return notice(say("done")), False, shown


def drawn(found: Mapping[str, Any], say: Say) -> Safe:
    """The experiment: where it stands, its arms, each metric with what is known of it now and over time, and who
    changed what."""
    experiment = found.get("experiment")
    if not experiment:
        return element("p", say("rollout_none"))
    state = facts(
        [
            (say("experiment"), f"{experiment['name']} ({experiment['kind']})"),
            (say("status"), found["status"]),
            (say("step"), f"{found['step'] + 1} / {len(experiment['steps'])}: {found['share']:.0%}"),
        ]
    )
    arms = [(name, arm["policy"] or "–", f"{arm['requests']:,}") for name, arm in found["arms"].items()]
    heads = (say("arm"), say("policy"), say("requests_count"))
    parts = [state, table(say("arms"), heads, arms), _metrics(found["guardrails"], say)]
    parts += [_over_time(row["name"], found.get("series", []), say) for row in found["guardrails"]]
    changes = [
        (_clock(row["time_s"]), row["status"], f"{row['share']:.0%}", row["who"], row["why"])
        for row in found["history"]
    ]
    heads_of_changes = [say(name) for name in ("time", "status", "share", "who", "why")]
    return join((*parts, table(say("history"), heads_of_changes, changes)))


def _metrics(rows: Sequence[Mapping[str, Any]], say: Say) -> Safe:
    """Means with their confidence sequences, and how near the evidence is to taking the canary back."""
    cells = [
        (
            row["name"],
            *(_interval(row.get(arm)) for arm in ("control", "canary")),
            f"{row['margin']:.3g}",
            f"{row['e']:.3g} / {row['needed']:.3g}",
        )
        for row in rows
    ]
    heads = (say("metric"), "control", "canary", say("margin"), say("evidence"))
    return table(say("metrics"), heads, cells, [i for i, row in enumerate(rows) if row["e"] >= row["needed"]])


def _interval(known: Mapping[str, Any] | None) -> str:
    if not known or known["mean"] is None:
        return "–"
    return f"{known['mean']:.3g} ({known['low']:.3g} – {known['high']:.3g}; {known['n']:,})"


def _over_time(metric: str, series: Sequence[Mapping[str, Any]], say: Say) -> Safe:
    """Both ends of the confidence sequences of both arms at each snapshot; nothing before there are two."""
    drawn: dict[str, list[float | None]] = {}
    for snapshot in series:
        row: Mapping[str, Any] = next((row for row in snapshot.get("guardrails", []) if row["name"] == metric), {})
        for arm in ("control", "canary"):
            for end in ("low", "high"):
                drawn.setdefault(f"{arm}, {say(end)}", []).append((row.get(arm) or {}).get(end))
    if not any(len([end for end in ends if end is not None]) > 1 for ends in drawn.values()):
        return Safe("")
    return lines(metric, drawn)


def _clock(time_s: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(time_s))
