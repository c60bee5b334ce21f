"""What every argument of ``generate`` means once the prompt has fewer visual tokens: one table.

The model sees a reduced prompt and the caller holds the full one, so an argument that counts the prompt, is shown it or
points into it needs care. `RULES` says which, for every parameter of transformers' ``generate``, every field of
``GenerationConfig`` and every input of the models' forwards. Knows names and values; must not know of calls.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from adaptive_fusion.models.caches import CACHES


class Meaning(Enum):
    """What becomes of an argument when the prompt is reduced."""

    SAME = "means the same for any prompt"
    INPUT = "belongs to the prompt and is reduced with it"
    LENGTH = "counts the prompt: shifted by what was left out of it"
    CALLBACK = "is shown the caller's full prompt"
    WHOLE = "needs every token of the prompt: the call runs native"
    FITTED = "fits the caller's prompt only: the call goes to the model as it is"
    REFUSED = "is refused by name"


def _unset(value: Any) -> bool:
    return value is None or value is False


def _neutral(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and value == 1)


def _zero(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and value == 0)


def _last(value: Any) -> bool:
    return value is None or isinstance(value, int)


@dataclass(frozen=True)
class Rule:
    """What an argument means and why; `idle` says of which values it is as if the argument were not there."""

    meaning: Meaning
    why: str
    idle: Callable[[Any], bool] = _unset


def _rules(meaning: Meaning, why: str, names: str, idle: Callable[[Any], bool] = _unset) -> dict[str, Rule]:
    return dict.fromkeys(names.split(), Rule(meaning, why, idle))


_SAME, _INPUT, _WHOLE, _FITTED = Meaning.SAME, Meaning.INPUT, Meaning.WHOLE, Meaning.FITTED
_DRAFTS = "drafts tokens from the prompt"
_PACKED = "points into the prompt"

RULES: Mapping[str, Rule] = {
    **_rules(
        _SAME,
        "counts new tokens only, or the time",
        "max_new_tokens min_new_tokens max_time exponential_decay_length_penalty begin_suppress_tokens "
        "suppress_tokens forced_bos_token_id forced_eos_token_id",
    ),
    **_rules(
        _SAME,
        "chooses tokens by their scores",
        "do_sample temperature top_k top_p min_p top_h typical_p epsilon_cutoff eta_cutoff renormalize_logits "
        "remove_invalid_values num_beams early_stopping length_penalty num_return_sequences low_memory",
    ),
    **_rules(
        _SAME,
        # A placeholder of every medium stays, so the prompt's words and the set of its tokens are what they were.
        "looks for tokens and words in the prompt, which keeps them",
        "repetition_penalty no_repeat_ngram_size bad_words_ids sequence_bias stop_strings tokenizer",
    ),
    **_rules(
        _SAME,
        "has a value per new token",
        "output_scores output_logits return_dict_in_generate output_router_logits",
    ),
    **_rules(_SAME, "is a token's number", "pad_token_id bos_token_id eos_token_id decoder_start_token_id"),
    **_rules(
        _SAME,
        "says how the pass is run",
        "use_cache cache_implementation cache_config max_cache_len prefill_chunk_size compile_config disable_compile "
        "continuous_batching_config synced_gpus",
    ),
    **_rules(
        _SAME,
        "is read with another argument only, which makes the call native",
        "negative_prompt_ids negative_prompt_attention_mask assistant_tokenizer num_assistant_tokens "
        "num_assistant_tokens_schedule assistant_confidence_threshold assistant_ensemble_weight "
        "max_matching_ngram_size assistant_lookbehind target_lookbehind",
    ),
    **_rules(
        _SAME,
        "asks for a search that transformers refuses without remote code",
        "penalty_alpha dola_layers diversity_penalty num_beam_groups constraints force_words_ids",
    ),
    **_rules(_SAME, "is not read", "labels num_items_in_batch _from_model_config transformers_version"),
    **_rules(_SAME, "is read field by field", "generation_config"),
    **_rules(
        _INPUT,
        "has a value per token of the prompt",
        "input_ids attention_mask mm_token_type_ids token_type_ids",
    ),
    **_rules(
        _INPUT,
        "belongs to the media",
        "pixel_values pixel_values_videos image_grid_thw video_grid_thw second_per_grid_ts",
    ),
    **_rules(_INPUT, "is input_ids by another name", "inputs"),
    **_rules(Meaning.LENGTH, "counts the prompt", "max_length min_length"),
    **_rules(
        Meaning.CALLBACK,
        "is shown the prompt",
        "stopping_criteria logits_processor prefix_allowed_tokens_fn streamer",
    ),
    **_rules(_WHOLE, "has a value per token of the prompt", "output_attentions output_hidden_states"),
    # The set of an encoder's tokens holds the padding too, which a reduced batch has more or less of.
    **_rules(_WHOLE, "reads the prompt with its padding", "encoder_repetition_penalty", _neutral),
    **_rules(_WHOLE, "reads the prompt with its padding", "encoder_no_repeat_ngram_size", _zero),
    # Its second pass counts positions with what the model kept of the first one's prompt.
    **_rules(_WHOLE, "runs the model a second time, on the positions of the prompt", "guidance_scale", _neutral),
    **_rules(_WHOLE, "is seeded by the tokens before", "watermarking_config"),
    **_rules(
        _WHOLE,
        _DRAFTS,
        "assistant_model assistant_early_exit prompt_lookup_num_tokens use_mtp speculation_type is_assistant",
    ),
    **_rules(_FITTED, "fits the prompt that it was filled with", " ".join(CACHES)),
    **_rules(_FITTED, _PACKED, "position_ids cu_seq_lens_q cu_seq_lens_k max_length_q max_length_k seq_idx"),
    **_rules(_FITTED, _PACKED, "logits_to_keep", _last),
    **_rules(_FITTED, "changes what a token sees of the prompt", "is_causal", _neutral),
    **_rules(_FITTED, "takes the place of the prompt", "inputs_embeds"),
    **_rules(_FITTED, "writes the prompt anew", "token_healing"),
    **_rules(_FITTED, "is encoded already", "mm_encoder_outputs"),
    **_rules(_FITTED, "takes the place of generate's own loop", "custom_generate"),
    **_rules(Meaning.REFUSED, "would run remote code; no remote code is executed", "trust_remote_code"),
}

# Of transformers' own criteria and processors those that look at scores, at the clock or at the last tokens. Any other
# may count the prompt, and takes the place of the one of its class that generate makes, so none can be wrapped.
_BLIND_NAMES = (
    "MaxTimeCriteria StopStringCriteria EosTokenCriteria ConfidenceCriteria TemperatureLogitsWarper TopPLogitsWarper "
    "TopKLogitsWarper TopHLogitsWarper MinPLogitsWarper TypicalLogitsWarper EpsilonLogitsWarper EtaLogitsWarper "
    "InfNanRemoveLogitsProcessor LogitNormalization SuppressTokensLogitsProcessor SequenceBiasLogitsProcessor "
    "NoBadWordsLogitsProcessor NoRepeatNGramLogitsProcessor"
)
_BLIND = frozenset(_BLIND_NAMES.split())


def is_blind(callback: Any) -> bool:
    """Whether a criterion or processor is one of transformers' own that the prompt means nothing to."""
    return is_own(callback) and type(callback).__name__ in _BLIND


def is_own(callback: Any) -> bool:
    """Whether a criterion or processor is one of transformers' own."""
    return type(callback).__module__.startswith("transformers.")
