"""Several decided requests in one pass of the model, each a row that stops, streams, is cut off and cancelled alone.

Images are encoded one request after the other, each at its own point; prompts are padded on the left, and positions
follow from the attention mask, so that a row is what it would be alone. A row that has ended is handed out at once,
and leaves the batch, while the others go on; see `going`. Knows tasks and timed passes. Must not know which requests
are put together, or why.

transformers' own continuous batching would have its place in `run_rows`: as of 5.24 it takes token numbers alone
(``add_request(input_ids, ...)``), no encoder outputs, pixels or positions, so that images cannot come in.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from transformers import StoppingCriteria, StopStringCriteria

from adaptive_fusion.control.controller import Controller
from adaptive_fusion.errors import InfeasibleBudgetError, OutOfMemoryError
from adaptive_fusion.execution.batches import together
from adaptive_fusion.execution.executor import Executor, Tries, deadline_s, release
from adaptive_fusion.execution.going import AGAIN, KEEPS_CACHE, Going
from adaptive_fusion.execution.oom import run_with_step_down
from adaptive_fusion.execution.row import Answer, Ends, Row
from adaptive_fusion.execution.timed import TimedModel
from adaptive_fusion.models.caches import rows_part
from adaptive_fusion.point import OperatingPoint

Passes = Callable[[Sequence[int]], Sequence[Sequence[int]]]
"""Which of prompts of these lengths are prefilled together, as places."""


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
    began, answers, over, why = executor.timed.clock(), dict[int, Answer](), list[int](), ""
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
            # Where a row ran out of memory the peak is that row's.
            batch = _Batch(executor, list(answers.values()), options, least, passes, measured and not over)
            why = batch.generated(ends, strings, began) or why
    finally:
        if measured:
            executor.meter.stop()
    return [*over, *(index for index, answer in answers.items() if not answer.over)], why


def _encoded(timed: TimedModel, controller: Controller, row: Row) -> Answer:
    """A row's prompt, prepared and encoded at its own point.

    Raises:
        OutOfMemoryError: If memory ran out; nothing of the try is alive any more.
    """
    tries = Tries(timed, row.task, controller, row.predict)
    encode = partial(run_with_step_down, lambda point: tries.encoded(point)[0], release=release)
    return Answer(row, tries, encode([tries.used]), deadline_s(row.task.choice.budget, row.task.arrived))


@dataclass(frozen=True)
class _Batch:
    """Rows whose encoders have run, as they are generated."""

    executor: Executor
    answers: Sequence[Answer]
    options: Mapping[str, Any]
    least: int
    passes: Passes
    measured: bool

    def generated(self, ends: frozenset[int], strings: StoppingCriteria | None, began: float) -> str:
        """Generate until the last row has ended; why it did not come to that, in words."""
        executor, answers = self.executor, self.answers
        timed, encoded = executor.timed, executor.timed.clock()
        began = min(max(began, answers[0].encoding.prepared_s), encoded)
        part = len(answers) > 1 and rows_part(timed.adapter.model)

        def ended(answer: Answer) -> None:
            try:
                if answer.row.streamer is not None:
                    answer.row.streamer.end()
                last = self.measured and all(each.over for each in answers)
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
            told = Ends(answers, ends, strings, timed.clock, ended, part=part)
            self._in_parts(told, encoded) if part else self._as_one(told, encoded)

        try:
            run_with_step_down(attempt, [answers[0].encoding.point], release=executor.release)
        except OutOfMemoryError:
            return "the batch ran out of memory"
        except Exception as error:  # whose fault it was shows where each runs alone
            return f"the batch failed with {type(error).__name__}"
        return ""

    def _as_one(self, told: Ends, encoded: float) -> None:
        """All rows in one pass, to the end of the last."""
        batch = together([answer.encoding for answer in self.answers])
        self.executor.timed.generate(replace(batch, ended_s=encoded), self._options(told, range(len(self.answers))))

    def _in_parts(self, told: Ends, encoded: float) -> None:
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

    def _options(self, told: Ends, rows: Sequence[int], most: int | None = None) -> dict[str, Any]:
        """For a pass of these rows, all of which have as many tokens already, that gives `most` tokens or all."""
        said = len(self.answers[rows[0]].tokens)
        most = most or max(self.answers[row].row.most for row in rows) - said
        # Strings of the model's own configuration are among those that are looked for here already.
        own = {"max_new_tokens": most, "stop_strings": None, "stopping_criteria": [told.of(rows)]}
        if self.least:
            own["min_new_tokens"] = min(max(0, self.least - said), most)
        return {**self.options, **own}
