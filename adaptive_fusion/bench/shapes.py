"""The published configurations of the Qwen3-VL family, as far as cost follows from them.

Data only: values of the released ``config.json`` files. Must not know of weights, adapters or times.
"""

from dataclasses import dataclass
from typing import Any

from adaptive_fusion.errors import ConfigError
from adaptive_fusion.evaluation.shares import RELEASED

VOCABULARY = 151_936
IDS = {
    "image_token_id": 151_655,
    "video_token_id": 151_656,
    "vision_start_token_id": 151_652,
    "vision_end_token_id": 151_653,
}
PATCH, MERGE, TEMPORAL = RELEASED.patch_size, RELEASED.merge_size, RELEASED.temporal_patch_size


@dataclass(frozen=True)
class Vision:
    """A vision tower; `taps` are block indices."""

    width: int
    depth: int
    mlp: int
    taps: tuple[int, ...]
    heads: int = 16


@dataclass(frozen=True)
class Shape:
    """One released model. `mlp` is the dense feed-forward width, or that of one of `experts` experts."""

    width: int
    layers: int
    heads: int
    kv_heads: int
    mlp: int
    vision: Vision
    tied: bool = False
    experts: int = 0
    active_experts: int = 8

    def config(self) -> Any:
        """The transformers configuration, dense or mixture of experts."""
        from transformers import Qwen3VLConfig, Qwen3VLMoeConfig

        text: dict[str, Any] = {
            "vocab_size": VOCABULARY,
            "hidden_size": self.width,
            "intermediate_size": self.mlp,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": 128,
            "max_position_embeddings": 262_144,
            "tie_word_embeddings": self.tied,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 5e6,
                "mrope_section": [24, 20, 20],
                "mrope_interleaved": True,
            },
        }
        if self.experts:
            text |= {
                "num_experts": self.experts,
                "num_experts_per_tok": self.active_experts,
                "moe_intermediate_size": self.mlp,
            }
        vision = {
            "depth": self.vision.depth,
            "hidden_size": self.vision.width,
            "intermediate_size": self.vision.mlp,
            "num_heads": self.vision.heads,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": TEMPORAL,
            "out_hidden_size": self.width,
            "num_position_embeddings": 2304,
            "deepstack_visual_indexes": list(self.vision.taps),
        }
        kind = Qwen3VLMoeConfig if self.experts else Qwen3VLConfig
        return kind(text_config=text, vision_config=vision, tie_word_embeddings=self.tied, **IDS)

    def model_class(self) -> Any:
        """The transformers class that this shape builds."""
        from transformers import Qwen3VLForConditionalGeneration, Qwen3VLMoeForConditionalGeneration

        return Qwen3VLMoeForConditionalGeneration if self.experts else Qwen3VLForConditionalGeneration


_SMALL = Vision(1024, 24, 4096, (5, 11, 17))
_LARGE = Vision(1152, 27, 4304, (8, 16, 24))

SHAPES = {
    "2b": Shape(2048, 28, 16, 8, 6144, _SMALL, tied=True),
    "4b": Shape(2560, 36, 32, 8, 9728, _SMALL, tied=True),
    "8b": Shape(4096, 36, 32, 8, 12288, _LARGE),
    "32b": Shape(5120, 64, 64, 8, 25600, _LARGE),
    "30b-a3b": Shape(2048, 48, 32, 4, 768, _LARGE, experts=128),
    "235b-a22b": Shape(4096, 94, 64, 4, 1536, _LARGE, experts=128),
}


def shape(size: str) -> Shape:
    """The shape of that name.

    Raises:
        ConfigError: For an unknown size.
    """
    found = SHAPES.get(size.lower())
    if found is None:
        raise ConfigError(f"size is {size!r}; expected one of {', '.join(SHAPES)}")
    return found


class ShapeProcessor:
    """The family's image and video processors without a tokenizer: enough to prepare pixels and to plan.

    The limits are those of the released processors: 64 to 16,384 tokens an image, 4 to 24,576 a clip.
    """

    tokenizer = None

    def __init__(self) -> None:
        from transformers import Qwen2VLImageProcessor, Qwen3VLVideoProcessor

        half = [0.5, 0.5, 0.5]
        common = {"patch_size": PATCH, "merge_size": MERGE, "temporal_patch_size": TEMPORAL}
        self.image_processor: Any = Qwen2VLImageProcessor(
            size=dict(RELEASED.size),
            image_mean=half,
            image_std=half,
            **common,
        )
        self.video_processor: Any = Qwen3VLVideoProcessor(
            size={"shortest_edge": 4_096, "longest_edge": 25_165_824},
            image_mean=half,
            image_std=half,
            **common,
        )
