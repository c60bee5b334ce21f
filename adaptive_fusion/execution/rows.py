"""Several decided requests in one pass of the model, each a row that stops, streams, is cut off and cancelled alone.

Images are encoded one request after the other, each at its own point; prompts are padded on the left, and positions
follow from the attention mask, so that a row is what it would be alone. A row that has ended is handed out at once,
while the others go on. Knows tasks and timed passes. Must not know which requests are put together, or why.

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
from adaptive_fusion.execution.oom import run_with_step_down
from adaptive_fusion.execution.timed import Encoding, TimedModel
from adaptive_fusion.point import OperatingPoint


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
        step = now - self.last_s if self.tokens else 0.0
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
        answers: In the batch's order.
        ends: Tokens that end an answer.
        strings: Finds strings that end one.
        clock: Seconds, monotonic.
        ended: Called with each row that ends.
    """

    def __init__(
        self,
        answers: Sequence[_Answer],
        ends: frozenset[int],
        strings: StoppingCriteria | None,
        clock: Callable[[], float],
        ended: Callable[[_Answer], None],
    ) -> None:
        self._answers, self._ends, self._strings, self._clock, self._ended = answers, ends, strings, clock, ended

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
        return torch.tensor([answer.over for answer in self._answers], device=input_ids.device)


def run_rows(
    executor: Executor,
    controller: Controller,
    rows: Sequence[Row],
    options: Mapping[str, Any],
    *,
    ends: frozenset[int] = frozenset(),
    stop_strings: Sequence[str] = (),
    tokenizer: Any = None,
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
            why = _generated(executor, list(answers.values()), options, ends, strings, began) or why
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


def _generated(
    executor: Executor,
    answers: Sequence[_Answer],
    options: Mapping[str, Any],
    ends: frozenset[int],
    strings: StoppingCriteria | None,
    began: float,
) -> str:
    """Generate until the last row has ended; why it did not come to that, in words."""
    timed, encoded = executor.timed, executor.timed.clock()
    began = min(max(began, answers[0].encoding.prepared_s), encoded)

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
        batch = together([answer.encoding for answer in answers])
        most = max(answer.row.most for answer in answers)
        rules = [_Ends(answers, ends, strings, timed.clock, ended)]
        # Strings of the model's own configuration are among those that are looked for here already.
        own = {"max_new_tokens": most, "stop_strings": None, "stopping_criteria": rules}
        timed.generate(replace(batch, ended_s=encoded), {**options, **own})

    try:
        run_with_step_down(attempt, [answers[0].encoding.point], release=executor.release)
    except OutOfMemoryError:
        return "the batch ran out of memory"
    except Exception as error:  # whose fault it was shows where each runs alone
        return f"the batch failed with {type(error).__name__}"
    return ""
