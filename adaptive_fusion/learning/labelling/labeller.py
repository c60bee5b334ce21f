"""A runner's model, run at several rungs for a label: answers, the likelihood of an answer, and what each took.

Knows runners, adapters and how rungs share work: one pass of the vision tower per pixel budget for all points,
and one batch for all answers. Must not know references, metrics or files. Nothing here
decides, learns or logs.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from threading import Event
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from adaptive_fusion.decision_log import text_hash
from adaptive_fusion.errors import ConfigError, Interrupted
from adaptive_fusion.evaluation.likelihood import after_prompt
from adaptive_fusion.evaluation.questions import Question
from adaptive_fusion.execution.batches import batches, together
from adaptive_fusion.execution.escalation import entropies, watched
from adaptive_fusion.execution.request import ChatRequest, build_request
from adaptive_fusion.execution.timed import Encoding, Pass, Recordings, TimedModel, until_end
from adaptive_fusion.features.prompts import PROMPT_VERSION, prompt_features, prompt_kind
from adaptive_fusion.learning.data.labels import Subject
from adaptive_fusion.learning.labelling.scoring import RungTiming
from adaptive_fusion.point import OperatingPoint
from adaptive_fusion.policy.escalation import MOST_TOKENS
from adaptive_fusion.policy.fitted import Fingerprint
from adaptive_fusion.policy.rungs import Rung
from adaptive_fusion.runner import AdaptiveRunner

MAX_NEW_TOKENS = 160
BATCH_TOKENS = 16_384
"""Most prompt tokens, padding included, that answer in one batch."""
_TIMED_TOKENS = 2
_WARM: WeakKeyDictionary[AdaptiveRunner, set[str]] = WeakKeyDictionary()
"""Rungs that have run at least once; kept per process, since a `RunnerModel` may be sent anew with every input."""


def describe(question: Question) -> Subject:
    """Hashes and features of one image or clip and the question about it; no model is needed.

    Raises:
        MediaError: For a medium that cannot be used.
        ConfigError: Unless there is exactly one medium: features belong to one.
    """
    return subject_of(build_request(question.load(), question.prompt or None, hashed=True), question.slices)


def subject_of(request: ChatRequest, slices: Mapping[str, str]) -> Subject:
    """The same of a request that was built with its hash.

    Raises:
        ConfigError: Unless there is exactly one medium.
    """
    if len(request.media) != 1 or request.content_hash is None:
        raise ConfigError(f"an input to label needs exactly one image or clip; got {len(request.media)}")
    complexity, asked = request.complexities[0], request.prompt
    return Subject(
        content_hash=request.content_hash,
        kind=request.kind,
        features=complexity.features,
        features_version=complexity.version,
        detail=complexity.detail,
        detail_version=complexity.detail_version or None,
        prompt_features=prompt_features(asked) if asked else {},
        prompt_version=PROMPT_VERSION if asked else None,
        prompt_hash=text_hash(asked) if asked else None,
        prompt_kind=prompt_kind(asked) if asked else None,
        slices=slices,
    )


@dataclass
class _Ready:
    """One point, encoded: the rungs that come to it, and milliseconds until the encoder was done."""

    names: list[str]
    encoding: Encoding
    ready_ms: float

    def timing(self, ttft_ms: float, **more: Any) -> RungTiming:
        encoded = self.encoding.encoded
        return RungTiming(ttft_ms, patches=encoded.patches, visual_tokens=encoded.visual_tokens, **more)


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
        self._recordings: tuple[str | None, Recordings] = None, Recordings(())

    @property
    def runner(self) -> AdaptiveRunner:
        """The runner, opened on first use."""
        return self.source if isinstance(self.source, AdaptiveRunner) else _opened(self.source, self.args)

    @property
    def fingerprint(self) -> Fingerprint:
        """Of the model that is run."""
        return self.runner.fingerprint

    def describe(self, question: Question) -> Subject:
        """See `describe`."""
        return describe(question)

    def answers(self, question: Question, rungs: Sequence[Rung]) -> dict[str, tuple[str, RungTiming]]:
        """See `scoring.Model`.

        Raises:
            MediaError: For a medium that cannot be used.
            Interrupted: Once cancelled.
        """
        ready = self._encode(question, rungs)
        first = [self._generate(each.encoding, _TIMED_TOKENS) for each in ready]
        answered = self._answered([each.encoding for each in ready])
        found: dict[str, tuple[str, RungTiming]] = {}
        for each, alone, (new, unsure) in zip(ready, first, answered, strict=True):
            text = self._tokenizer.decode(new, skip_special_tokens=True).strip()
            ttft_ms = each.ready_ms + alone.prefill_ms
            latency_ms = ttft_ms + alone.step_ms * max(0, len(new) - 1)
            timing = each.timing(ttft_ms, latency_ms=latency_ms, new_tokens=len(new), entropies=unsure)
            found |= {name: (text, timing) for name in each.names}
        return {rung.name: found[rung.name] for rung in rungs}

    def likelihoods(self, question: Question, text: str, rungs: Sequence[Rung]) -> dict[str, tuple[float, RungTiming]]:
        """See `scoring.Model`; the end of the answer counts as a token. Raises as `answers`."""
        answer = [*self._tokenizer(text, add_special_tokens=False).input_ids, int(self._tokenizer.eos_token_id)]
        found: dict[str, tuple[float, RungTiming]] = {}
        for each in self._encode(question, rungs):
            with self._exclusively():
                prompt, prefill_ms = self._timed.prefill(each.encoding)
                [likelihood] = after_prompt(self.runner.adapter.outer, prompt, [answer])
            timing = each.timing(each.ready_ms + prefill_ms, entropies=likelihood.entropies[:MOST_TOKENS])
            found |= {name: (likelihood.mean, timing) for name in each.names}
        return {rung.name: found[rung.name] for rung in rungs}

    # How it is done

    @property
    def _timed(self) -> TimedModel:
        return TimedModel(self.runner.adapter, self._clock)

    @property
    def _tokenizer(self) -> Any:
        return self.runner.adapter.processor.tokenizer

    def _encode(self, question: Question, rungs: Sequence[Rung]) -> list[_Ready]:
        """Every different point that the rungs come to on this input, encoded; the first call runs them twice,
        so that no rung pays for first-use work."""
        request, loaded_ms = self._loaded(question)
        points = self._points(request, rungs)
        warm = _WARM.setdefault(self.runner, set())
        if cold := [point for point, names in points.items() if not warm.issuperset(names)]:
            for point in cold:
                self._generate(self._encoded(request, point, points), _TIMED_TOKENS)
            warm.update(rung.name for rung in rungs)
            self._recordings = None, Recordings(())
            request, loaded_ms = self._loaded(question)
        ready = []
        for point, names in points.items():
            encoding = self._encoded(request, point, points)
            ready.append(_Ready(names, encoding, loaded_ms + encoding.ready_ms))
        return ready

    def _loaded(self, question: Question) -> tuple[ChatRequest, float]:
        """The request, and milliseconds of loading, measuring and hashing its media."""
        media = question.load()
        began = self._clock()
        request = build_request(media, question.prompt or None, hashed=True)
        return request, (self._clock() - began) * 1e3

    def _points(self, request: ChatRequest, rungs: Sequence[Rung]) -> dict[OperatingPoint, list[str]]:
        """Names of the rungs by the point that they come to on this model and input."""
        still = not any(size.clip for size in request.sizes)
        points: dict[OperatingPoint, list[str]] = {}
        for rung in rungs:
            point = self.runner.adapter.computed(self.runner.adapter.resolve(rung, request.sizes))
            points.setdefault(replace(point, max_fps=None) if still else point, []).append(rung.name)
        return points

    def _encoded(self, request: ChatRequest, point: OperatingPoint, points: Iterable[OperatingPoint]) -> Encoding:
        """The request encoded at a point. What the encoder's blocks make of it is kept until the next input, for
        `points` and other questions."""
        adapter = self.runner.adapter
        if self._recordings[0] != request.content_hash:
            self._recordings = request.content_hash, Recordings(())
        recordings = self._recordings[1]
        recordings.want(level for each in points for level in adapter.levels(each))
        with self._exclusively():
            return self._timed.encode(partial(adapter.prepare, request.messages, point), point, recordings)

    def _answered(self, encodings: Sequence[Encoding]) -> list[tuple[list[int], tuple[float, ...]]]:
        """Of every answer the new tokens, without what follows its end, and the entropies of the first of them."""
        most = BATCH_TOKENS if self.runner.adapter.packed else 0
        answers: dict[int, tuple[list[int], tuple[float, ...]]] = {}
        for rows in batches([each.length for each in encodings], most):
            chosen = [encodings[row] for row in rows]
            seen: list[Tensor] = []

            def see(logits: Tensor, seen: list[Tensor] = seen) -> bool:
                seen.append(entropies(logits).cpu())
                return len(seen) == MOST_TOKENS

            with watched(self.runner.adapter.model, see):
                done = self._generate(together(chosen), self.max_new_tokens)
            by_row = torch.stack(seen, dim=1).tolist()
            for row, new, unsure in zip(rows, done.new_tokens.tolist(), by_row, strict=True):
                tokens = until_end(new, self.runner.adapter.end_tokens)
                answers[row] = tokens, tuple(unsure[: len(tokens)])
        return [answers[row] for row in range(len(encodings))]

    def _generate(self, encoding: Encoding, most: int) -> Pass:
        options = {"max_new_tokens": most, "do_sample": False}
        with self._exclusively():
            # What was encoded before others ran begins now.
            began = replace(encoding, ended_s=self._clock())
            done = self._timed.generate(began, options, cancelled=self._cancelled)
        if done.timer.stopped_by is not None:
            raise Interrupted(f"the generation was {done.timer.stopped_by}")
        return done

    def _exclusively(self) -> AbstractContextManager[object]:
        if self._cancelled is not None and self._cancelled.is_set():
            raise Interrupted("the work was cancelled")
        return self.runner.exclusive()


@lru_cache(maxsize=1)
def _opened(source: Callable[..., AdaptiveRunner], args: tuple[Any, ...]) -> AdaptiveRunner:
    return source(*args)
