"""One pass of a model: prepared, encoded and generated, each stage timed once. Runner, labels, distillation and
benchmarks all come through here.

Knows an adapter, a clock and what ``generate`` takes. Must not know of decisions, policies, texts or what a pass is
for.
"""

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteriaList

from adaptive_fusion.decisions import Measurement
from adaptive_fusion.evaluation.likelihood import prefill
from adaptive_fusion.execution.meters import Meter
from adaptive_fusion.execution.timing import GenerationClock, synchronize
from adaptive_fusion.models import Adapter, Encoded, Recorded
from adaptive_fusion.models.caches import recall_positions, remember_positions
from adaptive_fusion.point import NATIVE, OperatingPoint

Prepare = Callable[[], Mapping[str, Any]]
"""Gives the processor's tensors at a point's pixel budget, on the model's device."""


@dataclass(frozen=True)
class Encoding:
    """A request whose encoder has run; times in seconds on the clock.

    `recorded_ms` is what a recording took that this encoding followed from, without being made anew.
    """

    point: OperatingPoint
    encoded: Encoded
    began_s: float
    prepared_s: float
    ended_s: float
    recorded_ms: float = 0.0

    @property
    def length(self) -> int:
        """Tokens of the prompt that the language model sees, padding included."""
        ids = self.encoded.inputs.get("input_ids")
        return int(ids.shape[-1]) if isinstance(ids, Tensor) else 0

    @property
    def ready_ms(self) -> float:
        """Milliseconds from the first tensor to the encoder's end, a recording's own included."""
        return (self.ended_s - self.began_s) * 1e3 + self.recorded_ms


@dataclass(frozen=True)
class Pass:
    """What ``generate`` gave for an encoding, and when its tokens came."""

    encoding: Encoding
    result: Any
    timer: GenerationClock
    ended_s: float

    @property
    def sequences(self) -> Tensor:
        """``[rows, prompt + new]`` as the model saw them."""
        found: Tensor = self.result if isinstance(self.result, Tensor) else self.result.sequences
        return found

    @property
    def new_tokens(self) -> Tensor:
        """``[rows, new]``, filled up after a row's end as ``generate`` does."""
        return self.sequences[:, self.encoding.length :]

    @property
    def count(self) -> int:
        """How many new tokens a row has; of a result of another kind, made by a loop of the caller's, its steps."""
        known = isinstance(self.result, Tensor) or isinstance(getattr(self.result, "sequences", None), Tensor)
        return int(self.sequences.shape[-1]) - self.encoding.length if known else self.timer.steps

    @property
    def first_s(self) -> float:
        """When the first token was there."""
        return self.timer.first_s if self.timer.first_s is not None else self.ended_s

    @property
    def prefill_ms(self) -> float:
        """Milliseconds from the encoder's end to the first token."""
        return (self.first_s - self.encoding.ended_s) * 1e3

    @property
    def step_ms(self) -> float:
        """Milliseconds of each token after the first; 0 if there was none."""
        steps = self.timer.steps - 1
        return (self.ended_s - self.first_s) * 1e3 / steps if steps > 0 else 0.0

    def measurement(self, arrived_s: float, peak_gb: float | None = None) -> Measurement:
        """What the request took that arrived then; all before the encoder counts as preprocessing."""
        encoding, first = self.encoding, self.first_s
        return Measurement(
            preprocess_ms=(encoding.prepared_s - arrived_s) * 1e3,
            encode_ms=(encoding.ended_s - encoding.prepared_s) * 1e3,
            prefill_ms=self.prefill_ms,
            decode_ms=(self.ended_s - first) * 1e3,
            ttft_ms=(first - arrived_s) * 1e3,
            latency_ms=(self.ended_s - arrived_s) * 1e3,
            visual_tokens=encoding.encoded.visual_tokens,
            prompt_tokens=encoding.length,
            new_tokens=self.count,
            patches=encoding.encoded.patches,
            peak_memory_gb=peak_gb if peak_gb is not None else 0.0,
        )


