"""What a request will cost at an operating point: milliseconds per stage and GiB, from a profile of few
coefficients.

Knows patches, tokens and coefficients. Knows nothing of models, images, budgets, files or clocks: whoever
plans a request says how much work it is. Plain floats only; `fit` and `estimate` make the coefficients.

With segments s of n_s patches each, N = sum n_s, Q = sum n_s^2, F = N x fused levels, T prompt tokens of
the whole batch of B, and t new tokens per sequence:

- encode = e0 B + e1 S + e2 N + e3 max(Q, hq) + e4 F + e5 F rank (attention is within a segment; S = number of segments)
- prefill = p0 + p1 max(T, ht) + p2 T^2 / B, of each of a batch's passes where its prompts are not all prefilled in one
- decode = (t - 1) (d0 + d1 G + d2 (T G / B + G t / 2)): the first token comes with the prefill; G is the number of rows
  that generate at a time, since those that have ended leave their batch
- times of all three x (1 + k (concurrency - 1)): what shares the device from outside; requests of one runner wait for
  each other or are one batch
- peak memory = the largest of what the encoder, the prefill and the end of the answer need, one after the other:
  m0 + m1 N + m2 max n_s^2 + m3 F + m4 P, with P pixels of the media as they came, where anything is encoded;
  c0 + c1 T + c3 T^2 / B + c4 N, with the patches' pixels still there; and c0 + c2 (T + B u) + c4 N, with u the most
  tokens that are counted for an answer and c2 the key-value cache of one token

Below hq pairs of patches and ht tokens the device waits for the host that launches its kernels, so that less work takes
no less time: a small model on a fast GPU answers a quarter of a megapixel no sooner than one. Both are 0 on a CPU.

All coefficients are non-negative, so that more work is never predicted to cost less.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from operator import mul
from typing import Any

from adaptive_fusion.checks import number
from adaptive_fusion.decisions import Prediction
from adaptive_fusion.errors import ConfigError
from adaptive_fusion.point import OperatingPoint

VERSION = 4

SIZES = {"encode": 6, "prefill": 3, "decode": 3, "memory": 5, "context": 5}
HIDDEN = ("hidden_pairs", "hidden_tokens")


@dataclass(frozen=True, slots=True)
class Work:
    """How much a request is at one operating point.

    Attributes:
        patches: ViT patches of each attention segment (an image, or a temporal step of a clip), all the
            batch's.
        prompt_tokens: Tokens of all the batch's prompts together, visual ones included.
        new_tokens: Tokens to generate per sequence; an expectation may be fractional.
        batch: Sequences generated together.
        concurrency: Requests that share the device while this one runs, itself included.
        source_pixels: Pixels of all media before they are resized; 0 if the processor is through with them.
        passes: Rows and longest prompt of each prefill; empty for one of all rows.
        going: Rows that generate at a time, on average until the answer ends; 0 for all.
        most_new_tokens: Tokens per sequence that memory has to be there for; below `new_tokens` it is those.

    Raises:
        ConfigError: For a count that is negative or not finite.
    """

    patches: tuple[int, ...] = ()
    prompt_tokens: int = 1
    new_tokens: float = 1.0
    batch: int = 1
    concurrency: int = 1
    source_pixels: int = 0
    passes: tuple[tuple[int, int], ...] = ()
    going: float = 0.0
    most_new_tokens: float = 0.0

    def __post_init__(self) -> None:
        for name, low in (
            ("prompt_tokens", 0),
            ("new_tokens", 0),
            ("batch", 1),
            ("concurrency", 1),
            ("source_pixels", 0),
            ("going", 0),
            ("most_new_tokens", 0),
        ):
            if not low <= getattr(self, name) < math.inf:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; expected a finite number from {low}")
        if self.patches and not 0 <= min(self.patches) <= max(self.patches) < math.inf:
            raise ConfigError(f"patches has {min(self.patches)!r}; expected counts of at least 0")


def encode_terms(point: OperatingPoint, work: Work, hidden: float = 0.0) -> tuple[float, ...]:
    """What e0 to e5 multiply; `hidden` is hq."""
    patches = work.patches
    total = sum(patches)
    squares = sum([n * n for n in patches])
    fused = total * point.layers if point.fuses else 0
    has_media = float(work.batch) if patches else 0.0
    return (has_media, len(patches), total, max(squares, hidden if patches else 0.0), fused, fused * point.adapter_rank)


def prefill_terms(work: Work, hidden: float = 0.0) -> tuple[float, ...]:
    """What p0 to p2 multiply; `hidden` is ht."""
    passes = work.passes or ((work.batch, work.prompt_tokens / work.batch),)
    return (
        float(len(passes)),
        sum([max(rows * longest, hidden) for rows, longest in passes]),
        sum([rows * longest * longest for rows, longest in passes]),
    )


def decode_terms(work: Work) -> tuple[float, ...]:
    """What d0 to d2 multiply."""
    steps = max(work.new_tokens - 1.0, 0.0)
    going = work.going or work.batch
    context = work.prompt_tokens * going / work.batch + going * work.new_tokens / 2
    return (steps, steps * going, steps * context)


def memory_terms(point: OperatingPoint, work: Work) -> tuple[float, ...]:
    """What m0 to m4 multiply."""
    patches = work.patches
    if not patches:
        return (0.0, 0, 0, 0, 0)
    total = sum(patches)
    largest = max(patches)
    fused = total * point.layers if point.fuses else 0
    return (1.0, total, largest * largest, fused, work.source_pixels)


def prompt_memory_terms(work: Work) -> tuple[float, ...]:
    """What c0, c1, c3 and c4 multiply as the prompt is read."""
    tokens = work.prompt_tokens
    return (1.0, tokens, tokens * tokens / work.batch, sum(work.patches))


def peak_gb(memory: tuple[float, ...], context: tuple[float, ...], point: OperatingPoint, work: Work) -> float:
    """The peak that these coefficients, m0 to m4 and c0 to c4, predict."""
    c0, c1, c2, c3, c4 = context
    most = work.most_new_tokens if work.most_new_tokens > work.new_tokens else work.new_tokens
    read = _dot((c0, c1, c3, c4), prompt_memory_terms(work))
    told = c0 + c2 * (work.prompt_tokens + work.batch * most) + c4 * sum(work.patches)
    return max(_dot(memory, memory_terms(point, work)), read, told)


@dataclass(frozen=True)
class Profile:
    """Coefficients of the cost model on one machine, in milliseconds and GiB; see the module for the terms.

    Attributes:
        key: What it holds for: model configuration hash, device, dtype, attention backend, versions.
        encode: e0 to e5. Preprocessing is in it: it is all that comes before the prefill.
        prefill: p0 to p2.
        decode: d0 to d2.
        memory: m0 to m4, the central estimate, of peaks while the encoder runs.
        context: c0 to c4, of peaks while the language model runs.
        memory_margin: Largest measured / predicted peak x 1.05: where the controller's memory envelope
            starts.
        sharing: k, the slowdown per further concurrent request; 1 is time sharing.
        samples: Requests it was fitted on; 0 for an analytic estimate.
        errors: Median relative error per stage on those samples.
        hidden_pairs: hq.
        hidden_tokens: ht.

    Raises:
        ConfigError: For coefficients that are negative, not finite or of the wrong number.
    """

    key: Mapping[str, str]
    encode: tuple[float, ...]
    prefill: tuple[float, ...]
    decode: tuple[float, ...]
    memory: tuple[float, ...]
    context: tuple[float, ...]
    memory_margin: float = 1.25
    sharing: float = 1.0
    samples: int = 0
    errors: Mapping[str, float] = field(default_factory=dict)
    hidden_pairs: float = 0.0
    hidden_tokens: float = 0.0

    def __post_init__(self) -> None:
        for name, size in SIZES.items():
            values = getattr(self, name)
            if len(values) != size:
                raise ConfigError(f"{name} has {len(values)} coefficients; expected {size}")
            for value in values:
                number(value, name, 0.0, 1e12)
        number(self.memory_margin, "memory_margin", 1.0, 4.0)
        number(self.sharing, "sharing", 0.0, 100.0)
        number(self.samples, "samples", 0, 1e12)
        number(self.hidden_pairs, "hidden_pairs", 0.0, 1e15)
        number(self.hidden_tokens, "hidden_tokens", 0.0, 1e12)

    def mismatch(self, key: Mapping[str, str]) -> str | None:
        """Why this profile does not hold for `key`, or None if it does."""
        differing = [
            f"{name} was {self.key.get(name, 'absent')}, is {key.get(name, 'absent')}"
            for name in sorted({*self.key, *key})
            if self.key.get(name) != key.get(name)
        ]
        return f"profile is of another set-up: {'; '.join(differing)}" if differing else None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "version": VERSION,
            "key": dict(self.key),
            **{name: list(getattr(self, name)) for name in SIZES},
            "memory_margin": self.memory_margin,
            "sharing": self.sharing,
            "samples": self.samples,
            "errors": dict(self.errors),
            "hidden_pairs": self.hidden_pairs,
            "hidden_tokens": self.hidden_tokens,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Profile":
        """Read `to_dict`'s form.

        Raises:
            ConfigError: For another version, unknown or missing parts, or coefficients out of range.
        """
        known = ("version", "key", *SIZES, "memory_margin", "sharing", "samples", "errors", *HIDDEN)
        if values.get("version") != VERSION:
            raise ConfigError(f"profile has version {values.get('version')!r}; expected {VERSION}")
        if set(values) != set(known):
            raise ConfigError(f"profile has parts {sorted(map(str, values))}; expected {sorted(known)}")
        key, errors = values["key"], values["errors"]
        if not isinstance(key, Mapping) or not isinstance(errors, Mapping):
            raise ConfigError("profile's key and errors must be tables")
        for name in SIZES:
            if not isinstance(values[name], list | tuple):
                raise ConfigError(f"profile's {name} is {values[name]!r}; expected a list of numbers")
        stages = {name: tuple(number(v, name, 0.0, 1e12) for v in values[name]) for name in SIZES}
        return cls(
            key={str(k): str(v) for k, v in key.items()},
            encode=stages["encode"],
            prefill=stages["prefill"],
            decode=stages["decode"],
            memory=stages["memory"],
            context=stages["context"],
            memory_margin=number(values["memory_margin"], "memory_margin", 1.0, 4.0),
            sharing=number(values["sharing"], "sharing", 0.0, 100.0),
            samples=int(number(values["samples"], "samples", 0, 1e12)),
            errors={str(k): number(v, "errors", 0.0, 1e12) for k, v in errors.items()},
            hidden_pairs=number(values["hidden_pairs"], "hidden_pairs", 0.0, 1e15),
            hidden_tokens=number(values["hidden_tokens"], "hidden_tokens", 0.0, 1e12),
        )


class CostModel:
    """Predicts from a profile; a few microseconds a call.

    Args:
        profile: The coefficients.
        parts: Whether prompts of one batch can be prefilled apart, and rows that have ended leave it.
    """

    def __init__(self, profile: Profile, *, parts: bool = True) -> None:
        self.profile, self.parts = profile, parts

    def beside(self, own: Work, others: Sequence[Work]) -> Work:
        """What a request, alone a batch of one, is in one batch with `others`: all media are encoded before its
        prefill, all prompts are prefilled before it goes on, and its own answer is as long as it was."""
        if not others:
            return own
        rows = (own, *others)
        lengths = [row.prompt_tokens for row in rows]
        groups, going = [list(range(len(rows)))], 0.0
        if self.parts:
            groups = self.passes(lengths)
            mine = max(own.new_tokens, 1.0)
            going = sum(min(max(row.new_tokens, 1.0), mine) for row in rows) / mine
        passes = tuple((len(places), max(lengths[place] for place in places)) for places in groups)
        return Work(
            patches=tuple(n for row in rows for n in row.patches),
            prompt_tokens=len(rows) * max(lengths),
            new_tokens=own.new_tokens,
            batch=len(rows),
            concurrency=own.concurrency,
            source_pixels=sum(row.source_pixels for row in rows),
            passes=passes if len(passes) > 1 else (),
            going=going,
            most_new_tokens=max(row.most_new_tokens for row in rows),
        )

    def passes(self, lengths: Sequence[int]) -> list[list[int]]:
        """Which prompts of a batch are prefilled together, so that all are done the soonest: padding costs time, and so
        does a pass, no less than a step of decoding. Places in `lengths`, by the first of each group. The best groups
        are runs of the prompts in order of length."""
        first, token, square = self.profile.prefill
        first = max(first, self.profile.decode[0])
        order = sorted(range(len(lengths)), key=lambda place: -lengths[place])
        # Of the longest so many: the least time, and where the last of their runs begins.
        best: list[tuple[float, int]] = [(0.0, 0)]
        for end in range(1, len(order) + 1):
            found = []
            for begin in range(end):
                rows, longest = end - begin, lengths[order[begin]]
                tokens = rows * longest
                took = first + token * max(tokens, self.profile.hidden_tokens) + square * tokens * longest
                found.append((best[begin][0] + took, begin))
            best.append(min(found))
        groups, end = [], len(order)
        while end:
            begin = best[end][1]
            groups.append(sorted(order[begin:end]))
            end = begin
        return sorted(groups)

    def predict(self, point: OperatingPoint, work: Work) -> Prediction:
        """Milliseconds per stage and peak GiB above the resting set of `work`, counted for `point`."""
        profile = self.profile
        shared = 1.0 + profile.sharing * (work.concurrency - 1)
        return Prediction(
            shared * _dot(profile.encode, encode_terms(point, work, profile.hidden_pairs)),
            shared * _dot(profile.prefill, prefill_terms(work, profile.hidden_tokens)),
            shared * _dot(profile.decode, decode_terms(work)),
            peak_gb(profile.memory, profile.context, point, work),
        )


def _dot(coefficients: tuple[float, ...], terms: tuple[float, ...]) -> float:
    total: float = sum(map(mul, coefficients, terms))
    return total
