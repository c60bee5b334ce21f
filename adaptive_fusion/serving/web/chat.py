"""The chat page: a conversation with images and clips, its budget, and the decision behind each answer.

Knows its components and the endpoints. Must not know of other pages.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

import gradio as gr

from adaptive_fusion.serving.web.asking import Limits, Manner, Turn, body_of, kind_of, settled
from adaptive_fusion.serving.web.budget import BudgetControls, budget_controls, offered
from adaptive_fusion.serving.web.client import Api, ApiError
from adaptive_fusion.serving.web.conversation import answers, chosen_of, shown_turns
from adaptive_fusion.serving.web.decision import panel
from adaptive_fusion.serving.web.growing import Running, growing
from adaptive_fusion.serving.web.markup import element, notice
from adaptive_fusion.serving.web.web import Trouble, Web

KEEP_S = 3600.0
"""How long a conversation is kept after its page was last used."""
_SAVE = """(text) => {
  if (!text) return;
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  link.download = "conversation.json";
  link.click();
  URL.revokeObjectURL(link.href);
}"""


@dataclass
class ChatControls:
    """What other pages read of this one: settings and budget, in the order of `Manner` and `Limits`; and what is to
    be done when the page is opened: a function, what it reads and what it fills."""

    manner: list[Any]
    limits: list[Any]
    opening: tuple[Any, Any, Any]


def chat_page(web: Web) -> ChatControls:
    """Lay the page out and connect it."""
    say = web.say
    turns, running = gr.State([], time_to_live=KEEP_S), Running()
    with gr.Row():
        with gr.Column(scale=3, min_width=320):
            talk = gr.Chatbot(
                label=say("conversation"), placeholder=say("no_answer_yet"), elem_id="conversation", height="60vh",
                buttons=["copy"], min_height=240,
            )  # fmt: skip
            said = gr.HTML(elem_id="said")
            message = gr.MultimodalTextbox(
                label=say("message"), placeholder=say("message_hint"), file_count="multiple",
                file_types=["image", "video"], sources=["upload"], elem_id="message", submit_btn=say("send"),
            )  # fmt: skip
            with gr.Row(elem_classes="af-buttons"):
                stop = gr.Button(say("stop"), variant="stop", elem_id="stop", min_width=80)
                up = gr.Button(say("thumbs_up"), elem_id="up", min_width=80)
                down = gr.Button(say("thumbs_down"), elem_id="down", min_width=80)
                clear = gr.Button(say("clear"), elem_id="clear", min_width=80)
                export = gr.Button(say("export"), elem_id="export", min_width=80)
            exported = gr.Textbox(visible=False)
            with gr.Accordion(say("settings"), open=False, elem_id="settings"):
                manner = _manner_controls(web)
        with gr.Column(scale=2, min_width=320):
            with gr.Accordion(say("budget"), open=True):
                budget = budget_controls(web)
            with gr.Accordion(say("decision"), open=True):
                chosen = gr.Dropdown([], label=say("answer_number"), elem_id="chosen")
                shown = gr.HTML(element("p", say("no_decision")), elem_id="decision")
                raw = gr.Textbox(label=say("as_json"), lines=4, max_lines=12, interactive=False, buttons=["copy"])

    page = _Chat(web, running)
    settings = [*manner, *budget.limits]
    after = [talk, turns, said, message, chosen, shown, raw]
    # Multiple, as a call counts until its decision is drawn, and Gradio would drop what is sent before that.
    message.submit(
        page.ask, [message, turns, *settings], after, trigger_mode="multiple", concurrency_limit=None,
        show_progress="hidden",
    )  # fmt: skip
    chosen.input(page.show, [turns, chosen], [shown, raw], concurrency_limit=None, show_progress="hidden")
    stop.click(page.stop, None, said, concurrency_limit=None, show_progress="hidden")
    gr.on([clear.click, talk.clear], page.clear, None, after, show_progress="hidden")
    for button, rating in ((up, "up"), (down, "down")):
        button.click(_rating(page, rating), [turns, chosen], said, concurrency_limit=None, show_progress="hidden")
    export.click(page.export, turns, [exported, said], show_progress="hidden").then(None, exported, None, js=_SAVE)
    asked_next = [message, turns, *settings]
    _watch(page, budget, asked_next)
    filled = [manner[-1], *budget.limits, said, budget.offered]
    return ChatControls(manner, budget.limits, (page.opened, asked_next, filled))


def _manner_controls(web: Web) -> list[Any]:
    say = web.say
    return [
        gr.Textbox("", label=say("system"), lines=2, elem_id="system"),
        gr.Slider(1, 1024, 128, step=1, label=say("max_tokens"), elem_id="max-tokens"),
        gr.Slider(0, 2, 0, step=0.05, label=say("temperature")),
        gr.Slider(0.05, 1, 1, step=0.05, label=say("top_p")),
        gr.Textbox("", label=say("seed"), max_lines=1),
        gr.Dropdown([], label=say("model"), elem_id="model", visible=False),
    ]


def _watch(page: "_Chat", budget: BudgetControls, inputs: list[Any]) -> None:
    """Show the points anew when a limit moves or other media are chosen."""
    changes = [control.change for control in budget.limits] + [inputs[0].change]
    gr.on(
        changes, page.points, inputs, budget.offered, trigger_mode="always_last", concurrency_limit=None,
        show_progress="hidden",
    )  # fmt: skip


def _rating(page: "_Chat", rating: str) -> Any:
    async def rate(turns: list[Turn], chosen: int | None, request: gr.Request) -> str:
        return await page.rate(turns, chosen, rating, request)

    return rate


class _Chat:
    """What the page does."""

    def __init__(self, web: Web, running: Running) -> None:
        self._web, self._running = web, running

    async def ask(
        self, request: gr.Request, message: dict[str, Any], turns: list[Turn], *settings: Any
    ) -> AsyncIterator[tuple[Any, ...]]:
        """Answer a message; yields conversation, turns, notice, message box, choice of answers, decision and its JSON.

        All in one call: Gradio may lose a second one that follows in the moment in which it closes a page's stream.
        """
        say, tab = self._web.say, str(request.session_hash)
        text, files = message.get("text") or "", tuple(message.get("files") or ())
        if refused := self._refused(tab, text, files):
            yield _changed(said=notice(refused))
            return
        manner, limits = settled(settings)
        turns = [*turns, Turn("user", text, files)]
        answer = Turn("assistant")
        stop, told = asyncio.Event(), ""
        self._running.stops[tab] = stop
        try:
            yield _changed(talk=shown_turns(turns), turns=turns, said="", message=_put(None))
            with self._web.telling():
                api = self._web.api(request)
                body = await body_of(await self._web.model(api, manner.model), turns, manner, limits.values())
                turns.append(answer)
                async for _ in growing(api, body, answer, stop):
                    yield _changed(talk=shown_turns(turns), turns=turns)
        except Trouble as trouble:
            told = str(trouble)
        finally:
            del self._running.stops[tab]
        if told and not answer.text:
            # What cannot be asked is taken back, to be changed and sent again.
            turns = turns[: turns.index(answer) - 1] if answer in turns else turns[:-1]
            back = _put({"text": text, "files": list(files)})
            yield _changed(talk=shown_turns(turns), turns=turns, said=notice(told), message=back)
            return
        answer.note = say("stopped") if stop.is_set() else answer.note
        last = _changed(talk=shown_turns(turns), turns=turns, said=notice(told), chosen=answers(turns))
        yield last
        yield (*last[:-2], *await self.show(turns, None, request))

    def _refused(self, tab: str, text: str, files: Sequence[str]) -> str:
        """Why a message is not sent at all; empty where it is."""
        wrong = [Path(path).name for path in files if not kind_of(path)]
        if wrong:
            return self._web.say("wrong_file", name=wrong[0])
        if tab in self._running.stops:
            return self._web.say("busy")
        return "" if text.strip() or files else self._web.say("nothing_asked")

    async def opened(
        self, request: gr.Request, message: dict[str, Any] | None, turns: list[Turn], *settings: Any
    ) -> tuple[Any, ...]:
        """The models that there are, the server's own limits and its policies into the controls, a notice, and what is
        on offer. Of controls only those are shown that have an effect here."""
        names, told, models = [f.name for f in fields(Limits)], "", [""]
        try:
            with self._web.telling():
                api = self._web.api(request)
                found = await api.call("policy")
        except Trouble as trouble:
            return *(gr.skip() for _ in ["model", *names]), notice(str(trouble)), gr.skip()
        try:
            with self._web.telling():
                models = await self._web.models(api)
        except Trouble as trouble:  # an engine elsewhere may be away
            told = notice(str(trouble))
        manner, limits = settled(settings)
        given = {name: found["budget"].get(name, getattr(limits, name)) for name in names if name != "policy"}
        shown = [gr.update(value=value, visible=name in found["limits"]) for name, value in given.items()]
        choices = [(self._web.say("policy_default"), ""), *((name, name) for name in found["policies"])]
        policy = gr.update(choices=choices, value="", visible=len(found["policies"]) > 1)
        model = gr.update(choices=models, value=models[0], visible=len(models) > 1)
        offer = await self.points(request, message, turns, *astuple(manner), *given.values(), "")
        return model, *shown, policy, told, offer

    def stop(self, request: gr.Request) -> str:
        """End the answer that is being written on this page."""
        event = self._running.stops.get(str(request.session_hash))
        if event is not None:
            event.set()
        return ""

    def clear(self) -> tuple[Any, ...]:
        """Forget the conversation."""
        empty = element("p", self._web.say("no_decision"))
        return [], [], _put(""), _put(None), gr.update(choices=[], value=None), _put(empty), _put("")

    async def show(self, turns: list[Turn], chosen: int | None, request: gr.Request) -> tuple[Any, Any]:
        """The decision behind an answer, drawn and as JSON."""
        drawn, raw = await self._decision(turns, chosen, request)
        return _put(drawn), _put(raw)

    async def _decision(self, turns: list[Turn], chosen: int | None, request: gr.Request) -> tuple[str, str]:
        found = chosen_of(turns, chosen)
        if found is None or not found.fields:  # of an answer that was stopped the server keeps none
            return element("p", self._web.say("no_decision")), ""
        try:
            api = self._web.api(request)
            policy = await api.call("policy")
            pictures = await self._pictures(api, turns[: turns.index(found)])
        except (Trouble, ApiError) as error:
            return notice(str(error)), ""
        raw = json.dumps(dict(found.fields), indent=1, ensure_ascii=False)
        return panel(found.fields, policy, pictures, self._web.say), raw

    async def _pictures(self, api: Api, turns: Sequence[Turn]) -> list[Any]:
        """The media that were looked at last, as they were measured."""
        last = next((turn for turn in reversed(turns) if turn.files), None)
        if last is None:
            return []
        with self._web.telling():
            body = await body_of(await self._web.model(api), [last], Manner(), {})
            found = await api.call("decide", body, pictures="true")
        return list(found["pictures"])

    async def points(
        self, request: gr.Request, message: dict[str, Any] | None, turns: list[Turn], *settings: Any
    ) -> str:
        """What is on offer for the message as it stands."""
        message = message or {}
        files = tuple(path for path in message.get("files") or () if kind_of(path))
        if not files:
            files = next((turn.files for turn in reversed(turns) if turn.files), ())
        text = message.get("text") or next((turn.text for turn in reversed(turns) if turn.role == "user"), "")
        asked = [Turn("user", text, files)]
        return await offered(self._web, asked, *settled(settings), request)

    async def rate(self, turns: list[Turn], chosen: int | None, rating: str, request: gr.Request) -> str:
        """Send a rating of an answer."""
        say, found = self._web.say, chosen_of(turns, chosen)
        if found is None or not found.request_id:
            return notice(say("nothing_to_rate"))
        try:
            with self._web.telling():
                body = {"request_id": found.request_id, "rating": rating}
                done = await self._web.api(request).call("feedback", body)
        except Trouble as trouble:
            return notice(str(trouble))
        return notice(say("rated" if done["recorded"] else "rated_before"))

    async def export(self, turns: list[Turn]) -> tuple[str, str]:
        """The conversation as JSON, media and decisions included, and what went wrong."""
        try:
            with self._web.telling():
                body = await body_of("", turns, Manner(), {})
        except Trouble as trouble:
            return "", notice(str(trouble))
        decisions = [dict(turn.fields) for turn in turns if turn.fields]
        return json.dumps({"messages": body["messages"], "decisions": decisions}, ensure_ascii=False, indent=1), ""


def _changed(**values: Any) -> tuple[Any, ...]:
    """What `ask` yields, with what is not named left as it is."""
    names = ("talk", "turns", "said", "message", "chosen", "shown", "raw")
    if "said" in values:
        values["said"] = _put(values["said"])
    return tuple(values.get(name, gr.skip()) for name in names)


def _put(value: Any) -> Any:
    """A value for a component that `ask` now and then leaves as it is: after such Gradio (6.31) keeps every plain value
    for as long as the page lives."""
    return gr.update(value=value)
