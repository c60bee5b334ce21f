"""Which model an adapter drives, as a `Fingerprint`: class, shapes, a digest of sampled weights, limits of the
processor.

The digest is of a few values, at fixed places of a few parameters, each rounded to bfloat16: float32 and bfloat16 loads
of the same weights have the same one, on every device. A float16 load of float32 weights may have another, because
rounding twice is not rounding once. Adapters of PEFT count as no weights of the model, and neither wrappers nor
``torch.compile`` change it. Where weights are quantised, or wait on disk, there is no digest, and the reason in its
place. Knows configurations and parameters; must not know what follows from a difference.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from adaptive_fusion.checks import is_integer
from adaptive_fusion.models.base import Adapter
from adaptive_fusion.policy.fitted import Fingerprint

PARAMETERS, VALUES = 24, 32
"""How many parameters are sampled, and how many values of each."""
SPREAD = 16
"""Values of each tensor by which a change is noticed."""

_VISION = {
    "depth": ("depth", "num_hidden_layers"),
    "width": ("hidden_size",),
    "heads": ("num_heads", "num_attention_heads"),
    "mlp": ("intermediate_size",),
    "patch": ("patch_size",),
    "merge": ("spatial_merge_size",),
    "temporal": ("temporal_patch_size",),
    "out": ("out_hidden_size",),
    "taps": ("deepstack_visual_indexes",),
    "image": ("image_size",),
}
_TEXT = {
    "depth": ("num_hidden_layers",),
    "width": ("hidden_size",),
    "heads": ("num_attention_heads",),
    "kv_heads": ("num_key_value_heads",),
    "head_dim": ("head_dim",),
    "mlp": ("intermediate_size",),
    "vocab": ("vocab_size",),
    "experts": ("num_experts", "num_local_experts"),
    "active_experts": ("num_experts_per_tok",),
    "expert_mlp": ("moe_intermediate_size",),
}
"""What of a shape a policy may depend on, and under which names families have it. What one lacks is left out."""


def fingerprint(adapter: Adapter) -> Fingerprint:
    """The fingerprint of the model that `adapter` drives, in a few milliseconds; no parameter is copied."""
    config = adapter.model.config
    vision = _numbers(getattr(config, "vision_config", None), _VISION)
    if is_integer(tokens := getattr(config, "mm_tokens_per_image", None)):
        vision["tokens"] = tokens
    text = _numbers(config.get_text_config(), _TEXT)
    digest, unread = _digest(adapter.model)
    return Fingerprint(type(adapter.model).__name__, vision, text, digest, _limits(adapter.processor), unread)


def _numbers(config: Any, names: Mapping[str, tuple[str, ...]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, known in names.items():
        value = next((each for key in known if (each := getattr(config, key, None)) is not None), None)
        if is_integer(value):
            found[name] = value
        elif isinstance(value, list | tuple) and value and all(map(is_integer, value)):
            found[name] = list(value)
    return found


def _limits(processor: Any) -> dict[str, int]:
    """What the image processor does to sizes: least and most pixels, patch and merge, as far as it says so."""
    images = getattr(processor, "image_processor", None)
    size = getattr(images, "size", None)

    def edge(name: str) -> Any:
        return size.get(name) if isinstance(size, Mapping) else getattr(size, name, None)

    low, high = edge("shortest_edge"), edge("longest_edge")
    if is_integer(height := edge("height")) and is_integer(width := edge("width")):
        low = high = height * width
    found = {"min_pixels": low, "max_pixels": high}
    found |= {"patch": getattr(images, "patch_size", None), "merge": getattr(images, "merge_size", None)}
    return {name: value for name, value in found.items() if is_integer(value)}


def _digest(model: Any) -> tuple[str, str]:
    """The digest, or an empty one and the reason."""
    if getattr(model.config, "quantization_config", None) is not None or getattr(model, "is_quantized", False):
        return "", "the weights are quantised"
    parameters = _own_parameters(model)
    plain = (nn.Parameter, Tensor)
    if any(type(each) not in plain or not each.is_floating_point() for each in parameters.values()):
        return "", "weights are quantised, or of a kind that cannot be sampled"
    names = sorted(parameters)
    count = min(PARAMETERS, len(names))
    chosen = [parameters[names[place]] for place in _places(len(names), count)]
    if any(parameter.is_meta for parameter in chosen):
        return "", "weights are offloaded"
    digest = hashlib.sha256()
    try:
        for parameter in chosen:
            digest.update(_sample(parameter))
    except (RuntimeError, NotImplementedError, TypeError) as error:  # a kind of tensor that cannot be indexed
        return "", f"the weights cannot be read ({type(error).__name__})"
    return digest.hexdigest()[:16], ""


def _own_parameters(model: Any) -> dict[str, Tensor]:
    """Parameters by the names that they have without wrappers; those of PEFT's adapters are left out."""
    found = {name.replace("._orig_mod", ""): parameter for name, parameter in model.named_parameters()}
    inner = (".base_layer.", ".original_module.")
    wrapped = tuple({name.partition(mark)[0] + "." for name in found for mark in inner if mark in name})
    own = {}
    for name, parameter in found.items():
        if name.startswith(wrapped) and not any(mark in name for mark in inner):
            continue
        for mark in inner:
            name = name.replace(mark, ".")
        if parameter.numel():
            own[name] = parameter
    return own


def _places(size: int, count: int) -> list[int]:
    """`count` places of `size`, from the first to the last, evenly."""
    return [place * (size - 1) // max(count - 1, 1) for place in range(count)]


@torch.no_grad()
def sampled(tensors: Sequence[Tensor]) -> bytes:
    """`SPREAD` values and a few of each tensor, evenly from the first one on, to notice by that one was changed; of
    what cannot be read nothing."""
    found: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for each in tensors:
        if each.numel() and not each.is_meta:
            try:
                own = each.detach()
                if own.is_contiguous():
                    values = own.view(-1)[:: max(1, own.numel() // SPREAD)]
                else:  # flat it would be a copy
                    values = own[tuple([side // 2 for side in own.shape])].view(1)
            except (RuntimeError, NotImplementedError, TypeError):  # a kind of tensor that cannot be indexed
                continue
            found.setdefault((values.device, values.dtype), []).append(values)
    return b"".join(torch.cat(values).float().cpu().numpy().tobytes() for values in found.values())


@torch.no_grad()
def _sample(parameter: Tensor) -> bytes:
    places = _places(parameter.numel(), min(VALUES, parameter.numel()))
    # By coordinates: flattening would copy what is not contiguous.
    coordinates, rest = [], torch.tensor(places)
    for side in reversed(parameter.shape):
        coordinates.append((rest % side).to(parameter.device))
        rest = rest // side
    values = parameter.detach()[tuple(reversed(coordinates))] if coordinates else parameter.detach()
    rounded = values.to(torch.bfloat16).to("cpu", torch.float32) + 0.0  # so that -0 is 0
    return rounded.numpy().tobytes() + str(math.prod(parameter.shape)).encode()
