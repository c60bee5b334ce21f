"""Every argument of ``generate`` has been thought about: it means the same for a row of a batch, or keeps it alone."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from adaptive_fusion.execution.arguments import for_chat
from adaptive_fusion.execution.generate_rules import RULES, Meaning
from adaptive_fusion.execution.merging import ALONE, OWN, alike, shared_options, why_alone

BY_ROW = {
    *("min_new_tokens", "begin_suppress_tokens", "suppress_tokens", "forced_bos_token_id", "do_sample", "temperature"),
    *("top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff", "renormalize_logits"),
    *("remove_invalid_values", "pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"),
    "disable_compile",
}
NOT_READ = {
    *("labels", "num_items_in_batch", "_from_model_config", "transformers_version", "penalty_alpha", "dola_layers"),
    *("diversity_penalty", "num_beam_groups", "constraints", "force_words_ids", "negative_prompt_ids"),
    *("negative_prompt_attention_mask", "assistant_tokenizer", "num_assistant_tokens", "num_assistant_tokens_schedule"),
    *("assistant_confidence_threshold", "assistant_ensemble_weight", "max_matching_ngram_size"),
    *("assistant_lookbehind", "target_lookbehind"),
}
"""Without another argument, with which a request stays alone or is refused."""


def arguments(**options: Any) -> Any:
    return for_chat(SimpleNamespace(generation_config=GenerationConfig()), options)


def test_every_argument_is_in_one_of_the_tables() -> None:
    decided = {name for name, rule in RULES.items() if rule.meaning in (Meaning.SAME, Meaning.LENGTH, Meaning.CALLBACK)}
    assert decided == set(ALONE) | OWN | BY_ROW | NOT_READ
    assert not set(ALONE) & (OWN | BY_ROW | NOT_READ)


@pytest.mark.parametrize(
    ("options", "alone"),
    [
        ({"max_new_tokens": 5, "do_sample": True, "temperature": 0.5, "top_k": 3}, ""),
        ({"num_beams": 1, "repetition_penalty": 1.0, "use_cache": True}, ""),
        ({"stop_strings": ["x"], "tokenizer": object()}, ""),
        ({"max_length": 30, "max_new_tokens": 5}, ""),
        ({"max_length": 30}, "max_length"),
        ({"repetition_penalty": 1.1}, "repetition_penalty"),
        ({"cache_implementation": "static"}, "cache_implementation"),
        ({"logits_processor": [lambda ids, scores: scores]}, "logits_processor"),
        ({"generation_config": GenerationConfig(max_new_tokens=3)}, "generation_config"),
        ({"output_attentions": True}, "output_attentions"),
        ({"use_cache": False}, "use_cache"),
        ({"max_time": 3.0}, "max_time"),
        ({"strange": 1}, "strange"),
    ],
)
def test_what_keeps_a_request_alone_is_named(options: dict[str, Any], alone: str) -> None:
    found = why_alone(arguments(**options))
    assert found.split(" ")[0] == alone


def test_requests_are_alike_that_differ_in_length_alone() -> None:
    one = arguments(max_new_tokens=3, temperature=0.5, suppress_tokens=[1, 2])
    assert alike(one, arguments(max_new_tokens=9, temperature=0.5, suppress_tokens=[1, 2]))
    for other in ({"temperature": 0.6}, {"suppress_tokens": [1]}, {"do_sample": True}, {"temperature": "0.5"}):
        assert not alike(one, arguments(**{"temperature": 0.5, "suppress_tokens": [1, 2], **other}))
    tensor = torch.tensor([1, 2])
    assert not alike(arguments(eos_token_id=tensor), arguments(eos_token_id=tensor.clone()))
    assert "max_new_tokens" not in shared_options(one) and shared_options(one)["temperature"] == 0.5
