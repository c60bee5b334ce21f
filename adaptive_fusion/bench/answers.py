"""Every row's answer to every question: which rows there are, in which order they run, what is kept of each.

Knows adapters, questions and single trials. Must not know what an answer is worth.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from adaptive_fusion.bench.scenes import Item
from adaptive_fusion.bench.trial import caption_likelihood, run_request
from adaptive_fusion.chat import ChatRequest, build_request
from adaptive_fusion.decisions import Decision, Measurement
from adaptive_fusion.errors import ConfigError
from adaptive_fusion.fusion import DeepStackFusion, FusionSpec
from adaptive_fusion.ladder import Rung
from adaptive_fusion.meters import Meter, meter_for
from adaptive_fusion.models import Adapter
from adaptive_fusion.point import OperatingPoint
from adaptive_fusion.policy import SIMPLE, Policy

Decide = Callable[[Any, str], Decision]

NATIVE, ADAPTIVE, SHUFFLED, CHANCE = "native@1", "adaptive", "shuffled", "chance"
RATIOS = (1.0, 0.5, 0.25)


def gated(ratio: float = 1.0) -> Rung:
    """`gated` at its fullest: 12 levels, adapters of rank 8."""
    return Rung(OperatingPoint("gated", 12, ratio, adapter_rank=8))


def weighted(ratio: float = 1.0) -> Rung:
    """`weighted` at its usual size: 6 levels, adapters of rank 4."""
    return Rung(OperatingPoint("weighted", 6, ratio, adapter_rank=4))


def native(ratio: float = 1.0) -> Rung:
    """The model's own taps."""
    return Rung(OperatingPoint(downsample=ratio))


TOP, SUM = Rung(OperatingPoint("top")), Rung(OperatingPoint("sum", 12))
ROWS = (*(kind(ratio) for ratio in RATIOS for kind in (native, gated, weighted)), TOP, SUM)
KNOB_ROWS = (*map(native, RATIOS), TOP)


@dataclass(frozen=True)
class Answer:
    """What one row made of one question; `measurement` is None where no request ran (shuffled, chance)."""

    text: str
    likelihoods: tuple[float, ...] = ()
    token_accuracy: float | None = None
    measurement: Measurement | None = None


def rows_for(adapter: Adapter, rungs: Sequence[Rung]) -> dict[str, Rung]:
    """Native and those of `rungs` that this model can run as they are, by name, each once."""
    return {rung.name: rung for rung in (native(), *rungs) if not adapter.restrict(rung.point)[1]}


def cheap_rung(adapter: Adapter, policy: Policy) -> Rung:
    """Where the policy's lane for simple images begins, as far as this model can run it."""
    rung = policy.lanes[SIMPLE][0]
    return replace(rung, point=adapter.restrict(rung.point)[0])


def use_weights(adapter: Adapter, rungs: Iterable[Rung], files: Sequence[Path]) -> None:
    """Let the rungs run the trained fusion modules in `files`.

    Raises:
        ConfigError: For a file that is no fusion module, or one that none of the rungs runs.
    """
    specs = {fusion.spec for rung in rungs if (fusion := adapter.fusion(rung.point)) is not None}
    for file in files:
        module = DeepStackFusion.from_file(file)
        if module.spec not in specs:
            raise ConfigError(f"{Path(file).name} holds {module.spec}; no row runs that")
        adapter.add_fusion(module)


def trained_rows(adapter: Adapter, rows: Mapping[str, Rung], files: Sequence[Path]) -> dict[str, str]:
    """The file that each row's fusion comes from, the last of `files` that fits; untrained rows are left out."""
    names = {FusionSpec.read(file): Path(file).name for file in files}
    fusions = {row: adapter.fusion(rung.point) for row, rung in rows.items()}
    return {row: names[fusion.spec] for row, fusion in fusions.items() if fusion is not None and fusion.spec in names}


