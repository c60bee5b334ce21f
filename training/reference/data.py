"""Scenes to training batches: patches through the shipped processor, rows of tokens with labels.

A batch is encoded once; each scene then gives rows at several downsampling ratios (the full point and a random one),
so that one set of weights serves every operating point.
"""

import random
from dataclasses import dataclass

import numpy as np
import torch
from PIL import ImageDraw
from torch import Tensor
from transformers import Qwen3VLProcessor

from adaptive_fusion.reference import screens
from adaptive_fusion.reference.screens import (
    COLORS,
    KINDS,
    PROMPTS,
    SHAPES,
    Glyph,
    Icon,
    Kind,
    Scene,
    Split,
    make_scene,
)

IGNORE = -100
CHARS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"


@dataclass(frozen=True)
class Stage:
    """A stretch of the curriculum: how large and how full the scenes are, and how they are mixed."""

    until: float  # end of the stage as a share of all steps
    sides: tuple[int, int]
    effort: float
    patches: int  # patch budget of one process's batch
    mix: tuple[float, float, float, float]  # simple, dense, reading, clip
    both: bool = True  # rows at the full point and at a random one; else one row at either
    pages: float = 0.2  # share of the patches that go to packed pages, which only the encoder's own losses see


EVEN = (0.12, 0.36, 0.40, 0.12)
CURRICULUM = (
    Stage(0.30, (64, 128), 0.25, 1000, EVEN, both=False, pages=1.0),
    Stage(0.45, (64, 112), 0.25, 1000, (0.25, 0.30, 0.35, 0.1), both=False, pages=0.15),
    Stage(0.62, (96, 144), 0.45, 1300, EVEN, both=False, pages=0.15),
    Stage(0.80, (112, 208), 0.7, 1800, EVEN, pages=0.1),
    Stage(0.94, (160, 288), 0.9, 2600, EVEN, pages=0.0),
    Stage(1.00, (256, 384), 1.0, 4500, EVEN, pages=0.0),
)


@dataclass
class Encoded:
    """Scenes ready for the encoder: packed patches ``[n, 384]``, grids ``[scenes, 3]`` and the scenes themselves."""

    pixels: Tensor
    grids: Tensor
    scenes: list[Scene]


def encode_scene(processor: Qwen3VLProcessor, scene: Scene, budget: float = 1.0) -> tuple[Tensor, Tensor]:
    """One scene through the processor, shrunk to ``budget`` of its pixels (per frame)."""
    width, height = scene.image.size
    pixels = max(1024, int(width * height * budget))
    if len(scene.frames) == 1:
        size = {"shortest_edge": 1024, "longest_edge": pixels}
        out = processor.image_processor(images=[scene.image], size=size, return_tensors="pt")
        return out["pixel_values"], out["image_grid_thw"]
    frames = np.stack([np.asarray(frame) for frame in scene.frames])
    size = {"shortest_edge": 1024, "longest_edge": pixels * len(frames)}
    out = processor.video_processor(
        videos=[frames], size=size, do_sample_frames=False, cap_pixels_per_frame=False, return_tensors="pt"
    )
    return out["pixel_values_videos"], out["video_grid_thw"]


def sample_batch(processor: Qwen3VLProcessor, stage: Stage, rng: random.Random, split: Split) -> Encoded:
    """Stills or clips (one modality a batch), then packed pages, until the patch budget is full."""
    clips = rng.random() < stage.mix[-1] and stage.pages < 1
    pages = 0.0 if clips else stage.pages
    pixels, grids, scenes = [], [], []
    total = 0

    def add(scene: Scene, budget: float) -> None:
        nonlocal total
        patches, grid = encode_scene(processor, scene, budget)
        total += len(patches)
        pixels.append(patches)
        grids.append(grid)
        scenes.append(scene)

    while total < stage.patches * (1 - pages):
        kind: Kind = "clip" if clips else rng.choices(KINDS[:-1], stage.mix[:-1])[0]
        scene = make_scene(kind, rng.getrandbits(40), split, stage.sides, stage.effort)
        shrink = rng.random() < (0.5 if kind in ("simple", "clip") else 0.12)
        add(scene, rng.uniform(0.12, 0.7) if shrink else 1.0)
    while total < stage.patches:
        add(make_page(rng, (64, 128)), 1.0)
    return Encoded(torch.cat(pixels), torch.cat(grids), scenes)


