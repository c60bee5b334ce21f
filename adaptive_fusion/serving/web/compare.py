"""The compare page: one question natively and adaptively, side by side, with what differs marked.

Knows its components and the endpoints. Must not know of other pages, but for settings and budget.
"""

import asyncio
import difflib
import re
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import gradio as gr

from adaptive_fusion.serving.web.asking import NATIVE, Turn, body_of, kind_of, settled
from adaptive_fusion.serving.web.chat import ChatControls
from adaptive_fusion.serving.web.client import Api
from adaptive_fusion.serving.web.decision import Say
from adaptive_fusion.serving.web.growing import SHOW_S, Running, growing
from adaptive_fusion.serving.web.markup import Safe, element, facts, join, notice
from adaptive_fusion.serving.web.web import Trouble, Web, ms

IN_TURN, AT_ONCE = "in_turn", "at_once"


def compare_page(web: Web, chat: ChatControls) -> None:
    """Lay the page out and connect it."""
    say, page = web.say, _Compare(web)
    gr.HTML(element("p", say("compare_why")))
    message = gr.MultimodalTextbox(
        label=say("message"), placeholder=say("message_hint"), file_count="multiple",
        file_types=["image", "video"], sources=["upload"], elem_id="compare-message", submit_btn=say("run"),
    )  # fmt: skip
    with gr.Row():
        order = gr.Radio([(say(name), name) for name in (IN_TURN, AT_ONCE)], value=IN_TURN, label=say("order"))
        stop = gr.Button(say("stop"), variant="stop", elem_id="compare-stop", min_width=80)
    said = gr.HTML(elem_id="compare-said")
    with gr.Row():
        sides = [gr.HTML(elem_id=f"compare-{name}", min_height=120) for name in ("native", "adaptive")]
    differences = gr.HTML(elem_id="differences")
    message.submit(
        page.run, [message, order, *chat.manner, *chat.limits], [*sides, differences, said],
        concurrency_limit=None, show_progress="hidden",
    )  # fmt: skip
    stop.click(page.stop, None, None, concurrency_limit=None, show_progress="hidden")


class _Compare:
    def __init__(self, web: Web) -> None:
        self._web, self._running = web, Running()

    async def run(
        self, request: gr.Request, message: dict[str, Any], order: str, *settings: Any
    ) -> AsyncIterator[tuple[Any, ...]]:
        """Answer twice; yields both sides, the differences and a notice."""
        say, tab = self._web.say, str(request.session_hash)
        text, files = message.get("text") or "", tuple(message.get("files") or ())
        wrong = [Path(path).name for path in files if not kind_of(path)]
        if wrong or not (text.strip() or files) or tab in self._running.stops:
            told = say("busy") if tab in self._running.stops else say("nothing_asked")
            yield gr.skip(), gr.skip(), gr.skip(), notice(say("wrong_file", name=wrong[0]) if wrong else told)
            return
        manner, limits = settled(settings)
        both, stop = [Turn("assistant"), Turn("assistant")], asyncio.Event()
        self._running.stops[tab] = stop
        told = ""
        try:
            with self._web.telling():
                api = self._web.api(request)
                model = await self._web.model(api, manner.model)
                asked = [Turn("user", text, files)]
                bodies = [await body_of(model, asked, manner, limits.values(p)) for p in (NATIVE, None)]
                work = _answer(api, bodies, both, stop, at_once=order == AT_ONCE)
                async for _ in _looking(work):
                    yield (*self._sides(both), "", "")
        except Trouble as trouble:
            told = str(trouble)
        finally:
            del self._running.stops[tab]
        found = "" if told or stop.is_set() else differences(both[0].text, both[1].text, say)
        yield (*self._sides(both), found, notice(say("stopped") if stop.is_set() else told))

    def stop(self, request: gr.Request) -> None:
        """End what is being answered on this page."""
        if (event := self._running.stops.get(str(request.session_hash))) is not None:
            event.set()

    def _sides(self, both: list[Turn]) -> tuple[Safe, Safe]:
        say = self._web.say
        return _side(say("native"), both[0], say), _side(say("adaptive"), both[1], say)


async def _answer(
    api: Api, bodies: list[dict[str, Any]], both: list[Turn], stop: asyncio.Event, *, at_once: bool
) -> None:
    """Let both answers grow."""

    async def one(index: int) -> None:
        async for _ in growing(api, bodies[index], both[index], stop):
            pass

    if at_once:
        async with asyncio.TaskGroup() as tasks:
            for index in range(2):
                tasks.create_task(one(index))
    else:
        for index in range(2):
            if not stop.is_set():
                await one(index)


async def _looking(work: Any) -> AsyncIterator[None]:
    """Do `work`, with a pause now and then to look at it.

    Raises:
        What it raises; of a group's errors the first.
    """
    task, began = asyncio.ensure_future(work), time.monotonic()
    try:
        while not task.done():
            await asyncio.wait({task}, timeout=SHOW_S if time.monotonic() - began < 2 else 4 * SHOW_S)
            yield
        try:
            task.result()
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from None
    finally:
        if not task.done():
            task.cancel()
            await asyncio.wait({task})


def _side(name: str, answer: Turn, say: Say) -> Safe:
    fields = answer.fields
    pairs: list[tuple[str, object]] = []
    if "actual" in fields:  # as it is of all that were answered
        took, tokens = fields["actual"], fields["tokens"]
        pairs = [
            (say("plan"), fields["plan"]),
            (say("ttft"), ms(took, "ttft_ms")),
            (say("latency"), ms(took, "latency_ms")),
            (say("tokens"), f"{tokens['visual_used']:,}"),
            (say("new_tokens"), f"{tokens['new']:,}"),
        ]
    said = answer.text or say("waiting")
    return element("section", element("h2", name), element("p", said, class_="af-answer"), facts(pairs))


def differences(native: str, adaptive: str, say: Say) -> Safe:
    """Both answers as one text, with what only one of them says marked."""
    if native == adaptive:
        return element("p", say("differences_none"))
    before, after = (re.findall(r"\w+|\s+|[^\w\s]", text) for text in (native, adaptive))
    parts: list[object] = []
    for what, a, b, c, d in difflib.SequenceMatcher(None, before, after, autojunk=False).get_opcodes():
        if what == "equal":
            parts.append("".join(before[a:b]))
            continue
        if b > a:
            parts.append(element("mark", "".join(before[a:b]), class_="af-native", title=say("only_native")))
        if d > c:
            parts.append(element("mark", "".join(after[c:d]), class_="af-adaptive", title=say("only_adaptive")))
    key = join(
        (
            element("mark", say("only_native"), class_="af-native"),
            " ",
            element("mark", say("only_adaptive"), class_="af-adaptive"),
        )
    )
    return element("section", element("h2", say("differences")), element("p", key), element("p", *parts))
