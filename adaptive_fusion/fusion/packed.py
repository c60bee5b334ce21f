"""A tap's parameters as its kernels read them: in the levels' dtype, and in the order in which they are multiplied.

Made when they are first asked for and again when a parameter lies elsewhere or torch says that it changed. What writes
to one behind torch's back (``parameter.data.copy_(...)``) is not seen: write to the parameter itself, under
``torch.no_grad()``. A pass that wants gradients forgets all forms. Knows tensors only.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MOST = 64
"""Forms that are kept; beyond that the oldest goes."""


class Packed:
    """The forms of some parameters, each made once."""

    def __init__(self) -> None:
        self._kept: dict[tuple[object, ...], _Form] = {}

    def __call__(
        self, key: tuple[object, ...], parameters: Sequence[Tensor | None], make: Callable[[], Tensor]
    ) -> Tensor:
        """The form `key` of `parameters`, as `make` gives it."""
        whose = (*key, *map(id, parameters))
        stamp = tuple(None if each is None else _stamp(each) for each in parameters)
        known = self._kept.get(whose)
        if known is not None and known.stamp == stamp:
            return known.made
        with torch.no_grad():
            made = make().contiguous()
        given = [each for each in parameters if each is not None]
        if not any(each.is_inference() for each in given):  # else nothing says when they change
            form = _Form(stamp, made, (*given, *(each.detach() for each in given)))
            # Another in its place, for threads that look into the one that was.
            self._kept = dict([*self._kept.items(), (whose, form)][-MOST:])
        return made

    def clear(self) -> None:
        """Forget all: the parameters may be changed in ways that nothing tells, such as a fused optimizer's."""
        self._kept = {}

    def __reduce__(self) -> tuple[type, tuple[()]]:
        """A copy begins empty: it is asked for forms of other parameters."""
        return Packed, ()


@dataclass(frozen=True)
class _Form:
    """A form, and of what: parameters and their memory are held, so that no others come to have their names."""

    stamp: tuple[object, ...]
    made: Tensor
    held: tuple[Tensor, ...]


def _stamp(parameter: Tensor) -> tuple[object, ...]:
    version = None if parameter.is_inference() else parameter._version
    return parameter.data_ptr(), version, tuple(parameter.shape), parameter.stride(), parameter.dtype


def scored(
    down: Tensor | None, vectors: Tensor | None, gate: Tensor | None, tap: int, like: Tensor, levels: int, slots: int
) -> Tensor:
    """``[L, slots, D]``: of each level its adapter's rows, two of its score's vector and, at `tap`, two of the gate's.

    Args:
        down: ``[L, rank, D]``; None leaves these 0, as it does of the others.
        vectors: ``[L, D]``.
        gate: ``[D]``.
        like: A level ``[N, D]``, whose width, dtype and device it has.
    """
    rank, dtype = 0 if down is None else down.shape[1], like.dtype
    rows = like.new_zeros((levels, slots, like.shape[1]))
    if down is not None:
        rows[:, :rank] = down.to(dtype)
    if vectors is not None:
        rows[:, rank : rank + 2] = _halves(vectors, dtype)
    if gate is not None:
        rows[tap, rank + 2 : rank + 4] = _halves(gate, dtype)
    return rows


def spread(down: Tensor, codes: int, dtype: torch.dtype) -> Tensor:
    """``[L, codes, D]`` of an adapter's ``[L, rank, D]``: level i's rows at i * rank, so that the sum over levels of
    the products is all codes side by side."""
    levels, rank, width = down.shape
    rows = down.new_zeros((levels, codes, width), dtype=dtype)
    for i in range(levels):
        rows[i, i * rank : (i + 1) * rank] = down[i].to(dtype)
    return rows


def back(up: Tensor, dtype: torch.dtype) -> Tensor:
    """``[L * rank, D]`` of an adapter's ``[L, D, rank]``: one row a code."""
    return up.to(dtype).transpose(1, 2).flatten(0, 1)


def _halves(vector: Tensor, dtype: torch.dtype) -> Tensor:
    """``[..., 2, D]``: the vector in `dtype`, and what that leaves of it, so that both together are as good as the
    vector itself."""
    high = vector.to(dtype)
    return torch.stack([high, (vector - high.to(vector.dtype)).to(dtype)], dim=-2)
