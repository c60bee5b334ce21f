"""Every row's answer to every question: which rows there are, in which order they run, what is kept of each.

Knows adapters, questions and single trials. Must not know what an answer is worth.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from adaptive_fusion.decisions import Decision, Measurement
from adaptive_fusion.errors import ConfigError
from adaptive_fusion.evaluation.likelihood import Likelihood, after_prompt
from adaptive_fusion.evaluation.questions import Question
from adaptive_fusion.execution.meters import Meter, meter_for
from adaptive_fusion.execution.request import ChatRequest, build_request
from adaptive_fusion.execution.timed import Encoding, TimedModel, until_end
from adaptive_fusion.fusion import DeepStackFusion, FusionSpec
from adaptive_fusion.models import Adapter
from adaptive_fusion.point import OperatingPoint
from adaptive_fusion.policy.policy import SIMPLE, Policy
from adaptive_fusion.policy.rungs import Rung
from adaptive_fusion.progress import Progress, Steps, silent

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
    questions: Sequence[Question],
    rows: Mapping[str, Rung],
    decide: Decide | None = None,
    *,
    max_new_tokens: int = 160,
    progress: Progress = silent,
) -> dict[str, list[Answer]]:
    """Every row's answer to every question, plus `shuffled` and `chance`.

    Rows take turns on each question, in an order that rotates, so that a slow minute of the machine falls on all
    of them. Each (question, row) is encoded once. `shuffled` scores native's answers (and captions) on another
    image of the same slice; `chance` is that other image's own right answer.

    Args:
        decide: Gives the decision for a medium and a prompt; adds the row `adaptive`, its time included.
        progress: See `Progress`; a step is one row's answer to one question.
    """
    names = [*rows, *([ADAPTIVE] if decide else [])]
    timed, meter = TimedModel(adapter), meter_for(str(adapter.model.device))
    partners = _partners(questions)
    answers: dict[str, dict[int, Answer]] = {name: {} for name in names}
    shuffled: dict[int, Answer] = {}
    _warm_up(timed, questions[0], rows, decide, meter)
    steps = Steps(progress, "answer", len(questions) * len(names))
    for index, question in enumerate(questions):
        request = build_request(question.load(), question.prompt)
        turn = index % len(names)
        for name in (*names[turn:], *names[:turn]):
            other = questions[partners[index]] if name == NATIVE else None
            answer, swapped = _answer(timed, request, question, rows.get(name), decide, meter, max_new_tokens, other)
            answers[name][index] = answer
            if swapped is not None:
                shuffled[partners[index]] = swapped
            steps.advance()
    result = {name: [answers[name][i] for i in range(len(questions))] for name in names}
    if shuffled:
        result[SHUFFLED] = [shuffled[i] for i in range(len(questions))]
    back = {partner: index for index, partner in enumerate(partners)}
    result[CHANCE] = [Answer(questions[back[i]].references[0]) for i in range(len(questions))]
    return result


def _partners(questions: Sequence[Question]) -> list[int]:
    """For each question the next one of its slice, the last one's being the first."""
    members: dict[str, list[int]] = {}
    for index, question in enumerate(questions):
        members.setdefault(question.slice, []).append(index)
    partners = [0] * len(questions)
    for group in members.values():
        for here, there in zip(group, (*group[1:], group[0]), strict=True):
            partners[here] = there
    return partners


def _warm_up(
    timed: TimedModel, question: Question, rows: Mapping[str, Rung], decide: Decide | None, meter: Meter
) -> None:
    """Everything once, so that no row pays for building its fusion module or for first calls."""
    request = build_request(question.load(), question.prompt)
    for rung in rows.values():
        point = timed.adapter.resolve(rung, request.sizes)
        prepare = partial(timed.adapter.prepare, request.messages, point)
        timed.request(prepare, point, meter, max_new_tokens=2, do_sample=False)
    if decide is not None:
        decide(request.media[0], question.prompt)


def _answer(
    timed: TimedModel,
    request: ChatRequest,
    question: Question,
    rung: Rung | None,
    decide: Decide | None,
    meter: Meter,
    max_new_tokens: int,
    other: Question | None,
) -> tuple[Answer, Answer | None]:
    """One row's answer to `question`; with `other`, what the same image makes of that question's captions as well."""
    adapter, earlier = timed.adapter, 0.0
    if rung is not None:
        point = adapter.resolve(rung, request.sizes)
    else:
        assert decide is not None  # rows without a rung are the adaptive one
        began = timed.clock()
        point = decide(request.media[0], question.prompt).point
        earlier = (timed.clock() - began) * 1e3
    prepare = partial(adapter.prepare, request.messages, point)
    options = {"max_new_tokens": max_new_tokens, "do_sample": False}
    done, measurement = timed.request(prepare, point, meter, earlier_ms=earlier, **options)
    new = until_end(done.new_tokens[0].tolist(), adapter.end_tokens)
    text = adapter.processor.tokenizer.decode(new, skip_special_tokens=True).strip()
    own = _captions(timed, done.encoding, question)
    answer = Answer(text, tuple(each.total for each in own), own[0].ranked_first, measurement)
    if other is None:
        return answer, None
    theirs = _captions(timed, done.encoding, other)
    return answer, Answer(text, tuple(each.total for each in theirs), theirs[0].ranked_first)


def _captions(timed: TimedModel, encoding: Encoding, question: Question) -> list[Likelihood]:
    """How likely the question's first reference and its negatives are as the answer, each with the end token."""
    tokenizer = timed.adapter.processor.tokenizer
    texts = (question.references[0], *question.negatives)
    rows = [[*tokenizer(text, add_special_tokens=False).input_ids, int(tokenizer.eos_token_id)] for text in texts]
    prompt, _ = timed.prefill(encoding)
    return after_prompt(timed.adapter.model, prompt, rows)
