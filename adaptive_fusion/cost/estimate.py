"""A profile estimated from a model's shape alone, until it was measured.

Knows shapes and the guessed rates of a device. Must not know of samples or files.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from adaptive_fusion.cost.model import Profile
from adaptive_fusion.models.base import Adapter

GIB = float(1 << 30)
RATES = {"cuda": (1e14, 1e12), "cpu": (4e10, 1e10)}
"""Guessed operations and bytes per second of a device, until the first requests correct them."""


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The numbers of a vision-language model that its cost follows from; `text_mlp` is the active width
    per token.
    """

    vision_depth: int
    vision_width: int
    vision_mlp: int
    patch_dim: int
    text_layers: int
    text_width: int
    text_mlp: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int


def analytic_profile(
    shape: ModelShape,
    key: Mapping[str, str],
    *,
    dtype_bytes: int = 2,
    flops_per_s: float = 2e13,
    bytes_per_s: float = 4e11,
) -> Profile:
    """An estimate from shapes alone, for use until a profile is measured; the first requests correct its
    scale.

    Encode and prefill are bound by arithmetic (2 operations per weight and token, 4 x width per pair of
    attention, half of that for causal attention), decode by reading the weights and the key-value cache
    (Kaplan et al. 2020, table 1; Pope et al. 2022, section 2). Memory: activations of one layer, the ViT
    levels kept, and the key-value cache.
    """
    s = shape
    per_ms = 1e3 / flops_per_s
    vision = s.vision_depth * (8 * s.vision_width**2 + 4 * s.vision_width * s.vision_mlp)
    vision += 2 * s.patch_dim * s.vision_width
    attention = s.heads * s.head_dim
    weights = s.text_layers * (
        s.text_width * (2 * attention + 2 * s.kv_heads * s.head_dim) + 3 * s.text_width * s.text_mlp
    )
    head = s.text_width * s.vocab
    cache = 2 * s.text_layers * s.kv_heads * s.head_dim * dtype_bytes
    read_ms = 1e3 / bytes_per_s
    return Profile(
        dict(key),
        encode=(
            1.0,
            0.0,
            vision * per_ms,
            4 * s.vision_depth * s.vision_width * per_ms,
            4 * s.vision_width * per_ms,
            4 * s.vision_width * per_ms,
        ),
        prefill=(1.0 + 2 * head * per_ms, 2 * weights * per_ms, 2 * s.text_layers * attention * per_ms),
        decode=((weights + head) * dtype_bytes * read_ms, 2 * (weights + head) * per_ms, cache * read_ms),
        memory=(
            s.vocab * 4 / GIB,
            (4 * s.patch_dim + (8 * s.vision_width + 2 * s.vision_mlp) * dtype_bytes) / GIB,
            0.0,
            (cache + (8 * s.text_width + 3 * s.text_mlp) * dtype_bytes) / GIB,
            s.vision_width * dtype_bytes / GIB,
            0.0,
        ),
    )


def model_shape(adapter: Adapter) -> ModelShape:
    """The numbers that an estimate from shapes alone needs."""
    vision, text = adapter.model.config.vision_config, adapter.model.config.get_text_config()
    patch = int(vision.patch_size) ** 2 * int(getattr(vision, "temporal_patch_size", 1))
    experts = int(getattr(text, "num_experts_per_tok", 0) or 0)
    mlp = int(getattr(text, "moe_intermediate_size", 0) or 0) * experts or int(text.intermediate_size)
    return ModelShape(
        vision_depth=int(getattr(vision, "depth", 0) or vision.num_hidden_layers),
        vision_width=int(vision.hidden_size),
        vision_mlp=int(vision.intermediate_size),
        patch_dim=3 * patch,
        text_layers=int(text.num_hidden_layers),
        text_width=int(text.hidden_size),
        text_mlp=mlp,
        heads=int(text.num_attention_heads),
        kv_heads=int(getattr(text, "num_key_value_heads", None) or text.num_attention_heads),
        head_dim=int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads),
        vocab=int(text.vocab_size),
    )
