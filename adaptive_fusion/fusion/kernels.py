"""Fast weighted sums and pooling over the levels of a vision encoder.

The plain ``sum(w * f)`` makes two new tensors a level. Here each level is read once and added in place to
one block of the output that stays in cache, with float scalars; half-precision levels are accumulated in
float32 and rounded once. Knows packed tensors and segment lengths only: nothing of taps, strategies or
models.
"""

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import Any, Literal

import torch
from torch import Tensor

from adaptive_fusion.errors import ConfigError

Combine = Callable[[Sequence[Tensor], Tensor, Sequence[int]], Tensor]
"""The signature of `weighted_sum`, so that a compiled form can take its place."""


@dataclass(frozen=True)
class Law:
    """How the levels of a tap are weighed where that is the same for all images: ``w_i = s a_i``, and ``1 - s`` more
    for the tap's own level.

    Attributes:
        name: What a_i is: 1 (``unit``), or the softplus of a weight over their sum over the levels.
        weights: ``[L]`` in float32; None with ``unit``.
        mix: s, a tensor of one value; None for 1.
        tap: Position of the tap's own level.
    """

    name: Literal["unit", "softplus"]
    weights: Tensor | None = None
    mix: Tensor | None = None
    tap: int = 0


@dataclass(frozen=True)
class Gating:
    """How the levels of a tap are weighed, and its merger's output is gated, by what each image has in them.

    ``a_i`` are the sigmoids of ``vectors[i] . GlobalPool(F_i) + bias[i]`` over their sum, ``w_i`` as in `Law`, and the
    gate is ``2 sigmoid(gate . GlobalPool(F_tap) + gate_bias)``.

    Attributes:
        vectors, bias: ``[L, D]`` and ``[L]``; None for a level alone, whose a_i is 1.
        gate, gate_bias: ``[D]`` and one value.
        mix, tap: As in `Law`.
    """

    vectors: Tensor | None
    bias: Tensor | None
    gate: Tensor
    gate_bias: Tensor
    mix: Tensor | None
    tap: int


class CombineLaw(ABC):
    """A `Combine` that takes the parameters of a law as they are stored. What it does not do it answers with None.

    Adapters are ``down [L, rank, D]`` and ``up [L, D, rank]``, or None. Sums are accumulated in float32 and rounded
    once. Both raise ConfigError if shapes do not fit.
    """

    @abstractmethod
    def by_law(
        self, levels: Sequence[Tensor], lengths: Sequence[int], law: Law, down: Tensor | None, up: Tensor | None
    ) -> Tensor | None:
        """Sum of ``w_i F_i + s a_i up_i down_i F_i``, ``[N, D]``."""

    @abstractmethod
    def gated(
        self, levels: Sequence[Tensor], lengths: Sequence[int], gating: Gating, down: Tensor | None, up: Tensor | None
    ) -> tuple[Tensor, Tensor] | None:
        """The same sum with each image's own weights, and its gate: ``[N, D]`` and ``[n_images]`` in float32."""


# Elements of a block: its float32 form (2 MiB) stays in the last-level cache and splits over two threads
# into pieces that still dwarf the cost of an operator call. Smaller and larger blocks were slower on Zen 3.
_BLOCK = 2**19
_scratch = threading.local()


def check_packed(levels: Sequence[Tensor], lengths: Sequence[int]) -> None:
    """ConfigError unless levels are packed ``[N, D]`` tensors alike and `lengths`, each >= 1, sum to N."""
    if not levels:
        raise ConfigError("got no levels; expected at least one [patches, width] tensor")
    first = levels[0]
    shape, dtype, device = first.shape, first.dtype, first.device
    alike = all(each.shape == shape and each.dtype == dtype and each.device == device for each in levels)
    if not alike or len(shape) != 2 or not dtype.is_floating_point:
        found = sorted(f"{list(level.shape)} {level.dtype} on {level.device}" for level in levels)
        raise ConfigError(f"levels are {found}; expected floating [patches, width] tensors of one shape, dtype, device")
    if any(length < 1 for length in lengths) or sum(lengths) != shape[0]:
        raise ConfigError(f"lengths {list(lengths)} do not add up, each at least 1, to {shape[0]} patches")


