"""Fuse the levels of any vision transformer: small ViT, SigLIP and DINOv2 models with random weights.

    python examples/any_vit.py

Any encoder that returns its hidden states works the same way: drop the tokens that are no patches, say which
grid the rest lies on, and hand the chosen levels to a stand-alone fusion module.
"""

import torch
from torch import Tensor
from transformers import (
    Dinov2Config,
    Dinov2Model,
    PreTrainedModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTModel,
)

from adaptive_fusion.fusion import select_levels
from adaptive_fusion.fusion.standalone import STANDALONE

SIZE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 8, "num_attention_heads": 4}
HEIGHT, WIDTH, PATCH = 64, 96, 16
GRID = (HEIGHT // PATCH, WIDTH // PATCH)


def encoders() -> dict[str, tuple[PreTrainedModel, int]]:
    """Each encoder with the number of class and register tokens before its patches."""
    image = {"image_size": HEIGHT, "patch_size": PATCH}
    return {
        "vit": (ViTModel(ViTConfig(**SIZE, **image), add_pooling_layer=False), 1),
        "siglip": (SiglipVisionModel(SiglipVisionConfig(**SIZE, **image, vision_use_head=False)), 0),
        "dinov2": (Dinov2Model(Dinov2Config(**SIZE, **image, mlp_ratio=2)), 1),
    }


def capture(model: PreTrainedModel, pixels: Tensor, levels: tuple[int, ...], prefix: int) -> list[Tensor]:
    """The outputs of the blocks `levels`, each ``[batch, patches, width]``."""
    options = {} if isinstance(model, Dinov2Model) else {"interpolate_pos_encoding": True}
    hidden = model(pixels, output_hidden_states=True, **options).hidden_states
    return [hidden[level + 1][:, prefix:] for level in levels]


def main() -> None:
    torch.manual_seed(0)
    pixels = torch.randn(2, 3, HEIGHT, WIDTH)
    levels = select_levels(SIZE["num_hidden_layers"], taps=(), layers=6)
    print(f"levels {levels} of {SIZE['num_hidden_layers']}, two images of {GRID[0]} x {GRID[1]} patches")
    for name, (model, prefix) in encoders().items():
        with torch.no_grad():
            features = capture(model.eval(), pixels, levels, prefix)
        for strategy in STANDALONE.names():
            fusion = STANDALONE.get(strategy)(widths=[SIZE["hidden_size"]] * len(levels))
            fused = fusion(features, grids=[GRID] * len(levels))
            trained = sum(parameter.numel() for parameter in fusion.parameters())
            print(f"{name:7} {strategy:9} {list(fused.shape)}, {trained} parameters to train")


if __name__ == "__main__":
    main()
