"""Cut another shape out of a trained model of the reference's shape, for training to go on from.

    PYTHONPATH=training/reference python training/transfer/cut.py {plain,narrow} FROM OUT

`plain` has no DeepStack taps. `narrow` has a ViT of 10 blocks and a language model of width 128: its hidden states
keep the 128 directions in which they vary most (Ashkboos et al. 2024, SliceGPT: gains of the norms are folded into
what reads them, then everything that reads or writes the residual stream is turned and cut). Either answers far worse
than the whole at first.
"""

import argparse
import random
from pathlib import Path

import build
import torch
from data import Rows, encode_scene, question
from torch import Tensor, nn
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from adaptive_fusion.reference.screens import KINDS, make_scene

SHAPES = ("plain", "narrow")
WIDTH = 128
LEFT_OUT = (4, 10)
"""Blocks of the encoder that `narrow` does without: none of them is tapped."""
SEEN = 48
"""Screens from which the directions are taken."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    model = Qwen3VLForConditionalGeneration.from_pretrained(options.source, dtype=torch.float32).eval()
    model = plain(model) if options.shape == "plain" else narrow(model)
    build.save(model, build.build_processor(), options.out)
    print(f"{options.shape}: {sum(p.numel() for p in model.parameters()):,} parameters in {options.out}")


def plain(model: Qwen3VLForConditionalGeneration) -> Qwen3VLForConditionalGeneration:
    """The same without taps; what they said is lost."""
    config = _config(model, {"deepstack_visual_indexes": []}, {})
    state = {key: value for key, value in model.state_dict().items() if "deepstack" not in key}
    return _loaded(config, state)


@torch.no_grad()
def narrow(model: Qwen3VLForConditionalGeneration) -> Qwen3VLForConditionalGeneration:
    """Fewer blocks in the encoder, a narrower language model."""
    turned = directions(model)
    vision = model.config.vision_config
    kept = [i for i in range(vision.depth) if i not in LEFT_OUT]
    taps = [kept.index(i) for i in vision.deepstack_visual_indexes]
    config = _config(
        model,
        {"depth": len(kept), "deepstack_visual_indexes": taps, "out_hidden_size": WIDTH},
        {"hidden_size": WIDTH, "tie_word_embeddings": False},
    )
    config.tie_word_embeddings = False
    state = {}
    for key, value in model.state_dict().items():
        name = key
        if ".blocks." in key:
            head, _, tail = key.partition(".blocks.")
            index, _, rest = tail.partition(".")
            if int(index) in LEFT_OUT:
                continue
            name = f"{head}.blocks.{kept.index(int(index))}.{rest}"
        state[name] = _cut(model, key, value, turned)
    return _loaded(config, state)


def _cut(model: Qwen3VLForConditionalGeneration, key: str, value: Tensor, turned: Tensor) -> Tensor:
    """A weight in the narrower space: `turned` ``[width, WIDTH]`` maps the old residual stream to the new one."""
    grown = (turned.shape[0] / WIDTH) ** 0.5
    text = model.model.language_model
    if "merger" in key and "linear_fc2" in key:
        return turned.T @ value
    if key.endswith("embed_tokens.weight"):
        return value @ turned
    if key == "lm_head.weight":
        return (value * text.norm.weight) @ turned
    if "language_model" not in key:
        return value
    if key.endswith(("input_layernorm.weight", "post_attention_layernorm.weight", "language_model.norm.weight")):
        # The mean square is over fewer dimensions now, and all of them are about as large as before.
        return torch.full((WIDTH,), grown)
    if key.endswith(("o_proj.weight", "down_proj.weight")):
        return turned.T @ value
    layer = text.layers[int(key.split(".layers.")[1].split(".")[0])]
    if key.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
        return (value * layer.input_layernorm.weight) @ turned
    if key.endswith(("gate_proj.weight", "up_proj.weight")):
        return (value * layer.post_attention_layernorm.weight) @ turned
    return value


def directions(model: Qwen3VLForConditionalGeneration) -> Tensor:
    """The directions in which the residual stream varies most, by its layers' inputs alike: ``[width, WIDTH]``."""
    processor = build.build_processor()
    rows = Rows(processor)
    total = torch.zeros(model.config.text_config.hidden_size, model.config.text_config.hidden_size)

    def keep(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        states = nn.functional.normalize(inputs[0].flatten(0, -2), dim=-1)
        total.add_(states.T @ states)

    norms = [model.model.language_model.norm]
    for layer in model.model.language_model.layers:
        norms += [layer.input_layernorm, layer.post_attention_layernorm]
    hooks = [norm.register_forward_pre_hook(keep) for norm in norms]
    rng = random.Random(0)
    for seed in range(SEEN):
        scene = make_scene(KINDS[seed % 3], seed, "train", (160, 256))
        pixels, grid = encode_scene(processor, scene)
        merged = tuple(int(n) for n in grid[0] // torch.tensor([1, 2, 2]))
        tokens = rows.batch([scene], [question(scene, rng)], [merged])  # type: ignore[list-item]
        names = ("input_ids", "attention_mask", "mm_token_type_ids")
        model.model(**{name: tokens[name] for name in names}, pixel_values=pixels, image_grid_thw=grid)
    for hook in hooks:
        hook.remove()
    values, vectors = torch.linalg.eigh(total)
    print(f"{WIDTH} directions have {float(values[-WIDTH:].sum() / values.sum()):.4f} of the residual stream")
    return vectors[:, -WIDTH:]


def _config(
    model: Qwen3VLForConditionalGeneration, vision: dict[str, object], text: dict[str, object]
) -> Qwen3VLConfig:
    config = Qwen3VLConfig.from_dict(model.config.to_dict())
    for part, values in ((config.vision_config, vision), (config.text_config, text)):
        for key, value in values.items():
            setattr(part, key, value)
    return config


def _loaded(config: Qwen3VLConfig, state: dict[str, Tensor]) -> Qwen3VLForConditionalGeneration:
    model = Qwen3VLForConditionalGeneration(config)
    model.load_state_dict(state)
    tokenizer = build.build_tokenizer()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


if __name__ == "__main__":
    main()
