"""All pages in one language, as one Gradio application: tabs, look, and what is mended of Gradio's own markup.

Knows which pages there are. Must not know what they do.
"""

from importlib.resources import files
from typing import Any

import gradio as gr

from adaptive_fusion.serving.web.chat import chat_page
from adaptive_fusion.serving.web.compare import compare_page
from adaptive_fusion.serving.web.folder import folder_page
from adaptive_fusion.serving.web.live import live_page
from adaptive_fusion.serving.web.markup import Safe, element, join
from adaptive_fusion.serving.web.rollout import rollout_page
from adaptive_fusion.serving.web.texts import LANGUAGES, text
from adaptive_fusion.serving.web.web import Web

PAGES = ("chat", "compare", "live", "folder", "rollout")
SANS = ("system-ui", "-apple-system", "Segoe UI", "Noto Sans", "Noto Sans SC", "PingFang SC", "sans-serif")
MONO = ("ui-monospace", "Menlo", "Consolas", "monospace")


def blocks_of(web: Web) -> Any:
    """The pages; nothing in them asks another site for anything."""
    with gr.Blocks(title=web.say("title"), analytics_enabled=False, fill_width=True) as blocks:
        gr.HTML(_head(web), elem_id="head")
        with gr.Tabs():
            tabs = [gr.Tab(web.say(f"tab_{name}"), id=name) for name in PAGES]
            chat_tab, compare_tab, live_tab, folder_tab, rollout_tab = tabs
            with chat_tab:
                chat = chat_page(web)
            with compare_tab:
                compare_page(web, chat)
            with live_tab:
                live_timer = live_page(web, live_tab)
            with folder_tab:
                folder_page(web, chat)
            with rollout_tab:
                rollout_timer = rollout_page(web, rollout_tab)
        for tab, timer in ((live_tab, live_timer), (rollout_tab, rollout_timer)):
            others = [each.select for each in tabs if each is not tab]
            gr.on(others, lambda: gr.update(active=False), None, timer, show_progress="hidden")
        blocks.load(*chat.opening, show_progress="hidden", concurrency_limit=None)
    return blocks


def theme() -> Any:
    """Fonts of the reader's own machine."""
    fonts = [gr.themes.Font(name) for name in SANS], [gr.themes.Font(name) for name in MONO]
    return gr.themes.Default(font=fonts[0], font_mono=fonts[1], primary_hue="blue")


def style() -> str:
    """The pages' own style."""
    return (files("adaptive_fusion.serving.web") / "page.css").read_text("utf-8")


def script() -> str:
    """What is mended of Gradio's markup, in the page's head."""
    text = (files("adaptive_fusion.serving.web") / "page.js").read_text("utf-8")
    return f"<script>{text}</script>"


def _head(web: Web) -> Safe:
    links = [
        element(
            "a",
            text("language", name),
            href=f"../{name}/",
            lang=tag,
            aria_current="true" if name == web.language else None,
        )
        for name, tag in LANGUAGES.items()
    ]
    languages = element("nav", *links, aria_label=web.say("language_label"))
    button = element("button", web.say("leave"), type="submit")
    leave = element("form", button, method="post", action="../leave", id="leave", hidden="hidden")
    return element("header", element("h1", web.say("title")), join((languages, leave)), class_="af-head")
