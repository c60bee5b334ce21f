"""The page that explains a folder: many files measured and decided, as a gallery that can be sorted.

Knows its components and ``decide``. Must not know of other pages, but for settings and budget.
"""

import asyncio
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import gradio as gr

from adaptive_fusion.serving.web.asking import Limits, Manner, Turn, body_of, kind_of, settled
from adaptive_fusion.serving.web.chat import KEEP_S, ChatControls
from adaptive_fusion.serving.web.client import Api
from adaptive_fusion.serving.web.decision import Say
from adaptive_fusion.serving.web.markup import Safe, element, join, notice
from adaptive_fusion.serving.web.web import Trouble, Web

AT_A_TIME = 2
SORTS = ("name", "p", "tokens")


def folder_page(web: Web, chat: ChatControls) -> None:
    """Lay the page out and connect it."""
    say, page = web.say, _Folder(web)
    gr.HTML(element("p", say("folder_why")))
    chosen = gr.File(
        label=say("files"), file_count="multiple", file_types=["image", "video"], elem_id="folder-files", height=180
    )
    prompt = gr.Textbox("", label=say("folder_prompt"), max_lines=2)
    with gr.Row():
        go = gr.Button(say("explain"), variant="primary", elem_id="explain", min_width=80)
        sort = gr.Dropdown(
            [(say(f"sort_{name}"), name) for name in SORTS], value="name", label=say("sort"), elem_id="sort"
        )
    said, shown = gr.HTML(elem_id="folder-said"), gr.HTML(elem_id="gallery")
    rows = gr.State([], time_to_live=KEEP_S)
    go.click(
        page.explain, [chosen, prompt, sort, *chat.manner, *chat.limits], [rows, shown, said],
        concurrency_limit=None, show_progress="hidden",
    )  # fmt: skip
    sort.input(lambda rows, by: gallery(rows, by, say), [rows, sort], shown, show_progress="hidden")


class _Folder:
    def __init__(self, web: Web) -> None:
        self._web = web

    async def explain(
        self, request: gr.Request, files: list[str] | None, prompt: str, sort: str, *settings: Any
    ) -> AsyncIterator[tuple[Any, ...]]:
        """Decide each file; yields rows, gallery and how far it is."""
        say = self._web.say
        if not files:
            yield gr.skip(), gr.skip(), notice(say("no_files"))
            return
        manner, limits = settled(settings)
        rows: list[dict[str, Any]] = []
        try:
            api = self._web.api(request)
            with self._web.telling():
                model = await self._web.model(api, manner.model)
            gate = asyncio.Semaphore(AT_A_TIME)

            async def one(path: str) -> dict[str, Any]:
                async with gate:
                    return await self._decide(api, model, path, prompt, manner, limits)

            for done in asyncio.as_completed([one(path) for path in files]):
                rows.append(await done)
                told = element("p", say("explained_count", done=len(rows), all=len(files)), role="status")
                yield rows, gallery(rows, sort, say), told
        except Trouble as trouble:
            yield rows, gallery(rows, sort, say), notice(str(trouble))

    async def _decide(
        self, api: Api, model: str, path: str, prompt: str, manner: Manner, limits: Limits
    ) -> dict[str, Any]:
        """A row of the gallery; what goes wrong with one file is told in its place."""
        name = Path(path).name
        if not kind_of(path):
            return {"name": name, "error": self._web.say("wrong_file", name=name)}
        try:
            with self._web.telling():
                body = await body_of(model, [Turn("user", prompt, (path,))], manner, limits.values())
                found = await api.call("decide", body, pictures="true")
        except Trouble as trouble:
            return {"name": name, "error": str(trouble)}
        kept = {key: found[key] for key in ("lane", "plan", "p_complex", "reason", "pictures", "tokens")}
        return {"name": name, **kept}


def gallery(rows: list[dict[str, Any]], by: str, say: Say) -> Safe:
    """The files, sorted; those that failed come last."""
    keys: Mapping[str, Any] = {
        "name": lambda row: row["name"].lower(),
        "p": lambda row: -(row.get("p_complex") or 0.0),
        "tokens": lambda row: -row.get("tokens", {}).get("visual_planned", 0),
    }
    ordered = sorted(rows, key=lambda row: ("error" in row, keys[by](row)))
    return element("ul", *(_item(row, say) for row in ordered), class_="af-gallery", aria_label=say("gallery"))


def _item(row: Mapping[str, Any], say: Say) -> Safe:
    if "error" in row:
        return element("li", element("strong", row["name"]), element("p", row["error"]))
    picture = join(element("img", src=shown["picture"], alt=row["name"]) for shown in row["pictures"][:1])
    tokens = row["tokens"]
    lines = [
        f"{say('p_complex')} {row['p_complex']:.2f}" if row["p_complex"] is not None else "",
        f"{say('lane')} {row['lane']} · {row['plan']}",
        f"{say('tokens')} {tokens['visual_planned']:,} {say('of_native', native=tokens['visual_native'])}",
    ]
    said = join(element("div", line) for line in lines if line)
    return element("li", picture, element("strong", row["name"]), said, title=row["reason"])
