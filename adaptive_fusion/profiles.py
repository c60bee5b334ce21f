"""Where profiles come from: fitted to measured requests, estimated from a model's shape, or read from the
user's cache.

Knows samples, shapes and files. Knows nothing of models or how the samples were made, and is not needed to
predict. A file that cannot be used is never an error: it is told why, and an estimate takes its place.
"""

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from operator import mul
from pathlib import Path
from statistics import median

from adaptive_fusion.cost import (
    CostModel,
    Profile,
    Work,
    decode_terms,
    encode_terms,
    memory_terms,
    prefill_terms,
)
from adaptive_fusion.decisions import Measurement
from adaptive_fusion.errors import ConfigError
from adaptive_fusion.point import OperatingPoint

MIN_SAMPLES = 8
MAX_BYTES = 1 << 20
GIB = float(1 << 30)
_ROUNDS = 25

Sample = tuple[OperatingPoint, Work, Measurement]


def fit_profile(samples: Sequence[tuple[OperatingPoint, Work, Measurement]], key: Mapping[str, str]) -> Profile:
    """Fit a profile to measured requests: non-negative coefficients of least absolute log error, per stage.

    Samples should differ in patches, tokens, answer length and fusion; a term that never varies cannot be
    told apart. With samples at several levels of concurrency `sharing` is fitted too, else it stays 1.
    Values that are not finite and positive are left out. Of the peaks of one request measured several times the
    median counts, and every single one for the margin.

    Raises:
        ConfigError: If a stage has fewer than 8 usable samples.
    """
    shared = [sample for sample in samples if sample[1].concurrency > 1]
    alone = [sample for sample in samples if sample[1].concurrency == 1] or list(samples)
    encode, encode_ratios = _fit(
        "encode", [(encode_terms(p, w), m.ttft_ms - m.prefill_ms) for p, w, m in alone if w.patches]
    )
    prefill, prefill_ratios = _fit("prefill", [(prefill_terms(w), m.prefill_ms) for _, w, m in alone])
    decode, decode_ratios = _fit(
        "decode", [(decode_terms(w), m.latency_ms - m.ttft_ms) for _, w, m in alone if w.new_tokens > 1]
    )
    peaks: dict[tuple[OperatingPoint, Work], list[float]] = {}
    for point, work, measured in alone:
        if 0.0 < measured.peak_memory_gb < math.inf:
            peaks.setdefault((point, work), []).append(measured.peak_memory_gb)
    memory, _ = _fit("memory", [(memory_terms(p, w), median(found)) for (p, w), found in peaks.items()])
    memory_ratios = [
        peak / max(sum(map(mul, memory, memory_terms(p, w))), 1e-12)
        for (p, w), found in peaks.items()
        for peak in found
    ]
    profile = Profile(
        dict(key),
        encode,
        prefill,
        decode,
        memory,
        memory_margin=min(max(1.05 * max(memory_ratios), 1.05), 4.0),
        samples=len(alone),
        errors={
            "encode": _median_error(encode_ratios),
            "prefill": _median_error(prefill_ratios),
            "decode": _median_error(decode_ratios),
            "memory": _median_error(memory_ratios),
        },
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


def _median_error(ratios: Sequence[float]) -> float:
    return median(abs(ratio - 1.0) for ratio in ratios)


def _fit(stage: str, samples: Sequence[tuple[tuple[float, ...], float]]) -> tuple[tuple[float, ...], list[float]]:
    """Non-negative coefficients of least absolute log error, and measured / predicted of every usable sample.

    Iteratively reweighted least squares: the absolute log error, unlike the squared relative one, neither
    leans towards small predictions nor follows the requests that another process slowed down.
    """
    import numpy as np
    from scipy.optimize import nnls

    usable = [(terms, value) for terms, value in samples if 0.0 < value < math.inf]
    if len(usable) < MIN_SAMPLES:
        raise ConfigError(f"{stage} has {len(usable)} usable samples; expected at least {MIN_SAMPLES}")
    matrix = np.array([terms for terms, _ in usable], dtype=np.float64)
    target = np.array([value for _, value in usable], dtype=np.float64)
    scale = np.where(matrix.max(0) > 0.0, matrix.max(0), 1.0) / float(np.median(target))
    best, least, weights = np.zeros(matrix.shape[1]), math.inf, 1.0 / target
    for _ in range(_ROUNDS):
        solution, _ = nnls(matrix / scale * weights[:, None], target * weights)
        predicted = np.maximum(matrix @ (solution / scale), 1e-9 * target)
        error = np.abs(np.log(target / predicted))
        if error.mean() < least:
            best, least = solution / scale, float(error.mean())
        weights = 1.0 / (np.sqrt(predicted * target) * np.sqrt(np.maximum(error, 0.01)))
    ratios = target / np.maximum(matrix @ best, 1e-12)
    return tuple(best.tolist()), ratios.tolist()


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The numbers of a vision-language model that its cost follows from; `text_mlp` is the active width
    per token.
    """

    vision_depth: int
    vision_width: int
    vision_mlp: int
    patch_dim: int
    text_layers: int
    text_width: int
    text_mlp: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int


def analytic_profile(
    shape: ModelShape,
    key: Mapping[str, str],
    *,
    dtype_bytes: int = 2,
    flops_per_s: float = 2e13,
    bytes_per_s: float = 4e11,
) -> Profile:
    """An estimate from shapes alone, for use until a profile is measured; the first requests correct its
    scale.

    Encode and prefill are bound by arithmetic (2 operations per weight and token, 4 x width per pair of
    attention, half of that for causal attention), decode by reading the weights and the key-value cache
    (Kaplan et al. 2020, table 1; Pope et al. 2022, section 2). Memory: activations of one layer, the ViT
    levels kept, and the key-value cache.
    """
    s = shape
    per_ms = 1e3 / flops_per_s
    vision = s.vision_depth * (8 * s.vision_width**2 + 4 * s.vision_width * s.vision_mlp)
    vision += 2 * s.patch_dim * s.vision_width
    attention = s.heads * s.head_dim
    weights = s.text_layers * (
        s.text_width * (2 * attention + 2 * s.kv_heads * s.head_dim) + 3 * s.text_width * s.text_mlp
    )
    head = s.text_width * s.vocab
    cache = 2 * s.text_layers * s.kv_heads * s.head_dim * dtype_bytes
    read_ms = 1e3 / bytes_per_s
    return Profile(
        dict(key),
        encode=(
            1.0,
            0.0,
            vision * per_ms,
            4 * s.vision_depth * s.vision_width * per_ms,
            4 * s.vision_width * per_ms,
            4 * s.vision_width * per_ms,
        ),
        prefill=(1.0 + 2 * head * per_ms, 2 * weights * per_ms, 2 * s.text_layers * attention * per_ms),
        decode=((weights + head) * dtype_bytes * read_ms, 2 * (weights + head) * per_ms, cache * read_ms),
        memory=(
            s.vocab * 4 / GIB,
            (4 * s.patch_dim + (8 * s.vision_width + 2 * s.vision_mlp) * dtype_bytes) / GIB,
            0.0,
            (cache + (8 * s.text_width + 3 * s.text_mlp) * dtype_bytes) / GIB,
            s.vision_width * dtype_bytes / GIB,
            0.0,
        ),
    )


def user_cache_dir(environ: Mapping[str, str]) -> Path:
    """The folder for this library's caches: ``XDG_CACHE_HOME``, ``LOCALAPPDATA`` or ``~/.cache``, as set
    in `environ`.
    """
    base = environ.get("XDG_CACHE_HOME") or environ.get("LOCALAPPDATA")
    return (Path(base) if base else Path.home() / ".cache") / "adaptive_fusion"


def profile_path(cache_dir: Path, key: Mapping[str, str]) -> Path:
    """Where the profile for `key` is kept: one file per key, named by its hash."""
    text = json.dumps(dict(key), sort_keys=True, separators=(",", ":"))
    return Path(cache_dir) / "profiles" / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.json"


def save_profile(cache_dir: Path, profile: Profile) -> Path:
    """Write a profile to the cache and return its path; a reader sees the old file or the new one, never
    half of one.

    Raises:
        OSError: If the folder cannot be written.
    """
    path = profile_path(cache_dir, profile.key)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".json")
    try:
        with os.fdopen(handle, "w") as file:
            json.dump(profile.to_dict(), file, indent=1, allow_nan=False)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return path


def read_profile(path: Path, key: Mapping[str, str]) -> tuple[Profile | None, str]:
    """The profile in a file if it holds for `key`, and a sentence: what was found, or why it was refused."""
    try:
        with Path(path).open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
        if len(raw) > MAX_BYTES:
            return None, f"profile file is larger than {MAX_BYTES} bytes"
        values = json.loads(raw)
        if not isinstance(values, Mapping):
            return None, "profile file holds no table"
        profile = Profile.from_dict(values)
    except FileNotFoundError:
        return None, "no profile of this set-up; run `adaptive-fusion calibrate`"
    except OSError as error:
        return None, f"profile file cannot be read: {error.strerror}"
    except ConfigError as error:
        return None, str(error)
    except (ValueError, RecursionError):
        return None, "profile file is not valid JSON"
    refused = profile.mismatch(key)
    return (None, refused) if refused else (profile, f"profile of {profile.samples} requests")


def load_profile(cache_dir: Path, key: Mapping[str, str]) -> tuple[Profile | None, str]:
    """The cached profile for `key`, or None and the reason; never raises for what a file holds."""
    return read_profile(profile_path(cache_dir, key), key)
