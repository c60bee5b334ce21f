"""What an encoder's output depends on, as keys: equal keys mean equal outputs.

A key is a SHA-256 over length-prefixed fields: whose medium it is, its exact content, the size and the frames that the
point makes of it, the encoder and the processor as they are now, and of taps what fuses them. The encoder counts with
its weights, the adapters of PEFT on it, its dtype, device and attention backend. Knows adapters and modules; must not
know what is kept under a key.
"""

import json
import weakref
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from adaptive_fusion.media.clips import Video
from adaptive_fusion.media.hashes import length_prefixed
from adaptive_fusion.models.base import Adapter, size_of
from adaptive_fusion.models.chat_template import media_parts
from adaptive_fusion.models.fingerprint import fingerprint, sampled
from adaptive_fusion.models.reuse import Keys, Seen, Store
from adaptive_fusion.point import NATIVE, OperatingPoint

VERSION = "1"
_TOLD_OTHERWISE = frozenset({"max_pixels", "max_fps", "downsample", "fusion", "layers", "adapter_rank"})
"""Knobs that count by what they make of a medium or of its taps, or act on what is kept; others by their value."""
_OF_ADAPTERS = ("active_adapters", "disable_adapters", "merged_adapters", "scaling")
"""State of PEFT's layers that changes what they compute without changing a tensor."""


class EncoderKeys:
    """Keys for one adapter's media.

    Args:
        adapter: The way to the model.
    """

    def __init__(self, adapter: Adapter) -> None:
        self._adapter = adapter
        self._known: weakref.WeakKeyDictionary[nn.Module, tuple[str, str]] = weakref.WeakKeyDictionary()

    def seen(
        self, store: Store, messages: Sequence[Mapping[str, Any]], digests: Sequence[str], tenant: str
    ) -> Seen | None:
        """Which media of `messages`, whose exact hashes are `digests`, are in a `store`, as the model is now; None
        where the outputs of one cannot be kept.

        Args:
            tenant: Whose media they are; another's are never found.
        """
        parts = media_parts(messages)
        if any(self._adapter.encoded_sides(size_of(part), NATIVE) is None for part in parts):
            return None
        found = partial(self._keys, parts, digests, tenant, self._encoder(), {})
        return Seen(store, [part["type"] for part in parts], found)

    def _keys(
        self,
        parts: Sequence[Mapping[str, Any]],
        digests: Sequence[str],
        tenant: str,
        encoder: str,
        made: dict[tuple[Any, ...], list[Keys]],
        point: OperatingPoint,
    ) -> list[Keys]:
        """Keys of each medium at a point, of which those are `made` that were asked for before."""
        computed = self._adapter.computed(point)
        same = tuple(getattr(computed, name) for name in computed.knobs() if name != "downsample")
        if same not in made:
            fusion, keys = self._fusion(computed), list[Keys]()
            others = repr([(name, getattr(computed, name)) for name in computed.knobs() if name not in _TOLD_OTHERWISE])
            for part, digest in zip(parts, digests, strict=True):
                merged = length_prefixed(VERSION, encoder, tenant, digest, others, *self._planned(part, computed))
                taps = length_prefixed("taps", merged, fusion) if fusion else None
                keys.append(Keys(merged, taps))
            made[same] = keys
        return made[same]

    def _planned(self, part: Mapping[str, Any], point: OperatingPoint) -> tuple[str, ...]:
        """What the point, and the caller, make of a medium before the encoder sees it."""
        times: tuple[float, ...] = ()
        if isinstance(medium := part[part["type"]], Video):
            medium = medium.at_most(point.max_fps)
            times = medium.timestamps_s
        size = size_of({**part, part["type"]: medium})
        sides = self._adapter.encoded_sides(size, point)
        return part["type"], repr(sides), repr(size.resized is not None), repr(times)

    def _fusion(self, point: OperatingPoint) -> str:
        """What makes the taps at a point; empty where there are none."""
        if not self._adapter.taps or point.fusion == "top":
            return ""
        module = self._adapter.fusion(point)
        if module is None:
            return "native"
        return length_prefixed(repr(module.spec), self._digest(module, _content))

    def _encoder(self) -> str:
        """The encoder and the processor as they are now."""
        adapter = self._adapter
        settings = [
            getattr(adapter.processor, name).to_dict() if hasattr(adapter.processor, name) else None
            for name in ("image_processor", "video_processor")
        ]
        config = getattr(adapter.model.config, "vision_config", adapter.model.config)
        around = (
            type(adapter.model).__name__,
            str(adapter.dtype),
            str(adapter.device),
            getattr(config, "_attn_implementation", None),
            torch.get_float32_matmul_precision(),
            torch.is_autocast_enabled(adapter.device.type) and torch.get_autocast_dtype(adapter.device.type),
            adapter.model.training,
        )
        modules = [self._digest(module, lambda _: fingerprint(adapter).digest) for module in adapter.encoder]
        return length_prefixed(repr(around), json.dumps(settings, sort_keys=True, default=repr), *modules)

    def _digest(self, module: nn.Module, content: Any) -> str:
        """A module's state, and its `content`, which is only read again if the state is another."""
        state = _state(module)
        known = self._known.get(module)
        if known is None or known[0] != state:
            known = self._known[module] = state, content(module)
        return length_prefixed(*known)


def _state(module: nn.Module) -> str:
    """What tells that a module computes something else than before: its tensors, where they lie and how often they
    were written to, some values of each, and what PEFT's layers are told.

    Writing through ``.data`` is not counted by torch: it is noticed by the values, unless it spares all that are looked
    at."""
    tensors, told = list[Tensor](), list[Any]()
    for each in module.modules():
        tensors += _own_tensors(each)
        kind: Any = type(each)
        if _is_adapted(kind):
            told += [(name, repr(getattr(each, name, None))) for name in _OF_ADAPTERS]
    where = [(t.data_ptr(), _version(t), t.dtype, t.device, t.shape) for t in tensors]
    return length_prefixed(repr(where), repr(told), sampled(tensors))


def _version(tensor: Tensor) -> int:
    """How often a tensor was written to; 0 where torch does not count, as for one made in inference mode."""
    return 0 if tensor.is_inference() else tensor._version


def _own_tensors(module: nn.Module) -> Iterator[Tensor]:
    """The tensors that a module itself holds, also such as it shares with another and has as plain attributes."""
    plain = (value for value in vars(module).values() if isinstance(value, Tensor))
    held = (t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None)
    return chain(held, plain)


@cache
def _is_adapted(kind: type) -> bool:
    """Whether a class of layers is PEFT's."""
    return any(each.__module__.partition(".")[0] == "peft" for each in kind.__mro__)


def _content(module: nn.Module) -> str:
    """Every value of a small module."""
    tensors = (tensor for each in module.modules() for tensor in _own_tensors(each))
    return length_prefixed(*(t.detach().to("cpu", torch.float32).contiguous().numpy().tobytes() for t in tensors))
