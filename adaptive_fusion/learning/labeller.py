"""A runner's model, run at several rungs for a label: answers, the likelihood of an answer, and what each took.

Knows runners, adapters and how rungs share work: one pass of the vision tower per pixel budget for all points,
and one batch for all answers. Must not know references, metrics or files. Nothing here
decides, learns or logs.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import lru_cache
from threading import Event
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import StoppingCriteriaList

from adaptive_fusion.chat import ChatRequest, build_request
from adaptive_fusion.decisions import text_hash
from adaptive_fusion.errors import AdaptiveFusionError, ConfigError
from adaptive_fusion.ladder import Rung
from adaptive_fusion.learning.batches import batches, collate
from adaptive_fusion.learning.labels import Subject
from adaptive_fusion.learning.scoring import Example, Took
from adaptive_fusion.models import Encoded, GridAdapter, Recorded
from adaptive_fusion.point import OperatingPoint
from adaptive_fusion.prompts import PROMPT_VERSION, prompt_features
from adaptive_fusion.runner import AdaptiveRunner
from adaptive_fusion.timing import GenerationClock, synchronize

MAX_NEW_TOKENS = 160
BATCH_TOKENS = 16_384
"""Most prompt tokens, padding included, that answer in one batch."""
_TIMED_TOKENS = 2
_WARM: WeakKeyDictionary[AdaptiveRunner, set[str]] = WeakKeyDictionary()
"""Rungs that have run at least once; kept per process, since a `RunnerModel` may be sent anew with every input."""


class Interrupted(AdaptiveFusionError):
    """The work was called off before it ended."""


def describe(example: Example) -> Subject:
    """Hashes and features of one image or clip and its question; no model is needed.

    Raises:
        MediaError: For a medium that cannot be used.
        ConfigError: Unless there is exactly one medium: features belong to one.
    """
    request = build_request(_media(example), example.prompt or None, hashed=True)
    if len(request.media) != 1 or request.content_hash is None:
        raise ConfigError(f"an input to label needs exactly one image or clip; got {len(request.media)}")
    complexity, asked = request.complexities[0], request.prompt
    return Subject(
        content_hash=request.content_hash,
        kind=request.kind,
        features=complexity.features,
        features_version=complexity.version,
        prompt_features=prompt_features(asked) if asked else {},
        prompt_version=PROMPT_VERSION if asked else None,
        prompt_hash=text_hash(asked) if asked else None,
        slices=example.slices,
    )


def _media(example: Example) -> Any:
    return example.media() if callable(example.media) else example.media


@dataclass
class _Ready:
    """One point, encoded: the rungs that come to it, and milliseconds until the encoder was done."""

    names: list[str]
    point: OperatingPoint
    encoded: Encoded
    ready_ms: float

    def took(self, ttft_ms: float, **more: Any) -> Took:
        return Took(ttft_ms, patches=self.encoded.patches, visual_tokens=self.encoded.visual_tokens, **more)


class RunnerModel:
    """Runs rungs on a runner's model; what a `ModelScorer` asks.

    Times are those of a request that runs alone: `ttft_ms` is loading and measuring the media, preprocessing,
    the whole encoder (shared or not) and the prefill; `latency_ms` adds the answer's tokens at the pace of the
    first few. Answers come from a batch, left-padded, which changes none of them but for ties in the last bit.
    Other requests to the runner go on between the parts of the work.

    Args:
        source: A runner, or a function that opens one; with a function the model can be sent to other processes,
            each of which opens its own once.
        args: Arguments of the function.
        max_new_tokens: Upper bound of an answer.
        cancelled: Ends the work with `Interrupted` once it is set.
        clock: Seconds, monotonic.
    """

    def __init__(
        self,
        source: AdaptiveRunner | Callable[..., AdaptiveRunner],
        *args: Any,
        max_new_tokens: int = MAX_NEW_TOKENS,
        cancelled: Event | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.source, self.args = source, args
        self.max_new_tokens = max_new_tokens
        self._cancelled, self._clock = cancelled, clock
        self._recorded: tuple[str | None, dict[object, tuple[Recorded, float]]] = None, {}

    @property
    def runner(self) -> AdaptiveRunner:
        """The runner, opened on first use."""
        return self.source if isinstance(self.source, AdaptiveRunner) else _opened(self.source, self.args)

    def describe(self, example: Example) -> Subject:
        """See `describe`."""
        return describe(example)

    @torch.no_grad()
    def answers(self, example: Example, rungs: Sequence[Rung]) -> dict[str, tuple[str, Took]]:
        """See `scoring.Model`.

        Raises:
            MediaError: For a medium that cannot be used.
            Interrupted: Once cancelled.
        """
        ready = self._encode(example, rungs)
        first = [self._first_tokens(each.encoded) for each in ready]
        tokens = self._generated([each.encoded for each in ready])
        found: dict[str, tuple[str, Took]] = {}
        for each, (prefill_ms, step_ms), new in zip(ready, first, tokens, strict=True):
            text = self._tokenizer.decode(new, skip_special_tokens=True).strip()
            ttft_ms = each.ready_ms + prefill_ms
            latency_ms = ttft_ms + step_ms * max(0, len(new) - 1)
            took = each.took(ttft_ms, latency_ms=latency_ms, new_tokens=len(new))
            found |= {name: (text, took) for name in each.names}
        return {rung.name: found[rung.name] for rung in rungs}

    @torch.no_grad()
    def likelihoods(self, example: Example, text: str, rungs: Sequence[Rung]) -> dict[str, tuple[float, Took]]:
        """See `scoring.Model`; the end of the answer counts as a token. Raises as `answers`."""
        ids = [*self._tokenizer(text, add_special_tokens=False).input_ids, int(self._tokenizer.eos_token_id)]
        found: dict[str, tuple[float, Took]] = {}
        for each in self._encode(example, rungs):
            value, prefill_ms = self._likelihood(each.encoded, ids)
            found |= {name: (value, each.took(each.ready_ms + prefill_ms)) for name in each.names}
        return {rung.name: found[rung.name] for rung in rungs}

    # How it is done

    @property
    def _tokenizer(self) -> Any:
        return self.runner.adapter.processor.tokenizer

    def _encode(self, example: Example, rungs: Sequence[Rung]) -> list[_Ready]:
        """Every different point that the rungs come to on this input, encoded; the first call runs them twice,
        so that no rung pays for first-use work."""
        request, loaded_ms = self._loaded(example)
        points = self._points(request, rungs)
        warm = _WARM.setdefault(self.runner, set())
        if cold := [each for each in points if not warm.issuperset(points[each])]:
            for point in cold:
                self._first_tokens(self._encoded(request, point, points)[0])
            warm.update(rung.name for rung in rungs)
            self._recorded = None, {}
            request, loaded_ms = self._loaded(example)
        return [
            _Ready(names, point, *self._encoded(request, point, points, loaded_ms)) for point, names in points.items()
        ]

    def _loaded(self, example: Example) -> tuple[ChatRequest, float]:
        """The request, and milliseconds of loading, measuring and hashing its media."""
        media = _media(example)
        began = self._clock()
        request = build_request(media, example.prompt or None, hashed=True)
        return request, (self._clock() - began) * 1e3

    def _points(self, request: ChatRequest, rungs: Sequence[Rung]) -> dict[OperatingPoint, list[str]]:
        """Names of the rungs by the point that they come to on this model and input."""
        adapter = self.runner.adapter
        native = max((adapter.native_pixels(size) for size in request.sizes), default=1)
        points: dict[OperatingPoint, list[str]] = {}
        for rung in rungs:
            point, _ = adapter.restrict(rung.resolve(native))
            if not any(size.clip for size in request.sizes):
                point = replace(point, max_fps=None)
            points.setdefault(point, []).append(rung.name)
        return points

    def _encoded(
        self,
        request: ChatRequest,
        point: OperatingPoint,
        points: Mapping[OperatingPoint, object],
        loaded_ms: float = 0.0,
    ) -> tuple[Encoded, float]:
        """The point's encoder output, and milliseconds of all that comes before it and of the encoder itself."""
        adapter = self.runner.adapter
        with self._exclusively():
            began = self._clock()
            inputs = adapter.prepare(request.messages_at(point), point)
            if isinstance(adapter, GridAdapter):
                read_ms = (self._clock() - began) * 1e3
                recorded, tower_ms = self._record(adapter, request, point, inputs, points)
                began = self._clock()
                encoded = adapter.encode(inputs, point, recorded)
                loaded_ms += read_ms + tower_ms
            else:
                encoded = adapter.encode(inputs, point)
            self._synchronize()
            return encoded, loaded_ms + (self._clock() - began) * 1e3

    def _record(
        self,
        adapter: GridAdapter,
        request: ChatRequest,
        point: OperatingPoint,
        inputs: Mapping[str, Any],
        points: Mapping[OperatingPoint, object],
    ) -> tuple[Recorded, float]:
        """What the tower makes of the input at the point's pixel budget, and what that took; kept until the next
        input, for other points and other questions."""
        if self._recorded[0] != request.content_hash:
            self._recorded = request.content_hash, {}
        kept = self._recorded[1]
        levels = sorted({level for each in points for level in adapter.levels(each)})
        seen = point.max_pixels, point.max_fps
        if seen in kept:
            recorded, tower_ms = kept[seen]
            if all(set(levels) <= set(found) for found in recorded.levels.values()):
                return recorded, tower_ms
        self._synchronize()
        began = self._clock()
        recorded = adapter.record(inputs, levels)
        self._synchronize()
        kept[seen] = recorded, (self._clock() - began) * 1e3
        return kept[seen]

    def _first_tokens(self, encoded: Encoded) -> tuple[float, float]:
        """Milliseconds to the first token, and for each of the next ones."""
        timer = GenerationClock(self._clock, cancelled=self._cancelled, synchronize=self._synchronize)
        with self._exclusively():
            began = self._clock()
            self._generate(encoded.inputs, timer, _TIMED_TOKENS)
            self._synchronize()
            ended = self._clock()
        first = timer.first_s if timer.first_s is not None else ended
        step_s = (ended - first) / (timer.steps - 1) if timer.steps > 1 else 0.0
        return (first - began) * 1e3, step_s * 1e3

    def _generated(self, encoded: Sequence[Encoded]) -> list[list[int]]:
        """The new tokens of every answer, without what follows its end."""
        lengths = [int(each.inputs["input_ids"].shape[1]) for each in encoded]
        together = isinstance(self.runner.adapter, GridAdapter)
        ends = self.runner.adapter.end_tokens
        tokens: dict[int, list[int]] = {}
        for rows in batches(lengths, BATCH_TOKENS if together else 0):
            parts = [encoded[row].inputs for row in rows]
            inputs = collate(parts) if len(parts) > 1 else parts[0]
            with self._exclusively():
                timer = GenerationClock(self._clock, cancelled=self._cancelled)
                sequences = self._generate(inputs, timer, self.max_new_tokens)
            for row, sequence in zip(rows, sequences[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
                stop = next((i for i, token in enumerate(sequence, 1) if token in ends), len(sequence))
                tokens[row] = sequence[:stop]
        return [tokens[row] for row in range(len(encoded))]

    def _generate(self, inputs: Mapping[str, Any], timer: GenerationClock, most: int) -> Tensor:
        criteria = StoppingCriteriaList([timer])
        found: Tensor = self.runner.model.generate(  # type: ignore[operator]
            **inputs, max_new_tokens=most, do_sample=False, stopping_criteria=criteria
        )
        if timer.stopped_by is not None:
            raise Interrupted(f"the generation was {timer.stopped_by}")
        return found

    def _likelihood(self, encoded: Encoded, ids: Sequence[int]) -> tuple[float, float]:
        """Mean log-likelihood of the answer `ids`, and milliseconds of the prompt's part of the pass."""
        model: Any = self.runner.model
        target = torch.tensor([ids], device=model.device)
        with self._exclusively():
            began = self._clock()
            prompt = model(**encoded.inputs, use_cache=True, logits_to_keep=1)
            self._synchronize()
            prefill_ms = (self._clock() - began) * 1e3
            logits = prompt.logits
            if len(ids) > 1:
                # No mask: with one, Qwen's models would count positions for the prompt as well.
                rest = model(input_ids=target[:, :-1], past_key_values=prompt.past_key_values, use_cache=True)
                logits = torch.cat([logits, rest.logits], dim=1)
        likely = torch.log_softmax(logits.float(), dim=-1).gather(2, target[:, :, None])
        return float(likely.mean()), prefill_ms

    def _exclusively(self) -> AbstractContextManager[object]:
        if self._cancelled is not None and self._cancelled.is_set():
            raise Interrupted("the work was cancelled")
        return self.runner.exclusive()

    def _synchronize(self) -> None:
        synchronize(self.runner.device)


@lru_cache(maxsize=1)
def _opened(source: Callable[..., AdaptiveRunner], args: tuple[Any, ...]) -> AdaptiveRunner:
    return source(*args)