def answer_all(
    adapter: Adapter,
    items: Sequence[Item],
    rows: Mapping[str, Rung],
    decide: Decide | None = None,
    *,
    max_new_tokens: int = 160,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, list[Answer]]:
    """Every row's answer to every item, plus `shuffled` and `chance`.

    Rows take turns on each item, in an order that rotates, so that a slow minute of the machine falls on all
    of them. Each (item, row) is encoded once. `shuffled` scores native's answers (and captions) on another
    image of the same slice; `chance` is that other image's own right answer.

    Args:
        decide: Gives the decision for a medium and a prompt; adds the row `adaptive`, its time included.
        advance: Called after each (item, row).
    """
    names = [*rows, *([ADAPTIVE] if decide else [])]
    meter = meter_for(str(adapter.model.device))
    partners = _partners(items)
    answers: dict[str, dict[int, Answer]] = {name: {} for name in names}
    shuffled: dict[int, Answer] = {}
    _warm_up(adapter, items[0], rows, decide, meter)
    for index, item in enumerate(items):
        request = build_request(item.media, item.prompt)
        turn = index % len(names)
        for name in (*names[turn:], *names[:turn]):
            other = items[partners[index]] if name == NATIVE else None
            answer, swapped = _answer(adapter, request, item, rows.get(name), decide, meter, max_new_tokens, other)
            answers[name][index] = answer
            if swapped is not None:
                shuffled[partners[index]] = swapped
            advance()
    result = {name: [answers[name][i] for i in range(len(items))] for name in names}
    if shuffled:
        result[SHUFFLED] = [shuffled[i] for i in range(len(items))]
    back = {partner: index for index, partner in enumerate(partners)}
    result[CHANCE] = [Answer(items[back[i]].references[0]) for i in range(len(items))]
    return result


def _partners(items: Sequence[Item]) -> list[int]:
    """For each item the next one of its slice, the last one's being the first."""
    members: dict[str, list[int]] = {}
    for index, item in enumerate(items):
        members.setdefault(item.slice, []).append(index)
    partners = [0] * len(items)
    for group in members.values():
        for here, there in zip(group, (*group[1:], group[0]), strict=True):
            partners[here] = there
    return partners


def _warm_up(adapter: Adapter, item: Item, rows: Mapping[str, Rung], decide: Decide | None, meter: Meter) -> None:
    """Everything once, so that no row pays for building its fusion module or for first calls."""
    request = build_request(item.media, item.prompt)
    for rung in rows.values():
        point = _resolved(adapter, request, rung)
        run_request(adapter, partial(adapter.prepare, request.messages, point), point, meter, max_new_tokens=2)
    if decide is not None:
        decide(request.media[0], item.prompt)


def _resolved(adapter: Adapter, request: ChatRequest, rung: Rung) -> OperatingPoint:
    return rung.resolve(max(adapter.native_pixels(size) for size in request.sizes))


def _answer(
    adapter: Adapter,
    request: ChatRequest,
    item: Item,
    rung: Rung | None,
    decide: Decide | None,
    meter: Meter,
    max_new_tokens: int,
    other: Item | None,
) -> tuple[Answer, Answer | None]:
    """One row's answer to `item`; with `other`, what the same image makes of that item's captions as well."""
    earlier = 0.0
    if rung is not None:
        point = _resolved(adapter, request, rung)
    else:
        assert decide is not None  # rows without a rung are the adaptive one
        began = time.perf_counter()
        point = decide(request.media[0], item.prompt).point
        earlier = (time.perf_counter() - began) * 1e3
    prepare = partial(adapter.prepare, request.messages, point)
    outcome = run_request(adapter, prepare, point, meter, max_new_tokens=max_new_tokens, earlier_ms=earlier)
    text = adapter.processor.tokenizer.decode(outcome.tokens, skip_special_tokens=True).strip()
    likely, right = caption_likelihood(adapter, outcome.encoded, (item.references[0], *item.negatives))
    answer = Answer(text, tuple(likely), right[0], outcome.measurement)
    if other is None:
        return answer, None
    likely, right = caption_likelihood(adapter, outcome.encoded, (other.references[0], *other.negatives))
    return answer, Answer(text, tuple(likely), right[0])
