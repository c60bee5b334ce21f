"""An engine's answer as it is read by a program that asked for it: whole, or event by event.

Knows answers in OpenAI's form. Must not know what was asked or planned.
"""

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from adaptive_fusion.serving.gateway.client import UpstreamError, shortened
from adaptive_fusion.serving.gateway.escalate import entropies
from adaptive_fusion.serving.gateway.events import data_of


@dataclass
class Answer:
    """An answer as it came.

    Attributes:
        text: What was said.
        finish: Why it ended; empty while it has not.
        usage: As the engine counts.
        choices: Of a whole answer.
        first_s: When the first text of a stream came, by `time.monotonic`.
        pieces: Of a stream that said something.
        entropies: Of a stream's tokens, in nats, where log-probabilities came.
    """

    text: str = ""
    finish: str = ""
    usage: Mapping[str, Any] | None = None
    choices: Sequence[Any] = ()
    first_s: float = math.nan
    pieces: int = 0
    entropies: list[float] = field(default_factory=list)

    @classmethod
    def read(cls, found: Any) -> "Answer":
        """A whole answer.

        Raises:
            UpstreamError: If it is no chat completion.
        """
        try:
            choice = found["choices"][0]
            text = choice["message"].get("content") or ""
            return cls(text, choice.get("finish_reason") or "stop", found.get("usage"), found["choices"])
        except (TypeError, KeyError, IndexError, AttributeError) as error:
            raise UpstreamError("the engine's answer is no chat completion", 502) from error

    def said(self, event: bytes) -> Iterator[str]:
        """The text of an event of a stream, if it has any.

        Raises:
            UpstreamError: If it says that the engine broke off, or is no event of a chat completion.
        """
        data = data_of(event)
        if data is None or not data.startswith(b"{"):
            return
        try:
            found = json.loads(data)
            if found.get("error"):
                raise UpstreamError(f"the engine broke off: {shortened(found['error'])}", 502)
            self.usage = found.get("usage") or self.usage
            choice = (found.get("choices") or [{}])[0]
            self.finish = choice.get("finish_reason") or self.finish
            text = (choice.get("delta") or {}).get("content")
        except (ValueError, RecursionError, TypeError, KeyError, AttributeError) as error:
            raise UpstreamError("an event of the engine's answer is none of a chat completion", 502) from error
        self.entropies += entropies([choice])
        if text:
            if math.isnan(self.first_s):
                self.first_s = time.monotonic()
            self.text += text
            self.pieces += 1
            yield text