@dataclass
class Recordings:
    """What the encoder made of one input, for every way in which the knobs before and inside it stand.

    Attributes:
        levels: Blocks whose outputs are kept.
        kept: By `OperatingPoint.encoder_key` the recording and the milliseconds that it took.
    """

    levels: tuple[int, ...]
    kept: dict[tuple[Any, ...], tuple[Recorded, float]] = field(default_factory=dict)

    def want(self, levels: Iterable[int]) -> None:
        """Keep these levels too; what was recorded without one of them is forgotten."""
        if missing := set(levels) - set(self.levels):
            self.levels = tuple(sorted({*self.levels, *missing}))
            self.kept.clear()


class TimedModel:
    """Passes of an adapter's model on one clock. Holds no lock: one pass at a time is the caller's business.

    Args:
        adapter: The way to the model.
        clock: Seconds, monotonic.
    """

    def __init__(self, adapter: Adapter, clock: Callable[[], float] = time.perf_counter) -> None:
        self.adapter, self.clock = adapter, clock

    def synchronize(self) -> None:
        """Wait for the device that the model computes on."""
        synchronize(self.adapter.device)

    @torch.no_grad()
    def encode(self, prepare: Prepare, point: OperatingPoint, recordings: Recordings | None = None) -> Encoding:
        """Prepare and encode; with `recordings` the encoder's blocks run only where none of them serves."""
        began = self.clock()
        inputs = prepare()
        prepared = self.clock()
        recorded_ms = 0.0
        if recordings is None:
            encoded = self.adapter.encode(inputs, point)
        else:
            found = recordings.kept.get(point.encoder_key)
            if found is not None:
                recorded, recorded_ms = found
            else:
                recorded = self.adapter.record(inputs, point, recordings.levels)
                self.synchronize()
                recordings.kept[point.encoder_key] = recorded, (self.clock() - prepared) * 1e3
            encoded = self.adapter.encode(inputs, point, recorded)
        self.synchronize()
        return Encoding(point, encoded, began, prepared, self.clock(), recorded_ms)

    def as_given(self, inputs: Mapping[str, Any]) -> Encoding:
        """A call's own inputs as an encoding with nothing encoded yet: ``generate`` does it, with the prefill."""
        now = self.clock()
        return Encoding(NATIVE, Encoded(dict(inputs), 0, 0), now, now, now)

    @torch.no_grad()
    def generate(
        self,
        encoding: Encoding,
        options: Mapping[str, Any],
        *,
        deadline_s: float | None = None,
        cancelled: threading.Event | None = None,
    ) -> Pass:
        """Generate from an encoding until the answer, the deadline on the clock or the cancellation ends it.

        Args:
            options: For the model's ``generate``; entries that the encoding gives are taken from it.
        """
        timer = GenerationClock(self.clock, deadline_s, cancelled, self.synchronize)
        criteria = StoppingCriteriaList([*(options.get("stopping_criteria") or []), timer])
        given = {**options, **encoding.encoded.inputs, "stopping_criteria": criteria}
        recall_positions(self.adapter.model, given)
        result = self.adapter.outer.generate(**given)
        remember_positions(self.adapter.model, given, result)
        return Pass(encoding, result, timer, self.clock())

    def prefill(self, encoding: Encoding) -> tuple[Any, float]:
        """The model's output for the prompt alone, with its cache, and the milliseconds it took."""
        began = self.clock()
        output = prefill(self.adapter.outer, encoding.encoded.inputs)
        self.synchronize()
        return output, (self.clock() - began) * 1e3

    def request(
        self, prepare: Prepare, point: OperatingPoint, meter: Meter, *, earlier_ms: float = 0.0, **options: Any
    ) -> tuple[Pass, Measurement]:
        """A whole request alone on the machine, with its peak of memory.

        Args:
            earlier_ms: Spent on it before (deciding); counts as preprocessing.
            options: For the model's ``generate``.
        """
        meter.start()
        arrived = self.clock() - earlier_ms / 1e3
        try:
            done = self.generate(self.encode(prepare, point), options)
        finally:
            peak = meter.stop()
        return done, done.measurement(arrived, peak)


def until_end(tokens: Sequence[int], ends: frozenset[int]) -> list[int]:
    """A row of new tokens up to and with the first of those that end an answer."""
    stop = next((i for i, token in enumerate(tokens, 1) if token in ends), len(tokens))
    return list(tokens[:stop])
