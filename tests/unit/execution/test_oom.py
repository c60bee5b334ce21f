import contextlib
import gc
import tracemalloc
import weakref
from collections.abc import Callable

import pytest
import torch

from adaptive_fusion.errors import AdaptiveFusionError, ConfigError, OutOfMemoryError
from adaptive_fusion.execution.oom import is_out_of_memory, run_with_step_down
from adaptive_fusion.point import NATIVE, OperatingPoint

LADDER = [NATIVE, OperatingPoint(downsample=0.5), OperatingPoint(downsample=0.25)]


def chained(cause: BaseException) -> BaseException:
    error = RuntimeError("generation failed")
    error.__cause__ = cause
    return error


OUT = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of ..."),
    torch.OutOfMemoryError("HIP out of memory. Tried to allocate 20.00 MiB"),
    torch.OutOfMemoryError("XPU out of memory. Tried to allocate 1.00 GiB"),
    RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    RuntimeError("CUDA driver error: out of memory"),
    RuntimeError("HIP error: hipErrorOutOfMemory: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    RuntimeError("level_zero backend failed with error: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)"),
    RuntimeError("Native API returns: -5 (PI_ERROR_OUT_OF_RESOURCES)"),
    RuntimeError('NVML_SUCCESS == r INTERNAL ASSERT FAILED at "../c10/cuda/CUDACachingAllocator.cpp":1131'),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried "
        "to allocate 4398046511104 bytes. Error code 12 (Cannot allocate memory)"
    ),
    RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB)"),
    MemoryError(),
    OSError(12, "Cannot allocate memory"),
    chained(MemoryError("inner")),
]
NOT = [
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("CUDA error: device-side assert triggered"),
    RuntimeError("an illegal memory access was encountered; the device may be out of memory"),
    RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"),
    RuntimeError("CUDA error: misaligned address"),
    ValueError("image is out of memory lane"),
    KeyError("out of memory"),
    KeyboardInterrupt(),
    None,
]


@pytest.mark.parametrize("error", OUT, ids=lambda e: str(e)[:40])
def test_out_of_memory_is_recognised_in_every_dress(error: BaseException) -> None:
    assert is_out_of_memory(error)


@pytest.mark.parametrize("error", NOT, ids=lambda e: str(e)[:40])
def test_other_failures_are_not_taken_for_it(error: BaseException | None) -> None:
    assert not is_out_of_memory(error)


def test_the_real_cpu_allocator_is_recognised() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


def stages(point: OperatingPoint, alive: list["weakref.ref[torch.Tensor]"], depth: int) -> None:
    """Allocate at each stage, keep the tensors in the frames' locals, fail in the innermost one."""
    mine = torch.ones(64)
    alive.append(weakref.ref(mine))
    if depth:
        try:
            stages(point, alive, depth - 1)
        except RuntimeError as error:
            also = mine + 1
            alive.append(weakref.ref(also))
            raise torch.OutOfMemoryError("CUDA out of memory, wrapped") from error
    raise torch.OutOfMemoryError("CUDA out of memory.")


def test_the_failed_trys_tensors_are_dead_before_the_retry() -> None:
    alive: list[weakref.ref[torch.Tensor]] = []
    seen: list[tuple[OperatingPoint, int]] = []
    reported: list[tuple[OperatingPoint, str]] = []
    gc.disable()  # must not need the collector: nothing may be left in a cycle
    try:

        def attempt(point: OperatingPoint) -> str:
            seen.append((point, sum(ref() is not None for ref in alive)))
            if point != LADDER[-1]:
                stages(point, alive, 3)
            return point.name

        answer = run_with_step_down(attempt, LADDER, on_oom=lambda p, text: reported.append((p, text)))
    finally:
        gc.enable()
    assert answer == LADDER[-1].name
    assert seen == [(point, 0) for point in LADDER] and len(alive) >= 8
    assert reported == [(point, "CUDA out of memory, wrapped") for point in LADDER[:2]]


def test_release_runs_after_the_tensors_died_and_before_the_retry() -> None:
    order: list[str] = []
    alive: list[weakref.ref[torch.Tensor]] = []

    def attempt(point: OperatingPoint) -> None:
        order.append("try")
        stages(point, alive, 1)

    with pytest.raises(OutOfMemoryError) as caught:
        run_with_step_down(
            attempt,
            LADDER,
            release=lambda: order.append("release" if all(r() is None for r in alive) else "leak"),
        )
    assert order == ["try", "release"] * 3
    assert isinstance(caught.value, AdaptiveFusionError) and isinstance(caught.value, MemoryError)
    assert caught.value.__cause__ is None and is_out_of_memory(caught.value)
    assert all(point.name in str(caught.value) for point in LADDER)


def test_three_tries_reach_the_last_point_of_a_long_ladder() -> None:
    ladder = [OperatingPoint(max_pixels=(9 - i) * 10_000) for i in range(9)]
    tried: list[OperatingPoint] = []

    def attempt(point: OperatingPoint) -> None:
        tried.append(point)
        raise MemoryError

    with pytest.raises(OutOfMemoryError):
        run_with_step_down(attempt, ladder)
    assert tried == [ladder[0], ladder[4], ladder[8]]
    tried.clear()
    with pytest.raises(OutOfMemoryError):
        run_with_step_down(attempt, ladder[:1])
    assert tried == ladder[:1]
    with pytest.raises(ConfigError, match="0 points"):
        run_with_step_down(attempt, [])


@pytest.mark.parametrize("error", [e for e in NOT if isinstance(e, Exception)], ids=lambda e: str(e)[:30])
def test_other_errors_pass_through_at_once(error: Exception) -> None:
    tries: list[OperatingPoint] = []

    def attempt(point: OperatingPoint) -> None:
        tries.append(point)
        raise error

    with pytest.raises(type(error)) as caught:
        run_with_step_down(attempt, LADDER)
    assert caught.value is error and len(tries) == 1 and caught.value.__traceback__ is not None


def test_a_thousand_in_a_row_leave_nothing_behind() -> None:
    def recovers(point: OperatingPoint) -> int:
        block = bytearray(200_000)
        if point != LADDER[-1]:
            raise torch.OutOfMemoryError(f"CUDA out of memory at {len(block)}")
        return len(block)

    def fails(point: OperatingPoint) -> int:
        block = bytearray(200_000)
        raise RuntimeError(f"CUDA error: out of memory {len(block)}")

    def round_trip(attempt: Callable[[OperatingPoint], int]) -> None:
        with contextlib.suppress(OutOfMemoryError):
            run_with_step_down(attempt, LADDER)

    tracemalloc.start()
    try:
        for attempt in (recovers, fails):
            for _ in range(20):
                round_trip(attempt)
        gc.disable()
        before, _ = tracemalloc.get_traced_memory()
        for _ in range(500):
            round_trip(recovers)
            round_trip(fails)
        after, _ = tracemalloc.get_traced_memory()
    finally:
        gc.enable()
        tracemalloc.stop()
    assert after - before < 64_000  # one kept block of a failed try would be 200,000
