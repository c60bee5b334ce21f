"""The names of a key-value cache, and the positions that belong to one.

transformers 5.24 calls it ``cache``, versions before ``past_key_values``: asked of the installed package, so that the
same code runs with either. Models with M-RoPE keep the offset of their positions apart from the cache, and only that of
their last call. Of what is in a cache this knows no more than where its rows are.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from inspect import signature
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

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
    # The former names also lead to the present one's value, with a warning.
    name = next((name for name in CACHES if name in values), None)
    if name is not None and values[name] is not None:
        yield values[name]


def rows_part(model: Any) -> bool:
    """Whether rows of one of `model`'s caches can be taken apart and put together: it holds keys and values of every
    token, and nothing else (no windows, no states of linear attention)."""
    config: Any = unwrap(model).config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    try:
        layers = DynamicCache(config=text).layers
    except (AttributeError, TypeError, ValueError):  # a configuration that says nothing of its layers
        return False
    return bool(layers) and all(type(layer) is DynamicLayer for layer in layers)  # derived classes hold more


def cache_of(result: Any) -> Any:
    """The cache in what ``generate`` returned."""
    return next(_caches(result))


def joined(caches: Sequence[Any]) -> Any:
    """The first of some caches with the rows of all, one after the other, padded on the left to the longest; the others
    are empty afterwards. See `rows_part`."""
    first, longest = caches[0], max(cache.get_seq_length() for cache in caches)
    for layers in zip(*(cache.layers for cache in caches), strict=True):
        for name in ("keys", "values"):
            parts = [getattr(layer, name) for layer in layers]
            whole = torch.cat([nn.functional.pad(part, (0, 0, longest - part.shape[-2], 0)) for part in parts])
            for layer in layers[1:]:
                setattr(layer, name, None)
            setattr(layers[0], name, whole)
    if all(getattr(cache, _OFFSET, None) is not None for cache in caches):
        setattr(first, _OFFSET, torch.cat([getattr(cache, _OFFSET) for cache in caches]))
    return first


def keep_rows(cache: Any, rows: Sequence[int], cut: int) -> None:
    """Leave nothing but some rows in a cache, without their first `cut` tokens. See `rows_part`."""
    for layer in cache.layers:
        for name in ("keys", "values"):
            whole = getattr(layer, name)
            setattr(layer, name, whole[:, :, cut:].index_select(0, torch.tensor(rows, device=whole.device)))
    if (offset := getattr(cache, _OFFSET, None)) is not None:
        setattr(cache, _OFFSET, offset.index_select(0, torch.tensor(rows, device=offset.device)))
