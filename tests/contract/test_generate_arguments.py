"""`runner.generate` as a drop-in for ``model.generate``, over every argument that the installed transformers takes.

An argument that a later transformers brings fails here until somebody has decided what it means for a reduced prompt
(`execution.arguments.RULES`) and given it a trial.
"""

import copy
import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    CompileConfig,
    DynamicCache,
    Gemma3ForConditionalGeneration,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3_5ForConditionalGeneration,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeForConditionalGeneration,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
    TextIteratorStreamer,
)
from transformers.utils.generic import TransformersKwargs

from adaptive_fusion.budget import Budget
from adaptive_fusion.errors import ConfigError, UnsupportedModelError
from adaptive_fusion.execution.arguments import CHAT_NEW_TOKENS, GENERATE_NEW_TOKENS, for_chat
from adaptive_fusion.execution.generate_rules import RULES, Meaning
from adaptive_fusion.models.caches import CACHES, cache_name
from adaptive_fusion.point import NATIVE, OperatingPoint
from adaptive_fusion.runner import AdaptiveRunner

HALF = OperatingPoint("native", downsample=0.5)
CHEAPEST = Budget(latency_ms=0.001)  # no point keeps it, so the policy's cheapest runs
BASE: dict[str, Any] = {"do_sample": False, "max_new_tokens": 3, "min_new_tokens": 3}
FAMILIES = (
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeForConditionalGeneration,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3_5ForConditionalGeneration,
    Gemma3ForConditionalGeneration,
)
FORMER = frozenset(CACHES)
"""Names that ``generate`` takes through a decorator, which shows in no signature."""


def parameters(function: Callable[..., Any]) -> set[str]:
    kinds = inspect.signature(function).parameters
    return {name for name, p in kinds.items() if p.kind is not inspect.Parameter.VAR_KEYWORD} - {"self"}


def installed() -> set[str]:
    """Every argument that ``generate`` of the installed transformers takes for these models."""
    found = parameters(GenerationMixin.generate) | set(GenerationConfig().to_dict())
    for family in FAMILIES:
        found |= parameters(family.forward)
    found |= set(TransformersKwargs.__optional_keys__)
    # What it takes out of its keyword arguments before they go to the configuration and the model.
    for method in (GenerationMixin.generate, GenerationMixin._extract_generation_mode_kwargs):
        found |= set(re.findall(r"[^_]kwargs\.(?:pop|get)\(\"(\w+)\"", inspect.getsource(method)))
    return found


NAMES = sorted(installed() | FORMER)


class Seen:
    """A stopping criterion, processor, prefix function or streamer that keeps what it is shown."""

    def __init__(self) -> None:
        self.rows: list[torch.Tensor] = []

    def keep(self, ids: torch.Tensor) -> None:
        self.rows.append(ids.clone())


class SeenCriterion(Seen, StoppingCriteria):  # type: ignore[misc]
    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self.keep(input_ids)
        return torch.zeros(len(input_ids), dtype=torch.bool)


class SeenProcessor(Seen, LogitsProcessor):  # type: ignore[misc]
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.keep(input_ids)
        return scores


class SeenPrefix(Seen):
    def __call__(self, batch_id: int, ids: torch.Tensor) -> list[int]:
        self.keep(ids)
        return list(range(700))


class SeenStreamer(Seen):
    ended = False

    def put(self, value: torch.Tensor) -> None:
        self.keep(value)

    def end(self) -> None:
        self.ended = True


def made(content: list[dict[str, Any]], runner: AdaptiveRunner) -> dict[str, Any]:
    return runner.adapter.prepare([{"role": "user", "content": content}], NATIVE)


@pytest.fixture(scope="module")
def runner(reference_model: Any, processor: Any) -> AdaptiveRunner:
    return AdaptiveRunner(reference_model, processor, policy="reference-latency", seed=0)


@pytest.fixture(scope="module")
def inputs(runner: AdaptiveRunner, noise_image: Any) -> dict[str, Any]:
    return made([{"type": "image", "image": noise_image(96, 96)}, {"type": "text", "text": "Describe."}], runner)


@pytest.fixture(scope="module")
def batch(processor: Any, noise_image: Any) -> dict[str, Any]:
    """Rows whose prompts are reduced by different numbers of tokens, left-padded."""
    prompt = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>{}<|im_end|>\n<|im_start|>assistant\n"
    images = [noise_image(96, 64), noise_image(48, 48, 1)]
    texts = [prompt.format(words) for words in ("Describe.", "Read the text, all of it, please, and slowly.")]
    return dict(processor(text=texts, images=images, padding=True, return_tensors="pt"))


