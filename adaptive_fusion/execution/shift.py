"""One call's options for the prompt that the model really sees: lengths shifted, callbacks shown the full prompt.

Knows resolved arguments and token tensors. Must not know of models, media or policies.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from adaptive_fusion.errors import ConfigError
from adaptive_fusion.execution.arguments import Arguments
from adaptive_fusion.execution.full_prompt import (
    ShownCriterion,
    ShownProcessor,
    ShownStreamer,
    shown_prefix,
    shown_to,
)
from adaptive_fusion.execution.generate_rules import is_blind


def shift(arguments: Arguments, reduced: Tensor, prompt: Callable[[], Tensor]) -> dict[str, Any]:
    """The options for ``generate`` on the prompt `reduced` that mean what `arguments` mean on the full one.

    Args:
        arguments: The call's.
        reduced: ``input_ids`` that the model sees, ``[batch, length]``.
        prompt: Gives those that the caller means; called only if something counts the prompt or is shown it.

    Raises:
        ConfigError: If ``max_length`` leaves no room behind the full prompt.
    """
    options = dict(arguments.options)
    if not arguments.see_prompt:
        return options
    full = prompt()
    if torch.equal(full.cpu(), reduced.cpu()):
        return options
    _shift_lengths(arguments, options, full.shape[1], full.shape[1] - reduced.shape[1])
    _show(options, full, reduced.shape[1])
    return options


def _shift_lengths(arguments: Arguments, options: dict[str, Any], full: int, dropped: int) -> None:
    given = arguments.options.get("generation_config")
    for name in arguments.lengths:
        value = int(arguments.value(name))
        if name == "max_length" and value <= full:
            raise ConfigError(f"max_length is {value}; expected more than the {full} tokens of the prompt")
        shifted = max(0, value - dropped)
        if given is None or name in options:
            options[name] = shifted
        else:
            # In a copy of the caller's configuration: transformers will not take both in the future.
            options["generation_config"] = copy.copy(options["generation_config"])
            setattr(options["generation_config"], name, shifted)


def _show(options: dict[str, Any], full: Tensor, reduced_length: int) -> None:
    show = shown_to(full, reduced_length)
    for name, kind in (("stopping_criteria", ShownCriterion), ("logits_processor", ShownProcessor)):
        if options.get(name) is not None:
            found = options[name]
            shown = [item if is_blind(item) else kind(item, show) for item in found]
            options[name] = type(found)(shown) if isinstance(found, list) else shown
    if options.get("prefix_allowed_tokens_fn") is not None:
        options["prefix_allowed_tokens_fn"] = shown_prefix(options["prefix_allowed_tokens_fn"], full, reduced_length)
    if options.get("streamer") is not None:
        options["streamer"] = ShownStreamer(options["streamer"], show)
