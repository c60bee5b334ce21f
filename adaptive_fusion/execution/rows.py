"""Several decided requests in one pass of the model, each a row that stops, streams, is cut off and cancelled alone.

Images are encoded one request after the other, each at its own point; prompts are padded on the left, and positions
follow from the attention mask, so that a row is what it would be alone. A row that has ended is handed out at once,
and leaves the batch, while the others go on; see `going`. Knows tasks and timed passes. Must not know which requests
are put together, or why.

transformers' own continuous batching would have its place in `run_rows`: as of 5.24 it takes token numbers alone
(``add_request(input_ids, ...)``), no encoder outputs, pixels or positions, so that images cannot come in.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StopStringCriteria

from adaptive_fusion.control.controller import Controller
from adaptive_fusion.decisions import Measurement
from adaptive_fusion.errors import InfeasibleBudgetError, OutOfMemoryError
from adaptive_fusion.execution.batches import together
from adaptive_fusion.execution.executor import Executor, Run, Task, Tries, deadline_s, release
from adaptive_fusion.execution.going import AGAIN, KEEPS_CACHE, Going
from adaptive_fusion.execution.oom import run_with_step_down
from adaptive_fusion.execution.timed import Encoding, TimedModel
from adaptive_fusion.models.caches import rows_part
from adaptive_fusion.point import OperatingPoint

LEFT = 8
"""Fewest tokens that may still come for which it pays to let a row leave: that takes about as long as a token."""
Passes = Callable[[Sequence[int]], Sequence[Sequence[int]]]
"""Which of prompts of these lengths are prefilled together, as places."""


@dataclass(frozen=True)
class Row:
    """One request of a batch.

    Attributes:
        task: What was decided. Its options are asked for once the prompt is known, and may refuse it.
        predict: What another point than the decided one would have been expected to take.
        most: Most new tokens of its answer.
        done: Called with its run as soon as it has ended, while others go on.
        failed: Called with what went wrong with it, in place of `done`.
        streamer: Given its prompt and its tokens as they come.
    """

    task: Task
    predict: Callable[[OperatingPoint], Any]
    most: int
    done: Callable[[Run], None]
    failed: Callable[[Exception], None]
    streamer: Any = None


@dataclass
class _Answer:
    """A row whose encoder has run, and what came of it so far; times in seconds on the clock."""

    row: Row
    tries: Tries
    encoding: Encoding
    deadline_s: float | None
    tokens: list[int] = field(default_factory=list)
    first_s: float = 0.0
    last_s: float = 0.0
    over: bool = False
    stopped_by: str | None = None

    def take(self, token: int, now: float, *, ends: bool) -> None:
        """The row's next token came; `ends` says that its answer ends with it."""
        # What comes before the second token is in part the prefill of others.
        step = now - self.last_s if len(self.tokens) > 1 else 0.0
        self.first_s = self.first_s if self.tokens else now
        self.last_s = now
        self.tokens.append(token)
        if self.row.streamer is not None:
            self.row.streamer.put(torch.tensor([token]))
        cancelled = self.row.task.cancelled
        if cancelled is not None and cancelled.is_set():
            self.stopped_by = "cancelled"
        elif self.deadline_s is not None and now + step > self.deadline_s:
            self.stopped_by = "deadline"
        self.over = ends or self.stopped_by is not None or len(self.tokens) >= self.row.most

    def run(self, began_s: float, encoded_s: float, peak_gb: float | None, rows: int) -> Run:
        """What came of it; the controller learns from it. What is encoded of others before its own prefill counts as
        its encoding."""
        arrived, encoding = self.row.task.arrived, self.encoding
        took = Measurement(
            preprocess_ms=(began_s - arrived) * 1e3,
            encode_ms=(encoded_s - began_s) * 1e3,
            prefill_ms=(self.first_s - encoded_s) * 1e3,
            decode_ms=(self.last_s - self.first_s) * 1e3,
            ttft_ms=(self.first_s - arrived) * 1e3,
            latency_ms=(self.last_s - arrived) * 1e3,
            visual_tokens=encoding.encoded.visual_tokens,
            prompt_tokens=encoding.length,
            new_tokens=len(self.tokens),
            patches=encoding.encoded.patches,
            peak_memory_gb=peak_gb or 0.0,
        )
        self.tries.learn(took, self.stopped_by)
        prompt = encoding.encoded.inputs["input_ids"]
        sequence = torch.cat([prompt, torch.tensor([self.tokens], dtype=prompt.dtype, device=prompt.device)], 1)
        decision = replace(self.tries.decision(), batch=rows)
        return Run(decision, took, sequence, encoding.length, self.stopped_by)


