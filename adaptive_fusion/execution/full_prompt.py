"""What a caller sees of a reduced prompt: callbacks and results with the full one in its place.

The model generates behind a prompt with fewer placeholders. Stopping criteria, logits processors, prefix functions and
streamers are wrapped so that they see the caller's prompt followed by the new tokens, as from the model itself.
Knows token tensors and the interfaces of transformers' callbacks. Must not know of models, policies or budgets.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from adaptive_fusion.errors import ConfigError
from adaptive_fusion.models.caches import CACHES
from adaptive_fusion.models.placeholders import restore_prompt

Show = Callable[[Tensor], Tensor]


class _Wrapped:
    """Attributes that are not found here are those of `inner`: ``generate`` asks criteria for some of theirs."""

    inner: Any

    def __init__(self, inner: Any, show: Show) -> None:
        self.inner, self.show = inner, show

    def __getattr__(self, name: str) -> Any:
        if name == "inner":  # missing while it is copied or unpickled
            raise AttributeError(name)
        return getattr(self.inner, name)


class ShownCriterion(_Wrapped, StoppingCriteria):  # type: ignore[misc]
    """A stopping criterion that sees the full prompt."""

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        return self.inner(self.show(input_ids), scores, **kwargs)


class ShownProcessor(_Wrapped, LogitsProcessor):  # type: ignore[misc]
    """A logits processor that sees the full prompt."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Any:
        return self.inner(self.show(input_ids), scores)


class ShownStreamer(BaseStreamer):  # type: ignore[misc]
    """A streamer that is put the full prompt; ``generate`` puts the prompt first, then what is new."""

    def __init__(self, inner: Any, show: Show) -> None:
        self.inner, self._show = inner, show
        self._is_prompt = True

    def put(self, value: Tensor) -> None:
        shown, self._is_prompt = self._show(value) if self._is_prompt else value, False
        self.inner.put(shown)

    def end(self) -> None:
        self.inner.end()


def shown_to(prompt: Tensor, reduced_length: int) -> Show:
    """Puts `prompt` ``[batch, length]`` in place of the first `reduced_length` tokens of rows."""
    return lambda rows: restore_prompt(rows, reduced_length, prompt)


def shown_prefix(allowed: Callable[[int, Tensor], Any], prompt: Tensor, reduced_length: int) -> Callable[..., Any]:
    """``prefix_allowed_tokens_fn`` with the full prompt of its row."""

    def shown(batch_id: int, input_ids: Tensor) -> Any:
        whole = prompt[batch_id].to(input_ids.device)
        return allowed(batch_id, torch.cat([whole, input_ids[reduced_length:]]))

    return shown


class ReducedCache:
    """Stands for the cache of a reduced prompt in a result: the next turn's full prompt does not continue it.

    Handed to a model it raises instead of making it answer from the wrong tokens; `reduced` is the cache itself.
    """

    WHY: ClassVar[str] = (
        "was filled with a reduced prompt, which the full one does not continue; make the first call at point=NATIVE, "
        "or leave the cache out and give the whole conversation"
    )

    def __init__(self, reduced: Any) -> None:
        self.reduced = reduced

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "reduced":  # Python itself asks whether there are such
            raise AttributeError(name)
        raise ConfigError(f"the cache {self.WHY}")


def with_full_prompt(result: Any, reduced_length: int, prompt: Tensor) -> Any:
    """``generate``'s `result` behind a reduced prompt, as the caller's own `prompt` would have it.

    A cache in it is exchanged for a `ReducedCache`.
    """
    if isinstance(result, Tensor):
        return restore_prompt(result, reduced_length, prompt)
    result.sequences = restore_prompt(result.sequences, reduced_length, prompt)
    name = next((name for name in CACHES if name in result), None)  # the others are names of the same
    if name is not None:
        result[name] = ReducedCache(result[name])
    return result
