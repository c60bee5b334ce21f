"""What policies keep of real images and what they spend: text by a real reader, objects by their boxes, answers.

Goes through sources, one image after the other, and brings the cases together. Must not know how rows are drawn.

Readings are what takes time, about 2.5 seconds each on one core: of an image its native size, those of a bisection for
the smallest share that is sufficient, and the sizes that policies plan. A reader that keeps its readings makes a run
that was stopped go on where it was.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from adaptive_fusion.bench.real_cases import OBJECTS, TEXT, RealImage, Words, squeezer
from adaptive_fusion.bench.real_plans import Planners
from adaptive_fusion.bench.real_ranks import ranking
from adaptive_fusion.bench.real_rows import Case, Loss, Row, Seen, all_rows, summary, versus
from adaptive_fusion.errors import ConfigError
from adaptive_fusion.evaluation.folders import Failed
from adaptive_fusion.evaluation.readers import Reader, words
from adaptive_fusion.evaluation.shares import Sides, shown, within
from adaptive_fusion.evaluation.truth import Source
from adaptive_fusion.execution.oom import of_one_item
from adaptive_fusion.media.clips import Video
from adaptive_fusion.media.load import load_media
from adaptive_fusion.policy.policy import Policy
from adaptive_fusion.progress import Progress, Steps, silent

READ, DESCRIBE = "Read all the text in the image.", "Describe the image."
GENERAL = ("balanced", "latency", "quality")
"""Policies that are judged if none is named."""

MOST_LOST = 60
"""Words or objects that are named of what is lost of an image."""


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
            one = RealImage(item, planners, tuple(policies), reader, squeeze)
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
