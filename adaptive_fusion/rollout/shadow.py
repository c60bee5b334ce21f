"""Shadow runs: a sampled share of live requests, answered again at full compute in the background, as labels.

Knows a runner, a scorer and the runner's log. Must not know servers or how labels are fitted.

Live traffic goes first. The background thread starts only while no request is live, stops at the next token when
one arrives, and begins that shadow again later; an arriving request waits for one encoder pass or prefill at most.
The queue is bounded: what does not fit is dropped and counted. A shadow that fails is counted and never heard of
by the request. Nothing is kept of the media but in the queue.
"""

import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from adaptive_fusion.budget import Budget
from adaptive_fusion.errors import ConfigError, Interrupted
from adaptive_fusion.evaluation.questions import Question
from adaptive_fusion.execution.stream import Stream
from adaptive_fusion.learning.data.labels import shadow_record
from adaptive_fusion.learning.labelling.labeller import RunnerModel
from adaptive_fusion.learning.labelling.scoring import ModelScorer
from adaptive_fusion.policy.policy import COMPLEX, LANES
from adaptive_fusion.policy.rungs import Rung
from adaptive_fusion.reply import Reply
from adaptive_fusion.runner import AdaptiveRunner


@dataclass
class ShadowCounts:
    """What became of the sampled requests; `last_error` is that of the newest failure."""

    labelled: int = 0
    dropped: int = 0
    interrupted: int = 0
    failed: int = 0
    last_error: str = ""


@dataclass(frozen=True)
class _Task:
    question: Question
    reply: Reply


