"""A request's turn on the model, alone or in one batch with others that wait.

Knows jobs, the scheduler and prepared requests. Must not know how a request was read, who shares a batch, or the form
of an answer.
"""

from collections.abc import Callable, Sequence
from typing import Any

from opentelemetry.trace import SpanKind

from adaptive_fusion.decisions import Decision
from adaptive_fusion.execution.stream import Said
from adaptive_fusion.prepared import Prepared, Turn, answer
from adaptive_fusion.reply import Reply
from adaptive_fusion.serving.errands import Errand
from adaptive_fusion.serving.job import Job, tokenizer_of
from adaptive_fusion.serving.refusals import Refusal
from adaptive_fusion.serving.tracing import reply_attributes, request_attributes, say, span


class ModelTurn(Errand[Reply]):
    """What the model does for a request.

    Args:
        job: The request.
        prepared: With its media.
        decided: Called with its decision before the model runs, in the model's thread.
        said: Called with each piece of the answer as it comes, in the same thread.
    """

    def __init__(
        self,
        job: Job,
        prepared: Prepared,
        decided: Callable[[Decision], None] | None = None,
        said: Callable[[str], None] | None = None,
    ) -> None:
        super().__init__()
        self.job, self.prepared, self._decided = job, prepared, decided
        streamer = Said(tokenizer_of(prepared), said) if said is not None else None
        self.turn = Turn(prepared, self.cancelled, self._note, streamer, came=self._begin, result=self.result)
        self._queued_s = self._began_s = job.service.runner.clock()
        self._started = False

    def fits(self, other: Errand[Any]) -> bool:
        """See `Errand.fits`."""
        return isinstance(other, ModelTurn) and self.prepared.fits(other.prepared)

    def do(self, company: Sequence[Any]) -> None:
        """See `Errand.do`."""
        turns: list[ModelTurn] = [self, *company]
        for turn in turns:
            turn.result.add_done_callback(turn._ended)
        answer([turn.turn for turn in turns])

    def _begin(self) -> None:
        """It has come; again if it was left out of a batch, for which it has waited then too."""
        self._began_s = self.job.service.runner.clock()
        self.job.waited_s = self._began_s - self._queued_s

    def _start(self) -> None:
        if not self._started:
            self._started = True
            self.job.service.metrics.started(self.job.waited_s)

    def _ended(self, _: object) -> None:
        self._start()  # of one that failed before it was decided
        self.job.service.metrics.ended()

    def _note(self, decision: Decision) -> None:
        service = self.job.service
        self._start()
        service.metrics.decided(service.runner.clock() - self._began_s)
        if self._decided is not None:
            self._decided(decision)


async def take(turn: ModelTurn) -> Reply:
    """Wait for the model and let it answer, under a span of its own."""
    job, prepared, service = turn.job, turn.prepared, turn.job.service
    options = {**job.call.options, "stream": job.call.stream, "seed": job.call.seed}
    attributes = request_attributes(service.settings.model, {**options, "max_tokens": job.call.max_new_tokens})
    name = f"chat {service.settings.model}"
    with span(name, attributes, context=job.trace, kind=SpanKind.SERVER) as current:
        try:
            job.refuse_if_expired()
            reply = await service.scheduler.run(turn, latest_s=job.latest_s)
        except Refusal:
            service.reserve.observe(False)
            raise
        say(current, reply_attributes(reply))
        say(
            current,
            {
                "adaptive_fusion.queue_ms": job.waited_s * 1e3,
                "adaptive_fusion.media": len(prepared.request.media),
                "adaptive_fusion.visual_tokens_native": prepared.native_tokens,
                "adaptive_fusion.escalated": reply.decision.escalated is True,
                "adaptive_fusion.batch": reply.decision.batch,
            },
        )
    return reply