class Bench:
    """What the trials are made of."""

    def __init__(self, runner: AdaptiveRunner, inputs: dict[str, Any], clip: Any) -> None:
        self.runner, self.inputs, self.clip = runner, inputs, clip
        self.ids = inputs["input_ids"]
        self.length = self.ids.shape[1]
        self.tokenizer = runner.processor.tokenizer

    def video(self) -> dict[str, Any]:
        return made([{"type": "video", "video": self.clip}, {"type": "text", "text": "?"}], self.runner)


@pytest.fixture(scope="module")
def bench(runner: AdaptiveRunner, inputs: dict[str, Any], clip: Any) -> Bench:
    return Bench(runner, inputs, clip)


def plain(**values: Any) -> Callable[[Bench], dict[str, Any]]:
    return lambda _: values


def sampled(**values: Any) -> Callable[[Bench], dict[str, Any]]:
    return plain(do_sample=True, **values)


def beams(**values: Any) -> Callable[[Bench], dict[str, Any]]:
    return plain(num_beams=2, **values)


def assisted(**values: Any) -> Callable[[Bench], dict[str, Any]]:
    return lambda b: {"assistant_model": b.runner.model, **values}


TRIALS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    # Lengths
    "max_new_tokens": plain(max_new_tokens=2, min_new_tokens=None),
    "min_new_tokens": plain(min_new_tokens=2),
    "max_length": lambda b: {"max_length": b.length + 2, "max_new_tokens": None},
    "min_length": lambda b: {"min_length": b.length + 2, "min_new_tokens": None},
    "max_time": plain(max_time=100.0),
    "exponential_decay_length_penalty": plain(exponential_decay_length_penalty=(1, 4.0), min_new_tokens=None),
    "forced_bos_token_id": plain(forced_bos_token_id=5),
    "forced_eos_token_id": plain(forced_eos_token_id=762, min_new_tokens=None),
    "begin_suppress_tokens": plain(begin_suppress_tokens=[597]),
    "suppress_tokens": plain(suppress_tokens=[597]),
    "stop_strings": lambda b: {"stop_strings": ["e", "a"], "tokenizer": b.tokenizer, "min_new_tokens": None},
    "tokenizer": lambda b: {"stop_strings": "zzz", "tokenizer": b.tokenizer},
    # Choosing tokens
    "do_sample": sampled(),
    "temperature": sampled(temperature=0.5),
    "top_k": sampled(top_k=3),
    "top_p": sampled(top_p=0.5),
    "min_p": sampled(min_p=0.2),
    "top_h": sampled(top_h=0.4),
    "typical_p": sampled(typical_p=0.5),
    "epsilon_cutoff": sampled(epsilon_cutoff=0.01),
    "eta_cutoff": sampled(eta_cutoff=0.01),
    "renormalize_logits": plain(renormalize_logits=True),
    "remove_invalid_values": plain(remove_invalid_values=True),
    "num_beams": beams(),
    "early_stopping": beams(early_stopping=True),
    "length_penalty": beams(length_penalty=2.0),
    "num_return_sequences": beams(num_return_sequences=2),
    "low_memory": beams(low_memory=True),
    "repetition_penalty": plain(repetition_penalty=1.5),
    "no_repeat_ngram_size": plain(no_repeat_ngram_size=2),
    "bad_words_ids": plain(bad_words_ids=[[597]]),
    "sequence_bias": plain(sequence_bias=[[[597], -50.0]]),
    # What comes back
    "output_scores": plain(output_scores=True, return_dict_in_generate=True),
    "output_logits": plain(output_logits=True, return_dict_in_generate=True),
    "return_dict_in_generate": plain(return_dict_in_generate=True),
    "output_router_logits": plain(output_router_logits=True),
    "output_attentions": plain(output_attentions=True, return_dict_in_generate=True),
    "output_hidden_states": plain(output_hidden_states=True, return_dict_in_generate=True),
    # Tokens
    "pad_token_id": plain(pad_token_id=3),
    "bos_token_id": plain(bos_token_id=4),
    "eos_token_id": plain(eos_token_id=[440, 5], min_new_tokens=None),
    "decoder_start_token_id": plain(decoder_start_token_id=4),
    # How it is run
    "use_cache": plain(use_cache=False),
    "cache_implementation": plain(cache_implementation="static"),
    "cache_config": plain(cache_config={}),
    "max_cache_len": plain(cache_implementation="static", max_cache_len=200),
    "prefill_chunk_size": plain(prefill_chunk_size=10),
    "compile_config": lambda _: {"compile_config": CompileConfig()},
    "disable_compile": plain(disable_compile=True),
    "continuous_batching_config": plain(continuous_batching_config=object()),
    "synced_gpus": plain(synced_gpus=False),
    # Drafts and guidance, and what is read with them
    "assistant_model": assisted(),
    "assistant_tokenizer": lambda b: {"assistant_tokenizer": b.tokenizer},
    "num_assistant_tokens": plain(num_assistant_tokens=3),
    "num_assistant_tokens_schedule": plain(num_assistant_tokens_schedule="heuristic"),
    "assistant_confidence_threshold": plain(assistant_confidence_threshold=0.5),
    "assistant_ensemble_weight": plain(assistant_ensemble_weight=0.5),
    "max_matching_ngram_size": plain(max_matching_ngram_size=2),
    "assistant_lookbehind": plain(assistant_lookbehind=3),
    "target_lookbehind": plain(target_lookbehind=3),
    "assistant_early_exit": plain(assistant_early_exit=1),
    "prompt_lookup_num_tokens": plain(prompt_lookup_num_tokens=2),
    "use_mtp": plain(use_mtp=True),
    "speculation_type": plain(speculation_type="dflash"),
    "is_assistant": plain(is_assistant=True),
    "guidance_scale": plain(guidance_scale=1.5),
    "negative_prompt_ids": lambda b: {"negative_prompt_ids": b.ids},
    "negative_prompt_attention_mask": lambda b: {"negative_prompt_attention_mask": torch.ones_like(b.ids)},
    "encoder_repetition_penalty": plain(encoder_repetition_penalty=1.5),
    "encoder_no_repeat_ngram_size": plain(encoder_no_repeat_ngram_size=2),
    "watermarking_config": plain(watermarking_config={"bias": 2.5}),
    "token_healing": lambda b: {"token_healing": True, "tokenizer": b.tokenizer},
    # Searches that were moved to repositories
    "penalty_alpha": plain(penalty_alpha=0.5, top_k=4),
    "dola_layers": plain(dola_layers="low"),
    "diversity_penalty": beams(num_beam_groups=2, diversity_penalty=0.5),
    "num_beam_groups": beams(num_beam_groups=2),
    "constraints": beams(constraints=[object()]),
    "force_words_ids": beams(force_words_ids=[[5]]),
    "custom_generate": plain(custom_generate=lambda model, input_ids, **_: input_ids),
    "trust_remote_code": plain(trust_remote_code=True),
    # Callbacks
    "stopping_criteria": lambda _: {"stopping_criteria": StoppingCriteriaList([SeenCriterion()])},
    "logits_processor": lambda _: {"logits_processor": LogitsProcessorList([SeenProcessor()])},
    "prefix_allowed_tokens_fn": lambda _: {"prefix_allowed_tokens_fn": SeenPrefix()},
    "streamer": lambda _: {"streamer": SeenStreamer()},
    # The prompt
    "generation_config": lambda _: {"generation_config": GenerationConfig(repetition_penalty=1.5)},
    "inputs": lambda b: {"inputs": b.ids, "input_ids": None},
    "input_ids": plain(),
    "attention_mask": plain(attention_mask=None),
    "mm_token_type_ids": plain(mm_token_type_ids=None),
    "token_type_ids": lambda b: {"token_type_ids": torch.zeros_like(b.ids)},
    "pixel_values": plain(),
    "image_grid_thw": plain(),
    "pixel_values_videos": plain(),
    "video_grid_thw": plain(),
    "second_per_grid_ts": lambda _: {"second_per_grid_ts": torch.ones(1)},
    "labels": lambda b: {"labels": b.ids},
    "num_items_in_batch": lambda _: {"num_items_in_batch": torch.tensor(1)},
    "_from_model_config": plain(_from_model_config=True),
    "transformers_version": plain(transformers_version="5"),
    # What fits the caller's prompt only
    "cache": lambda _: {"cache": DynamicCache()},
    "past_key_values": lambda _: {"past_key_values": DynamicCache()},
    "cache_params": lambda _: {"cache_params": DynamicCache()},
    "position_ids": lambda b: {"position_ids": torch.arange(b.length).expand(4, 1, -1)},
    "inputs_embeds": lambda b: {"inputs_embeds": b.runner.model.get_input_embeddings()(b.ids).detach()},
    "mm_encoder_outputs": lambda _: {"mm_encoder_outputs": {}},
    "logits_to_keep": lambda _: {"logits_to_keep": torch.tensor([-1])},
    "cu_seq_lens_q": lambda b: {"cu_seq_lens_q": torch.tensor([0, b.length])},
    "cu_seq_lens_k": lambda b: {"cu_seq_lens_k": torch.tensor([0, b.length])},
    "max_length_q": lambda b: {"max_length_q": b.length},
    "max_length_k": lambda b: {"max_length_k": b.length},
    "seq_idx": lambda b: {"seq_idx": torch.zeros_like(b.ids)},
    "is_causal": plain(is_causal=False),
}


