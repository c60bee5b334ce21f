"""The page that asks for the key, where the server has one.

Knows HTML. Must not know of sessions or keys.
"""

import json
from html import escape

from adaptive_fusion.serving.web.texts import LANGUAGES, text

_PAGE = """<!doctype html>
<html lang="{tag}"><head><meta charset="utf-8"><title>{title}</title>
<link rel="icon" href="data:,"><meta name="viewport" content="width=device-width, initial-scale=1">
<style>
:root {{ color-scheme: light dark; }}
body {{ font-family: system-ui, sans-serif; display: grid; place-items: center; min-height: 90vh; margin: 0 1rem; }}
form {{ display: grid; gap: .75rem; width: min(24rem, 100%); }}
input, button {{ font: inherit; padding: .6rem; }}
p {{ margin: 0; }}
</style></head>
<body><main><form id="enter"><h1>{title}</h1><p>{why}</p>
<label for="key">{label}</label>
<input id="key" type="password" autocomplete="off" required autofocus>
<button>{button}</button><p id="said" role="alert"></p>
<p>{others}</p></form></main>
<script>
document.getElementById("enter").addEventListener("submit", async (event) => {{
  event.preventDefault();
  const said = document.getElementById("said");
  let known = false;
  try {{
    const headers = {{ authorization: "Bearer " + document.getElementById("key").value.trim() }};
    known = (await (await fetch("../enter", {{ method: "POST", headers }})).json()).entered === true;
  }} catch (error) {{ /* the key has characters that no header may have */ }}
  if (known) location.reload(); else said.textContent = {wrong};
}});
</script></body></html>"""


def entrance(language: str) -> str:
    """The page, in that language."""
    others = " · ".join(
        f'<a href="../{name}/" lang="{tag}">{escape(text("language", name))}</a>'
        for name, tag in LANGUAGES.items()
        if name != language
    )
    return _PAGE.format(
        tag=LANGUAGES[language],
        title=escape(text("title", language)),
        why=escape(text("key_why", language)),
        label=escape(text("key", language)),
        button=escape(text("key_enter", language)),
        wrong=json.dumps(text("key_wrong", language)).replace("<", "\\u003c"),
        others=others,
    )
