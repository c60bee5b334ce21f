"""A profile estimated from a model's shape alone, until it was measured.

Knows shapes and the guessed rates of a device. Must not know of samples or files.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from adaptive_fusion.cost.model import Profile
from adaptive_fusion.models.base import Adapter

GIB = float(1 << 30)
SHARE_OF_PEAK = 0.3
"""What transformers' eager code reaches of a GPU's peak, of arithmetic and of memory: on an H200 encoder and prefill
of the 4B shape take a quarter to a third of it at four megapixels."""
_PER_CLOCK = {7: 1024, 8: 2048, 9: 4096, 10: 8192, 12: 1024}
"""Dense half-precision operations of a multiprocessor in one clock, by compute capability (NVIDIA's whitepapers); 8.6
and 8.9 do half of 8.0."""


@dataclass(frozen=True, slots=True)
class Rates:
    """What a device is taken to do until the first requests correct it.

    Attributes:
        flops_per_s: Operations.
        bytes_per_s: Of memory.
        launch_ms: Of one layer's kernels by the host, below which a layer takes no less; 0 where nothing is launched.
    """

    flops_per_s: float
    bytes_per_s: float
    launch_ms: float = 0.0


CPU, GPU = Rates(4e10, 1e10), Rates(1e14, 1e12, 0.75)
"""A processor of few cores, and a GPU of which nothing is known. A layer takes .75 ms to launch by eager code on a fast
host; 1.0 to 1.6 were measured in a virtual machine."""


def device_rates(device: str) -> Rates:
    """Of a device as torch names it: of a CUDA device that is here by its own clocks."""
    if not device.startswith("cuda"):
        return CPU
    import torch

    if not torch.cuda.is_available():
        return GPU
    about = torch.cuda.get_device_properties(device)
    per_clock = _PER_CLOCK.get(about.major, 2048) // (2 if about.major == 8 and about.minor >= 6 else 1)
    # Clocks in kHz; memory transfers twice a clock over a bus that is given in bits.
    flops = about.multi_processor_count * per_clock * getattr(about, "clock_rate", 0) * 1e3
    moved = getattr(about, "memory_bus_width", 0) / 8 * 2 * getattr(about, "memory_clock_rate", 0) * 1e3
    return Rates(SHARE_OF_PEAK * flops or GPU.flops_per_s, SHARE_OF_PEAK * moved or GPU.bytes_per_s, GPU.launch_ms)


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
    rates: Rates = GPU,
) -> Profile:
    """An estimate from shapes alone, for use until a profile is measured; the first requests correct its
    scale.

    Encode and prefill are bound by arithmetic (2 operations per weight and token, 4 x width per pair of
    attention, half of that for causal attention), decode by reading the weights and the key-value cache
    (Kaplan et al. 2020, table 1; Pope et al. 2022, section 2). Memory: of the encoder activations of one block and the
    levels kept; of the language model those of one layer and the key-value cache. No layer takes less than launching
    it.
    """
    s = shape
    per_ms = 1e3 / rates.flops_per_s
    vision = s.vision_depth * (8 * s.vision_width**2 + 4 * s.vision_width * s.vision_mlp)
    vision += 2 * s.patch_dim * s.vision_width
    attention = s.heads * s.head_dim
    weights = s.text_layers * (
        s.text_width * (2 * attention + 2 * s.kv_heads * s.head_dim) + 3 * s.text_width * s.text_mlp
    )
    head = s.text_width * s.vocab
    cache = cache_gb(s, dtype_bytes) * GIB
    read_ms = 1e3 / rates.bytes_per_s
    pairs, token = 4 * s.vision_depth * s.vision_width * per_ms, 2 * weights * per_ms
    encoder_ms, decoder_ms = rates.launch_ms * s.vision_depth, rates.launch_ms * s.text_layers
    return Profile(
        dict(key),
        encode=(
            1.0,
            0.0,
            vision * per_ms,
            pairs,
            4 * s.vision_width * per_ms,
            4 * s.vision_width * per_ms,
        ),
        prefill=(1.0 + 2 * head * per_ms, token, 2 * s.text_layers * attention * per_ms),
        decode=(
            max((weights + head) * dtype_bytes * read_ms, decoder_ms),
            2 * (weights + head) * per_ms,
            cache * read_ms,
        ),
        memory=(
            0.0,
            # Queries and keys are turned by their positions in float32.
            (4 * s.patch_dim + (8 * s.vision_width + 2 * s.vision_mlp) * dtype_bytes + 8 * s.vision_width) / GIB,
            0.0,
            s.vision_width * dtype_bytes / GIB,
            0.0,
        ),
        context=(
            s.vocab * 4 / GIB,
            (cache + (8 * s.text_width + 3 * s.text_mlp) * dtype_bytes) / GIB,
            cache / GIB,
            0.0,
            4 * s.patch_dim / GIB,
        ),
        hidden_pairs=encoder_ms / pairs,
        hidden_tokens=decoder_ms / token,
    )


def cache_gb(shape: ModelShape, dtype_bytes: int) -> float:
    """GiB of the key-value cache of one token."""
    return 2 * shape.text_layers * shape.kv_heads * shape.head_dim * dtype_bytes / GIB


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
