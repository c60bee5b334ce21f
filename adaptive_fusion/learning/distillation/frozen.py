"""A model whose parameters stay what they are while something attached to it trains. Knows modules and tensors only."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from adaptive_fusion.errors import AdaptiveFusionError


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Inside this context no parameter of `model` takes gradient; afterwards all flags are what they were.

    Raises:
        AdaptiveFusionError: If a parameter or buffer was written to all the same.
    """
    flags = [(p, p.requires_grad) for p in model.parameters()]
    training = model.training
    before = _versions(model)
    model.requires_grad_(False).eval()
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        model.train(training)
    if changed := sorted(name for name, mark in _versions(model).items() if before.get(name) != mark):
        raise AdaptiveFusionError(f"{changed} of the frozen model changed; expected only fusion parameters to train")


def _versions(model: nn.Module) -> dict[str, tuple[int, int]]:
    # Every write to a tensor counts up its version; comparing values would cost as much memory as the model.
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: (tensor.data_ptr(), tensor._version) for name, tensor in named}
