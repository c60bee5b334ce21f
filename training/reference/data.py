"""Scenes to training batches: patches through the shipped processor, rows of tokens with labels.

A batch is encoded once; each scene then gives rows at several downsampling ratios (the full point and a random one),
so that one set of weights serves every operating point.
"""

import random
import re
from collections.abc import Iterator
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
BIN = re.compile("[a-h][1-8]")
PLACE_WORDS = {word for row in screens.PLACES for place in row for word in place.split()}
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
    where: float = 1.0  # weight of the encoder's own losses
    late: float = 1.0  # weight, among those, of characters read off the last tap
    shrunk: tuple[float, float] = (0.5, 0.12)  # shares of scenes shrunk before the encoder: simple and clips; others
    dropped: float = 0.0  # share of the second rows that lose single tokens instead of being pooled


EVEN = (0.14, 0.38, 0.38, 0.10)
LARGE = (0.13, 0.35, 0.37, 0.15)
CURRICULUM = (
    Stage(0.15, (64, 128), 0.25, 1000, EVEN, both=False, pages=1.0, where=0.5, late=0.0),
    Stage(0.45, (64, 128), 0.3, 1200, (0.22, 0.34, 0.34, 0.1), both=False, pages=0.3, where=0.5, late=0.0),
    Stage(0.72, (96, 160), 0.5, 1400, EVEN, both=False, pages=0.3),
    Stage(0.88, (128, 224), 0.7, 2000, LARGE, pages=0.15),
    Stage(0.96, (192, 320), 0.9, 2800, LARGE, pages=0.1),
    Stage(1.00, (256, 384), 1.0, 4500, LARGE, pages=0.0),
)
REFINE = (
    Stage(0.15, (128, 224), 0.7, 2000, (0.2, 0.4, 0.4, 0.4), pages=0.1, shrunk=(0.15, 0.05), dropped=0.3),
    Stage(0.55, (192, 320), 0.9, 2800, (0.2, 0.4, 0.4, 0.33), pages=0.05, shrunk=(0.15, 0.05), dropped=0.3),
    Stage(1.00, (256, 384), 1.0, 4500, (0.2, 0.4, 0.4, 0.3), pages=0.0, shrunk=(0.15, 0.05), dropped=0.3),
)
"""After the first curriculum: mostly at full size, far more clips, and rows that lose single tokens."""
FINISH = (
    Stage(0.5, (192, 320), 0.9, 2800, (0.25, 0.35, 0.4, 0.4), pages=0.05, shrunk=(0.5, 0.03), dropped=0.3),
    Stage(1.0, (256, 384), 1.0, 4500, (0.2, 0.35, 0.45, 0.4), pages=0.0, shrunk=(0.5, 0.03), dropped=0.3),
)
"""Then small simple screens and small clips again, which the second curriculum let fade, and more clips still."""
CLIPS = (
    Stage(0.6, (160, 288), 0.8, 3000, (0.25, 0.35, 0.4, 0.75), pages=0.0, shrunk=(0.4, 0.03), dropped=0.15),
    Stage(1.0, (224, 384), 1.0, 4000, (0.2, 0.35, 0.45, 0.6), pages=0.0, shrunk=(0.4, 0.03), dropped=0.15),
)
"""And clips above all, small ones first: many of them fit in a batch."""
CURRICULA = {"first": CURRICULUM, "refine": REFINE, "finish": FINISH, "clips": CLIPS}


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
        shrink = rng.random() < stage.shrunk[0 if kind in ("simple", "clip") else 1]
        add(scene, rng.uniform(0.12, 0.7) if shrink else 1.0)
    while total < stage.patches:
        add(make_page(rng, (64, 128)), 1.0)
    return Encoded(torch.cat(pixels), torch.cat(grids), scenes)