def make_page(rng: random.Random, sides: tuple[int, int]) -> Scene:
    """A screen packed with characters and icons, for the encoder's own losses: no question is asked of it."""
    low, high = sides[0] // screens.GRID, sides[1] // screens.GRID
    size = rng.randint(low, high) * screens.GRID, rng.randint(low, high) * screens.GRID
    image, dark = screens._textured(rng, size)
    draw = ImageDraw.Draw(image)
    glyphs: list[Glyph] = []
    icons: list[Icon] = []
    y = float(rng.randint(6, 10))
    while y < size[1] - 5:
        points = rng.choice((10, 11, 12, 12, 14))
        side = rng.choice((12, 13, 14, 24, 36)) if rng.random() < 0.3 else 13
        font = screens._font(points)
        pitch = max(points, side if rng.random() < 0.5 else points) + rng.randint(1, 6)
        middle = y + (pitch - points) / 2
        shade = rng.randint(0, 70)
        ink = (255 - shade,) * 3 if dark else (shade,) * 3
        if rng.random() < 0.3:
            ground = rng.choice(list(screens.GROUNDS.values()))
            draw.rectangle((0, y - 7, size[0], y + pitch - 7), fill=ground)
            ink = (0, 0, 0) if sum(ground) > 300 else (245, 245, 245)
        x = rng.uniform(2, 10)
        while x < size[0] - 8:
            if rng.random() < 0.35:
                edge = min(side, pitch + 1)
                color, shape = rng.choice(list(COLORS)), rng.choice(SHAPES)
                if x + edge > size[0]:
                    break
                screens._shape(draw, shape, x + edge / 2, middle, edge, screens._jitter(rng, COLORS[color]))
                icons.append(Icon(x + edge / 2, middle, edge, color, shape))
                x += edge + rng.uniform(1, 8)
            else:
                word = "".join(rng.choice(CHARS) for _ in range(rng.randint(1, 6)))
                if x + font.getlength(word) > size[0]:
                    break
                draw.text((x, middle), word, fill=ink, font=font, anchor="lm")
                glyphs += screens._glyphs(font, x, middle, word)
                x += font.getlength(word) + rng.uniform(3, 14)
        y += pitch
    return Scene("dense", (image,), {}, tuple(icons), tuple(glyphs))


def where_targets(batch: Encoded, patch: int = 8, merge: int = 2) -> Tensor:
    """What lies on each patch, ``[3, merged tokens, 4]``: character, colour, shape; 0 is nothing.

    A character belongs to the patch under its centre; an icon to every patch whose centre it covers.
    """
    found = []
    for scene, (_, h, w) in zip(batch.scenes, batch.grids.tolist(), strict=True):
        maps = np.zeros((3, h, w), np.int64)
        sx, sy = w / scene.image.width, h / scene.image.height
        y, x = np.mgrid[0:h, 0:w] + 0.5
        for icon in scene.icons:
            inside = np.maximum(abs(x / sx - icon.x), abs(y / sy - icon.y)) <= max(icon.side / 2, 0.5 / sx)
            maps[1][inside] = 1 + list(COLORS).index(icon.color)
            maps[2][inside] = 1 + SHAPES.index(icon.shape)
        for glyph in scene.glyphs:
            row, column = min(h - 1, max(0, int(glyph.y * sy))), min(w - 1, max(0, int(glyph.x * sx)))
            maps[0, row, column] = 1 + CHARS.index(glyph.char)
        cells = maps.reshape(3, h // merge, merge, w // merge, merge).transpose(0, 1, 3, 2, 4)
        found.append(torch.from_numpy(cells.reshape(3, -1, merge * merge)))
    return torch.cat(found, 1)


class Rows:
    """Token rows for the language model: prompt, visual placeholders, answer, padded on the right."""

    def __init__(self, processor: Qwen3VLProcessor) -> None:
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.start, self.end = processor.vision_start_token_id, processor.vision_end_token_id
        self.pads = {True: processor.video_token_id, False: processor.image_token_id}

    def ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    def row(self, scene: Scene, prompt: str, grid: tuple[int, int, int]) -> list[int]:
        """The prompt's tokens for a grid counted in merged tokens, as the processor writes them."""
        clip = len(scene.frames) > 1
        frame = [self.start] + [self.pads[clip]] * (grid[1] * grid[2]) + [self.end]
        visual = frame
        if clip:
            # Frames come two per second; a temporal patch holds two of them.
            stamps = [self.ids(f"<{(4 * t + 1) / 4:.1f} seconds>") for t in range(grid[0])]
            visual = [self.start, *(token for stamp in stamps for token in (*stamp, *frame)), self.end]
        head, tail = self.ids("<|im_start|>user\n"), self.ids(f"{prompt}<|im_end|>\n<|im_start|>assistant\n")
        return head + visual + tail

    def batch(
        self, scenes: list[Scene], answers: list[tuple[str, str]], grids: list[tuple[int, int, int]]
    ) -> dict[str, Tensor]:
        """``input_ids``, ``attention_mask``, ``mm_token_type_ids``, ``labels``: each ``[rows, length]``."""
        rows, labels = [], []
        for scene, (prompt, answer), grid in zip(scenes, answers, grids, strict=True):
            head = self.row(scene, prompt, grid)
            tail = self.ids(answer + "<|im_end|>")
            rows.append(head + tail)
            labels.append([IGNORE] * len(head) + tail)
        length = max(map(len, rows))
        pad = self.tokenizer.pad_token_id
        ids = torch.tensor([row + [pad] * (length - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
        types = (ids == self.pads[False]).int() + 2 * (ids == self.pads[True]).int()
        wanted = torch.tensor([row + [IGNORE] * (length - len(row)) for row in labels])
        return {"input_ids": ids, "attention_mask": mask, "mm_token_type_ids": types, "labels": wanted}


def question(scene: Scene, rng: random.Random | None = None) -> tuple[str, str]:
    """A prompt and its answer: the scene's own task, or now and then another one that can be asked of it."""
    task = scene.task
    if rng is not None and rng.random() < 0.15:
        task = rng.choice(list(scene.answers))
    return PROMPTS[task], scene.answers[task]