class _Ends(StoppingCriteria):  # type: ignore[misc]
    """Called after every token: tells each row its own, and which rows have ended.

    Args:
        answers: All rows.
        ends: Tokens that end an answer.
        strings: Finds strings that end one.
        clock: Seconds, monotonic.
        ended: Called with each row that ends.
        part: Whether a pass ends with a row that does, so that the others can go on without it.
    """

    def __init__(
        self,
        answers: Sequence[_Answer],
        ends: frozenset[int],
        strings: StoppingCriteria | None,
        clock: Callable[[], float],
        ended: Callable[[_Answer], None],
        *,
        part: bool,
    ) -> None:
        self._all, self._ends, self._strings, self._clock, self._ended = answers, ends, strings, clock, ended
        self._answers, self._part = answers, part

    def of(self, rows: Sequence[int]) -> "_Ends":
        """The same for a pass of some rows."""
        self._answers = [self._all[row] for row in rows]
        return self

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """``[rows]`` of bool: whether each must end."""
        tokens = input_ids[:, -1].tolist()  # also waits for the device, so that the time is honest
        found = [False] * len(tokens) if self._strings is None else self._strings(input_ids, scores).tolist()
        now = self._clock()
        going = [answer for answer in self._answers if not answer.over]
        for answer, token, stop in zip(self._answers, tokens, found, strict=True):
            if not answer.over:
                answer.take(token, now, ends=stop or token in self._ends)
        for answer in going:
            if answer.over:
                self._ended(answer)
        over = [answer.over for answer in self._answers]
        if self._part and any(over) and not all(over):
            left = max(answer.row.most - len(answer.tokens) for answer in self._answers if not answer.over)
            over = [each or left >= LEFT for each in over]
        return torch.tensor(over, device=input_ids.device)


def run_rows(
    executor: Executor,
    controller: Controller,
    rows: Sequence[Row],
    options: Mapping[str, Any],
    *,
    ends: frozenset[int] = frozenset(),
    stop_strings: Sequence[str] = (),
    tokenizer: Any = None,
    least: int = 0,
    passes: Passes = lambda lengths: [range(len(lengths))],
) -> tuple[list[int], str]:
    """Run rows as one batch; the caller holds the model's lock.

    Where the meter costs nothing the row that ends last has the batch's peak of memory; of others it is not known.

    Args:
        executor: Whose model.
        controller: Learns from each row.
        rows: Their tasks must have no second pass and no limit of memory.
        options: For ``generate``, the same for all; without limits of length and strings that end an answer.
        ends: Tokens that end an answer.
        stop_strings: Strings that do.
        tokenizer: Of these strings.
        least: Fewest new tokens of an answer.
        passes: Which prompts are prefilled together.

    Returns:
        Indices of the rows for which the batch was not to be, neither done nor failed, to be run alone; and why, in
        words.
    """
    measured = executor.meter.free_of_charge
    if measured:
        executor.meter.start()
    else:
        executor.meter.skip()
    began, answers, over, why = executor.timed.clock(), dict[int, _Answer](), list[int](), ""
    try:
        for index, row in enumerate(rows):
            try:
                answers[index] = _encoded(executor.timed, controller, row)
            except OutOfMemoryError:
                over.append(index)
                why = "encoding it beside others ran out of memory"
            except Exception as error:
                if isinstance(error, InfeasibleBudgetError):
                    controller.refused(row.task.choice)
                row.failed(error)
        if answers:
            strings = StopStringCriteria(tokenizer, list(stop_strings)) if stop_strings else None
            batch = _Batch(executor, list(answers.values()), options, least, passes)
            why = batch.generated(ends, strings, began) or why
    finally:
        if measured:
            executor.meter.stop()
    return [*over, *(index for index, answer in answers.items() if not answer.over)], why


