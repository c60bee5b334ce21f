"""The model inside its wrappers: the module that holds the vision encoder, the device it computes on, what is refused.

Knows the wrappers of PEFT, torch and accelerate by their public attributes, imports none of their packages, and must
not know of operating points.
"""

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from adaptive_fusion.errors import UnsupportedModelError

_SPLITTERS = frozenset({"DataParallel", "DistributedDataParallel", "FullyShardedDataParallel", "DeepSpeedEngine"})
"""Wrappers that spread a call over processes or devices, each of which would see placeholders of another's media."""

_OUTSIDE = frozenset({"XLORA"})
"""Kinds of adapter that live in PEFT's own forward, which encoding an image does not go through."""

# A model keeps M-RoPE state between prefill and decode, so two generations on one model must not interleave,
# whichever runner they come from.
_LOCKS: "weakref.WeakKeyDictionary[nn.Module, threading.RLock]" = weakref.WeakKeyDictionary()

# The compiler's stance holds for the whole process, so two threads must not change it in turns.
_STANCE = threading.RLock()


def unwrap(model: Any) -> nn.Module:
    """The transformers model inside PEFT's and ``torch.compile``'s wrappers: the same object for all of them.

    Raises:
        UnsupportedModelError: For a wrapper whose calls cannot be followed, by name.
    """
    while True:
        if _SPLITTERS & {kind.__name__ for kind in type(model).__mro__}:
            raise UnsupportedModelError(
                f"model is a {type(model).__name__}, which splits a call between devices or processes; "
                "expected the model in it, its .module"
            )
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif _is_peft(model):
            _refuse_outside(model)
            model = model.base_model.model
        else:
            found: nn.Module = model
            return found


def lock_of(model: Any) -> threading.RLock:
    """The one lock of a model, whatever it is wrapped in."""
    return _LOCKS.setdefault(unwrap(model), threading.RLock())


def called(module: Any) -> Any:
    """The submodule whose forward runs when `module` is called: inside ``torch.compile`` and PEFT's
    ``modules_to_save``, where it depends on the adapter in use."""
    while True:
        if hasattr(module, "_orig_mod"):
            module = module._orig_mod
        elif hasattr(module, "original_module") and hasattr(module, "modules_to_save"):
            copies, active = module.modules_to_save, module.active_adapters
            in_use = bool(active) and not module.disable_adapters and all(name in copies for name in active)
            module = copies[active[0]] if in_use else module.original_module
        else:
            return module


def execution_device(model: Any) -> torch.device:
    """Where `model` computes. The weights that accelerate has offloaded lie on ``meta``; its hooks know the device."""
    device = torch.device(model.device)
    if device.type != "meta":
        return device
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        for each in getattr(hook, "hooks", (hook,)):
            found = getattr(each, "execution_device", None)
            if found is not None and torch.device(found).type != "meta":
                return torch.device(found)
    return device


@contextmanager
def uncompiled(*modules: Any) -> Iterator[None]:
    """Inside this context compiled code of these modules runs as it is written. Hooks come and go with every request:
    compiled code would be compiled anew for each, seconds every time, or would keep those that it was compiled with."""
    if not any(_is_compiled(module) for module in modules):
        yield
        return
    with _STANCE, torch.compiler.set_stance("force_eager"):
        yield


def _is_compiled(module: Any) -> bool:
    return (
        hasattr(module, "_orig_mod")
        or getattr(module, "_compiled_call_impl", None) is not None
        or hasattr(getattr(module, "forward", None), "_torchdynamo_orig_callable")
    )


def _is_peft(model: Any) -> bool:
    # A transformers model has a `base_model` too; only PEFT's wrappers have an adapter's configuration beside it.
    return hasattr(model, "peft_config") and any(
        kind.__module__.partition(".")[0] == "peft" for kind in type(model).__mro__
    )


def _refuse_outside(model: Any) -> None:
    for name, config in model.peft_config.items():
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        if getattr(config, "is_prompt_learning", False) or kind in _OUTSIDE:
            raise UnsupportedModelError(
                f"the PEFT adapter {name!r} is {kind}, which is not in the model's layers; "
                "expected adapters that are, such as LORA, or the model merged with it"
            )
