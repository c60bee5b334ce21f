"""The rollout page: experiments that run, their arms and what is known of each, and buttons that move them.

Knows ``/v1/adaptive_fusion/rollout`` and its two actions. Must not know how experiments are judged.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import gradio as gr

from adaptive_fusion.serving.web.client import ApiError
from adaptive_fusion.serving.web.decision import Say
from adaptive_fusion.serving.web.markup import Safe, element, facts, join, notice, table
from adaptive_fusion.serving.web.web import Trouble, Web

EVERY_S = 2.0
_NOT_HERE = 404


def rollout_page(web: Web, selected: Any) -> None:
    """Lay the page out and connect it; it is read while it is open."""
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
                    return element("p", say("rollout_none")), gr.Timer(active=False)
                raise Trouble(str(error)) from error
        except Trouble as trouble:
            return notice(str(trouble)), gr.Timer(active=False)
        return drawn(found, say), gr.Timer(active=True)

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


def drawn(values: Mapping[str, Any], say: Say, level: int = 2) -> Safe:
    """Whatever the endpoint tells: single values as facts, rows as tables, parts under their names."""
    if not values:
        return element("p", say("rollout_none"))
    plain = [(name, _short(value)) for name, value in values.items() if not isinstance(value, list | dict)]
    parts: list[object] = [facts(plain)] if plain else []
    for name, value in values.items():
        if isinstance(value, dict) and value:
            parts += [element(f"h{min(level, 6)}", name), drawn(value, say, level + 1)]
        elif isinstance(value, list) and value and all(isinstance(row, dict) for row in value):
            parts.append(_rows(name, value))
        elif isinstance(value, list) and value:
            parts.append(facts([(name, ", ".join(_short(each) for each in value))]))
    return join(parts)


def _rows(name: str, rows: Sequence[Mapping[str, Any]]) -> Safe:
    heads = list(dict.fromkeys(key for row in rows for key in row))
    return table(name, heads, [[_short(row.get(key)) for key in heads] for row in rows])


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "–" if value is None else str(value)
