"""A model behind an address, asked from Python: the decisions, log and policies of a runner, the answers of an engine.

`AdaptiveRunner.remote` makes one. A request is planned as the gateway plans it (`plan`), its media are brought to what
the plan says, and the engine's answer comes back as a `Reply`. Knows requests and answers. Must not know how plans are
made or media resized.
"""

import json
import math
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from adaptive_fusion.budget import Budget
from adaptive_fusion.control.upstream import Upstream, measured_from_outside
from adaptive_fusion.decision_log import DecisionLog, text_hash
from adaptive_fusion.decisions import Decision, Measurement, decision_record
from adaptive_fusion.errors import ConfigError
from adaptive_fusion.execution.request import conversation
from adaptive_fusion.execution.turns import Turns, turns_of
from adaptive_fusion.features.prompts import prompt_kind
from adaptive_fusion.media.inline import data_url_bytes
from adaptive_fusion.media.pixels import DEFAULT
from adaptive_fusion.point import NATIVE, OperatingPoint
from adaptive_fusion.policy.escalation import MOST_TOKENS
from adaptive_fusion.policy.files import AUTO
from adaptive_fusion.policy.policy import Policy
from adaptive_fusion.policy.rungs import Rung
from adaptive_fusion.reply import Reply
from adaptive_fusion.serving.gateway import engines, processors
from adaptive_fusion.serving.gateway.answer import Answer
from adaptive_fusion.serving.gateway.client import TIMEOUT_S, Client, UpstreamError
from adaptive_fusion.serving.gateway.escalate import ASKED, entropies
from adaptive_fusion.serving.gateway.events import Events
from adaptive_fusion.serving.gateway.outgoing import chat_body
from adaptive_fusion.serving.gateway.plan import Medium, Planned, Plans
from adaptive_fusion.serving.gateway.reading import Call, Shown, read_call
from adaptive_fusion.serving.gateway.remote_stream import RemoteStream
from adaptive_fusion.serving.gateway.sizing import Given, Sizing, as_data_url
from adaptive_fusion.serving.gateway.stills import NotPlanned

__all__ = ["Remote", "RemoteStream", "UpstreamError"]


@dataclass(frozen=True)
class _Ready:
    """A planned request with its media as bytes."""

    call: Call
    media: tuple[Medium, ...]
    data: tuple[bytes, ...]
    planned: Planned
    arrived_s: float


