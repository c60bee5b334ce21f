"""A request that is loaded and measured, and its turn on the model, which may come later and be shared with others.

Knows a request, its arguments and the runner that answers it. Must not know how anything is decided or run.
"""

import threading
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from adaptive_fusion.budget import Budget
from adaptive_fusion.control.candidates import Candidate
from adaptive_fusion.decisions import Decision
from adaptive_fusion.execution.arguments import Arguments
from adaptive_fusion.execution.merging import alike
from adaptive_fusion.execution.request import ChatRequest
from adaptive_fusion.execution.stream import Stream
from adaptive_fusion.point import OperatingPoint
from adaptive_fusion.reply import Reply

if TYPE_CHECKING:
    from adaptive_fusion.answering import Answering


@dataclass(frozen=True)
class Call:
    """The arguments of `chat` and `stream`; see `AdaptiveRunner.prepared` for those that they lack."""

    media: Any
    prompt: str | None
    budget: Budget | None
    point: OperatingPoint | None
    arguments: Arguments
    of_prompt: dict[str, Any]
    arrived_s: float | None = None
    seed: int | None = None
    audit: bool = False
    context: int | None = None
    tenant: str = ""


@dataclass(frozen=True)
class Prepared:
    """A request with its media loaded and measured, whose turn on the model may come later.

    Attributes:
        runner: Whose request it is.
        request: Messages and media.
        arrived_s: When it arrived, on the runner's clock: deadlines count from here.
        native_tokens: Visual tokens that it has natively.
        text_tokens: Tokens of what is said, roughly: the chat template's own are estimated.
    """

    runner: "Answering"
    request: ChatRequest
    arrived_s: float
    native_tokens: int
    text_tokens: int
    call: Call

    def decide(self, *, wait_ms: float = 0.0, refuse: bool = True) -> Decision:
        """The decision that would be taken in `wait_ms` from now; nothing is run.

        Args:
            wait_ms: How long it will still wait for the model.
            refuse: Whether a budget that asks for it may refuse; else the decision says that it is not feasible.

        Raises:
            InfeasibleBudgetError: If nothing fits and the budget asks for a refusal.
        """
        limits = self.runner.budget.merge(self.call.budget)
        if not refuse:
            limits = replace(limits, on_infeasible="cheapest")
        return self.runner._decide(self, limits, wait_ms)

    def offers(self) -> tuple[str, list[Candidate]]:
        """See `AdaptiveRunner.offers`."""
        return self.runner._offers(self.runner._chat_info(self.request, self.call.arguments, self.arrived_s))

    @cached_property
    def apart(self) -> str:
        """Why it is never put together with others, in words; empty where it may be."""
        return self.runner._why_apart(self)

    def fits(self, other: "Prepared") -> bool:
        """Whether it could be answered in one pass of the model with `other`, whatever that costs."""
        if self.runner is not other.runner or self.apart or other.apart:
            return False
        return alike(self.call.arguments, other.call.arguments)

    def chat(
        self, *, cancelled: threading.Event | None = None, decided: Callable[[Decision], None] | None = None
    ) -> Reply:
        """Answer it; see `AdaptiveRunner.chat`.

        Args:
            cancelled: Ends the generation at its next token once it is set.
            decided: Called with the decision before the model runs, in this thread.
        """
        return self.runner._answer_turn(Turn(self, cancelled, decided))

    def stream(
        self, *, cancelled: threading.Event | None = None, decided: Callable[[Decision], None] | None = None
    ) -> Stream[Reply]:
        """The answer in pieces; see `AdaptiveRunner.stream`, and `chat` for the arguments."""

        def work(streamer: Any, ended: threading.Event) -> Reply:
            return self.runner._answer_turn(Turn(self, ended, decided, streamer))

        return Stream(work, getattr(self.runner.processor, "tokenizer", self.runner.processor), cancelled)


@dataclass(frozen=True)
class Turn:
    """A prepared request's turn on the model.

    Attributes:
        prepared: The request.
        cancelled: Ends its generation at the next token once it is set.
        decided: Called with the decision before the model runs, in the thread that runs it.
        streamer: As ``generate`` takes one.
        lead_s: How long before its turn it counts as arrived; None leaves its arrival as it is.
        came: Called when its turn has come, again if it was left out of the batch that it came with.
        request_id: Of its decision, also of a second one, if a batch comes to nothing.
        result: The reply, or what went wrong.
    """

    prepared: Prepared
    cancelled: threading.Event | None = None
    decided: Callable[[Decision], None] | None = None
    streamer: Any = None
    lead_s: float | None = None
    came: Callable[[], None] | None = None
    request_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    result: "Future[Reply]" = field(default_factory=Future)

    def come(self) -> "Turn":
        """The same turn, which has come."""
        if self.came is not None:
            self.came()
        if self.lead_s is None:
            return self
        arrived = self.prepared.runner._clock() - self.lead_s
        return replace(self, prepared=replace(self.prepared, arrived_s=arrived), lead_s=None)

    def settle(self, answer: Callable[[], Reply]) -> None:
        """Set the result to what `answer` gives or raises, unless nobody wants it any more."""
        with suppress(InvalidStateError):
            try:
                reply = answer()
            except Exception as error:
                self.result.set_exception(error)
            else:
                self.result.set_result(reply)

    def fail(self, error: Exception) -> None:
        """Set the result to an error."""
        with suppress(InvalidStateError):
            self.result.set_exception(error)


def answer(turns: Sequence[Turn]) -> None:
    """Answer the turns of one runner, together where they may be; each result is there as soon as its answer ended."""
    turns[0].prepared.runner._answer_turns(turns)