def weighted_sum(levels: Sequence[Tensor], weights: Tensor, lengths: Sequence[int]) -> Tensor:
    """Sum of ``weights[image, i] * levels[i]``, accumulated in float32 (or float64) and rounded once.

    Args:
        levels: L packed tensors ``[N, D]`` of one dtype.
        weights: ``[L]`` or ``[1, L]`` for all patches alike, or ``[n_images, L]``.
        lengths: patches per image, summing to N.

    Returns ``[N, D]`` in the levels' dtype. Differentiable in weights and levels (once), with the same
    forward kernel in training and inference; no temporary of a level's size is kept. A weight of exactly 0
    skips its level.
    Raises ConfigError if shapes do not fit.
    """
    check_packed(levels, lengths)
    rows = weight_rows(weights, len(levels), len(lengths))
    if torch.is_grad_enabled() and (rows.requires_grad or any(level.requires_grad for level in levels)):
        out: Tensor = _WeightedSum.apply(rows, tuple(lengths), *levels)
        return out
    return _accumulate(levels, rows, lengths)


def global_pool(levels: Sequence[Tensor], lengths: Sequence[int]) -> Tensor:
    """Each level's mean over each image: L times ``[N, D]`` to ``[n_images, L, D]``, float32 (or float64).

    One matrix product per image and level: a row of equal shares times the patches. Half precision is
    summed in float32 by that product and rounded once. Differentiable. Raises ConfigError if shapes do not
    fit.
    """
    check_packed(levels, lengths)
    parts = [torch.split(level, list(lengths)) for level in levels]
    means = []
    for image, length in enumerate(lengths):
        # A power of two is exact in half precision, where 1 / length is not; the rest of the factor follows
        # in float32.
        share = 0.5 ** (length - 1).bit_length()
        row = levels[0].new_full((length,), share)
        sums = torch.stack([torch.mv(part[image].t(), row) for part in parts])
        means.append(sums.to(_wide(sums.dtype)) * (1 / (share * length)))
    return torch.stack(means)


def expand_rows(values: Tensor, lengths: Sequence[int]) -> Tensor:
    """Repeat row i of ``[n_images, ...]`` lengths[i] times; a single row is left to broadcasting."""
    if values.shape[0] == 1:
        return values
    # Not waited for: a copy that the device is waited for with ends all that is queued on it.
    counts = torch.tensor(list(lengths)).to(values.device, non_blocking=True)
    return values.repeat_interleave(counts, dim=0, output_size=sum(lengths))


class CompiledSum:
    """`weighted_sum` through ``torch.compile``, for at most `max_shapes` kinds of input.

    A kind is (levels, width, dtype, device, one row of weights or many); the number of patches is dynamic.
    Further kinds and calls that need gradient take the uncompiled kernel, so a stream of odd shapes never
    recompiles without bound. Needs a C++ compiler on CPU and takes some seconds at the first call of a
    kind.
    """

    def __init__(self, max_shapes: int = 8, backend: str | Callable[..., Any] = "inductor") -> None:
        limit = torch._dynamo.config.recompile_limit
        if not 1 <= max_shapes <= limit:
            raise ConfigError(f"max_shapes is {max_shapes!r}; expected 1 to {limit} (torch's own limit of recompiles)")
        self.max_shapes = max_shapes
        self.kinds: set[tuple[Any, ...]] = set()
        # A code object of its own: torch counts recompiles by it, and several of these would share one limit.
        own = FunctionType(_plain_sum.__code__.replace(), _plain_sum.__globals__)
        self._run = torch.compile(own, dynamic=True, backend=backend)

    def __call__(self, levels: Sequence[Tensor], weights: Tensor, lengths: Sequence[int]) -> Tensor:
        check_packed(levels, lengths)
        rows = weight_rows(weights, len(levels), len(lengths))
        first = levels[0]
        kind = (len(levels), first.shape[1], first.dtype, first.device, rows.shape[0] == 1)
        if kind not in self.kinds and len(self.kinds) >= self.max_shapes:
            return weighted_sum(levels, weights, lengths)
        if torch.is_grad_enabled() and (rows.requires_grad or any(level.requires_grad for level in levels)):
            return weighted_sum(levels, weights, lengths)
        self.kinds.add(kind)
        out: Tensor = self._run(list(levels), expand_rows(rows, lengths))
        return out


def _plain_sum(levels: list[Tensor], rows: Tensor) -> Tensor:
    total = levels[0].to(rows.dtype) * rows[:, :1]
    for index, level in enumerate(levels[1:], start=1):
        total = total + level.to(rows.dtype) * rows[:, index : index + 1]
    return total.to(levels[0].dtype)


