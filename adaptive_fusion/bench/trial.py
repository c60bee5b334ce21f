"""One request at one operating point, timed stage by stage, and the likelihood of given captions after it.

Knows an adapter and a meter. Must not know of scenes, scores or tables.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteriaList

from adaptive_fusion.decisions import Measurement
from adaptive_fusion.meters import Meter
from adaptive_fusion.models import Adapter, Encoded
from adaptive_fusion.point import OperatingPoint
from adaptive_fusion.timing import GenerationClock, synchronize


@dataclass(frozen=True)
class Outcome:
    """New tokens ``[n]`` of a greedy answer, what they took, and the encoded request for further questions."""

    tokens: Tensor
    measurement: Measurement
    encoded: Encoded


@torch.no_grad()
def run_request(
    adapter: Adapter,
    prepare: Callable[[], dict[str, Any]],
    point: OperatingPoint,
    meter: Meter,
    *,
    max_new_tokens: int,
    exactly: bool = False,
    earlier_ms: float = 0.0,
    clock: Callable[[], float] = time.perf_counter,
) -> Outcome:
    """Prepare, encode and answer greedily; every stage is timed once.

    Args:
        prepare: Gives the processor's tensors at the point's pixel budget, on the model's device; its time is
            `preprocess_ms`.
        exactly: Generate `max_new_tokens` even past the end of the answer.
        earlier_ms: Spent on this request before (deciding); counted as preprocessing.
        clock: Seconds, monotonic.
    """
    model = adapter.model
    ready = partial(synchronize, model.device)
    meter.start()
    began = clock()
    inputs = prepare()
    prepared = clock()
    encoded = adapter.encode(inputs, point)
    ready()
    encoded_s = clock()
    timer = GenerationClock(clock, synchronize=ready)
    limits = {"min_new_tokens": max_new_tokens} if exactly else {}
    sequences = model.generate(
        **encoded.inputs,
        **limits,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        stopping_criteria=StoppingCriteriaList([timer]),
    )
    ended = clock()
    peak = meter.stop()
    length = int(encoded.inputs["input_ids"].shape[1])
    first = timer.first_s if timer.first_s is not None else ended
    measurement = Measurement(
        preprocess_ms=(prepared - began) * 1e3 + earlier_ms,
        encode_ms=(encoded_s - prepared) * 1e3,
        prefill_ms=(first - encoded_s) * 1e3,
        decode_ms=(ended - first) * 1e3,
        ttft_ms=(first - began) * 1e3 + earlier_ms,
        latency_ms=(ended - began) * 1e3 + earlier_ms,
        visual_tokens=encoded.visual_tokens,
        prompt_tokens=length,
        new_tokens=int(sequences.shape[1]) - length,
        patches=encoded.patches,
        peak_memory_gb=peak if peak is not None else 0.0,
    )
    return Outcome(sequences[0, length:], measurement, encoded)


@torch.no_grad()
def caption_likelihood(adapter: Adapter, encoded: Encoded, captions: Sequence[str]) -> tuple[list[float], list[float]]:
    """Log-likelihood of each caption (with the end token) as the answer, and its share of tokens ranked
    first.

    The prompt runs once; the captions share its cache, padded on the right, where causal attention never
    looks.
    """
    model, tokenizer = adapter.model, adapter.processor.tokenizer
    rows = [[*tokenizer(text, add_special_tokens=False).input_ids, int(tokenizer.eos_token_id)] for text in captions]
    length = max(map(len, rows))
    ids = torch.tensor([row + [row[-1]] * (length - len(row)) for row in rows], device=model.device)
    real = torch.tensor([[1.0] * len(row) + [0.0] * (length - len(row)) for row in rows], device=model.device)
    prompt = model(**encoded.inputs, use_cache=True, logits_to_keep=1)
    cache = prompt.past_key_values
    cache.batch_repeat_interleave(len(rows))
    # No mask: with one, Qwen's models would count positions for the prompt as well.
    logits = model(input_ids=ids[:, :-1], past_key_values=cache, use_cache=True).logits
    logits = torch.cat([prompt.logits.expand(len(rows), -1, -1), logits], dim=1).float()
    likely = torch.log_softmax(logits, dim=-1).gather(2, ids[:, :, None])[:, :, 0]
    right = (logits.argmax(-1) == ids).float()
    return (likely * real).sum(1).tolist(), ((right * real).sum(1) / real.sum(1)).tolist()
