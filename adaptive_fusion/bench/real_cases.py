"""One real image on its way to the cases of the benchmark: planned, read at every size that is asked for, judged.

Knows an item of a source, a reader, plans and vision-squeezer where it is installed. Must not know of other images, nor
how rows are compared.
"""

import io
import math
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from PIL import Image

from adaptive_fusion.bench.real_plans import Plan, Planners
from adaptive_fusion.bench.real_rows import QUARTER, SQUEEZER, Case, Loss, Objects, Seen
from adaptive_fusion.errors import ConfigError, MediaError
from adaptive_fusion.evaluation.readers import Line, Reader, characters, is_legible, text_kept, words
from adaptive_fusion.evaluation.shares import (
    LEAST_CHARACTERS,
    RELEASED,
    TOKEN_PIXELS,
    Curve,
    Sides,
    shares_to_read,
    shown,
    sized,
    within,
)
from adaptive_fusion.evaluation.truth import Item
from adaptive_fusion.features.complexity import measure_complexity
from adaptive_fusion.media.clips import Video
from adaptive_fusion.media.load import load_media

TEXT, OBJECTS, ANSWERS = "text", "objects", "answers"
"""What can be kept of an image."""

Words = Counter[str]
Squeeze = Callable[[bytes, bool], Image.Image]


class RealImage:
    """An image whose every size is read once.

    Args:
        item: Its file and truth.
        planners: Of the policies that are judged.
        policies: Their names.
        reader: None where only objects are judged.
        squeeze: See `squeezer`.

    Raises:
        MediaError: For a file that is no image.
    """

    def __init__(
        self,
        item: Item,
        planners: Planners,
        policies: tuple[str, ...],
        reader: Reader | None,
        squeeze: Squeeze | None,
    ) -> None:
        image = load_media(item.path)
        if isinstance(image, Video):
            raise MediaError("is a clip; expected an image")
        self.item, self.image, self.unsqueezed = item, image, list[str]()
        self.native, self.complexity = within(image.size), measure_complexity(image)
        self._planners, self._policies, self._reader, self._squeeze = planners, policies, reader, squeeze
        self._lines: dict[Sides, tuple[Line, ...]] = {}

    def cases(self, prompt: str, pictured: bool) -> Iterator[tuple[str, list[Case]]]:
        """The image's cases, by what is kept in them."""
        if pictured:
            yield OBJECTS, self._objects(prompt)
        elif characters(self._words(self.native)).total() >= LEAST_CHARACTERS:
            yield TEXT, [self._text(prompt)]
            yield ANSWERS, self._answers()

    def _objects(self, prompt: str) -> list[Case]:
        scale = math.sqrt(math.prod(self.native) / math.prod(self.image.size))
        things = [(t.name, min(t.width, t.height) * scale) for t in self.item.things]
        things = [(name, side) for name, side in things if side >= RELEASED.patch_size]
        if not things:
            return []
        kept = Objects([side for _, side in things])
        seen, losses = {}, {}
        for policy, plan in self._plans(prompt).items():
            seen[policy] = self._seen(plan, lambda share: float(kept.at(share)))
            small = math.sqrt(seen[policy].share)
            losses[policy] = Loss(tuple(name for name, side in things if side * small < RELEASED.patch_size))
        squeezed = self._squeezed(crop=False)
        if squeezed is not None:
            seen[SQUEEZER] = self._seen(_as_sent(squeezed), lambda share: float(kept.at(share)))
        return [self._case(prompt, kept=kept, seen=seen, losses=losses, weight=float(len(things)))]

    def _text(self, prompt: str) -> Case:
        before = self._words(self.native)
        legible = [answer for _, answer in self.item.qa if is_legible(answer, before)]

        def read(after: Words) -> tuple[float, float | None]:
            answered = sum(is_legible(answer, after) for answer in legible) / len(legible) if legible else None
            return text_kept(before, after), answered

        steps = {1.0: 1.0}
        for share in shares_to_read(steps):
            steps[share], _ = read(self._words(sized(self.image.size, share)))
        seen, losses = {}, {}
        for policy, plan in self._plans(prompt).items():
            seen[policy] = self._read_seen(plan, read)
            losses[policy] = self._loss(before, plan.seen)
        squeezed = self._squeezed(crop=True)
        if squeezed is not None:
            sent = _as_sent(squeezed)
            after = words(line.text for line in self._read(_scaled_up(squeezed, sent.seen, self.native)))
            seen[SQUEEZER] = self._seen(sent, lambda _: read(after)[0], read(after)[1])
        found = {share: read(after) for share, after in self._all_read().items()}
        kept = Curve({share: part for share, (part, _) in found.items()})
        answers = Curve({share: part or 0.0 for share, (_, part) in found.items()}) if legible else None
        more: dict[str, Any] = {"legible": len(legible), "answers": answers, "read": read}
        return self._case(prompt, kept=kept, seen=seen, losses=losses, **more)

    def _answers(self) -> list[Case]:
        """A case for each known question whose answer can be read natively: whether it still can."""
        before, found = self._words(self.native), []
        for question, answer in dict.fromkeys(self.item.qa):
            if not is_legible(answer, before):
                continue

            def read(after: Words, answer: str = answer) -> tuple[float, float | None]:
                return float(is_legible(answer, after)), None

            seen = {policy: self._read_seen(plan, read) for policy, plan in self._plans(question).items()}
            found.append((question, read, seen))
        cases = []
        for question, read, seen in found:  # now that all sizes are read, each question's curve has them all
            kept = Curve({share: read(after)[0] for share, after in self._all_read().items()})
            cases.append(self._case(question, kept=kept, seen=seen, read=read))
        return cases

    def _case(self, question: str, **fields: Any) -> Case:
        item, entropy = self.item, self.complexity.features["grey_entropy"]
        quarter = math.prod(sized(self.image.size, QUARTER)) / math.prod(self.native)
        expected = {
            policy: self._planners.expected_loss(policy, self.image.size, self.complexity, question, quarter)
            for policy in self._policies
        }
        return Case(item.source, item.path, self.image.size, question, expected=expected, entropy=entropy, **fields)

    def _plans(self, prompt: str) -> dict[str, Plan]:
        size, complexity = self.image.size, self.complexity
        return {policy: self._planners.plan(policy, size, complexity, prompt) for policy in self._policies}

    def _seen(self, plan: Plan, kept: Callable[[float], float], answers: float | None = None) -> Seen:
        share = math.prod(plan.seen) / math.prod(self.native)
        return Seen(share, plan.pixels, plan.tokens, kept(share), answers)

    def _read_seen(self, plan: Plan, read: Callable[[Words], tuple[float, float | None]]) -> Seen:
        kept, answers = read(self._words(plan.seen))
        return self._seen(plan, lambda _: kept, answers)

    def _loss(self, before: Words, small: Sides) -> Loss:
        """Words that are not read again at these sides, and the line that has most of them."""
        lost = before - self._words(small)
        lines = [(sum(lost[word] > 0 for word in words([line.text])), line) for line in self._lines[self.native]]
        count, line = max(lines, key=lambda pair: pair[0], default=(0, None))
        place = None
        if count and line is not None and line.corners:
            xs, ys = zip(*line.corners, strict=True)
            place = min(xs), min(ys), max(xs), max(ys)
        return Loss(tuple(lost.elements()), place)

    def _all_read(self) -> dict[float, Words]:
        """The words of all sizes that were read, by their share of the native pixels."""
        return {math.prod(small) / math.prod(self.native): self._words(small) for small in self._lines}

    def _words(self, small: Sides) -> Words:
        if small not in self._lines:
            self._lines[small] = self._read(shown(self.image, small))
        return words(line.text for line in self._lines[small])

    def _read(self, pixels: Any) -> tuple[Line, ...]:
        if self._reader is None:
            raise ConfigError("this image is judged by its text, and there is no reader")
        return self._reader.read(pixels)

    def _squeezed(self, crop: bool) -> Image.Image | None:
        if self._squeeze is None:
            return None
        try:
            return self._squeeze(self.item.path.read_bytes(), crop)
        except Exception as error:  # another package's, whatever it is: the image itself is in order
            self.unsqueezed.append(f"{type(error).__name__}: {error}")
            return None


