"""How sure a model upstream is of its first tokens, read from the log-probabilities in its answer, and these taken out
of it again.

Knows answers and events in OpenAI's form. Must not know of plans, thresholds or HTTP.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from adaptive_fusion.serving.gateway.events import data_of
from adaptive_fusion.serving.gateway.splice import Body, Node, NotReadable

ASKED = 20
"""How many of the likeliest tokens are asked for, the most that OpenAI's API gives."""
PAUSE_S = (60.0, 3600.0)
"""How long an engine that refused is not asked, at first and at most."""
_CHOICE = {"logprobs": None, "*": None}
SHAPE = {"choices": [_CHOICE], "*": None}


class Looks:
    """Whether an engine gives log-probabilities: one that refuses them is asked again after a while, each time a longer
    one, as an engine may be started anew behind its address.

    Args:
        ever: Whether it is known to have them at all.
        clock: Seconds, monotonic.
    """

    def __init__(self, ever: bool, clock: Callable[[], float]) -> None:
        self._ever, self._clock = ever, clock
        self._from_s, self._pause_s = -math.inf, PAUSE_S[0]

    @property
    def are_given(self) -> bool:
        """Whether to ask now."""
        return self._ever and self._clock() >= self._from_s

    def refused(self) -> None:
        """It refused them, and nothing else of the request."""
        self._from_s = self._clock() + self._pause_s
        self._pause_s = min(2 * self._pause_s, PAUSE_S[1])

    def given(self) -> None:
        """It gave some."""
        self._pause_s = PAUSE_S[0]


def entropies(choices: Sequence[Any]) -> list[float]:
    """Of the tokens in an answer's or an event's first choice, each in nats; what is missing of the whole probability
    counts as one more token, so an entropy is at least about this."""
    found = list[float]()
    first = choices[0] if choices and isinstance(choices[0], Mapping) else {}
    logprobs = first.get("logprobs")
    rows = logprobs.get("content") if isinstance(logprobs, Mapping) else None
    for row in rows if isinstance(rows, list) else ():
        top = row.get("top_logprobs") if isinstance(row, Mapping) else None
        values = [each.get("logprob") for each in top if isinstance(each, Mapping)] if isinstance(top, list) else []
        numbers = [float(each) for each in values if isinstance(each, int | float) and not isinstance(each, bool)]
        if not numbers:
            return found
        shares = [math.exp(min(0.0, each)) for each in numbers]
        shares.append(max(0.0, 1.0 - sum(shares)))
        total = sum(shares)
        found.append(-sum(p / total * math.log(p / total) for p in shares if p > 0))
    return found


def without_logprobs(data: bytes) -> bytes:
    """A JSON answer or event with null in place of its log-probabilities, everything else as it was."""
    try:
        body = Body(data, SHAPE)
    except NotReadable:
        return data
    choices = body.root.get("choices")
    spans: list[tuple[Node, str]] = []
    for choice in (choices.items if choices is not None else None) or ():
        if (said := choice.get("logprobs")) is not None and said.value is not None:
            spans.append((said, "null"))
    return body.edited(spans)


def choices_of(data: bytes | None) -> list[Any]:
    """The choices of an answer or of an event's data; none where it is no answer."""
    if data is None or not data.startswith(b"{"):
        return []
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return []
    choices = found.get("choices") if isinstance(found, dict) else None
    return choices if isinstance(choices, list) else []


def event_without_logprobs(event: bytes) -> bytes:
    """An event with null in place of its log-probabilities."""
    data = data_of(event)
    if data is None or b'"logprobs"' not in data:
        return event
    return event.replace(data, without_logprobs(data), 1)
