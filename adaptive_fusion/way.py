"""A prepared request's way to the model.

Knows a request, its arguments and the runner that answers it. Must not know decisions.
"""

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import LogitsProcessorList

from adaptive_fusion.execution.shift import shift
from adaptive_fusion.execution.stream import Pieces, Repeating
from adaptive_fusion.point import NATIVE, OperatingPoint
from adaptive_fusion.prepared import Prepared

if TYPE_CHECKING:
    from adaptive_fusion.answering import Answering


class Way:
    """Its tensors at a point, its full prompt, its options."""

    def __init__(self, runner: "Answering", prepared: Prepared, streamer: Pieces | None = None) -> None:
        self._runner, self._prepared, self._streamer = runner, prepared, streamer
        # Nobody holds the full prompt: it is the one that the media would have had natively.
        self.prompt: Callable[[], Tensor] = cache(lambda: self.prepare(NATIVE)["input_ids"])

    def prepare(self, at: OperatingPoint) -> dict[str, Any]:
        """The processor's tensors."""
        request = self._prepared.request
        seen = self._runner._seen(request)
        reuse: dict[str, Any] = {"reuse": seen.at(at)} if seen is not None else {}
        return self._runner.adapter.prepare(request.messages, at, **reuse, **request.of_prompt)

    def options(self, reduced: Tensor) -> dict[str, Any]:
        """``generate``'s options for the prompt that the model sees, with a stream's own streamer, which sees it too.
        What a try has given that ran out of memory stands: the next one says it again and goes on.

        Raises:
            ContextLengthError: If prompt and answer do not fit into the call's context.
        """
        self._runner._require_context(self._prepared.call, reduced.shape[-1])
        options, streamer = shift(self._prepared.call.arguments, reduced, self.prompt), self._streamer
        if streamer is None:
            return options
        if streamer.said:
            repeating = Repeating(reduced.shape[-1], streamer.said)
            options["logits_processor"] = LogitsProcessorList([*(options.get("logits_processor") or ()), repeating])
        return {**options, "streamer": streamer}
