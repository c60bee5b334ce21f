"""What each field of a chat request means here: one table.

`FIELDS` has every field of OpenAI's API and those of vLLM and transformers that clients send beside them. A field that
is not in it is listed in the answer as ignored. Knows names and values. Must not know of models or HTTP.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from adaptive_fusion.serving.refusals import Refusal


class Use(Enum):
    """What becomes of a field."""

    HONOURED = "does what it says"
    LISTED = "changes no answer: accepted and listed in adaptive_fusion.ignored"
    DEFAULT_ONLY = "is not supported: refused, unless it says what is done anyway"


@dataclass(frozen=True)
class Field:
    """A field's use, and of one that is not supported the values that ask for nothing, in words and as a test."""

    use: Use
    neutral: str = ""
    is_neutral: Callable[[Any], bool] = lambda value: False


def _equal(*values: Any) -> Callable[[Any], bool]:
    """Equal in value and kind: true is not 1."""
    return lambda given: any(given == value and isinstance(given, bool) == isinstance(value, bool) for value in values)


def _only(neutral: str, is_neutral: Callable[[Any], bool]) -> Field:
    return Field(Use.DEFAULT_ONLY, neutral, is_neutral)


_HONOURED = (
    "messages model stream stream_options max_tokens max_completion_tokens temperature top_p top_k min_p "
    "repetition_penalty min_tokens ignore_eos seed stop logprobs top_logprobs continue_final_message "
    "add_generation_prompt adaptive_fusion"
)
_LISTED = "user metadata safety_identifier prompt_cache_key prompt_cache_retention prompt_cache_options"
_UNSET = (
    "chat_template prompt_logprobs truncate_prompt_tokens logits_processors structured_outputs guided_json "
    "guided_regex guided_choice guided_grammar structural_tag grammar kv_transfer_params"
)
_NONE = _only("null", lambda value: False)
_ZERO, _ONE, _FALSE = _only("0", _equal(0)), _only("1", _equal(1)), _only("false", _equal(False))
_EMPTY_LIST, _EMPTY_TABLE = _only("an empty list", _equal([])), _only("an empty object", _equal({}))

FIELDS: Mapping[str, Field] = {
    **dict.fromkeys(_HONOURED.split(), Field(Use.HONOURED)),
    **dict.fromkeys(_LISTED.split(), Field(Use.LISTED)),
    # of OpenAI's API
    "n": _ONE,
    "frequency_penalty": _ZERO,
    "presence_penalty": _ZERO,
    "logit_bias": _EMPTY_TABLE,
    "response_format": _only('{"type": "text"}', _equal({"type": "text"})),
    "tools": _EMPTY_LIST,
    "functions": _EMPTY_LIST,
    "tool_choice": _only("none, or auto without tools", _equal("none", "auto")),
    "function_call": _only("none, or auto without functions", _equal("none", "auto")),
    "parallel_tool_calls": _only("true or false: there are no tools", lambda value: isinstance(value, bool)),
    "modalities": _only('["text"]', _equal(["text"])),
    "service_tier": _only("auto or default", _equal("auto", "default")),
    "store": _FALSE,
    "verbosity": _only("medium", _equal("medium")),
    "reasoning_effort": _only("none", _equal("none")),
    **dict.fromkeys(("audio", "moderation", "prediction", "web_search_options"), _NONE),
    # of vLLM and transformers
    "best_of": _ONE,
    "use_beam_search": _FALSE,
    "num_beams": _ONE,
    "length_penalty": _ONE,
    "echo": _FALSE,
    "include_stop_str_in_output": _FALSE,
    "skip_special_tokens": _only("true", _equal(True)),
    "spaces_between_special_tokens": _only("true", _equal(True)),
    "add_special_tokens": _FALSE,
    **dict.fromkeys(("stop_token_ids", "bad_words", "allowed_token_ids", "documents"), _EMPTY_LIST),
    **dict.fromkeys(("chat_template_kwargs", "mm_processor_kwargs"), _EMPTY_TABLE),
    **dict.fromkeys(_UNSET.split(), _NONE),
}


def sort_fields(body: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The fields that are honoured and given, and the names of those that change nothing.

    Raises:
        Refusal: 400 for a field that is not supported and not at its default, by its name.
    """
    honoured: dict[str, Any] = {}
    ignored = []
    for name, value in body.items():
        known = FIELDS.get(name)
        if value is None:
            continue
        if known is None or known.use is Use.LISTED:
            ignored.append(name)
        elif known.use is Use.HONOURED:
            honoured[name] = value
        elif not known.is_neutral(value):
            shown = repr(value)
            raise Refusal(
                f"{name} is {shown if len(shown) <= 80 else shown[:76] + '...'}, which is not supported; expected "
                f"{known.neutral}, or the field left out",
                code="unsupported_parameter",
                param=name,
            )
    return honoured, tuple(sorted(name[:100] for name in ignored))
