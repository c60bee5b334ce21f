"""The names of a key-value cache: transformers 5.24 calls it ``cache``, versions before ``past_key_values``.

Asked of the installed package, so that the same code runs with either. Knows nothing of what is in a cache.
"""

from inspect import signature
from typing import Any

from adaptive_fusion.models.unwrap import unwrap

CACHES = ("cache", "past_key_values", "cache_params")
"""Names under which ``generate`` takes a cache: the present one and, until transformers 6, two former ones."""


def cache_name(model: Any) -> str:
    """The name of the cache among the arguments of the model's forward and in its output."""
    takes = signature(unwrap(model).forward).parameters
    return next((name for name in CACHES if name in takes), CACHES[0])