def weight_rows(weights: Tensor, levels: int, images: int) -> Tensor:
    """`weights` as ``[1, L]`` or ``[n_images, L]``, float32 (or float64); ConfigError if their shape does not fit."""
    rows = weights[None] if weights.ndim == 1 else weights
    if rows.ndim != 2 or rows.shape[1] != levels or rows.shape[0] not in (1, images):
        raise ConfigError(f"weights are {list(weights.shape)}; expected [{levels}] or [{images}, {levels}] (per image)")
    return rows if rows.dtype == torch.float64 else rows.float()


def _accumulate(levels: Sequence[Tensor], rows: Tensor, lengths: Sequence[int]) -> Tensor:
    with torch.no_grad():
        out = torch.empty_like(levels[0])
        if out.device.type != "cpu":
            # Reading the weights back as floats would wait for the device; a kernel launch costs more than
            # cache misses.
            columns = torch.split(expand_rows(rows, lengths).to(_wide(out.dtype)), 1, dim=1)
            _add_block(out, levels, columns, None)
            return out
        scalars: list[list[float]] = rows.tolist()
        step = max(1, _BLOCK // max(1, out.shape[1]))
        stop = 0
        for index, length in enumerate([sum(lengths)] if len(scalars) == 1 else lengths):
            start, stop = stop, stop + length
            for low in range(start, stop, step):
                high = min(low + step, stop)
                buffers = None if _wide(out.dtype) == out.dtype else _buffers(high - low, out.shape[1])
                _add_block(out[low:high], [level[low:high] for level in levels], scalars[index], buffers)
        return out


def _add_block(
    out: Tensor,
    parts: Sequence[Tensor],
    weights: Sequence[float | Tensor],
    buffers: tuple[Tensor, Tensor] | None,
) -> None:
    """out = sum of weights[i] * parts[i]. `buffers` (wide accumulator, wide copy) serve a narrow `out`."""
    if buffers is None and _wide(out.dtype) != out.dtype:
        wide = torch.empty_like(out, dtype=_wide(out.dtype))
        buffers = wide, torch.empty_like(wide)
    total, copy = buffers if buffers is not None else (out, None)
    started = False
    for part, weight in zip(parts, weights, strict=True):
        if isinstance(weight, float) and weight == 0.0:
            continue
        if not started and copy is not None:
            # Scaled in place, so that one buffer less goes through the cache.
            total.copy_(part).mul_(weight)
        elif not started:
            torch.mul(part, weight, out=total)
        elif isinstance(weight, float):
            total.add_(part if copy is None else copy.copy_(part), alpha=weight)
        else:
            total.addcmul_(part if copy is None else copy.copy_(part), weight)
        started = True
    if not started:
        total.zero_()
    if total is not out:
        out.copy_(total)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype in (torch.float32, torch.float64) else torch.float32


def _buffers(rows: int, width: int) -> tuple[Tensor, Tensor]:
    """Two float32 ``[rows, width]`` views of this thread's scratch memory, kept between calls."""
    size = rows * width
    pair: tuple[Tensor, Tensor] | None = getattr(_scratch, "pair", None)
    if pair is None or pair[0].numel() < size:
        # A tensor born in inference mode could not be written to outside of it.
        with torch.inference_mode(False):
            pair = torch.empty(max(size, _BLOCK)), torch.empty(max(size, _BLOCK))
        _scratch.pair = pair
    return pair[0][:size].view(rows, width), pair[1][:size].view(rows, width)


class _WeightedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, lengths: tuple[int, ...], *levels: Tensor) -> Tensor:
        ctx.save_for_backward(rows, *levels)
        ctx.lengths = lengths
        return _accumulate(levels, rows, lengths)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, *levels = ctx.saved_tensors
        wide = grad.to(_wide(grad.dtype))
        grad_rows: Tensor | None = None
        if ctx.needs_input_grad[0]:
            per_patch = torch.stack([(wide * level).sum(1) for level in levels], dim=1)
            segments = [sum(ctx.lengths)] if rows.shape[0] == 1 else list(ctx.lengths)
            grad_rows = torch.stack([part.sum(0) for part in torch.split(per_patch, segments)]).to(rows.dtype)
        spread = expand_rows(rows, ctx.lengths).to(wide.dtype)
        grad_levels = [
            (wide * spread[:, i : i + 1]).to(grad.dtype) if ctx.needs_input_grad[2 + i] else None
            for i in range(len(levels))
        ]
        return grad_rows, None, *grad_levels
