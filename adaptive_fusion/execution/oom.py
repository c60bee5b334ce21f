"""Out of memory: telling it from other failures, and trying again lower down.

Knows exceptions, their texts and operating points. Knows nothing of models; imports no framework. Recovery
happens outside the ``except`` block, because a live exception keeps the frames, and with them the tensors,
of the failed try (PyTorch FAQ, "My out of memory exception handler can't allocate memory").
"""

import traceback
from collections.abc import Callable, Sequence
from typing import TypeVar

from adaptive_fusion.errors import AdaptiveFusionError, ConfigError, OutOfMemoryError
from adaptive_fusion.point import OperatingPoint

T = TypeVar("T")

_TYPES = frozenset({"OutOfMemoryError", "ResourceExhaustedError"})
_SAYS = (
    "out of memory",
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "failed to allocate",
    "alloc_failed",
    "allocation_failed",
    "error_out_of_device_memory",
    "error_out_of_host_memory",
    "out_of_resources",
    "nvml_success == r internal assert failed",
    "memoryallocation",
)
_NEVER = ("illegal memory access", "device-side assert", "misaligned address", "illegal address")
_DEPTH = 8


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an exception, or one it was raised from, says that memory ran out.

    Known by type: MemoryError and every framework's OutOfMemoryError (torch's CUDA, HIP and XPU ones).
    Known by text: the CUDA, HIP and Level Zero drivers, cuBLAS, cuDNN and MIOpen allocation failures, the
    NVML assert that MIG devices raise in place of an out-of-memory error, and the CPU allocator's plain
    RuntimeError. Illegal memory accesses and device-side asserts are never taken for it: they leave the
    device unusable and must not be retried.
    """
    for _ in range(_DEPTH):
        if error is None:
            return False
        text = " ".join(str(argument) for argument in error.args)[:20_000].lower()
        if any(words in text for words in _NEVER):
            return False
        if isinstance(error, MemoryError) or type(error).__name__ in _TYPES:
            return True
        if isinstance(error, RuntimeError | OSError) and any(words in text for words in _SAYS):
            return True
        error = error.__cause__
    return False


def of_one_item(error: Exception) -> AdaptiveFusionError:
    """`error` as one of the library's, if it concerns only the item at hand: such an error itself, or out of memory.

    Whoever goes through many items reports it and goes on with the next.

    Raises:
        `error` itself, if it is neither: a fault of the program, which the next item would meet too.
    """
    if isinstance(error, AdaptiveFusionError):
        return error
    if is_out_of_memory(error):
        said = (str(error).splitlines() or [type(error).__name__])[0][:200]
        return OutOfMemoryError(f"out of memory: {said or type(error).__name__}")
    raise error


def run_with_step_down(
    attempt: Callable[[OperatingPoint], T],
    ladder: Sequence[OperatingPoint],
    *,
    attempts: int = 3,
    on_oom: Callable[[OperatingPoint, str], None] | None = None,
    release: Callable[[], None] | None = None,
) -> T:
    """Run `attempt` at the first point of the ladder, and lower down each time memory runs out.

    The tries are spread over the ladder so that the last one is its last point. Before each retry the
    failed try's traceback, frames and locals are gone, so its tensors are dead unless something else holds
    them.

    Args:
        attempt: Runs one operating point; must be safe to repeat.
        ladder: The planned point, then points that need less and less memory.
        attempts: Most tries, at least 1.
        on_oom: Called after each failed try with the point and the first line of the error's text.
        release: Called before each retry, and after the last failure: give cached memory back here.

    Raises:
        OutOfMemoryError: If every try ran out of memory.
        ConfigError: If the ladder is empty or `attempts` is below 1.

    Any other exception of `attempt` passes through untouched.
    """
    if not ladder or attempts < 1:
        raise ConfigError(
            f"ladder has {len(ladder)} points and attempts is {attempts!r}; expected at least one of each"
        )
    tries = min(attempts, len(ladder))
    spread = [round(i * (len(ladder) - 1) / max(tries - 1, 1)) for i in range(tries)]
    for index in spread:
        point = ladder[index]
        failed: BaseException | None = None
        try:
            return attempt(point)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            failed = error
        said = (str(failed).splitlines() or [type(failed).__name__])[0][:200]
        _forget(failed)
        failed = None
        if release is not None:
            release()
        if on_oom is not None:
            on_oom(point, said)
    tried = ", ".join(ladder[index].name for index in spread)
    raise OutOfMemoryError(f"out of memory at every operating point tried: {tried}") from None


def _forget(error: BaseException) -> None:
    """Cut an exception chain loose from the frames it went through."""
    pending: list[BaseException | None] = [error]
    for _ in range(4 * _DEPTH):
        if not pending:
            return
        each = pending.pop()
        if each is None:
            continue
        pending += [each.__cause__, each.__context__]
        traceback.clear_frames(each.__traceback__)
        each.__traceback__ = each.__cause__ = each.__context__ = None
