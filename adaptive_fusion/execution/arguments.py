"""One call's arguments of ``generate`` by name, and what they ask of its prompt.

`generate_rules` has the table of what each argument means behind a reduced prompt; what is not in it goes to the model
as it is. Knows names and values. Must not know of media, policies or budgets.
"""

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from inspect import Parameter, signature
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from adaptive_fusion.checks import integer
from adaptive_fusion.errors import ConfigError
from adaptive_fusion.execution.full_prompt import ReducedCache
from adaptive_fusion.execution.generate_rules import RULES, Meaning, is_blind, is_own
from adaptive_fusion.models.caches import CACHES
from adaptive_fusion.models.unwrap import unwrap
from adaptive_fusion.point import NATIVE, OperatingPoint

CHAT_NEW_TOKENS = 256
"""Upper bound of an answer where neither the caller nor a generation configuration has one."""
GENERATE_NEW_TOKENS = 20
"""What ``generate`` gives where nothing limits it: the ``max_length`` of transformers' own defaults."""


_LISTS = ("stopping_criteria", "logits_processor")
_COUNTS = ("max_new_tokens", "min_new_tokens", "max_length", "min_length")
_PIXELS = {"pixel_values": "image_grid_thw", "pixel_values_videos": "video_grid_thw"}


@dataclass(frozen=True)
class Arguments:
    """The arguments of one call of ``generate``, by name.

    `inputs` are those of the prompt, `options` all others. `as_is` says why the call must go to the model as it is,
    `whole` why its prompt must keep every token; None where it need not. `defaults` is the model's own configuration.
    """

    inputs: Mapping[str, Any]
    options: Mapping[str, Any]
    defaults: Any
    as_is: str | None = None
    whole: str | None = None

    def value(self, name: str) -> Any:
        """What ``generate`` goes by: the explicit argument, else the given configuration's, else the model's."""
        if name in self.options:
            return self.options[name]
        given = getattr(self.options.get("generation_config"), name, None)
        return given if given is not None else getattr(self.defaults, name, None)

    def most_new_tokens(self, prompt_length: int) -> int:
        """The most tokens an answer to a prompt of `prompt_length` can have."""
        new, total = self.value("max_new_tokens"), self.value("max_length")
        if new is None:
            new = GENERATE_NEW_TOKENS if total is None else operator.index(total) - prompt_length
        return max(1, operator.index(new))

    @property
    def lengths(self) -> tuple[str, ...]:
        """The lengths in force that count the prompt; new tokens take precedence over them."""
        pairs = (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens"))
        return tuple(
            name
            for name, new in pairs
            if self.value(new) is None and self.value(name) is not None and (name == "max_length" or self.value(name))
        )

    @property
    def see_prompt(self) -> bool:
        """Whether anything counts the caller's prompt or is shown it."""
        if self.lengths or any(self.options.get(name) is not None for name in ("prefix_allowed_tokens_fn", "streamer")):
            return True
        return any(not is_blind(item) for name in _LISTS for item in self.options.get(name) or ())

    def end_tokens(self) -> frozenset[int]:
        """Tokens that end an answer."""
        found = self.value("eos_token_id")
        return frozenset([] if found is None else torch.as_tensor(found).flatten().tolist())

    def end_strings(self) -> tuple[str, ...]:
        """Strings that end an answer."""
        found = self.value("stop_strings")
        return (found,) if isinstance(found, str) else tuple(found or ())


def resolve(model: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Arguments:
    """The arguments of ``model.generate(*args, **kwargs)``.

    Raises:
        ConfigError: For an argument that is refused, by name.
        TypeError: As Python raises it for a call that does not fit the signature.
    """
    named = _by_name(model, args, kwargs)
    main = getattr(model, "main_input_name", "input_ids")
    if named.get("inputs") is not None and named.get(main) is None:
        named[main] = named.pop("inputs")
    inputs = {name: value for name, value in named.items() if name in RULES and RULES[name].meaning is Meaning.INPUT}
    options = {name: value for name, value in named.items() if name not in inputs}
    found = Arguments(inputs, options, getattr(model, "generation_config", None))
    _refuse(found)
    as_is = _active(found, Meaning.FITTED) or _unknown(found) or _unfit(found)
    return Arguments(inputs, options, found.defaults, as_is, _active(found, Meaning.WHOLE) or _own_list(found))


def for_chat(
    model: Any, options: Mapping[str, Any], max_new_tokens: int | None = None, tokenizer: Any = None
) -> Arguments:
    """The arguments of a ``generate`` whose prompt is made of a request; without a limit, `CHAT_NEW_TOKENS` is it.

    Stop strings get the `tokenizer`, and whoever asks for logits or scores gets them returned.

    Raises:
        ConfigError: For an argument of the prompt's or one that is refused, by name, and for more than one answer.
    """
    named = dict(options)
    if max_new_tokens is not None:
        named["max_new_tokens"] = integer(max_new_tokens, "max_new_tokens", 1)
    found = Arguments({}, named, getattr(model, "generation_config", None))
    _refuse(found)
    for name, value in named.items():
        rule = RULES.get(name)
        if rule is not None and rule.meaning in (Meaning.INPUT, Meaning.FITTED) and not rule.idle(value):
            raise ConfigError(f"{name} {rule.why}; chat and stream make the prompt themselves: use generate")
    several = found.value("num_return_sequences") or 1
    if several != 1:
        raise ConfigError(f"num_return_sequences is {several!r}; chat and stream give 1 answer, generate several")
    if found.value("max_new_tokens") is None and found.value("max_length") is None:
        named["max_new_tokens"] = CHAT_NEW_TOKENS
    if found.value("stop_strings") is not None:
        named.setdefault("tokenizer", tokenizer)
    if found.value("output_logits") or found.value("output_scores"):
        named.setdefault("return_dict_in_generate", True)
    whole = _active(found, Meaning.FITTED) or _active(found, Meaning.WHOLE) or _unknown(found) or _own_list(found)
    return Arguments({}, named, found.defaults, whole=whole)


def settled(arguments: Arguments, point: OperatingPoint | None) -> tuple[OperatingPoint | None, str | None]:
    """The point that a call must run, if any, and why if it is not the given one: native for the whole prompt.

    Raises:
        ConfigError: If the arguments rule the given point out.
    """
    why = arguments.as_is or arguments.whole
    if point is None:
        return (NATIVE, f"native: {why}") if why is not None else (None, None)
    # Fusion leaves the prompt as long as it was, downsampling does not.
    if why is not None and (point.downsample != 1.0 or (arguments.as_is is not None and point != NATIVE)):
        raise ConfigError(f"point is {point.name}, but {why}; expected native, or no point")
    return point, None


def _by_name(model: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    host: Any = unwrap(model)
    takes = signature(host.generate)  # PEFT's own has no names
    named = dict(takes.bind(*args, **kwargs).arguments)
    for parameter in takes.parameters.values():
        if parameter.kind is Parameter.VAR_KEYWORD:
            named |= named.pop(parameter.name, {})
    return named


def _refuse(arguments: Arguments) -> None:
    for name, rule in RULES.items():
        if rule.meaning is Meaning.REFUSED and not rule.idle(arguments.value(name)):
            raise ConfigError(f"{name} is {arguments.value(name)!r}: it {rule.why}")
    for name in CACHES:
        if isinstance(arguments.value(name), ReducedCache):
            raise ConfigError(f"{name} {ReducedCache.WHY}")
    if isinstance(custom := arguments.value("custom_generate"), str):
        raise ConfigError(f"custom_generate is {custom!r}; expected a function: no remote code is executed")
    if arguments.value("cache_implementation") == "paged":
        raise ConfigError("cache_implementation is 'paged'; expected another: continuous batching drops the images")


def _active(arguments: Arguments, meaning: Meaning) -> str | None:
    """The first argument of a meaning that is in force, with the reason."""
    for name, rule in RULES.items():
        if rule.meaning is meaning and not rule.idle(arguments.value(name)):
            return f"{name} {rule.why}"
    return None


@cache
def _new_fields() -> tuple[str, ...]:
    return tuple(name for name in vars(GenerationConfig()) if name not in RULES)


def _unknown(arguments: Arguments) -> str | None:
    """An argument or field that the table lacks. transformers itself names typos, and may know what is newer."""
    for name in arguments.options:
        if name not in RULES:
            return f"{name} is an argument that is not known here"
    for name in _new_fields():
        if arguments.value(name) is not None:
            return f"{name} is a field of GenerationConfig that is not known here"
    return None


def _unfit(arguments: Arguments) -> str | None:
    """Why the prompt is not one that can be reduced: then it is the model that accepts it or says what is wrong."""
    inputs = arguments.inputs
    ids = inputs.get("input_ids")
    if not isinstance(ids, Tensor) or ids.ndim != 2 or inputs.get("inputs") is not None:
        return "input_ids is missing, or not one tensor [batch, length]"
    for name in ("attention_mask", "mm_token_type_ids", "token_type_ids"):
        if inputs.get(name) is not None and getattr(inputs[name], "shape", None) != ids.shape:
            return f"{name} is not of input_ids' shape"
    pad = arguments.value("pad_token_id")
    if inputs.get("attention_mask") is None and pad is not None and bool((ids == pad).any()):
        return "attention_mask is missing beside padding"
    if all(inputs.get(name) is None for name in _PIXELS):
        for name in _PIXELS.values():
            if inputs.get(name) is not None:
                return f"{name} is without its pixels"
    for name in _COUNTS:
        if not _is_count(arguments.value(name)):
            return f"{name} is {arguments.value(name)!r}"
    if "max_length" in arguments.lengths and arguments.value("max_length") <= ids.shape[1]:
        return f"max_length is {arguments.value('max_length')}, the prompt alone takes {ids.shape[1]}"
    return None


def _is_count(value: Any) -> bool:
    try:
        return value is None or operator.index(value) >= 0
    except TypeError:
        return False


def _own_list(arguments: Arguments) -> str | None:
    for name in _LISTS:
        for item in arguments.value(name) or ():
            if is_own(item) and not is_blind(item):
                return f"{name} has a {type(item).__name__}, which may count the prompt"
    return None