def call_of(bench: Bench, name: str) -> dict[str, Any]:
    inputs = bench.video() if "video" in name else bench.inputs
    return {**inputs, **BASE, **TRIALS[name](bench)}


def outcome(generate: Callable[..., Any], kwargs: dict[str, Any], drop: int) -> Any:
    """The tokens after the prompt and the names of what else came back, or the error's class."""
    torch.manual_seed(0)
    try:
        out = generate(**kwargs)
    except Exception as error:
        return type(error), str(error)[:60]
    sequences = out if isinstance(out, torch.Tensor) else out.sequences
    return sequences[:, drop:].tolist(), [] if isinstance(out, torch.Tensor) else sorted(out)


def prompt_length(call: dict[str, Any]) -> int:
    return int(next(call[name] for name in ("input_ids", "inputs") if call.get(name) is not None).shape[1])


def test_every_argument_of_the_installed_transformers_is_decided() -> None:
    assert not (set(NAMES) - set(RULES)), "decide in execution/arguments.py what these mean for a reduced prompt"
    assert not (set(RULES) - set(NAMES)), "these are taken by no model any more"
    assert not (set(NAMES) ^ set(TRIALS)), "every argument has a trial here"


def test_the_default_number_of_new_tokens_is_that_of_transformers() -> None:
    assert GenerationConfig._get_default_generation_params()["max_length"] == GENERATE_NEW_TOKENS


