"""The reference model before training: configuration, tokenizer and processor, in Hugging Face format.

The tokenizer is listed, not trained: every byte, then one token for each word of the screens' closed vocabulary.
Capitals and digits have no merges, so text on a screen is always read character by character.
"""

import json
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from adaptive_fusion.reference import screens

SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
CHAT_TEMPLATE = (
    "{%- for message in messages -%}{{ '<|im_start|>' + message.role + '\\n' }}"
    "{%- if message.content is string -%}{{ message.content }}"
    "{%- else -%}{%- for part in message.content -%}"
    "{%- if part.type == 'image' -%}<|vision_start|><|image_pad|><|vision_end|>"
    "{%- elif part.type == 'video' -%}<|vision_start|><|video_pad|><|vision_end|>"
    "{%- elif part.type == 'text' -%}{{ part.text }}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}{{ '<|im_end|>\\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)
PATCH, MERGE = 8, 2
MAX_PIXELS = (48 * PATCH) ** 2
MIN_PIXELS = (4 * PATCH) ** 2


def closed_vocabulary() -> list[str]:
    """The words (with their leading space) that are one token each, in a fixed order."""
    words = [f" {word}" for word in (*screens.COLORS, *screens.SHAPES, *screens.GROUNDS)]
    places = {part for row in screens.PLACES for place in row for part in place.split()}
    words += [f" {word}" for word in sorted(places | set(screens.MOVES))]
    words += [f" {row}{column}" for row in "abcdefgh" for column in range(1, screens.BINS + 1)]
    words += [f" {word}" for word in ("ground", "panel", "line", "lines", "moves", "turns", "appears", "disappears")]
    for prompt in screens.PROMPTS.values():
        words += [f" {word}" for word in prompt.rstrip(".?").split()]
    words += ["user", "assistant", "system", " seconds"]
    # The first word of an answer has no leading space.
    words += [word.strip() for word in words]
    return list(dict.fromkeys(words))


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE whose only merges spell the closed vocabulary, longest common prefixes shared."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {char: i for i, char in enumerate(alphabet)}
    merges: list[tuple[str, str]] = []
    # Left-to-right merges: each word is its first byte, then one byte more at a time. Words are pre-split, so the
    # prefixes are reached only inside words of the list.
    for word in closed_vocabulary():
        spelled = word.replace(" ", "Ġ")
        for end in range(2, len(spelled) + 1):
            piece = spelled[:end]
            if piece not in vocab:
                vocab[piece] = len(vocab)
                merges.append((spelled[: end - 1], spelled[end - 1]))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(_regex(r" ?[a-h][1-8](?![a-z0-9])| ?[A-Z]?[a-z]+| ?[^ a-z]|\s"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL[1:]),
        padding_side="left",
        model_max_length=8192,
        extra_special_tokens={},
    )


def _regex(pattern: str) -> object:
    from tokenizers import Regex

    return Regex(pattern)


def build_processor() -> Qwen3VLProcessor:
    """The Qwen3-VL processor at patch 8 with a native budget of 384 x 384 pixels."""
    size = {"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS}
    mean = std = [0.5, 0.5, 0.5]
    images = Qwen2VLImageProcessor(
        size=size, patch_size=PATCH, merge_size=MERGE, temporal_patch_size=2, image_mean=mean, image_std=std
    )
    videos = Qwen3VLVideoProcessor(
        size={"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS * 4},
        patch_size=PATCH,
        merge_size=MERGE,
        temporal_patch_size=2,
        image_mean=mean,
        image_std=std,
        fps=2,
        min_frames=4,
        max_frames=16,
    )
    return Qwen3VLProcessor(
        image_processor=images,
        tokenizer=build_tokenizer(),
        video_processor=videos,
        chat_template=CHAT_TEMPLATE,
    )


def build_config(tokenizer: PreTrainedTokenizerFast) -> Qwen3VLConfig:
    """A Qwen3-VL of about 2.3 million parameters: ViT 12 x 64 with taps 2, 5, 8; LLM 4 x 160."""
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL}
    width, head_dim = 160, 40
    return Qwen3VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": width,
            "intermediate_size": 400,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "head_dim": head_dim,
            "max_position_embeddings": 4096,
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [8, 6, 6],
                "mrope_interleaved": True,
            },
            "initializer_range": 0.04,
            "bos_token_id": ids["<|im_start|>"],
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
        },
        vision_config={
            "depth": 12,
            "hidden_size": 64,
            "intermediate_size": 192,
            "num_heads": 2,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": 2,
            "out_hidden_size": width,
            "num_position_embeddings": 48 * 48,
            "deepstack_visual_indexes": [2, 5, 8],
            "initializer_range": 0.04,
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> Qwen3VLForConditionalGeneration:
    """The untrained model, float32, from a seed."""
    torch.manual_seed(seed)
    model = Qwen3VLForConditionalGeneration(build_config(tokenizer))
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


@torch.no_grad()
def whiten(model: Qwen3VLForConditionalGeneration, pixels: torch.Tensor) -> None:
    """Start the patch embedding as a PCA whitening of `pixels` ``[patches, 384]`` (both frames of a pair alike).

    Screens are mostly flat: without this the strokes of a character hide behind the ground's brightness.
    """
    conv = model.model.visual.patch_embed.proj
    flat = pixels.view(-1, 3, 2, PATCH * PATCH)[:, :, 0].reshape(len(pixels), -1)
    flat = flat[flat.view(len(flat), 3, -1).std(-1).mean(-1) > 0.05]
    mean = flat.mean(0)
    values, vectors = torch.linalg.eigh(torch.cov((flat - mean).T))
    values, vectors = values.flip(0)[: conv.out_channels], vectors.flip(1)[:, : conv.out_channels]
    filters = 0.5 * (vectors / (values + 3e-3).sqrt()).T
    conv.weight.copy_((filters.view(-1, 3, 1, PATCH, PATCH) / 2).expand_as(conv.weight))
    conv.bias.copy_(-(filters @ mean))


def save(model: Qwen3VLForConditionalGeneration, processor: Qwen3VLProcessor, folder: Path) -> None:
    """Write everything that ``from_pretrained`` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


if __name__ == "__main__":
    built = build_processor()
    model = build_model(built.tokenizer)
    counts = {name: sum(p.numel() for p in child.parameters()) for name, child in model.model.named_children()}
    print(json.dumps({"parameters": counts, "vocabulary": len(built.tokenizer)}, indent=1))
