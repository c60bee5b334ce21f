"""The names of a key-value cache, and the positions that belong to one.

transformers 5.24 calls it ``cache``, versions before ``past_key_values``: asked of the installed package, so that the
same code runs with either. Models with M-RoPE keep the offset of their positions apart from the cache, and only that of
their last call. Knows nothing of what is in a cache.
"""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from inspect import signature
from typing import Any

from adaptive_fusion.models.unwrap import unwrap

CACHES = ("cache", "past_key_values", "cache_params")
"""Names under which ``generate`` takes a cache: the present one and, until transformers 6, two former ones."""


def cache_name(model: Any) -> str:
    """The name of the cache among the arguments of the model's forward and in its output."""
    takes = signature(unwrap(model).forward).parameters
    return next((name for name in CACHES if name in takes), CACHES[0])


_OFFSET = "_adaptive_fusion_rope_deltas"


def recall_positions(model: Any, given: Mapping[str, Any]) -> None:
    """Before a call: put the offset of positions back that `model` had when it filled a cache among the arguments.

    Without it a second turn continues at the offset of whatever request came between the two.
    """
    for cache in _caches(given):
        if hasattr(cache, _OFFSET):
            model.model.rope_deltas = getattr(cache, _OFFSET)


def remember_positions(model: Any, given: Mapping[str, Any], result: Any) -> None:
    """After a call: note the offset on the caches that it filled, where a copy of the cache has it too."""
    inner = getattr(model, "model", None)
    if inner is not None and hasattr(inner, "rope_deltas"):
        for cache in (*_caches(given), *_caches(result if isinstance(result, Mapping) else {})):
            with suppress(AttributeError):  # a tuple of tensors, or a loop of the caller's made it
                setattr(cache, _OFFSET, inner.rope_deltas)


def _caches(values: Mapping[str, Any]) -> Iterator[Any]:
    return (values[name] for name in CACHES if name in values and values[name] is not None)