class ShadowedRunner:
    """A runner's `chat` and `stream`, of whose requests a share is labelled afterwards; all else is the runner's.

    The label is the quality of what the user got against the full answer: its likelihood under the point that was
    used (see `ModelScorer`). It goes to the runner's log as a ``shadow`` record with the request's id.

    Args:
        runner: Answers the requests. Must have a log.
        share: Of requests that are labelled, 0 to 1.
        waiting: Most requests that wait for their shadow.
        arms: Label the policy's cheap plan and the first of its strong lane as well, at two more prefills a label:
            then every label says which of the two was enough, whatever the request ran at, and a policy can be trained
            on shadows alone.
        seed: Of the sampling.
        clock: Seconds since the epoch, for the labels.

    Raises:
        ConfigError: For a runner without a log or a value out of range.
    """

    def __init__(
        self,
        runner: AdaptiveRunner,
        share: float,
        *,
        waiting: int = 8,
        arms: bool = False,
        seed: int | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        if runner.log is None:
            raise ConfigError("the runner has no log; expected one, where shadow labels go")
        if not 0 <= share <= 1 or waiting < 1:
            raise ConfigError(f"share is {share!r}, waiting {waiting!r}; expected 0 to 1, and at least 1")
        self.runner, self.share, self.log = runner, share, runner.log
        self.counts = ShadowCounts()
        both = (runner.policy.cheap_rung, runner.policy.lanes[COMPLEX][0])
        self._arms = both if arms else ()
        self._most, self._clock, self._rng = waiting, clock, random.Random(seed)
        self._tasks: deque[_Task] = deque()
        self._live = 0
        self._closed = False
        self._changed = threading.Condition()
        self._cancelled = threading.Event()
        model = RunnerModel(runner, cancelled=self._cancelled)
        self._scorer = ModelScorer(model)
        self._thread = threading.Thread(target=self._work, name="adaptive-fusion-shadow", daemon=True)
        self._thread.start()

    def __getattr__(self, name: str) -> Any:
        if name == "runner":
            raise AttributeError(name)
        return getattr(self.runner, name)

    def chat(self, media: Any, prompt: str | None = None, **options: Any) -> Reply:
        """See `AdaptiveRunner.chat`."""
        with self._living():
            reply = self.runner.chat(media, prompt, **options)
        self.offer(media, prompt, reply)
        return reply

    def stream(self, media: Any, prompt: str | None = None, **options: Any) -> "ShadowedStream":
        """See `AdaptiveRunner.stream`; the request is live until the stream has ended or is closed."""
        self.arrive()
        try:
            stream = self.runner.stream(media, prompt, **options)
        except BaseException:
            self.leave()
            raise

        def ended(reply: Reply | None) -> None:
            self.leave()
            if reply is not None:
                self.offer(media, prompt, reply)

        return ShadowedStream(stream, ended)

    def drain(self, timeout_s: float | None = None) -> bool:
        """Wait until no shadow is under way or waiting; whether that came to pass in time."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._tasks or self._closed, timeout_s)

    def close(self) -> None:
        """Give up what waits, stop what runs at its next token, and end the thread; requests go on unshadowed."""
        with self._changed:
            self._closed = True
            self._tasks.clear()
            self._cancelled.set()
            self._changed.notify_all()
        self._thread.join()

    def __enter__(self) -> "ShadowedRunner":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # How it is done

    def arrive(self) -> None:
        """A live request is there: what runs here stops at its next token. `leave` follows."""
        with self._changed:
            self._live += 1
            self._cancelled.set()

    def leave(self) -> None:
        """A live request has ended."""
        with self._changed:
            self._live -= 1
            self._changed.notify_all()

    @contextmanager
    def _living(self) -> Iterator[None]:
        self.arrive()
        try:
            yield
        finally:
            self.leave()

    def offer(self, media: Any, prompt: str | None, reply: Reply) -> None:
        """An answered request, of which a share is labelled once no request is live."""
        decided = reply.decision
        if decided.lane not in LANES or reply.finish_reason not in ("stop", "length"):
            return  # text alone, a point that was given, or an answer that was cut off: nothing to learn for routing
        with self._changed:
            if self._closed or self._rng.random() >= self.share:
                return
            if len(self._tasks) >= self._most:
                self.counts.dropped += 1
                return
            self._tasks.append(_Task(Question(media, prompt or ""), reply))
            self._changed.notify_all()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or (self._tasks and not self._live))
                if self._closed:
                    return
                task = self._tasks[0]
                self._cancelled.clear()
            try:
                self._label(task)
                self.counts.labelled += 1
            except Interrupted:
                self.counts.interrupted += 1
                continue
            except Exception as error:  # whatever a model raises: the request it belongs to is long answered
                self.counts.failed += 1
                self.counts.last_error = f"{type(error).__name__}: {error}"
            with self._changed:
                if self._tasks and self._tasks[0] is task:
                    self._tasks.popleft()
                self._changed.notify_all()

    def _label(self, task: _Task) -> None:
        decided = task.reply.decision
        rung = Rung(decided.point)
        others = [other for other in dict.fromkeys(self._arms) if other.name != decided.rung]
        scores = self._scorer.score(task.question, list({each.name: each for each in (rung, *others)}.values()))
        quality = {decided.rung: scores.quality[rung.name], **{each.name: scores.quality[each.name] for each in others}}
        self.log.write(
            shadow_record(decided.request_id, quality, reference_quality=scores.reference_quality, time_s=self._clock())
        )


class PairedShadow(ShadowedRunner):
    """A shadow of another policy: what it would have run is judged beside what the user got, on the same request.

    Args:
        runner: Answers the requests. Must have a log, where the label of what the user got goes, as ever.
        canary: Decides by the other policy; the same model.
        tell: Called with the request's id and what both came to by metric, `runner` first.
        waiting: Most requests that wait for their shadow.
    """

    def __init__(
        self,
        runner: AdaptiveRunner,
        canary: AdaptiveRunner,
        tell: Callable[[str, Mapping[str, float], Mapping[str, float]], None],
        *,
        waiting: int = 8,
    ) -> None:
        self.canary, self._tell = canary, tell
        super().__init__(runner, 1.0, waiting=waiting)

    def _label(self, task: _Task) -> None:
        decided, question = task.reply.decision, task.question
        budget = Budget.from_dict(dict(decided.budget))
        other = self.canary.decide(question.media, question.prompt or None, budget=budget)
        mine, theirs = Rung(decided.point), Rung(other.point)
        scores = self._scorer.score(question, [mine] if theirs.name == mine.name else [mine, theirs])
        quality = {decided.rung: scores.quality[mine.name], other.rung: scores.quality[theirs.name]}
        self.log.write(
            shadow_record(decided.request_id, quality, reference_quality=scores.reference_quality, time_s=self._clock())
        )
        mine_worth, their_worth = ({"quality": scores.quality[each.name]} for each in (mine, theirs))
        self._tell(decided.request_id, mine_worth, their_worth)


class ShadowedStream:
    """A `Stream` that says when it has ended, and with which reply (None without one)."""

    def __init__(self, stream: Stream[Reply], ended: Callable[[Reply | None], None]) -> None:
        self._stream, self._ended = stream, ended
        self._once = threading.Lock()

    def __iter__(self) -> Iterator[str]:
        try:
            yield from self._stream
        finally:
            self.close()

    @property
    def reply(self) -> Reply:
        """See `Stream.reply`."""
        try:
            return self._stream.reply
        finally:
            self.close()

    def close(self) -> None:
        """See `Stream.close`."""
        self._stream.close()
        if self._once.acquire(blocking=False):
            try:
                reply = self._stream.reply
            except BaseException:  # the reader of the stream gets it
                reply = None
            self._ended(reply)

    def __enter__(self) -> "ShadowedStream":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
