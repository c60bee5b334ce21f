"""A runner whose requests run out of memory at a stage in turn, with their tensors alive, at every step down."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import torch
from PIL import Image

from adaptive_fusion.errors import OutOfMemoryError
from adaptive_fusion.point import NATIVE, OperatingPoint
from adaptive_fusion.runner import AdaptiveRunner


@contextmanager
def starving(runner: AdaptiveRunner, image: Image.Image) -> Iterator[Callable[[int], None]]:
    """Gives a function that asks until so many tries more have failed; the runner is itself again at the end."""
    adapter = runner.adapter
    prepared = adapter.prepare([{"role": "user", "content": [{"type": "image", "image": image}]}], NATIVE)
    with torch.no_grad():
        ready = adapter.encode(prepared, NATIVE)
    failed = [0]

    def out_of_memory(stage: str) -> None:
        failed[0] += 1
        raise torch.OutOfMemoryError(f"CUDA out of memory in {stage}. Tried to allocate 2.00 GiB")

    def failing_encode(inputs: Any, point: OperatingPoint) -> Any:
        block = torch.ones(1 << 18)  # 1 MiB that the failed try holds
        if failed[0] % 10:
            out_of_memory(f"encode of {len(inputs)} inputs, holding {block.nbytes}")
        return replace(ready, inputs=dict(ready.inputs))

    def fail(count: int) -> None:
        last = failed[0] + count
        for _ in range(count):  # each request fails at least once
            if failed[0] < last:
                with suppress(OutOfMemoryError):
                    runner.chat(image, "?", max_new_tokens=2)
        assert failed[0] >= last

    adapter.prepare, adapter.encode = lambda *_: dict(prepared), failing_encode  # type: ignore[method-assign]
    handle = adapter.model.register_forward_pre_hook(lambda *_: out_of_memory("prefill"))
    try:
        yield fail
    finally:
        handle.remove()
        del adapter.prepare, adapter.encode