@pytest.mark.parametrize("name", NAMES)
def test_an_argument_means_the_same_at_every_point(bench: Bench, name: str) -> None:
    runner, model, meaning = bench.runner, bench.runner.model, RULES[name].meaning
    if meaning is Meaning.REFUSED:
        for point in (NATIVE, HALF, None):
            with pytest.raises(ConfigError, match=name):
                runner.generate(**call_of(bench, name), point=point)
        return
    length = prompt_length(call_of(bench, name))
    expected = outcome(model.generate, call_of(bench, name), length)
    assert outcome(runner.generate, {**call_of(bench, name), "point": NATIVE}, length) == expected
    if meaning in (Meaning.WHOLE, Meaning.FITTED):
        with pytest.raises(ConfigError, match=f"native@0.5, but {name} "):
            runner.generate(**call_of(bench, name), point=HALF)
        runner.last = None
        assert outcome(runner.generate, {**call_of(bench, name), "budget": CHEAPEST}, length) == expected
        if isinstance(expected[0], list):
            decision = runner.last[0]  # type: ignore[index]
            assert decision.point == NATIVE and decision.reason.startswith(f"native: {name} ")
        return
    call = call_of(bench, name)
    found = outcome(runner.generate, {**call, "point": HALF}, length)
    if not isinstance(expected[0], list):
        assert found == expected
        return
    assert runner.last is not None and runner.last[0].point == HALF
    if meaning in (Meaning.SAME, Meaning.INPUT):
        # The oracle: the model behind the reduced prompt, with the argument as it is.
        given = {"input_ids": call.get("inputs"), **{k: v for k, v in call.items() if v is not None and k != "inputs"}}
        prompt = {k: v for k, v in given.items() if RULES[k].meaning is Meaning.INPUT}
        rest = {k: v for k, v in call.items() if RULES[k].meaning is not Meaning.INPUT}
        with torch.no_grad():
            encoded = runner.adapter.encode(prompt, HALF).inputs
        assert encoded["input_ids"].shape[1] < length
        # What looks for tokens in the prompt finds those of the full one.
        assert set(encoded["input_ids"].flatten().tolist()) == set(prompt["input_ids"].flatten().tolist())
        assert found == outcome(model.generate, {**encoded, **rest}, encoded["input_ids"].shape[1])
    else:
        assert len(found[0][0]) == len(expected[0][0])


@pytest.mark.parametrize("name", sorted(n for n, r in RULES.items() if r.meaning in (Meaning.INPUT, Meaning.FITTED)))
def test_chat_refuses_what_belongs_to_a_prompt(runner: AdaptiveRunner, name: str) -> None:
    """It makes the prompt itself: an argument of the caller's would be dropped, or mixed with another prompt."""
    with pytest.raises(ConfigError, match=f"^{name} "):
        for_chat(runner.model, {name: torch.zeros(1, 2)})


