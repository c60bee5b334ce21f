"""The face of a model: a runner is used where the model was, and stays a runner.

Attributes that a runner lacks are those of the model, to read, to set and to delete; methods with which a module gives
itself back give the runner back. Knows a model and an adapter that follows it. Must not know of requests, policies or
budgets.
"""

import threading
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, NoReturn, Self

import torch

from adaptive_fusion.errors import ConfigError, NotCopyableError
from adaptive_fusion.models import Adapter

_FIXED = frozenset({"chosen", "model", "policy", "processor"})
"""Attributes that much else was made from, so that setting them anew would take no effect, or half of one."""


class ModelFace(ABC):
    """What `AdaptiveRunner` is as a model. Subclasses set `model` last: from then on the names are told apart."""

    model: Any
    adapter: Adapter
    _lock: threading.RLock
    """The model's: held by whoever runs or changes it."""
    _where: tuple[torch.device, torch.dtype]
    """Where the model was, and its dtype, when the runner last looked."""

    if TYPE_CHECKING:
        # The model's, named here because nearly every caller of `generate` reads them. What is not declared is found at
        # run time all the same; type checkers are to call it a mistake, so `__getattr__` is hidden from them.
        config: Any
        generation_config: Any

    else:

        def __getattr__(self, name: str) -> Any:
            # Only reached for names that the runner does not have; "model" is missing until it was set.
            model = vars(self).get("model")
            if model is None:
                raise AttributeError(f"{type(self).__name__} has no attribute {name!r} yet")
            try:
                return getattr(model, name)
            except AttributeError as error:
                if hasattr(type(model), name):
                    raise
                both = f"{type(self).__name__} and the {type(model).__name__} in it have"
                raise AttributeError(f"{both} no attribute {name!r}", name=name, obj=self) from error

        def __setattr__(self, name: str, value: Any) -> None:
            if self._is_own(name):
                if name in _FIXED and "model" in vars(self) and value is not vars(self).get(name):
                    raise ConfigError(f"{name} cannot be changed; expected a new {type(self).__name__} with it")
                object.__setattr__(self, name, value)
            else:
                setattr(self.model, name, value)

        def __delattr__(self, name: str) -> None:
            if self._is_own(name):
                object.__delattr__(self, name)
            else:
                delattr(self.model, name)

        @property
        def __class__(self) -> type:
            # What transformers and others ask of a model is its class: `pipeline` by name, many by isinstance. type()
            # still gives the runner's, and isinstance is true of both.
            adapter = vars(self).get("adapter")
            return type(self) if adapter is None else type(adapter.model)

    def _is_own(self, name: str) -> bool:
        own = vars(self)
        return "model" not in own or name in own or hasattr(type(self), name) or not hasattr(own["model"], name)

    def __dir__(self) -> list[str]:
        return sorted({*dir(type(self)), *vars(self), *dir(vars(self).get("model"))})

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward, untouched."""
        with self._lock:
            return self.model(*args, **kwargs)

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise NotCopyableError(
            f"{type(self).__name__} can be neither pickled nor copied, as it holds a lock and what it has learned; "
            "expected one per process, loaded there, and for another policy the same model wrapped again"
        )

    @property
    def device(self) -> torch.device:
        """Where the model computes, and where its inputs belong; of an offloaded model not where its weights wait."""
        return self.adapter.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the model's weights."""
        return self.adapter.dtype

    def _follow(self) -> None:
        """Look whether the model has been moved or cast, by whomever, and go by what it is now."""
        where = self.device, self.dtype
        if where != self._where:
            with self._lock:
                self._where = where
                self.adapter.follow()
                self._moved()

    @abstractmethod
    def _moved(self) -> None:
        """Renew what was made for the device and the dtype that the model had."""

    def _described(self, *facts: str) -> str:
        """A `repr` of one line: the model, how it is driven, and these `facts`."""
        model = f"{type(self.adapter.model).__name__} in {str(self.dtype).removeprefix('torch.')} on {self.device}"
        return f"{type(self).__name__}({', '.join((model, type(self.adapter).__name__, *facts))})"

    # Methods with which a module gives itself back. The model is changed and the runner follows.

    def _changed(self, method: str, *args: Any, **kwargs: Any) -> Self:
        with self._lock:
            getattr(self.model, method)(*args, **kwargs)
        return self

    def apply(self, *args: Any, **kwargs: Any) -> Self:
        """See ``nn.Module.apply``."""
        return self._changed("apply", *args, **kwargs)

    def bfloat16(self, *args: Any, **kwargs: Any) -> Self:
        """See ``nn.Module.bfloat16``."""
        return self._changed("bfloat16", *args, **kwargs)

    def cpu(self, *args: Any, **kwargs: Any) -> Self:
        """See ``nn.Module.cpu``."""
        return self._changed("cpu", *args, **kwargs)

    def cuda(self, *args: Any, **kwargs: Any) -> Self:
        """See ``nn.Module.cuda``."""
        return self._changed("cuda", *args, **kwargs)

    def double(self, *args: Any, **kwargs: Any) -> Self:
        """See ``nn.Module.double``."""
        return self._changed("double", *args, **kwargs)

    def eval(self, *args: Any, **kwargs: Any) -> Self:
        """See ``nn.Module.eval``."""
        return self._changed("eval", *args, **kwargs)

    def float(self, *args: Any, **kwargs: Any) -> Self:
        """See ``nn.Module.float``."""
        return self._changed("float", *args, **kwargs)

    def half(self, *args: Any, **kwargs: Any) -> Self:
        """See ``nn.Module.half``."""
        return self._changed("half", *args, **kwargs)

    def ipu(self, *args: Any, **kwargs: Any) -> Self:
        """See ``nn.Module.ipu``."""
        return self._changed("ipu", *args, **kwargs)

    def mtia(self, *args: Any, **kwargs: Any) -> Self:
        """See ``nn.Module.mtia``."""
        return self._changed("mtia", *args, **kwargs)

    def requires_grad_(self, *args: Any, **kwargs: Any) -> Self:
        """See ``nn.Module.requires_grad_``."""
        return self._changed("requires_grad_", *args, **kwargs)

    def share_memory(self, *args: Any, **kwargs: Any) -> Self:
        """See ``nn.Module.share_memory``."""
        return self._changed("share_memory", *args, **kwargs)

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """See ``nn.Module.to``."""
        return self._changed("to", *args, **kwargs)

    def to_empty(self, *args: Any, **kwargs: Any) -> Self:
        """See ``nn.Module.to_empty``."""
        return self._changed("to_empty", *args, **kwargs)

    def train(self, *args: Any, **kwargs: Any) -> Self:
        """See ``nn.Module.train``."""
        return self._changed("train", *args, **kwargs)

    def type(self, *args: Any, **kwargs: Any) -> Self:
        """See ``nn.Module.type``."""
        return self._changed("type", *args, **kwargs)

    def xpu(self, *args: Any, **kwargs: Any) -> Self:
        """See ``nn.Module.xpu``."""
        return self._changed("xpu", *args, **kwargs)
