"""One request of a batch, what came of it so far, and when its answer ends: at a token, a string, its length, its
deadline, or with whoever asked.

Knows tasks, tokens and times. Must not know how rows are generated, or which requests are put together.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria

from adaptive_fusion.decisions import Measurement
from adaptive_fusion.execution.executor import Run, Task, Tries
from adaptive_fusion.execution.timed import Encoding
from adaptive_fusion.point import OperatingPoint

LEFT = 8
"""Fewest tokens that may still come for which it pays to let a row leave: that takes about as long as a token."""


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
class Answer:
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


class Ends(StoppingCriteria):  # type: ignore[misc]
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
        answers: Sequence[Answer],
        ends: frozenset[int],
        strings: StoppingCriteria | None,
        clock: Callable[[], float],
        ended: Callable[[Answer], None],
        *,
        part: bool,
    ) -> None:
        self._all, self._ends, self._strings, self._clock, self._ended = answers, ends, strings, clock, ended
        self._answers, self._part = answers, part

    def of(self, rows: Sequence[int]) -> "Ends":
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
