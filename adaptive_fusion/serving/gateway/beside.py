"""What another policy would have sent, judged beside an answer that a client got: a shadow, which answers nobody.

The engine is asked again without sampling: with the media as they came, as the old policy sends them and as the new one
would. How many words an answer shares with that to the media as they came is its quality. Both policies are compared by
their first plan, whether or not the engine was asked how sure the model is.

Live requests go first: this begins only while none is there, and one that comes ends what runs here, which is begun
again later. What waits is bounded; what does not fit is dropped and counted. Knows the gateway's parts. Must not know
of experiments.
"""

import asyncio
import json
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from adaptive_fusion.errors import AdaptiveFusionError
from adaptive_fusion.evaluation.text import word_f1
from adaptive_fusion.execution.turns import Turns
from adaptive_fusion.reply import Reply
from adaptive_fusion.serving.gateway.plan import Planned
from adaptive_fusion.serving.gateway.proxy import Headers, closed
from adaptive_fusion.serving.gateway.reading import Call
from adaptive_fusion.serving.gateway.sent import body_of
from adaptive_fusion.serving.gateway.service import Gateway
from adaptive_fusion.serving.gateway.side import Side
from adaptive_fusion.serving.gateway.sizing import Given

WAITING = 8
"""Most requests that wait to be judged."""
_STILL = {"stream": False, "temperature": 0, "n": 1}
_LEFT_OUT = ("stream_options", "logprobs", "top_logprobs")
_MOST_BYTES = 4 << 20
"""Of an answer."""
Tell = Callable[[str, Mapping[str, float], Mapping[str, float]], None]


@dataclass
class Aside:
    """A request as it may be asked again.

    Attributes:
        method, target, headers: Of its head.
        call: What it says.
        planned: What the old policy decided; None until it has.
    """

    method: str
    target: bytes
    headers: Headers
    call: Call
    planned: Planned | None = None


class NotJudged(AdaptiveFusionError):
    """The engine does not say what would be compared."""


class Shadow:
    """Judges a policy beside another's answers. All but the constructor belongs to the gateway's event loop.

    Args:
        gateway: Whose requests they are.
        canary: The side of the other policy.
        tell: Called with the request's id and what both policies came to, the old one first.
    """

    def __init__(self, gateway: Gateway, canary: Side, tell: Tell) -> None:
        self._gateway, self.canary, self._tell = gateway, canary, tell
        self._tasks: deque[tuple[Aside, str]] = deque()
        self._live = 0
        self._running: asyncio.Task[None] | None = None
        self._closed = False
        self.judged = self.dropped = self.interrupted = self.failed = 0

    def arrive(self) -> None:
        """A live request is there: what runs here ends. `leave` follows."""
        self._live += 1
        if self._running is not None:
            self._running.cancel()

    def leave(self) -> None:
        """A live request has ended."""
        self._live -= 1
        self._begin()

    def offer(self, aside: Aside, prompt: str | None, reply: Reply) -> None:
        """An answered request, to be judged once no request is live."""
        planned = aside.planned
        if self._closed or planned is None or not any(medium.measured is not None for medium in planned.media):
            return  # there is nothing that policies could send differently
        if len(self._tasks) >= WAITING:
            self.dropped += 1
            return
        self._tasks.append((aside, reply.decision.request_id))
        self._begin()

    def close(self) -> None:
        """Give up what waits; from any thread, since it is the loop that ends what runs."""
        self._closed = True
        self._tasks.clear()

    # How it is done

    def _begin(self) -> None:
        over = self._closed or self._gateway.draining
        if self._running is None and self._tasks and not self._live and not over:
            self._running = asyncio.get_running_loop().create_task(self._work())
            self._gateway.aside.add(self._running)
            self._running.add_done_callback(self._done)

    def _done(self, task: "asyncio.Task[None]") -> None:
        self._running = None
        self._gateway.aside.discard(task)
        if task.cancelled():
            self.interrupted += 1
        self._begin()

    async def _work(self) -> None:
        aside, request_id = self._tasks[0]
        try:
            found = await self._judge(aside)
        except AdaptiveFusionError:
            self.failed += 1
        else:
            self.judged += 1
            self._tell(request_id, *found)
        if self._tasks and self._tasks[0][0] is aside:
            self._tasks.popleft()

    async def _judge(self, aside: Aside) -> list[dict[str, float]]:
        """What the old and the new policy came to."""
        planned = aside.planned
        assert planned is not None
        decide = self.canary.plans.decide
        other = await self._gateway.in_thread(decide, aside.call, planned.media, Turns(), 0.0)
        answers: dict[tuple[Given, ...], str | None] = {}
        full = tuple(Given() for _ in aside.call.shown)
        for given in (full, tuple(planned.given), tuple(other.given)):
            if given not in answers:
                answers[given] = await self._answer(aside, planned, given)
        reference = answers[full]
        if reference is None:
            raise NotJudged("the engine fails on the request as it came")
        return [_worth(answers[tuple(each.given)], reference) for each in (planned, other)]

    async def _answer(self, aside: Aside, planned: Planned, given: Sequence[Given]) -> str | None:
        """What the engine says; None where it fails.

        Raises:
            NotJudged: If it refuses, or says no words.
        """
        whole = await body_of(self._gateway, aside.call, planned, given)
        body = await self._gateway.in_thread(_still, whole)
        headers = [pair for pair in aside.headers if pair[0].lower() != b"accept-encoding"]
        headers.append((b"accept-encoding", b"identity"))
        response = await self._gateway.upstream.send(aside.method, aside.target, headers, body)
        data = bytearray()
        try:
            async for piece in response.aiter_stream():
                data += piece
                if len(data) > _MOST_BYTES:
                    raise NotJudged("the answer is too long")
        finally:
            await closed(response)
        if response.status >= 500:
            return None
        try:
            said = json.loads(data)["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError, RecursionError):
            said = None
        if response.status != 200 or not isinstance(said, str):
            raise NotJudged("the engine says no words")
        return said


def _still(body: bytes) -> bytes:
    """The request without sampling, to be answered in one piece."""
    kept = {name: value for name, value in json.loads(body).items() if name not in _LEFT_OUT}
    return json.dumps({**kept, **_STILL}).encode()


def _worth(said: str | None, reference: str) -> dict[str, float]:
    if said is None:
        return {"errors": 1.0}
    return {"errors": 0.0, "quality": 1.0 if said == reference else word_f1(said, [reference])}
