"""A profile fitted to measured requests.

Knows samples and the terms of the cost model. Knows nothing of models, files or how the samples were made.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from statistics import median

from adaptive_fusion.cost.fit_peaks import fit_peaks
from adaptive_fusion.cost.fit_stage import StageSample, fit_stage
from adaptive_fusion.cost.model import CostModel, Profile, Work, decode_terms, encode_terms, peak_gb, prefill_terms
from adaptive_fusion.decisions import Measurement
from adaptive_fusion.point import OperatingPoint

_QUANTILES = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
_GAIN = 0.05

Sample = tuple[OperatingPoint, Work, Measurement]


def fit_profile(samples: Sequence[Sample], key: Mapping[str, str], cache_gb: float) -> Profile:
    """Fit a profile to measured requests: non-negative coefficients of least absolute log error, per stage.

    Samples should differ in patches, tokens, answer length and fusion; a term that never varies cannot be
    told apart. The work that launching hides is looked for among the samples' own. With samples at several
    levels of concurrency `sharing` is fitted too, else it stays 1.
    Values that are not finite and positive are left out. Of the peaks of one request measured several times the
    median counts, and every single one for the margin. `cache_gb` is the key-value cache of one token, which answers
    are too short to show.

    Raises:
        ConfigError: If a stage has fewer than 8 usable samples.
    """
    shared = [sample for sample in samples if sample[1].concurrency > 1]
    alone = [sample for sample in samples if sample[1].concurrency == 1] or list(samples)
    seen = [(p, w, m.ttft_ms - m.prefill_ms) for p, w, m in alone if w.patches]
    encode, encode_ratios, pairs = _fit_hidden(
        "encode",
        lambda hidden: [(encode_terms(p, w, hidden), ms) for p, w, ms in seen],
        [encode_terms(p, w)[3] for p, w, _ in seen],
    )
    prefill, prefill_ratios, tokens = _fit_hidden(
        "prefill",
        lambda hidden: [(prefill_terms(w, hidden), m.prefill_ms) for _, w, m in alone],
        [w.prompt_tokens for _, w, _ in alone],
    )
    decode, decode_ratios = fit_stage(
        "decode", [(decode_terms(w), m.latency_ms - m.ttft_ms) for _, w, m in alone if w.new_tokens > 1]
    )
    peaks: dict[tuple[OperatingPoint, Work], list[float]] = {}
    for point, work, measured in alone:
        if 0.0 < measured.peak_memory_gb < math.inf:
            peaks.setdefault((point, work), []).append(measured.peak_memory_gb)
    memory, context = fit_peaks([(p, w, median(found)) for (p, w), found in peaks.items()], cache_gb)
    memory_ratios = [
        peak / max(peak_gb(memory, context, p, w), 1e-12) for (p, w), found in peaks.items() for peak in found
    ]
    profile = Profile(
        dict(key),
        encode,
        prefill,
        decode,
        memory,
        context,
        memory_margin=min(max(1.05 * max(memory_ratios), 1.05), 4.0),
        samples=len(alone),
        errors={
            "encode": _median_error(encode_ratios),
            "prefill": _median_error(prefill_ratios),
            "decode": _median_error(decode_ratios),
            "memory": _median_error(memory_ratios),
        },
        hidden_pairs=pairs,
        hidden_tokens=tokens,
    )
    model = CostModel(profile)
    slopes = [
        (measured.latency_ms / model.predict(point, replace(work, concurrency=1)).latency_ms - 1.0)
        / (work.concurrency - 1)
        for point, work, measured in shared
        if 0.0 < measured.latency_ms < math.inf
    ]
    if not slopes:
        return profile
    return replace(profile, sharing=min(max(median(slopes), 0.0), 100.0), samples=len(samples))


def _fit_hidden(
    stage: str, samples: Callable[[float], list[StageSample]], work: Sequence[float]
) -> tuple[tuple[float, ...], list[float], float]:
    """As `fit_stage`, with the amount of work below which the stage takes no less: one of `work`'s quantiles, or 0
    unless that takes a twentieth off the error."""
    best = fit_stage(stage, samples(0.0))
    hidden, least = 0.0, (1.0 - _GAIN) * _mean_error(best[1])
    ordered = sorted(work)
    for quantile in _QUANTILES:
        amount = float(ordered[int(quantile * (len(ordered) - 1))])
        found = fit_stage(stage, samples(amount))
        if _mean_error(found[1]) < least:
            best, hidden, least = found, amount, _mean_error(found[1])
    return *best, hidden


def _mean_error(ratios: Sequence[float]) -> float:
    return sum(abs(math.log(ratio)) for ratio in ratios) / len(ratios)


def _median_error(ratios: Sequence[float]) -> float:
    return median(abs(ratio - 1.0) for ratio in ratios)
