"""The recipe of the reference model sees exactly what the shipped processor would give it, and learns."""

import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from adaptive_fusion.media.clips import Video
from adaptive_fusion.models import adapter_for
from adaptive_fusion.point import NATIVE, OperatingPoint
from adaptive_fusion.reference import model_path
from adaptive_fusion.reference.screens import KINDS, PROMPTS, make_scene

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
        [(logits, labels)], *_ = train.points(
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
    found = data.where_targets(data.Encoded(patches, grid, [scene]))
    assert found.glyphs.shape == (len(patches) // 4, 8)
    # Half a patch is as wide as the narrowest character, so that next to none of them shares its place.
    assert 0.95 * len(scene.glyphs) <= int((found.glyphs > 0).sum()) <= len(scene.glyphs)
    assert torch.equal(found.colors > 0, found.shapes > 0) and bool((found.colors > 0).any())
    assert found.places.min() == 0 and found.places.max() == 7


@pytest.mark.parametrize("kind", ["simple", "dense", "reading"])
def test_answers_look_at_the_tokens_that_show_what_they_say(recipe: Any, processor: Any, kind: str) -> None:
    data = recipe["data"]
    scene = make_scene(kind, 8, "train", (128, 192))  # type: ignore[arg-type]
    grid = (1, scene.image.height // 16, scene.image.width // 16)
    row = data.Rows(processor).batch([scene], [data.question(scene)], [grid])
    ids, visual = row["input_ids"][0], row["input_ids"][0] == processor.image_token_id
    said = [processor.decode([ids[at + 1]]).strip() for _, at in row["asking"].tolist()]
    assert [word for word in said if len(word) == 1] == [glyph.char for glyph in scene.glyphs]
    assert [word for word in said if word in data.COLORS] == [icon.color for icon in scene.icons]
    assert bool(row["looked_at"].any(1).all()) and not bool((row["looked_at"] & ~visual).any())
    first = int(visual.nonzero()[0])
    for word, looked in zip(said, row["looked_at"], strict=True):
        if len(word) == 1:
            y, x = divmod(int(looked.nonzero()[0]) - first, grid[2])
            assert any(g.char == word and (int(g.y // 16), int(g.x // 16)) == (y, x) for g in scene.glyphs)


def test_guided_attention_is_taught_without_changing_the_model(recipe: Any, processor: Any) -> None:
    data, train, build = recipe["data"], recipe["train"], recipe["build"]
    model, rows = build.build_model(processor.tokenizer), data.Rows(processor)
    scene = make_scene("dense", 2, "train", (96, 96), 0.3)
    batch = data.Encoded(*data.encode_scene(processor, scene), [scene])
    asked = [[data.question(scene)]]
    [(plain, _)], *_ = train.points(model, rows, batch, [(1.0,)], asked)
    gaze = train.Gaze(model)
    optimizer = torch.optim.AdamW(model.model.language_model.parameters(), lr=2e-3)
    [(watched, _)], _, [(before, _)], _ = train.points(model, rows, batch, [(1.0,)], asked, None, gaze)
    assert torch.equal(plain, watched)
    for _ in range(8):
        _, _, [(loss, mass)], _ = train.points(model, rows, batch, [(1.0,)], asked, None, gaze)
        torch.autograd.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < before.item() - 0.2 and all(0 < m <= 1 for m in mass)


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
        asked = [[data.question(s) for s in scenes]]
        [(logits, labels)], *_ = train.points(model, rows, batch, [(1.0,) * 4], asked)
        loss = torch.nn.functional.cross_entropy(logits, labels)
        torch.autograd.backward(loss)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize("kind", ["reading", "clip"])
def test_rows_that_lose_tokens_are_those_rows_less_these_tokens(recipe: Any, processor: Any, kind: str) -> None:
    """Two scenes in one batch lose tokens as each does alone, and what is looked at is the tokens that are left."""
    data, train, build = recipe["data"], recipe["train"], recipe["build"]
    model, rows = build.build_model(processor.tokenizer).eval(), data.Rows(processor)
    scenes = [make_scene(kind, seed, "train", (96, 128), 0.5) for seed in (1, 2)]  # type: ignore[arg-type]
    parts = [data.encode_scene(processor, scene) for scene in scenes]
    batches = [data.Encoded(*part, [scene]) for part, scene in zip(parts, scenes, strict=True)]
    both = data.Encoded(*(torch.cat(column) for column in zip(*parts, strict=True)), scenes)
    asked = [data.question(scene) for scene in scenes]
    rng = random.Random(4)
    keeps = [data.kept_tokens(batch, rng) for batch in batches]
    assert all(0 < int(keep.sum()) < len(keep) for keep in keeps)
    gaze, events = train.Gaze(model), train.Events(model)
    with torch.no_grad():
        more = (None, gaze, events)
        apart = [
            train.points(model, rows, batch, [(1.0,)], [[one]], *more, [keep])
            for batch, one, keep in zip(batches, asked, keeps, strict=True)
        ]
        joined = train.points(model, rows, both, [(1.0, 1.0)], [asked], *more, [torch.cat(keeps)])
        whole = train.points(model, rows, both, [(1.0, 1.0)], [asked], *more)
    logits, labels = joined[0][0]
    torch.testing.assert_close(logits, torch.cat([one[0][0][0] for one in apart]), atol=1e-4, rtol=1e-4)
    assert torch.equal(labels, whole[0][0][1]) and not torch.allclose(logits, whole[0][0][0], atol=1e-4)
    if kind == "clip":
        (told, targets), (_, all_targets) = joined[3][0], whole[3][0]
        assert len(told) == len(targets) == int(torch.cat(keeps).sum()) and torch.equal(
            targets, all_targets[torch.cat(keeps)]
        )
        assert bool((all_targets > 0).any())
        assert train.Events.loss(joined[3][0]).isfinite()


def test_a_clip_says_what_its_event_happens_to_and_where(recipe: Any, processor: Any) -> None:
    data = recipe["data"]
    events = set()
    for seed in range(12):
        scene = make_scene("clip", seed, "train", (128, 192))
        t, h, w = len(scene.frames) // 2, scene.image.height // 16, scene.image.width // 16
        answer = scene.answers["event"].split()
        found = data.event_targets(scene, h, w)
        events.add(answer[2])
        assert set(np.unique(found)) <= {0, 1 + data.EVENTS.index(answer[2])} and found.shape == (t, h, w)
        assert (found > 0).any()
        row = data.Rows(processor).batch([scene], [data.question(scene)], [(t, h, w)])
        looked = row["looked_at"]
        assert bool((looked.any(0) & (row["input_ids"][0] != processor.video_token_id)).logical_not().all())
        assert int(looked[0].sum()) == int(data.acting_cells(scene, h, w).sum())
    assert events == set(data.EVENTS)
