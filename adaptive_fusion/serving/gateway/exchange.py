"""One chat request under way through the gateway, and what its client is told of it in headers.

Knows decisions and headers. Must not know how requests are sent or answers read.
"""

import asyncio
from dataclasses import dataclass

import httpcore2
from starlette.types import Scope, Send

from adaptive_fusion.decisions import Decision
from adaptive_fusion.execution.turns import Turns
from adaptive_fusion.point import NATIVE
from adaptive_fusion.serving import answers
from adaptive_fusion.serving.gateway.entry import Entry
from adaptive_fusion.serving.gateway.plan import Planned
from adaptive_fusion.serving.gateway.proxy import Headers
from adaptive_fusion.serving.gateway.reading import Call
from adaptive_fusion.serving.gateway.side import Side
from adaptive_fusion.serving.gateway.sizing import Given
from adaptive_fusion.serving.gateway.watch import Watch
from adaptive_fusion.serving.trials import Trial

REASON_CHARACTERS = 500


@dataclass
class Exchange:
    """One request under way.

    Attributes:
        scope: Its head.
        send: To its client.
        call: What it says.
        planned: What was decided.
        turns: Its place in its conversation.
        watch: What its answer takes.
        side: What has decided it.
        entry: Where it is.
        trial: Its part in an experiment.
        under_way: The engine's answer to what was sent before the decision was made, in an audit.
        lost_ms: What a first pass took that was given up.
        refused_look: Whether the engine refused to be asked how sure the model is, or refused the request itself.
    """

    scope: Scope
    send: Send
    call: Call
    planned: Planned
    turns: Turns
    watch: Watch
    side: Side
    entry: Entry
    trial: Trial | None = None
    under_way: "asyncio.Future[httpcore2.Response] | None" = None
    lost_ms: float = 0.0
    refused_look: bool = False


def target_of(scope: Scope) -> bytes:
    """Path and query of a request, as they came."""
    path: bytes = scope.get("raw_path") or scope["path"].encode()
    query: bytes = scope.get("query_string") or b""
    return path.partition(b"?")[0] + (b"?" + query if query else b"")


def headers_of(planned: Planned, decision: Decision) -> Headers:
    """The decision, beside the engine's own headers."""
    found = answers.headers(decision, planned.native_tokens)
    values = {name: value for name, value in found.items() if name.startswith(answers.HEADER)}
    if decision.point != NATIVE or decision.escalated is not True:
        values[f"{answers.HEADER}visual-tokens"] = str(planned.tokens)
    if decision.escalated is not None:
        values[f"{answers.HEADER}escalated"] = str(decision.escalated).lower()
    if planned.media:
        told = [row.get("why") or row["given"] for row in media_of(planned, escalated=decision.escalated is True)]
        values[f"{answers.HEADER}media"] = ", ".join(told)
    values[f"{answers.HEADER}reason"] = decision.reason[:REASON_CHARACTERS]
    return [(name.encode(), answers.plain(value).encode()) for name, value in values.items()]


def media_of(planned: Planned, *, escalated: bool = False) -> list[dict[str, str]]:
    """What each medium gets, and why one is left as it came."""
    given = planned.second if escalated and planned.second is not None else planned.given
    return [
        {"given": said_of(one), **({"why": medium.why} if medium.measured is None else {})}
        for medium, one in zip(planned.media, given, strict=True)
    ]


def arm_of(trial: Trial | None) -> Headers:
    """The arm of an experiment, and which; nothing without one."""
    told = trial.said().get("rollout", {}) if trial is not None else {}
    return [(f"{answers.HEADER}{name}".encode(), answers.plain(value).encode()) for name, value in told.items()]


def said_of(given: Given) -> str:
    """What a medium gets, in a word."""
    pixels = "native" if given.max_pixels is None else f"{given.max_pixels}px"
    return pixels if given.max_fps is None else f"{pixels}/{given.max_fps:g}fps"