def test_typos_get_the_model_s_own_error(runner: AdaptiveRunner, inputs: Any, noise_image: Any) -> None:
    for limits in ({}, {"point": NATIVE}, {"budget": CHEAPEST}):
        with pytest.raises(ValueError, match="max_new_token'"):
            runner.generate(**inputs, max_new_token=3, **limits)
    with pytest.raises(ConfigError, match="max_new_token "):
        runner.generate(**inputs, max_new_token=3, point=HALF)
    with pytest.raises(ValueError, match="max_new_token'"):
        runner.chat(noise_image(48, 48), "?", max_new_token=3)
    with pytest.raises(TypeError, match="multiple values"):
        runner.generate(inputs["input_ids"], inputs=inputs["input_ids"])


# Lengths that count the prompt


@pytest.mark.parametrize("where", ["argument", "config", "model"])
@pytest.mark.parametrize("point", [NATIVE, HALF], ids=lambda p: p.name)
def test_a_limit_of_the_prompt_and_ten_gives_ten_tokens(
    runner: AdaptiveRunner, batch: Any, where: str, point: OperatingPoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    length = batch["input_ids"].shape[1]
    limits = {"max_length": length + 10, "min_length": length + 10}
    given: dict[str, Any] = limits if where == "argument" else {}
    if where == "config":
        given = {"generation_config": GenerationConfig(**limits)}
    elif where == "model":
        monkeypatch.setattr(runner.model, "generation_config", GenerationConfig(**limits, eos_token_id=762))
    out = runner.generate(**batch, point=point, **given)
    assert out.shape[1] == length + 10 and torch.equal(out[:, :length], batch["input_ids"])
    if where == "config":
        assert given["generation_config"].max_length == length + 10, "the caller's own object is left alone"


def test_new_tokens_take_precedence_over_lengths(runner: AdaptiveRunner, inputs: Any) -> None:
    length = inputs["input_ids"].shape[1]
    out = runner.generate(**inputs, point=HALF, max_length=length + 9, max_new_tokens=4, min_new_tokens=4)
    assert out.shape[1] == length + 4
    for short in (length, length - 20, 0):
        # Longer than the reduced prompt, yet no room behind the caller's: the model's own error, in its numbers.
        with pytest.raises(ValueError, match=f"is {length}, but `max_length` is set to {short}"):
            runner.generate(**inputs, max_length=short)


def test_the_prediction_knows_max_length(runner: AdaptiveRunner, inputs: Any) -> None:
    length = inputs["input_ids"].shape[1]

    def predicted(**limits: Any) -> float:
        runner.controller.__init__()  # type: ignore[misc]  # nothing learned between the two
        runner.generate(**inputs, point=HALF, **limits)
        assert runner.last is not None and runner.last[0].predicted is not None
        return runner.last[0].predicted.decode_ms

    assert predicted(max_length=length + 3) == predicted(max_new_tokens=3) < predicted(max_new_tokens=6)
    assert predicted() == predicted(max_new_tokens=GENERATE_NEW_TOKENS)


# Callbacks


@pytest.mark.parametrize("beams", [1, 2])
def test_callbacks_see_the_full_prompt_and_then_the_new_tokens(runner: AdaptiveRunner, batch: Any, beams: int) -> None:
    ids = batch["input_ids"]
    length = ids.shape[1]
    criterion, processor, prefix = SeenCriterion(), SeenProcessor(), SeenPrefix()
    out = runner.generate(
        **batch,
        point=HALF,
        num_beams=beams,
        **BASE,
        stopping_criteria=StoppingCriteriaList([criterion]),
        logits_processor=[processor],
        prefix_allowed_tokens_fn=prefix,
    )
    assert out.shape == (2, length + 3)
    for seen, first in ((criterion, 1), (processor, 0)):
        assert [rows.shape[1] for rows in seen.rows] == [length + first + i for i in range(3)]
        for rows in seen.rows:
            assert torch.equal(rows[:, :length], ids.repeat_interleave(len(rows) // 2, 0))
    assert {len(row) for row in prefix.rows} == {length, length + 1, length + 2}
    turns = [row for row in prefix.rows if len(row) == length]
    assert torch.equal(torch.stack(turns), ids.repeat_interleave(beams, 0))
    if beams == 1:
        assert torch.equal(criterion.rows[-1], out)


def test_a_streamer_is_put_the_full_prompt(runner: AdaptiveRunner, inputs: Any) -> None:
    streamer = SeenStreamer()
    out = runner.generate(**inputs, point=HALF, streamer=streamer, **BASE)
    assert torch.equal(streamer.rows[0], inputs["input_ids"]) and streamer.ended
    assert torch.cat([row.flatten() for row in streamer.rows]).tolist() == out[0].tolist()


def test_a_grammar_that_slices_by_prompt_length_fires(runner: AdaptiveRunner, inputs: Any, noise_image: Any) -> None:
    length = inputs["input_ids"].shape[1]
    wanted = [440, 360, 597, 440]

    def allowed(_: int, ids: torch.Tensor) -> list[int]:
        done = ids[length:].tolist()
        return [wanted[len(done)]] if done == wanted[: len(done)] else [0]

    for point in (NATIVE, HALF):
        out = runner.generate(**inputs, point=point, max_new_tokens=4, prefix_allowed_tokens_fn=allowed)
        assert out[0, length:].tolist() == wanted
    # chat's prompt is nobody's: it counts as it would be with its media in full.
    few = OperatingPoint("native", downsample=0.5, max_pixels=1024)
    answer = runner.processor.tokenizer.decode(wanted).strip()
    for point in (NATIVE, HALF, few):
        reply = runner.chat(
            noise_image(96, 96), "Describe.", point=point, max_new_tokens=4, prefix_allowed_tokens_fn=allowed
        )
        assert reply.text == answer and reply.finish_reason == "length"


def test_criteria_of_transformers_keep_their_meaning(runner: AdaptiveRunner, inputs: Any, processor: Any) -> None:
    length = inputs["input_ids"].shape[1]
    ten = StoppingCriteriaList([MaxLengthCriteria(length + 25)])
    with pytest.raises(ConfigError, match="MaxLengthCriteria"):
        runner.generate(**inputs, stopping_criteria=ten, point=HALF)
    # It takes the place of generate's own limit of 20 new tokens.
    out = runner.generate(**inputs, stopping_criteria=ten, min_new_tokens=25, budget=CHEAPEST)
    assert out.shape[1] == length + 25
    assert runner.last is not None and "MaxLengthCriteria" in runner.last[0].reason
    strings = [StopStringCriteria(processor.tokenizer, ["zzz"])]
    assert runner.generate(**inputs, stopping_criteria=strings, point=HALF, **BASE).shape[1] == length + 3


# Caches


@pytest.mark.parametrize("name", CACHES)
def test_a_second_turn_on_a_cache_answers_as_the_model_does(runner: AdaptiveRunner, inputs: Any, name: str) -> None:
    model, length = runner.model, inputs["input_ids"].shape[1]
    more = runner.processor.tokenizer("and then?", return_tensors="pt").input_ids
    asked: dict[str, Any] = {**BASE, "return_dict_in_generate": True}

    def turn(generate: Callable[..., Any], first: Any, **limits: Any) -> Any:
        ids = torch.cat([first.sequences, more], dim=1)
        held = {name: first[cache_name(model)]}
        return generate(input_ids=ids, attention_mask=torch.ones_like(ids), **held, **BASE, **limits)

    expected = turn(model.generate, model.generate(**inputs, **asked))
    found = turn(runner.generate, runner.generate(**inputs, **asked, point=NATIVE), budget=CHEAPEST)
    assert torch.equal(found, expected)
    assert runner.last is not None and runner.last[0].reason.startswith(f"native: {name} ")
    # The cache of a reduced prompt would go with a full one and answer from the wrong tokens: nothing takes it.
    reduced = runner.generate(**inputs, **asked, point=HALF)
    assert torch.equal(reduced.sequences[:, :length], inputs["input_ids"])
    with pytest.raises(ConfigError, match=f"{name} was filled with a reduced prompt"):
        turn(runner.generate, reduced)
    with pytest.raises(ConfigError, match="was filled with a reduced prompt"):
        turn(model.generate, reduced)
    assert reduced[cache_name(model)].reduced.get_seq_length() < length


@pytest.mark.parametrize("copied", [False, True])
def test_other_requests_between_two_turns_do_not_move_the_second(
    runner: AdaptiveRunner, inputs: Any, noise_image: Any, copied: bool
) -> None:
    more = runner.processor.tokenizer("and then?", return_tensors="pt").input_ids
    asked: dict[str, Any] = {**BASE, "return_dict_in_generate": True}

    def turns(generate: Callable[..., Any], between: Callable[[], Any], **limits: Any) -> list[Any]:
        found, own = [], DynamicCache()
        for given in ({}, {"cache": own}):
            first = generate(**inputs, **asked, **given, **limits)
            between()
            ids = torch.cat([first.sequences, more], dim=1)
            cache = copy.deepcopy(first[cache_name(runner.model)]) if copied else first[cache_name(runner.model)]
            found.append(generate(input_ids=ids, attention_mask=torch.ones_like(ids), cache=cache, **BASE).tolist())
        return found

    def others() -> None:
        runner.chat(noise_image(64, 200), "?", point=HALF, max_new_tokens=2)
        runner.chat(None, "Hello", max_new_tokens=2)

    assert turns(runner.generate, others, point=NATIVE) == turns(runner.model.generate, lambda: None)


# What stands beside the prompt


def test_what_does_not_fit_the_prompt_goes_to_the_model(runner: AdaptiveRunner, inputs: Any, batch: Any) -> None:
    grid = {k: v for k, v in inputs.items() if k != "pixel_values"}
    unmasked = {k: v for k, v in batch.items() if k != "attention_mask"}
    longer = {**inputs, "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    for call, reason in (
        (grid, "image_grid_thw is without its pixels"),
        (unmasked, "attention_mask is missing beside padding"),
        (longer, "attention_mask is not of input_ids' shape"),
        ({**inputs, "attention_mask": inputs["attention_mask"][None, None]}, "attention_mask is not of"),
    ):
        expected = outcome(runner.model.generate, {**call, **BASE}, 0)
        assert outcome(runner.generate, {**call, **BASE, "budget": CHEAPEST}, 0) == expected
        with pytest.raises(ConfigError, match=reason):
            runner.generate(**call, **BASE, point=HALF)


def test_what_needs_the_prompt_goes_with_points_that_keep_it(runner: AdaptiveRunner, inputs: Any) -> None:
    top = OperatingPoint("top")
    out = runner.generate(**inputs, **BASE, point=top, output_hidden_states=True, return_dict_in_generate=True)
    assert out.hidden_states[0][0].shape[1] == inputs["input_ids"].shape[1]
    assert runner.last is not None and runner.last[0].point == top
    # As if they were not there.
    idle = {"logits_to_keep": 2, "cache": None, "mm_encoder_outputs": None, "output_attentions": False}
    assert torch.equal(
        runner.generate(**inputs, **BASE, point=HALF, **idle), runner.generate(**inputs, **BASE, point=HALF)
    )
    with pytest.raises(ConfigError, match="top@1, but cache"):
        runner.generate(**inputs, **BASE, point=top, cache=DynamicCache())


def test_remote_code_and_dropped_images_are_refused_by_name(runner: AdaptiveRunner, inputs: Any) -> None:
    for given in ({"custom_generate": "some/repository"}, {"cache_implementation": "paged"}):
        with pytest.raises(ConfigError, match=next(iter(given))):
            runner.generate(**inputs, **given)


# Generation configurations


def test_a_generation_config_is_kept(runner: AdaptiveRunner, noise_image: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    image, config = noise_image(48, 48), GenerationConfig(max_new_tokens=3, min_new_tokens=3, do_sample=False)

    def tokens(**given: Any) -> list[int]:
        found = [runner.chat(image, "?", point=HALF, **given), runner.stream(image, "?", point=HALF, **given).reply]
        return [reply.measurement.new_tokens for reply in found]

    assert tokens(generation_config=config) == [3, 3]
    assert tokens(generation_config=config, max_new_tokens=5, min_new_tokens=5) == [5, 5]
    monkeypatch.setattr(runner.model, "generation_config", runner.model.generation_config)  # put back afterwards
    runner.generation_config = GenerationConfig(max_new_tokens=4, min_new_tokens=4, eos_token_id=762)
    assert runner.model.generation_config.max_new_tokens == 4 == runner.generation_config.max_new_tokens
    assert tokens() == [4, 4] and tokens(generation_config=config) == [3, 3]
    assert for_chat(runner.model, {}).most_new_tokens(9) == 4
    runner.generation_config = GenerationConfig(eos_token_id=762)
    assert for_chat(runner.model, {}).most_new_tokens(9) == CHAT_NEW_TOKENS == 256


def test_chat_keeps_a_length_that_counts_the_prompt(runner: AdaptiveRunner, inputs: Any, noise_image: Any) -> None:
    length = inputs["input_ids"].shape[1]
    for point in (NATIVE, HALF, OperatingPoint("native", downsample=0.5, max_pixels=1024)):
        limits = {"max_length": length + 6, "min_length": length + 6}
        reply = runner.chat(noise_image(96, 96), "Describe.", point=point, **limits)
        assert reply.measurement.new_tokens == 6 and reply.finish_reason == "length"
    with pytest.raises(ConfigError, match=f"max_length is {length}"):
        runner.chat(noise_image(96, 96), "Describe.", point=HALF, max_length=length)


@pytest.mark.parametrize("several", [False, True])
def test_an_answer_that_ends_in_a_stop_string_at_its_limit_has_stopped(
    runner: AdaptiveRunner, noise_image: Any, several: bool
) -> None:
    asked: dict[str, Any] = {"point": HALF, "max_new_tokens": 4, "do_sample": False}
    whole = runner.chat(noise_image(96, 96), "Describe.", **asked)
    assert whole.finish_reason == "length"
    text = runner.processor.tokenizer.decode(whole.token_ids)  # the whole of it cannot come before its last token
    reply = runner.chat(noise_image(96, 96), "Describe.", **asked, stop_strings=["zzz", text] if several else text)
    assert reply.token_ids == whole.token_ids and reply.finish_reason == "stop"


def test_chat_runs_native_what_needs_the_whole_prompt(runner: AdaptiveRunner, noise_image: Any) -> None:
    reply = runner.chat(noise_image(48, 48), "?", budget=CHEAPEST, max_new_tokens=2, encoder_repetition_penalty=1.3)
    assert reply.decision.point == NATIVE
    assert reply.decision.reason.startswith("native: encoder_repetition_penalty ")
    with pytest.raises(ConfigError, match="encoder_repetition_penalty"):
        runner.chat(noise_image(48, 48), "?", point=HALF, encoder_repetition_penalty=1.3)
    with pytest.raises(ConfigError, match="streamer"):
        runner.stream(noise_image(48, 48), "?", streamer=TextIteratorStreamer(runner.processor.tokenizer))


# Points and budgets


def test_a_point_or_budget_is_honoured_or_refused_on_every_call(
    reference_model: Any, processor: Any, inputs: Any
) -> None:
    now = [0.0]
    runner = AdaptiveRunner(reference_model, processor, policy="reference-latency", clock=lambda: now[0])
    handle = reference_model.register_forward_pre_hook(lambda *_: now.__setitem__(0, now[0] + 0.010))
    text = {"input_ids": processor.tokenizer("Hello", return_tensors="pt").input_ids}
    calls: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
        "text": ((), text),
        "positional": ((inputs["input_ids"],), {k: v for k, v in inputs.items() if k != "input_ids"}),
        "cached": ((), {**inputs, "cache": DynamicCache()}),
    }
    hard = Budget(latency_ms=55, on_deadline="stop", on_infeasible="cheapest")
    try:
        for name, (args, kwargs) in calls.items():
            out = runner.generate(*args, **kwargs, budget=hard, max_new_tokens=40, min_new_tokens=40)
            assert 1 <= out.shape[1] - prompt_length({**kwargs, "inputs": args[0] if args else None}) <= 6, name
            decision, measured = runner.last  # type: ignore[misc]
            assert decision.budget["latency_ms"] == 55 and measured.latency_ms <= 65
        args, kwargs = calls["positional"]
        runner.generate(*args, **kwargs, point=HALF, max_new_tokens=2)
        assert runner.last is not None and runner.last[0].point == HALF
        runner.generate(**text, point=HALF, max_new_tokens=2)
        assert runner.last[0].point == HALF and runner.last[0].kind == "text"
        with pytest.raises(ConfigError, match=r"native@0\.5, but cache"):
            runner.generate(**inputs, cache=DynamicCache(), point=HALF)
        with pytest.raises(ConfigError, match="on_infeasible is 'refuse', but cache"):
            runner.generate(**inputs, cache=DynamicCache(), budget=Budget(latency_ms=5, on_infeasible="refuse"))
        with pytest.raises(UnsupportedModelError, match="cannot run"):
            runner.adapter.knobs = runner.adapter.knobs - {"fusion"}
            runner.generate(**text, point=OperatingPoint("gated", 12))
    finally:
        handle.remove()


def test_a_point_that_comes_too_late_for_the_media_is_refused(
    runner: AdaptiveRunner, bench: Bench, inputs: Any, processor: Any
) -> None:
    late = OperatingPoint("native", downsample=0.5, max_pixels=1024, max_fps=1.0)
    for call in (inputs, bench.video()):
        with pytest.raises(ConfigError, match=r"too late for max_pixels, max_fps; expected native@0\.5, or"):
            runner.generate(**call, point=late, max_new_tokens=2)
    runner.generate(**processor.tokenizer("Hello", return_tensors="pt"), point=late, max_new_tokens=2)
    assert runner.last is not None and runner.last[0].point == late


def test_calls_inside_native_are_the_model_s_and_say_so(runner: AdaptiveRunner, inputs: Any) -> None:
    expected = runner.model.generate(**inputs, **BASE)
    with runner.native():
        assert torch.equal(runner.generate(**inputs, **BASE), expected)
    assert runner.last is not None and runner.last[0].point == NATIVE and "inside native" in runner.last[0].reason
