"""Every row's answer to every question: which rows there are, in which order they run, what is kept of each.

Knows adapters, questions and single trials. Must not know what an answer is worth.
"""

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from adaptive_fusion.checks import whole_characters
from adaptive_fusion.decisions import Decision, Measurement
from adaptive_fusion.errors import ConfigError
from adaptive_fusion.evaluation.likelihood import Likelihood, after_prompt
from adaptive_fusion.evaluation.questions import Question
from adaptive_fusion.execution.meters import meter_for
from adaptive_fusion.execution.oom import of_one_item
from adaptive_fusion.execution.request import ChatRequest, build_request
from adaptive_fusion.execution.timed import Encoding, TimedModel, until_end
from adaptive_fusion.fusion import DeepStackFusion, FusionSpec, served
from adaptive_fusion.models import Adapter
from adaptive_fusion.point import OperatingPoint
from adaptive_fusion.policy.policy import Policy
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


@dataclass(frozen=True)
class Answered:
    """Answers by row to `questions`; `failed` has the name of each other question and what was wrong."""

    answers: dict[str, list[Answer]]
    questions: list[Question]
    failed: list[tuple[str, str]]


def rows_for(adapter: Adapter, rungs: Sequence[Rung]) -> dict[str, Rung]:
    """Native and those of `rungs` that this model can run as they are, by name, each once."""
    return {rung.name: rung for rung in (native(), *rungs) if not adapter.restrict(rung.point)[1]}


def cheap_rung(adapter: Adapter, policy: Policy) -> Rung:
    """The policy's cheap plan, as far as this model can run it."""
    rung = policy.cheap_rung
    return replace(rung, point=adapter.restrict(rung.point)[0])


def use_weights(adapter: Adapter, rungs: Iterable[Rung], files: Sequence[Path]) -> None:
    """Let the rungs run the trained fusion modules in `files`.

    Raises:
        ConfigError: For a file that is no fusion module, or one that none of the rungs runs.
    """
    specs = {adapter.spec(rung.point) for rung in rungs}
    for file in files:
        module = DeepStackFusion.from_file(file)
        if not specs & served(module.spec):
            raise ConfigError(f"{Path(file).name} holds {module.spec}; no row runs that")
        adapter.add_fusion(module)


def trained_rows(adapter: Adapter, rows: Mapping[str, Rung], files: Sequence[Path]) -> dict[str, str]:
    """The file that each row's fusion comes from, the last of `files` that fits; untrained rows are left out."""
    names = {spec: Path(file).name for file in files for spec in served(FusionSpec.read(file))}
    specs = {row: adapter.spec(rung.point) for row, rung in rows.items()}
    return {row: names[spec] for row, spec in specs.items() if spec is not None and spec in names}


def answer_all(
    adapter: Adapter,
    questions: Sequence[Question],
    rows: Mapping[str, Rung],
    decide: Decide | None = None,
    *,
    max_new_tokens: int = 160,
    progress: Progress = silent,
) -> Answered:
    """Every row's answer to every question, plus `shuffled` and `chance`.

    Rows take turns on each question, in an order that rotates, so that a slow minute of the machine falls on all
    of them. Each (question, row) is encoded once. `shuffled` scores native's answers (and captions) on another
    image of the same slice; `chance` is that other image's own right answer. A question that is refused or runs out of
    memory is left out of all rows, and named.

    Args:
        decide: Gives the decision for a medium and a prompt; adds the row `adaptive`, its time included.
        progress: See `Progress`; a step is one row's answer to one question.

    Raises:
        ConfigError: If fewer than two questions are left: a shuffled pair needs two.
    """
    run = _Rows(adapter, rows, decide, max_new_tokens)
    failed = {index: why for index, question in enumerate(questions) if (why := _wrong_text(question)) is not None}
    partners = _partners(questions, failed)
    answers: dict[str, dict[int, Answer]] = {name: {} for name in run.names}
    shuffled: dict[tuple[int, int], Answer] = {}
    steps = Steps(progress, "answer", len(questions) * len(run.names))
    for index, question in enumerate(questions):
        left = len(run.names)
        try:
            if index not in failed:
                for name, answer, swapped in run.answers(index, question, questions[partners[index]]):
                    answers[name][index] = answer
                    if swapped is not None:
                        shuffled[index, partners[index]] = swapped
                    left -= 1
                    steps.advance()
        except Exception as error:
            failed[index] = str(of_one_item(error))
        for _ in range(left):
            steps.advance()
    kept = [index for index in range(len(questions)) if index not in failed]
    if len(kept) < 2:
        why = "; ".join(failed.values())[:500]
        raise ConfigError(f"{len(kept)} of {len(questions)} questions could be answered, expected at least 2: {why}")
    result = {name: [answers[name][i] for i in kept] for name in run.names}
    # Whoever lost its partner has the next one of its slice.
    before = {there: here for here, there in _partners(questions, failed).items()}
    if NATIVE in rows:
        for there, here in before.items():
            if (here, there) not in shuffled:
                shuffled[here, there] = run.swapped(questions[here], questions[there])
        result[SHUFFLED] = [shuffled[before[i], i] for i in kept]
    result[CHANCE] = [Answer(questions[before[i]].references[0]) for i in kept]
    named = [(questions[i].name, why) for i, why in sorted(failed.items())]
    return Answered(result, [questions[i] for i in kept], named)


