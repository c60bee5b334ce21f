"""A conversation as the page's components take it.

Knows turns and components. Must not know of endpoints.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from adaptive_fusion.serving.web.asking import Turn


def shown_turns(turns: Sequence[Turn]) -> list[dict[str, Any]]:
    """The conversation as the component takes it."""
    found: list[dict[str, Any]] = []
    for turn in turns:
        found += [{"role": turn.role, "content": {"path": path, "alt_text": Path(path).name}} for path in turn.files]
        note = f" *({turn.note})*" if turn.note else ""
        if turn.text or turn.role == "assistant":
            found.append({"role": turn.role, "content": turn.text + note})
    return found


def answers(turns: Sequence[Turn]) -> Any:
    """The choice among the answers, the last one chosen."""
    numbers = list(range(sum(turn.role == "assistant" for turn in turns)))
    return gr.update(choices=[(str(n + 1), n) for n in numbers], value=numbers[-1] if numbers else None)


def chosen_of(turns: Sequence[Turn], chosen: int | None) -> Turn | None:
    """The answer of that number, the last one where it is none; None where there are no answers."""
    found = [turn for turn in turns if turn.role == "assistant"]
    return found[chosen] if chosen is not None and 0 <= chosen < len(found) else found[-1] if found else None
