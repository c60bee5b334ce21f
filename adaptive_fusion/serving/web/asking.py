"""From what stands on a page to the body of a request: conversation, files, sampling, budget.

Knows OpenAI's form of a request and files of a session. Must not know of components or how anything is shown.
"""

import asyncio
import base64
import mimetypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

NATIVE = "native"


@dataclass
class Turn:
    """What one side said.

    Attributes:
        role: ``user`` or ``assistant``.
        text: In words.
        files: Paths of images and clips, as the session has them.
        request_id: Of an answer; empty until it is known, and of one that failed.
        note: What else there is to say of it: that it was stopped, or why it failed.
        fields: The decision and what came of it, once the answer has ended.
    """

    role: str
    text: str = ""
    files: tuple[str, ...] = ()
    request_id: str = ""
    note: str = ""
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Limits:
    """A budget as it stands on the page: 0 is no limit."""

    latency_ms: float = 0
    ttft_ms: float = 0
    vram_gb: float = 0
    attainment: float = 0.95
    on_deadline: str = "finish"
    on_infeasible: str = "cheapest"
    policy: str = ""

    def values(self, point: str | None = None) -> dict[str, Any]:
        """The field ``adaptive_fusion`` of a request."""
        given = {name: getattr(self, name) for name in ("latency_ms", "ttft_ms", "vram_gb")}
        found: dict[str, Any] = {name: value for name, value in given.items() if value}
        found |= {name: getattr(self, name) for name in ("attainment", "on_deadline", "on_infeasible")}
        if self.policy:
            found["policy"] = self.policy
        if point is not None:
            found["point"] = point
        return found


@dataclass(frozen=True)
class Manner:
    """How an answer is to be made."""

    system: str = ""
    max_tokens: float = 128
    temperature: float = 0
    top_p: float = 1
    seed: str = ""
    model: str = ""

    def values(self) -> dict[str, Any]:
        """Fields of a request."""
        found: dict[str, Any] = {"max_tokens": int(self.max_tokens), "temperature": self.temperature}
        if self.temperature > 0 and self.top_p < 1:
            found["top_p"] = self.top_p
        if self.seed.strip():
            try:
                found["seed"] = int(self.seed)
            except ValueError:
                found["seed"] = self.seed  # the server says what it expects
        return found


def settled(settings: Sequence[Any]) -> tuple[Manner, Limits]:
    """The values of all controls, those of `Manner` first."""
    count = len(fields(Manner))
    manner = Manner(*settings[:count])
    return replace(manner, model=manner.model or ""), Limits(*settings[count:])


def kind_of(path: str) -> str:
    """``image``, ``video`` or nothing, by the file's name; the server looks at its bytes."""
    kind = (mimetypes.guess_type(path)[0] or "").partition("/")[0]
    return kind if kind in ("image", "video") else ""


async def body_of(model: str, turns: Sequence[Turn], manner: Manner, own: Mapping[str, Any]) -> dict[str, Any]:
    """A chat request. Answers that failed are left out with their questions' place kept; files are read in a thread.

    Raises:
        FileNotFoundError: For a file that was deleted since.
    """
    messages = await asyncio.to_thread(_messages, turns)
    if manner.system.strip():
        messages.insert(0, {"role": "system", "content": manner.system})
    return {"model": model, "messages": messages, **manner.values(), "adaptive_fusion": dict(own)}


def _messages(turns: Sequence[Turn]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for turn in turns:
        if turn.role == "user":
            parts: list[dict[str, Any]] = [_part(path) for path in turn.files]
            if turn.text.strip() or not parts:
                parts.append({"type": "text", "text": turn.text})
            found.append({"role": "user", "content": parts})
        elif turn.text:
            found.append({"role": "assistant", "content": turn.text})
    return found


def _part(path: str) -> dict[str, Any]:
    kind = "video_url" if kind_of(path) == "video" else "image_url"
    label = mimetypes.guess_type(path)[0] or "application/octet-stream"
    data = base64.b64encode(Path(path).read_bytes()).decode()
    return {"type": kind, kind: {"url": f"data:{label};base64,{data}"}}
