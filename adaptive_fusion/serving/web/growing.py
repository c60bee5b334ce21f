"""Answers as they grow, and the decisions behind them.

Knows the endpoints and OpenAI's form of an answer in pieces. Must not know of components or pages.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from adaptive_fusion.serving.web.asking import Turn
from adaptive_fusion.serving.web.client import Api, ApiError

SHOW_S = 0.05
"""How often at most a growing answer is shown."""


@dataclass
class Running:
    """Answers that are being written, by page; setting the event ends one."""

    stops: dict[str, asyncio.Event] = field(default_factory=dict)


async def growing(api: Api, body: dict[str, Any], answer: Turn, stop: asyncio.Event) -> AsyncIterator[None]:
    """Let an answer grow, with a pause between two looks at it; setting `stop` ends its generation. An answer that came
    to its end has all that is kept of its decision."""

    def named(request_id: str) -> None:
        answer.request_id = request_id

    chunks = api.stream(body, named)
    stopped = asyncio.ensure_future(stop.wait())
    shown = 0.0
    try:
        while True:
            following = asyncio.ensure_future(anext(chunks, None))
            await asyncio.wait({following, stopped}, return_when=asyncio.FIRST_COMPLETED)
            if not following.done():
                following.cancel()
                await asyncio.wait({following})
                return
            chunk = following.result()
            if chunk is None:
                break
            answer.fields = chunk.get("adaptive_fusion", answer.fields)
            answer.text += said_in(chunk)
            if time.monotonic() - shown >= SHOW_S:
                shown = time.monotonic()
                yield
    finally:
        stopped.cancel()
        await chunks.aclose()
    if answer.request_id:
        with contextlib.suppress(ApiError):  # then what came with the answer is all that is known
            answer.fields = await api.call("decisions", below=answer.request_id)


def said_in(chunk: Mapping[str, Any]) -> str:
    """What a piece of an answer adds to its text; engines leave out what they have nothing to say of."""
    deltas = [choice.get("delta") or {} for choice in chunk.get("choices") or ()]
    return "".join(delta.get("content") or "" for delta in deltas)