def _wrong_text(question: Question) -> str | None:
    """What is wrong with a question's texts; the model reads those of another question beside its own."""
    try:
        for text in (question.prompt, *question.references, *question.negatives):
            whole_characters(text, "a question or its right answer")
    except ConfigError as error:
        return str(error)
    return None


def _partners(questions: Sequence[Question], without: Container[int] = ()) -> dict[int, int]:
    """For each question the next one of its slice, the last one's being the first; `without` some."""
    members: dict[str, list[int]] = {}
    for index, question in enumerate(questions):
        if index not in without:
            members.setdefault(question.slice, []).append(index)
    pairs = (zip(group, (*group[1:], group[0]), strict=True) for group in members.values())
    return dict(pair for group in pairs for pair in group)


class _Rows:
    """The rows of a table on one adapter."""

    def __init__(self, adapter: Adapter, rows: Mapping[str, Rung], decide: Decide | None, max_new_tokens: int) -> None:
        self.timed, self.meter = TimedModel(adapter), meter_for(str(adapter.device))
        self.rows, self.decide, self.max_new_tokens = rows, decide, max_new_tokens
        self.names = [*rows, *([ADAPTIVE] if decide else [])]
        self._warm = False

    def answers(self, index: int, question: Question, partner: Question) -> Iterator[tuple[str, Answer, Answer | None]]:
        """Every row's answer, in the order of question `index`; native's also with the partner's captions."""
        request = build_request(question.load(), question.prompt)
        if not self._warm:
            self._warm_up(request, question)
        turn = index % len(self.names)
        for name in (*self.names[turn:], *self.names[:turn]):
            yield name, *self._answer(name, request, question, partner if name == NATIVE else None)

    def swapped(self, question: Question, partner: Question) -> Answer:
        """What native makes of the partner's captions, seeing the media of `question`."""
        request = build_request(question.load(), question.prompt)
        answer, swapped = self._answer(NATIVE, request, question, partner)
        return swapped or answer

    def _warm_up(self, request: ChatRequest, question: Question) -> None:
        """Everything once, so that no row pays for building its fusion module or for first calls."""
        for rung in self.rows.values():
            point = self.timed.adapter.resolve(rung, request.sizes)
            prepare = partial(self.timed.adapter.prepare, request.messages, point)
            self.timed.request(prepare, point, self.meter, max_new_tokens=2, do_sample=False)
        if self.decide is not None:
            self.decide(request.media[0], question.prompt)
        self._warm = True

    def _answer(
        self, name: str, request: ChatRequest, question: Question, other: Question | None
    ) -> tuple[Answer, Answer | None]:
        """A row's answer to `question`; with `other`, what the same image makes of that question's captions as well."""
        timed, adapter, earlier = self.timed, self.timed.adapter, 0.0
        if name in self.rows:
            point = adapter.resolve(self.rows[name], request.sizes)
        else:
            assert self.decide is not None  # rows without a rung are the adaptive one
            began = timed.clock()
            point = self.decide(request.media[0], question.prompt).point
            earlier = (timed.clock() - began) * 1e3
        prepare = partial(adapter.prepare, request.messages, point)
        options = {"max_new_tokens": self.max_new_tokens, "do_sample": False}
        done, measurement = timed.request(prepare, point, self.meter, earlier_ms=earlier, **options)
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
    return after_prompt(timed.adapter.outer, prompt, rows)