def kept_tokens(batch: Encoded, rng: random.Random, merge: int = 2) -> Tensor:
    """Which merged tokens of the scenes that are asked something stay, as reducers other than pooling would have it:
    by scene, random ones go, or those that show what the one before shows (in a clip the pair of frames before). A
    boolean ``[tokens]``."""
    sizes = (batch.grids.prod(1) // merge**2).tolist()
    found = []
    for scene, (t, h, w), tokens in zip(
        batch.scenes, batch.grids.tolist(), torch.split(batch.pixels, [merge**2 * n for n in sizes]), strict=True
    ):
        if not scene.answers:
            continue
        count = len(tokens) // merge**2
        keep = torch.from_numpy(np.random.default_rng(rng.getrandbits(32)).random(count)) >= rng.uniform(0.1, 0.7)
        if rng.random() < 0.5:
            seen = tokens.view(t, h // merge, w // merge, -1)
            same = torch.zeros(seen.shape[:3], dtype=torch.bool)
            if t > 1:
                same[1:] = (seen[1:] - seen[:-1]).abs().amax(-1) < 0.02
            else:
                same[:, :, 1:] = (seen[:, :, 1:] - seen[:, :, :-1]).abs().amax(-1) < 0.02
            keep = ~same.flatten() | (keep if rng.random() < 0.5 else False)
        keep[0] = True
        found.append(keep)
    return torch.cat(found)


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
        points = rng.choice((11, 12, 12, 13, 14))
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


def cells_under(icon: Icon, scene: Scene, h: int, w: int) -> np.ndarray:
    """The cells of an ``h x w`` grid that an icon covers, at least the one under its centre: a boolean ``[h, w]``."""
    sx, sy = w / scene.image.width, h / scene.image.height
    y, x = np.mgrid[0:h, 0:w] + 0.5
    inside = np.maximum(abs(x / sx - icon.x), abs(y / sy - icon.y)) <= icon.side / 2
    inside[min(h - 1, max(0, int(icon.y * sy))), min(w - 1, max(0, int(icon.x * sx)))] = True
    return inside


def acting_cells(scene: Scene, h: int, w: int) -> np.ndarray:
    """Where what a clip's event happens to is seen, by pair of frames: a boolean ``[pairs, h, w]``."""
    frames = [cells_under(icon, scene, h, w) if icon is not None else np.zeros((h, w), bool) for icon in scene.acting]
    return np.stack([first | second for first, second in zip(frames[::2], frames[1::2], strict=True)])


EVENTS = ("moves", "turns", "appears", "disappears")


def event_targets(scene: Scene, h: int, w: int) -> np.ndarray:
    """What has happened where, as far as a causal model can know it by then: ``[pairs, h, w]``, 0 nothing, else 1 + the
    event's number, on the cells of what it happened to, in this pair of frames or the one before."""
    cells = acting_cells(scene, h, w)
    event = 1 + next(i for i, name in enumerate(EVENTS) if name in scene.answers["event"].split())
    found = np.zeros(cells.shape, np.int64)
    for pair in range(len(cells)):
        if any(icon != scene.acting[0] for icon in scene.acting[: 2 * pair + 2]):
            found[pair][cells[pair] | cells[max(0, pair - 1)]] = event
    return found


@dataclass
class Located:
    """What lies where, by merged token: 0 is nothing. A character lies in the half patch under its centre (two small
    ones can share a patch), an icon on every patch it covers; places are eighths of the height and width."""

    glyphs: Tensor  # [tokens, 8]
    colors: Tensor  # [tokens, 4]
    shapes: Tensor  # [tokens, 4]
    places: Tensor  # [tokens, 2]


def where_targets(batch: Encoded, merge: int = 2) -> Located:
    """The targets of the encoder's own losses, stills only."""

    def by_token(cells: np.ndarray, across: int) -> Tensor:
        h, w = cells.shape[0] // merge, cells.shape[1] // across
        blocks = cells.reshape(h, merge, w, across).transpose(0, 2, 1, 3)
        return torch.from_numpy(blocks.reshape(h * w, merge * across))

    found: list[tuple[Tensor, ...]] = []
    for scene, (_, h, w) in zip(batch.scenes, batch.grids.tolist(), strict=True):
        colors, shapes, glyphs = np.zeros((h, w), np.int64), np.zeros((h, w), np.int64), np.zeros((h, 2 * w), np.int64)
        for icon in scene.icons:
            inside = cells_under(icon, scene, h, w)
            colors[inside] = 1 + list(COLORS).index(icon.color)
            shapes[inside] = 1 + SHAPES.index(icon.shape)
        sx, sy = 2 * w / scene.image.width, h / scene.image.height
        for glyph in scene.glyphs:
            row, column = min(h - 1, max(0, int(glyph.y * sy))), min(2 * w - 1, max(0, int(glyph.x * sx)))
            glyphs[row, column] = 1 + CHARS.index(glyph.char)
        rows, columns = np.mgrid[0 : h // merge, 0 : w // merge]
        eighths = np.stack([8 * (rows + 0.5) / rows.shape[0], 8 * (columns + 0.5) / rows.shape[1]], -1).astype(np.int64)
        parts = by_token(glyphs, 2 * merge), by_token(colors, merge), by_token(shapes, merge)
        found.append((*parts, torch.from_numpy(eighths.reshape(-1, 2))))
    return Located(*(torch.cat(column) for column in zip(*found, strict=True)))


class Rows:
    """Token rows for the language model: prompt, visual placeholders, answer, padded on the right."""

    def __init__(self, processor: Qwen3VLProcessor) -> None:
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.start, self.end = processor.vision_start_token_id, processor.vision_end_token_id
        self.first_visual = len(self.ids("<|im_start|>user\n")) + 1
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
        """``input_ids``, ``attention_mask``, ``mm_token_type_ids``, ``labels``: each ``[rows, length]``.

        And where to look: ``asking`` ``[n, 2]`` (row, position) are the positions that are about to write a character
        or say something of an icon, ``looked_at`` ``[n, length]`` marks the visual tokens that show it.
        """
        rows, labels, spots = [], [], []
        for i, (scene, (prompt, answer), grid) in enumerate(zip(scenes, answers, grids, strict=True)):
            head = self.row(scene, prompt, grid)
            tail = self.ids(answer + "<|im_end|>")
            first = self.first_visual
            spots += [(i, len(head) + at - 1, first + cells) for at, cells in self.shown(scene, tail, grid)]
            rows.append(head + tail)
            labels.append([IGNORE] * len(head) + tail)
        length = max(map(len, rows))
        pad = self.tokenizer.pad_token_id
        ids = torch.tensor([row + [pad] * (length - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
        types = (ids == self.pads[False]).int() + 2 * (ids == self.pads[True]).int()
        wanted = torch.tensor([row + [IGNORE] * (length - len(row)) for row in labels])
        looked_at = torch.zeros(len(spots), length, dtype=torch.bool)
        for n, (_, _, cells) in enumerate(spots):
            looked_at[n, cells] = True
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "mm_token_type_ids": types,
            "labels": wanted,
            "asking": torch.tensor([spot[:2] for spot in spots], dtype=torch.long).view(-1, 2),
            "looked_at": looked_at,
        }

    def shown(self, scene: Scene, answer: list[int], grid: tuple[int, int, int]) -> Iterator[tuple[int, np.ndarray]]:
        """Which visual tokens show what a token of the answer says: (index in the answer, indices in the grid).

        Characters and icons of a scene are in the order in which its answers name them.
        """
        frames, h, w = grid
        if len(scene.frames) > 1:
            seen = acting_cells(scene, h, w)[:frames]
            at_frame = len(self.ids("<0.2 seconds>")) + 2 + h * w
            cells = np.concatenate([k * at_frame + np.flatnonzero(part) for k, part in enumerate(seen)])
            # Of the prompt's visual part: an opening token, then each frame behind its time and its own opening token.
            cells += len(self.ids("<0.2 seconds>")) + 1
            yield from ((at, cells) for at in range(len(answer) - 1) if len(cells))
            return
        icons = [np.flatnonzero(cells_under(icon, scene, h, w)) for icon in scene.icons]
        sx, sy = w / scene.image.width, h / scene.image.height
        glyphs = iter([min(h - 1, int(g.y * sy)) * w + min(w - 1, int(g.x * sx)) for g in scene.glyphs])
        icon = -1
        for at, token in enumerate(answer):
            word = self.tokenizer.decode([token]).strip()
            if len(word) == 1 and word in CHARS:
                yield at, np.array([next(glyphs)])
            elif word in COLORS and icons:
                icon += 1
                yield at, icons[icon]
            elif BIN.fullmatch(word) and icons:
                yield at, icons[icon + 1]
            elif (word in SHAPES or word in PLACE_WORDS) and icons:
                yield at, icons[icon]


def question(scene: Scene, rng: random.Random | None = None) -> tuple[str, str]:
    """A prompt and its answer: the scene's own task, or now and then another one that can be asked of it."""
    task = scene.task
    if rng is not None and rng.random() < 0.15:
        task = rng.choice(list(scene.answers))
    return PROMPTS[task], scene.answers[task]
