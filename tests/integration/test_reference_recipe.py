"""The recipe of the reference model sees exactly what the shipped processor would give it, and learns."""

import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from adaptive_fusion.models import adapter_for
from adaptive_fusion.point import NATIVE, OperatingPoint
from adaptive_fusion.reference import model_path
from adaptive_fusion.reference.screens import KINDS, PROMPTS, make_scene
from adaptive_fusion.video import Video

RECIPE = Path(__file__).parents[2] / "training" / "reference"
pytestmark = pytest.mark.skipif(not RECIPE.is_dir(), reason="the folder training/ is not part of a wheel")


@pytest.fixture(scope="module")
def recipe() -> Any:
    sys.path.insert(0, str(RECIPE))
    try:
        import build
        import data
        import train

        yield {"build": build, "data": data, "train": train}
    finally:
        sys.path.remove(str(RECIPE))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ratio", [1.0, 0.5])
def test_training_rows_are_the_runners_own_inputs(
    recipe: Any, processor: Any, reference_model: Any, kind: str, ratio: float
) -> None:
    data, train = recipe["data"], recipe["train"]
    scene = make_scene(kind, 5, "train", (128, 192))  # type: ignore[arg-type]
    prompt, answer = PROMPTS[scene.task], scene.answers[scene.task]
    if kind == "clip":
        frames = np.stack([np.asarray(frame) for frame in scene.frames])
        times = tuple(i / 2 for i in range(len(frames)))
        part = {"type": "video", "video": Video(frames, times, len(frames) / 2, len(frames))}
    else:
        part = {"type": "image", "image": scene.image}
    adapter = adapter_for(reference_model, processor)
    inputs = adapter.prepare([{"role": "user", "content": [part, {"type": "text", "text": prompt}]}], NATIVE)
    encoded = adapter.encode(inputs, OperatingPoint(downsample=ratio))
    ids = processor.tokenizer(answer + "<|im_end|>", add_special_tokens=False).input_ids
    with torch.no_grad():
        tail = torch.tensor([ids])
        grown = {**encoded.inputs, "input_ids": torch.cat([encoded.inputs["input_ids"], tail], 1)}
        for key in ("attention_mask", "mm_token_type_ids"):
            old = grown[key]
            grown[key] = torch.cat([old, torch.full_like(tail, int(key == "attention_mask")).to(old.dtype)], 1)
        expected = reference_model(**grown).logits[0, -len(ids) - 1 : -1]
        patches, grid = data.encode_scene(processor, scene)
        [(logits, labels)] = train.points(
            reference_model,
            data.Rows(processor),
            data.Encoded(patches, grid, [scene]),
            [(ratio,)],
            [[(prompt, answer)]],
        )
    assert labels.tolist() == ids
    torch.testing.assert_close(logits, expected, atol=1e-3, rtol=1e-3)


def test_location_targets_name_what_lies_on_each_patch(recipe: Any, processor: Any) -> None:
    data = recipe["data"]
    scene = data.make_page(random.Random(3), (96, 96))
    patches, grid = data.encode_scene(processor, scene)
    glyphs, colors, shapes = data.where_targets(data.Encoded(patches, grid, [scene]))
    assert glyphs.shape == (len(patches) // 4, 4)
    assert 0 < int((glyphs > 0).sum()) <= len(scene.glyphs) and torch.equal(colors > 0, shapes > 0)


def test_the_shipped_files_are_what_the_recipe_builds(recipe: Any, processor: Any) -> None:
    build = recipe["build"]
    fresh = build.build_processor()
    assert fresh.tokenizer.get_vocab() == processor.tokenizer.get_vocab()
    assert fresh.chat_template == processor.chat_template
    shipped = AutoModelForImageTextToText.from_pretrained(model_path())
    built = build.build_model(fresh.tokenizer)
    assert {n: p.shape for n, p in built.named_parameters()} == {n: p.shape for n, p in shipped.named_parameters()}
    assert shipped.config.vision_config.depth == 12
    assert list(shipped.config.vision_config.deepstack_visual_indexes) == [2, 5, 8]
    assert sum(f.stat().st_size for f in model_path().iterdir()) <= 10_000_000
    assert type(AutoProcessor.from_pretrained(model_path())).__name__ == "Qwen3VLProcessor"


def test_a_few_steps_lower_the_loss(recipe: Any, processor: Any) -> None:
    data, train, build = recipe["data"], recipe["train"], recipe["build"]
    model, rows = build.build_model(processor.tokenizer), data.Rows(processor)
    scenes = [make_scene("simple", i, "train", (64, 64), 0.15) for i in range(4)]
    encoded = [data.encode_scene(processor, scene) for scene in scenes]
    batch = data.Encoded(*(torch.cat(parts) for parts in zip(*encoded, strict=True)), scenes)
    matrices, rest = train.parameter_groups(model)
    optimizers = [train.Muon(matrices, lr=2e-3), torch.optim.AdamW(rest, lr=1e-3)]
    losses = []
    for _ in range(12):
        [(logits, labels)] = train.points(model, rows, batch, [(1.0,) * 4], [[data.question(s) for s in scenes]])
        loss = torch.nn.functional.cross_entropy(logits, labels)
        torch.autograd.backward(loss)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
