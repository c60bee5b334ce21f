"""Which requests may share one pass of the model: those whose arguments of ``generate`` mean the same for a row of a
batch as for a prompt alone, and are the same but for how long an answer may be.

Knows resolved arguments. Must not know of models, points or queues.
"""

from collections.abc import Mapping
from typing import Any

from adaptive_fusion.execution.arguments import Arguments

ROWS = 4
"""Most requests of a batch where nobody says otherwise."""

OWN = frozenset({"max_new_tokens", "stop_strings", "tokenizer"})
"""Arguments that are kept row by row. Of strings that end an answer all rows have the same, as they are looked for in
the batch."""

_ONE_PASS = "is about one pass of one prompt"
_PADDED = "reads the prompt, which a batch pads"
_CALLERS = "is shown one prompt"
ALONE: Mapping[str, str] = {
    **dict.fromkeys(("num_beams", "num_return_sequences", "early_stopping", "length_penalty"), "makes rows of its own"),
    **dict.fromkeys(("repetition_penalty", "no_repeat_ngram_size", "bad_words_ids", "sequence_bias"), _PADDED),
    **dict.fromkeys(("max_length", "min_length", "forced_eos_token_id", "exponential_decay_length_penalty"), _ONE_PASS),
    **dict.fromkeys(("max_time", "prefill_chunk_size", "synced_gpus", "low_memory"), _ONE_PASS),
    **dict.fromkeys(("cache_implementation", "cache_config", "max_cache_len", "use_cache"), "sizes or makes a cache"),
    **dict.fromkeys(("compile_config", "continuous_batching_config"), _ONE_PASS),
    **dict.fromkeys(("output_scores", "output_logits", "output_router_logits"), "keeps what belongs to one prompt"),
    **dict.fromkeys(("return_dict_in_generate",), "asks for what generate gives for one prompt"),
    **dict.fromkeys(("stopping_criteria", "logits_processor", "prefix_allowed_tokens_fn", "streamer"), _CALLERS),
    **dict.fromkeys(("generation_config",), "is the caller's own"),
}
"""Arguments with which a request stays alone, and why; what reads more of the prompt than this is in `Arguments.whole`
already."""
_IDLE: Mapping[str, tuple[Any, ...]] = {
    **dict.fromkeys(("num_beams", "num_return_sequences", "repetition_penalty", "length_penalty"), (1,)),
    **dict.fromkeys(("no_repeat_ngram_size", "min_length"), (0,)),
    "use_cache": (True,),
    "cache_implementation": ("dynamic",),
    "low_memory": (False,),
}
_BESIDE = {"max_length": "max_new_tokens", "min_length": "min_new_tokens"}
"""Lengths that are not read where another is given."""


def why_alone(arguments: Arguments) -> str:
    """Why a request with these arguments has to run alone, in words; empty where it may share a pass."""
    if arguments.whole is not None:
        return arguments.whole
    for name, why in ALONE.items():
        value = arguments.value(name)
        off = value is None or (value is False and name not in _IDLE)
        if off or any(value == idle for idle in _IDLE.get(name, ())):
            continue
        if name in _BESIDE and name not in arguments.lengths:
            continue
        return f"{name} {why}"
    return ""


def alike(one: Arguments, other: Arguments) -> bool:
    """Whether two requests that may share a pass have the same arguments, but for how long an answer may be."""
    mine, others = ({k: v for k, v in each.options.items() if k != "max_new_tokens"} for each in (one, other))
    return mine.keys() == others.keys() and all(_same(mine[name], others[name]) for name in mine)


def _same(one: Any, other: Any) -> bool:
    if one is other:
        return True
    try:
        return type(one) is type(other) and bool(one == other)
    except (TypeError, ValueError, RuntimeError):  # tensors of several values have no one truth
        return False


def shared_options(arguments: Arguments) -> dict[str, Any]:
    """What ``generate`` is told once for all rows."""
    return {name: value for name, value in arguments.options.items() if name not in OWN}
