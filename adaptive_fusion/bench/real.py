"""What policies keep of real images and what they spend: text by a real reader, objects by their boxes, answers.

Knows sources, readers and plans, and brings them together into cases. Must not know how rows are compared or drawn.

Readings are what takes time, about 2.5 seconds each on one core: of an image its native size, those of a bisection for
the smallest share that is sufficient, and the sizes that policies plan. A reader that keeps its readings makes a run
that was stopped go on where it was.
"""

import io
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from PIL import Image

from adaptive_fusion.bench.real_plans import Plan, Planners
from adaptive_fusion.bench.real_ranks import ranking
from adaptive_fusion.bench.real_rows import QUARTER, SQUEEZER, Case, Loss, Objects, Row, Seen, all_rows, summary, versus
from adaptive_fusion.errors import ConfigError, MediaError
from adaptive_fusion.evaluation.folders import Failed
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
from adaptive_fusion.evaluation.truth import Item, Source
from adaptive_fusion.execution.oom import of_one_item
from adaptive_fusion.features.complexity import measure_complexity
from adaptive_fusion.media.clips import Video
from adaptive_fusion.media.load import load_media
from adaptive_fusion.policy.policy import Policy
from adaptive_fusion.progress import Progress, Steps, silent

TEXT, OBJECTS, ANSWERS = "text", "objects", "answers"
READ, DESCRIBE = "Read all the text in the image.", "Describe the image."
GENERAL = ("balanced", "latency", "quality")
"""Policies that are judged if none is named."""

MOST_LOST = 60
"""Words or objects that are named of what is lost of an image."""

Words = Counter[str]


@dataclass
class Cases:
    """What was measured: cases by what is kept in them.

    `failed` are inputs that failed, each with the reason, `unsqueezed` those that only vision-squeezer failed on;
    `nothing` counts, by source, the images without anything to judge.
    """

    found: dict[str, list[Case]] = field(default_factory=dict)
    failed: Failed = field(default_factory=list)
    nothing: Counter[str] = field(default_factory=Counter)
    unsqueezed: Failed = field(default_factory=list)


def needs_reader(sources: Sequence[Source]) -> bool:
    """Whether any of the sources is judged by text."""
    return not all(source.pictured for source in sources)


def question_for(source: Source, prompt: str | None) -> str:
    """What is asked about each image of a source: `prompt`, or by its kind to describe the image or to read it."""
    return prompt if prompt is not None else DESCRIBE if source.pictured else READ


def measure(
    sources: Sequence[Source],
    policies: Mapping[str, Policy],
    reader: Reader | None,
    *,
    images: int,
    prompt: str | None = None,
    progress: Progress = silent,
) -> Cases:
    """Plan and read the first `images` of each source.

    An image that is refused or runs out of memory is named in `failed`, and the others go on.

    Raises:
        ConfigError: If no image could be measured.
    """
    planners, squeeze, cases = Planners(policies), squeezer(), Cases()
    work = [(source, item) for source in sources for item in source.items[:images]]
    steps = Steps(progress, "images", len(work))
    for source, item in work:
        try:
            one = _Image(item, planners, tuple(policies), reader, squeeze)
            found = dict(one.cases(question_for(source, prompt), source.pictured))
        except Exception as error:
            cases.failed.append((f"{item.source}/{item.path.name}", str(of_one_item(error))))
        else:
            cases.unsqueezed += [(f"{item.source}/{item.path.name}", why) for why in one.unsqueezed]
            for what, several in found.items():
                if several:
                    cases.found.setdefault(what, []).extend(several)
            if not any(found.values()):
                cases.nothing[item.source] += 1
        steps.advance()
    if not cases.found:
        why = "; ".join(f"{name}: {why}" for name, why in cases.failed)[:500] or "no text and no objects on them"
        raise ConfigError(f"none of {len(work)} images could be measured: {why}")
    return cases


def judge(
    cases: Cases,
    policies: Sequence[str],
    *,
    exact: bool = False,
    reader: Reader | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Rows over all cases and by source, policies beside their fixed rows, and ranks, as plain values.

    Args:
        cases: From `measure`.
        policies: Their names.
        exact: Read what fixed rows show of each image, in place of taking it off the curve of what was read.
        reader: For `exact`.
        progress: See `Progress`.
    """
    kinds = {}
    for what, some in cases.found.items():
        rows = all_rows(some, policies)
        if exact and reader is not None:
            rows = read_rows(rows, some, reader, progress)
        by_source: dict[str, list[int]] = {}
        for index, case in enumerate(some):
            by_source.setdefault(case.source, []).append(index)
        kinds[what] = {
            "rows": [summary(row, some) for row in rows],
            "versus": versus(rows, some),
            "sources": {source: [summary(row, some, own) for row in rows] for source, own in by_source.items()},
        }
    return {"kinds": kinds, "ranking": ranking(cases.found, policies)}


def read_rows(rows: Sequence[Row], cases: Sequence[Case], reader: Reader, progress: Progress = silent) -> list[Row]:
    """The rows with all that was taken off a curve read at its size."""
    again = {row: list(row.seen) for row in rows}
    wanted = [i for i in range(len(cases)) if any(not row.seen[i].measured for row in rows)]
    steps = Steps(progress, "fixed rows", len(wanted))
    for index in wanted:
        case = cases[index]
        image, memo = load_media(case.path), dict[Sides, Words]()
        for row in rows:
            seen = row.seen[index]
            if seen.measured or case.read is None or isinstance(image, Video):
                continue
            sides = within(case.file, seen.pixels)
            if sides not in memo:
                memo[sides] = words(line.text for line in reader.read(shown(image, sides)))
            kept, answers = case.read(memo[sides])
            again[row][index] = replace(seen, kept=kept, answers=answers, measured=True)
        steps.advance()
    return [replace(row, seen=tuple(again[row])) for row in rows]


@dataclass(frozen=True)
class Bad:
    """A case of a policy that keeps little."""

    what: str
    policy: str
    case: Case

    @property
    def seen(self) -> Seen:
        return self.case.seen[self.policy]

    @property
    def loss(self) -> Loss:
        return self.case.losses[self.policy]

    def to_dict(self) -> dict[str, Any]:
        """Plain values; of what is lost, the beginning."""
        return {
            "source": self.case.source,
            "file": self.case.path.name,
            "what": self.what,
            "policy": self.policy,
            "kept": self.seen.kept,
            "share": self.seen.share,
            "lost": list(self.loss.lost[:MOST_LOST]),
        }


def worst(cases: Cases, policy: str, count: int) -> list[Bad]:
    """The images that a policy keeps least of, at most `count`; none that it keeps all of."""
    bad = [Bad(what, policy, case) for what in (TEXT, OBJECTS) for case in cases.found.get(what, ())]
    bad = [one for one in bad if one.seen.kept < 1.0]
    return sorted(bad, key=lambda one: (one.seen.kept, one.case.source, one.case.path.name))[:count]


class _Image:
    """One image on its way to cases; each size of it is read once."""

    def __init__(
        self,
        item: Item,
        planners: Planners,
        policies: tuple[str, ...],
        reader: Reader | None,
        squeeze: "Callable[[bytes, bool], Image.Image] | None",
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


def squeezer() -> "Callable[[bytes, bool], Image.Image] | None":
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