def _encoded(timed: TimedModel, controller: Controller, row: Row) -> _Answer:
    """A row's prompt, prepared and encoded at its own point.

    Raises:
        OutOfMemoryError: If memory ran out; nothing of the try is alive any more.
    """
    tries = Tries(timed, row.task, controller, row.predict)
    encode = partial(run_with_step_down, lambda point: tries.encoded(point)[0], release=release)
    return _Answer(row, tries, encode([tries.used]), deadline_s(row.task.choice.budget, row.task.arrived))


@dataclass(frozen=True)
class _Batch:
    """Rows whose encoders have run, as they are generated."""

    executor: Executor
    answers: Sequence[_Answer]
    options: Mapping[str, Any]
    least: int
    passes: Passes

    def generated(self, ends: frozenset[int], strings: StoppingCriteria | None, began: float) -> str:
        """Generate until the last row has ended; why it did not come to that, in words."""
        executor, answers = self.executor, self.answers
        timed, encoded = executor.timed, executor.timed.clock()
        began = min(max(began, answers[0].encoding.prepared_s), encoded)
        part = len(answers) > 1 and rows_part(timed.adapter.model)

        def ended(answer: _Answer) -> None:
            try:
                if answer.row.streamer is not None:
                    answer.row.streamer.end()
                last = executor.meter.free_of_charge and all(each.over for each in answers)
                peak = executor.meter.stop() if last else None
                run = answer.run(began, encoded, peak, len(answers))
            except Exception as error:  # its own: the others go on
                answer.row.failed(error)
            else:
                answer.row.done(run)

        def attempt(_: OperatingPoint) -> None:
            for answer in answers:
                if answer.row.streamer is not None:
                    answer.row.streamer.put(answer.encoding.encoded.inputs["input_ids"].cpu())
            told = _Ends(answers, ends, strings, timed.clock, ended, part=part)
            self._in_parts(told, encoded) if part else self._as_one(told, encoded)

        try:
            run_with_step_down(attempt, [answers[0].encoding.point], release=executor.release)
        except OutOfMemoryError:
            return "the batch ran out of memory"
        except Exception as error:  # whose fault it was shows where each runs alone
            return f"the batch failed with {type(error).__name__}"
        return ""

    def _as_one(self, told: _Ends, encoded: float) -> None:
        """All rows in one pass, to the end of the last."""
        batch = together([answer.encoding for answer in self.answers])
        self.executor.timed.generate(replace(batch, ended_s=encoded), self._options(told, range(len(self.answers))))

    def _in_parts(self, told: _Ends, encoded: float) -> None:
        """Prompts of like length in one prefill, then all rows together, fewer whenever one has ended."""
        timed, answers = self.executor.timed, self.answers
        groups = self.passes([answer.encoding.length for answer in answers])
        most = 1 if len(groups) > 1 else None
        parts: list[Going] = []
        for rows in groups:
            batch = replace(together([answers[row].encoding for row in rows]), ended_s=encoded)
            done = timed.generate(batch, {**self._options(told, rows, most), **KEEPS_CACHE})
            parts.append(Going.after(done, rows).without(self._over))
        going = Going.together([part for part in parts if part.rows] or parts[:1])
        while going.rows:
            options = {**self._options(told, going.rows), **AGAIN}
            done = timed.generate(going.encoding(batch, timed.adapter.model), options)
            going = Going.after(done, going.rows).without(self._over)

    @property
    def _over(self) -> list[int]:
        return [row for row, answer in enumerate(self.answers) if answer.over]

    def _options(self, told: _Ends, rows: Sequence[int], most: int | None = None) -> dict[str, Any]:
        """For a pass of these rows, all of which have as many tokens already, that gives `most` tokens or all."""
        said = len(self.answers[rows[0]].tokens)
        most = most or max(self.answers[row].row.most for row in rows) - said
        # Strings of the model's own configuration are among those that are looked for here already.
        own = {"max_new_tokens": most, "stop_strings": None, "stopping_criteria": [told.of(rows)]}
        if self.least:
            own["min_new_tokens"] = min(max(0, self.least - said), most)
        return {**self.options, **own}
