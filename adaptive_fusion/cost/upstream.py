"""Costs of a model behind an address: a guess until requests were seen, then what their times say.

From outside two times are seen, to the first token and to the last, so encoding and prefill are one stage here, by
tokens. Knows work and times. Must not know of addresses, requests or files.
"""

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from adaptive_fusion.cost.fit_stage import MIN_SAMPLES, fit_stage
from adaptive_fusion.cost.model import Profile, Work, decode_terms, prefill_terms
from adaptive_fusion.errors import ConfigError

GUESS_PREFILL = (30.0, 0.1, 0.0)
"""Milliseconds: an engine's own, a token's and none for pairs of tokens. The scale is learned with the first requests;
only the share of what does not depend on tokens matters until then."""
GUESS_DECODE = (20.0, 0.0, 0.0)
MIN_SPREAD = 1.5
"""Longest over shortest prompt among the samples from which the price of a token can be told."""

Seen = tuple[Work, float | None, float]
"""What a request was, and the milliseconds to its first token (None where nobody saw it) and its last."""


def guessed(key: Mapping[str, str]) -> Profile:
    """Costs before anything was seen."""
    return Profile(dict(key), (0.0,) * 6, GUESS_PREFILL, GUESS_DECODE, (0.0,) * 5, (0.0,) * 5)


def learned(samples: Sequence[Seen], before: Profile) -> Profile | None:
    """Costs by what was seen; None where that is too little to tell the price of a token."""
    first = [(work, ttft_ms) for work, ttft_ms, _ in samples if ttft_ms is not None and 0 < ttft_ms < math.inf]
    lengths = [work.prompt_tokens for work, _ in first]
    if len(first) < MIN_SAMPLES or max(lengths) < MIN_SPREAD * max(1, min(lengths)):
        return None
    prefill, ratios = fit_stage("prefill", [(prefill_terms(work), ms) for work, ms in first])
    decode, rest = before.decode, [(w, last - ms) for w, ms, last in samples if ms is not None and w.new_tokens > 1]
    with contextlib.suppress(ConfigError):  # answers of one token have no decoding
        decode, _ = fit_stage("decode", [(decode_terms(work), ms) for work, ms in rest])
    errors = {"prefill": sorted(abs(ratio - 1.0) for ratio in ratios)[len(ratios) // 2]}
    return replace(before, prefill=prefill, decode=decode, sharing=0.0, samples=len(first), errors=errors)