class Remote:
    """See `AdaptiveRunner.remote`; thread-safe."""

    def __init__(
        self,
        url: str,
        model: str,
        *,
        processor: str = "qwen3-vl",
        engine: str = "openai",
        policy: Policy | str | Path = AUTO,
        budget: Budget | None = None,
        log: DecisionLog | str | Path | None = None,
        key: str | None = None,
        timeout_s: float = TIMEOUT_S,
        seed: int | None = None,
    ) -> None:
        self.client, self.model = Client(url, key, timeout_s), model
        self.engine, self.grid = engines.find(engine), processors.find(processor)
        self.upstream = Upstream(self.grid, model, policy=policy, budget=budget, seed=seed)
        self.log = DecisionLog(log) if isinstance(log, str | Path) else log
        self._plans = Plans(self.upstream, audit=False, gives_logprobs=self.engine.logprobs)
        self._sizing = Sizing(self.grid, DEFAULT.max_megapixels)

    @property
    def policy(self) -> Policy:
        """The policy with what can be chosen before an engine."""
        return self.upstream.policy

    @property
    def gives_logprobs(self) -> bool:
        """Whether the engine can be asked how sure the model is."""
        return self.engine.logprobs

    def close(self) -> None:
        """Close all connections."""
        self.client.close()

    def __enter__(self) -> "Remote":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Asking

    def chat(
        self,
        media: Any,
        prompt: str | None = None,
        *,
        budget: Budget | None = None,
        max_new_tokens: int | None = None,
        point: OperatingPoint | None = None,
        **fields: Any,
    ) -> Reply:
        """Answer one request; arguments are those of `AdaptiveRunner.chat`, but `fields` are the engine's own.

        Raises:
            UpstreamError: If the engine does not answer.
            MediaError: For a medium that cannot be used.
            ConfigError: For an argument that cannot be said upstream.
            UnsupportedModelError: For a `point` with a knob other than pixels and frames.
            InfeasibleBudgetError: If nothing fits and the budget asks for a refusal.
        """
        ready = self._ready(media, prompt, budget, max_new_tokens, point, fields, stream=False)
        second = ready.planned.choice.candidate.second
        asked = {"logprobs": True, "top_logprobs": ASKED} if second is not None else {}
        answer = self._whole(ready, ready.planned.given, asked)
        decision, first_ms = ready.planned.decision, (time.monotonic() - ready.arrived_s) * 1e3
        if second is None:
            return self._reply(ready, answer, decision)
        seen = entropies(answer.choices)[: second.k]
        if not seen:
            why = "the engine gave no log-probabilities"
            return self._reply(ready, answer, replace(decision, escalation={**decision.escalation, "why": why}))
        entropy = sum(seen) / len(seen)
        escalation = {**decision.escalation, "entropy": entropy}
        unsure = entropy > second.threshold
        self.upstream.controller.looked_at(ready.planned.choice, math.nan, escalated=unsure)
        if not unsure:
            return self._reply(ready, answer, replace(decision, escalated=False, escalation=escalation))
        assert ready.planned.second is not None
        answer = self._whole(ready, ready.planned.second, {})
        better, first = second.candidate, ready.planned.choice.candidate
        said = f"went on to {better.key}: entropy {entropy:.3g}, above {second.threshold:.3g}"
        decision = replace(
            decision,
            escalated=True,
            escalation={**escalation, "first_rung": first.key, "first_ms": first_ms},
            point=better.point,
            rung=better.key,
            predicted=better.predicted,
            reason=f"{decision.reason}; {said}",
        )
        return self._reply(ready, answer, decision, learn=False)

    def stream(
        self,
        media: Any,
        prompt: str | None = None,
        *,
        budget: Budget | None = None,
        max_new_tokens: int | None = None,
        point: OperatingPoint | None = None,
        **fields: Any,
    ) -> RemoteStream:
        """As `chat`, as an iterator over pieces of text whose ``reply`` holds the `Reply` once it has ended. What a
        stream begins with stands, so there is no second pass."""
        ready = self._ready(media, prompt, budget, max_new_tokens, point, fields, stream=True)
        answer = Answer()
        return RemoteStream(self._pieces(ready, answer), lambda: self._reply(ready, answer, ready.planned.decision))

    def decide(
        self, media: Any, prompt: str | None = None, *, budget: Budget | None = None, max_new_tokens: int | None = None
    ) -> Decision:
        """The decision `chat` would take, without asking the engine."""
        return self._ready(media, prompt, budget, max_new_tokens, None, {}, stream=False).planned.decision

    def answer_at(
        self, media: Any, prompt: str | None, rung: Rung, max_new_tokens: int
    ) -> tuple[str, Measurement, tuple[float, ...]]:
        """The greedy answer at a rung, for a label: nothing is decided, learned or logged. What it took, and the
        entropies of its first tokens in nats, where the engine gives log-probabilities.

        Raises:
            UnsupportedModelError: For a rung with knobs other than pixels and frames.
        """
        ready = self._ready(media, prompt, None, max_new_tokens, NATIVE, {"temperature": 0}, stream=True)
        adapter, sizes = self.upstream.adapter, ready.planned.info.sizes
        adapter.require(rung.point)
        point = adapter.resolve(rung, sizes)
        planned = self._plans.decide(replace(ready.call, point=point), ready.media, Turns(), 0.0)
        answer, began_s = Answer(), time.monotonic()
        ready = replace(ready, planned=planned, arrived_s=began_s)
        asked = {"logprobs": True, "top_logprobs": ASKED} if self.engine.logprobs else {}
        for _ in self._pieces(ready, answer, asked):
            pass
        return answer.text.strip(), self._measured(ready, answer), tuple(answer.entropies[:MOST_TOKENS])

    # How it is done

    def _ready(
        self,
        media: Any,
        prompt: str | None,
        budget: Budget | None,
        max_new_tokens: int | None,
        point: OperatingPoint | None,
        fields: Mapping[str, Any],
        *,
        stream: bool,
    ) -> _Ready:
        arrived = time.monotonic()
        if stream and "stream" in fields:
            raise ConfigError("stream is given; expected the method stream")
        most = {} if max_new_tokens is None else {"max_tokens": max_new_tokens}
        streaming: dict[str, Any] = {"stream": True} if stream else {}
        if stream and self.engine.stream_usage:
            streaming["stream_options"] = {"include_usage": True}
        body = chat_body(self.model, conversation(media, prompt), {**streaming, **most, **fields})
        call = read_call(body)
        never = "a stream's answer begins at once" if stream else call.why_no_look
        call = replace(call, budget=budget or Budget(), point=point, why_no_look=never)
        data = tuple(data_url_bytes(each.text) for each in call.shown)
        shown = tuple(self._medium(each, found) for each, found in zip(data, call.shown, strict=True))
        names = [each.measured.name for each in shown if each.measured is not None]
        turns = turns_of(call.messages, names, "")
        planned = self._plans.decide(call, shown, turns, (time.monotonic() - arrived) * 1e3)
        return _Ready(call, shown, data, planned, arrived)

    def _medium(self, data: bytes, shown: Shown) -> Medium:
        try:
            return Medium(self._sizing.measure(data, shown.kind), shown.detail)
        except NotPlanned as error:
            return Medium(None, shown.detail, str(error))

    def _sent(self, ready: _Ready, given: Sequence[Given], added: Mapping[str, Any]) -> bytes:
        """The body with media at what they are given."""
        edits = []
        for medium, data, shown, each in zip(ready.media, ready.data, ready.call.shown, given, strict=True):
            if medium.measured is None:
                continue
            frames = self._plans.frames(medium.measured, each)
            small = self._sizing.smaller(medium.measured, data, each, frames)
            if small is not None:
                edits.append((shown.node, json.dumps(as_data_url(small, shown.text[:64]))))
        return ready.call.body.edited(edits, dict(added))

    def _whole(self, ready: _Ready, given: Sequence[Given], added: Mapping[str, Any]) -> Answer:
        return Answer.read(self.client.json(self._sent(ready, given, added)))

    def _pieces(
        self, ready: _Ready, answer: Answer, added: Mapping[str, Any] | None = None
    ) -> Generator[str, None, None]:
        """The texts of a stream, kept in `answer` too."""
        events = Events()
        with self.client.asked(self._sent(ready, ready.planned.given, added or {})) as response:
            for piece in response.iter_stream():
                for event in events.feed(piece):
                    yield from answer.said(event)
            yield from answer.said(events.rest)
        if not answer.finish:
            raise UpstreamError("the engine ended in the middle of its answer", 502)

    def _reply(self, ready: _Ready, answer: Answer, decision: Decision, *, learn: bool = True) -> Reply:
        """What goes out; costs and lengths learn from it and it is logged."""
        planned, measured = ready.planned, self._measured(ready, answer)
        ended = answer.finish != "length"
        if learn:
            kind = prompt_kind(ready.call.prompt)
            self.upstream.took(planned.choice, planned.ran, planned.work, kind, measured, ended=ended)
        if self.log is not None:
            names = "+".join(each.measured.name for each in ready.media if each.measured is not None)
            prompt = text_hash(ready.call.prompt)
            record = decision_record(
                decision,
                measured,
                time_s=time.time(),
                content_hash=names or None,
                prompt_hash=prompt,
                finish_reason=answer.finish,
            )
            self.log.write(record)
        return Reply(answer.text, answer.finish, decision, measured)

    def _measured(self, ready: _Ready, answer: Answer) -> Measurement:
        usage = answer.usage if isinstance(answer.usage, Mapping) else {}
        counted, work = self.engine.image_tokens(usage), ready.planned.work
        prompt = usage.get("prompt_tokens")
        new = usage.get("completion_tokens")
        return measured_from_outside(
            (answer.first_s - ready.arrived_s) * 1e3,
            (time.monotonic() - ready.arrived_s) * 1e3,
            ready.planned.tokens if counted is None else counted,
            prompt if isinstance(prompt, int) else int(work.prompt_tokens),
            new if isinstance(new, int) else answer.pieces or max(1, round(work.new_tokens)),
        )
