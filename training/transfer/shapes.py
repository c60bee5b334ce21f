"""Write an untrained model of another shape, with the reference model's tokenizer and processor.

PYTHONPATH=training/reference python training/transfer/shapes.py {plain,narrow} OUT [--seed 0]
"""

import argparse
from pathlib import Path
from typing import Any

import build
import torch
from transformers import Qwen3VLForConditionalGeneration

SHAPES: dict[str, dict[str, dict[str, Any]]] = {
    "plain": {"vision": {"deepstack_visual_indexes": []}, "text": {}},
    "narrow": {
        "vision": {
            "depth": 8,
            "hidden_size": 80,
            "intermediate_size": 240,
            "num_heads": 2,
            "out_hidden_size": 128,
            "deepstack_visual_indexes": [1, 3, 5],
        },
        "text": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 5, "head_dim": 40},
    },
}
"""What differs from the reference model's configuration."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    model = shaped(options.shape, options.seed)
    build.save(model, build.build_processor(), options.out)
    print(f"{options.shape}: {sum(p.numel() for p in model.parameters()):,} parameters in {options.out}")


def shaped(name: str, seed: int) -> Qwen3VLForConditionalGeneration:
    """The untrained model of a shape."""
    tokenizer = build.build_tokenizer()
    config = build.build_config(tokenizer)
    for part, values in (("vision_config", SHAPES[name]["vision"]), ("text_config", SHAPES[name]["text"])):
        for key, value in values.items():
            setattr(getattr(config, part), key, value)
    torch.manual_seed(seed)
    model = Qwen3VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


if __name__ == "__main__":
    main()
