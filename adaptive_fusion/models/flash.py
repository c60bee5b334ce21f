"""PyTorch's attention without cuDNN's kernel, for as long as somebody asks for that.

Some versions of PyTorch prefer cuDNN's kernel on some GPUs. It makes a plan for every length that its thread has not
seen, and how many patches are left of an image is hardly ever the same. Without it flash is the first on every GPU, as
far as it takes the inputs.

Knows PyTorch's switches, which are the whole process's. Must not know of models.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_LOCK = threading.Lock()
_inside = 0
_before = True


@contextmanager
def flash_first(device: torch.device) -> Iterator[None]:
    """Inside this context cuDNN's attention is off, whichever threads are in it: the last one out puts it back.

    The order in which PyTorch looks at its kernels is left alone: it is set when the first attention runs, which may be
    inside.
    """
    if device.type != "cuda":
        yield
        return
    _enter()
    try:
        yield
    finally:
        _leave()


def _enter() -> None:
    global _inside, _before
    with _LOCK:
        if not _inside:
            _before = bool(torch.backends.cuda.cudnn_sdp_enabled())  # type: ignore[no-untyped-call]
            torch.backends.cuda.enable_cudnn_sdp(False)
        _inside += 1


def _leave() -> None:
    global _inside
    with _LOCK:
        _inside -= 1
        if not _inside:
            torch.backends.cuda.enable_cudnn_sdp(_before)