def squeezer() -> Squeeze | None:
    """What vision-squeezer makes of an encoded image (cropped or not), or None where it is not installed.

    Its default settings for models whose cost goes by area (``claude``), as that of the released models does.
    """
    try:
        from vision_squeezer import optimize_image
    except ImportError:
        return None

    def squeeze(encoded: bytes, crop: bool) -> Image.Image:
        made = optimize_image(encoded, model="claude", crop=crop)["bytes"]
        return Image.open(io.BytesIO(made)).convert("RGB")

    return squeeze


def _as_sent(picture: Image.Image) -> Plan:
    """A picture that is sent in place of the image, as the released processor takes it."""
    sides = within(picture.size)
    pixels = math.prod(sides)
    return Plan(sides, pixels, pixels // TOKEN_PIXELS, SQUEEZER, "", "")


def _scaled_up(picture: Image.Image, seen: Sides, native: Sides) -> Any:
    """(H, W, 3) uint8 RGB: the picture at the sides `seen`, scaled up to as many pixels as are native."""
    scale = max(1.0, math.sqrt(math.prod(native) / math.prod(seen)))
    up = round(seen[0] * scale), round(seen[1] * scale)
    small = picture.resize(seen, Image.Resampling.BICUBIC)
    return np.asarray(small.resize(up, Image.Resampling.BICUBIC))
