"""The plan of a request, image by image: what the policy decides for all of it, and what each image gets of that.

The decision is the planner's, one for a request, with the costs and corrections learned from what the engine upstream
took. Its pixels are the most that any image of it gets; an image for which fewer are enough, by its own detail and the
question, gets those. Within a conversation an image keeps what it had: it rises where a question needs more, and falls
only where the budget cannot be met otherwise. Knows measured media and decisions. Must not know of bytes, JSON or HTTP.
"""

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from adaptive_fusion.budget import Budget
from adaptive_fusion.control.candidates import Candidate, Choice
from adaptive_fusion.control.escalating import Asking
from adaptive_fusion.control.planner import FIXED
from adaptive_fusion.control.request_info import TEMPLATE_TOKENS, RequestInfo
from adaptive_fusion.control.staying import FALLS, RISES, STAYS
from adaptive_fusion.control.upstream import Upstream
from adaptive_fusion.cost.model import Work
from adaptive_fusion.decisions import Decision
from adaptive_fusion.execution.parts import LOW_DETAIL_PIXELS
from adaptive_fusion.execution.request import kind_of
from adaptive_fusion.execution.turns import Turns
from adaptive_fusion.features.prompts import prompt_kind
from adaptive_fusion.media.sampling import frames_at
from adaptive_fusion.point import NATIVE, OperatingPoint
from adaptive_fusion.serving.gateway.escalate import Looks
from adaptive_fusion.serving.gateway.reading import Call
from adaptive_fusion.serving.gateway.sizing import Given, Kept, Measured

MOST_CONVERSATIONS = 4096
_WORDS = {
    STAYS: "what the conversation's media had stays",
    RISES: "media of the conversation rise: what they had is not enough for the question",
    FALLS: "media of the conversation fall: the budget cannot be met otherwise",
}
Memory = Mapping[str, Given]
"""What each medium of a conversation had, by the hash of its bytes."""


@dataclass(frozen=True)
class Medium:
    """One medium of a request as it is planned for: what is known of it and its bytes, or why it is left as it is."""

    measured: Measured | None
    detail: str = ""
    why: str = ""
    data: bytes | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Planned:
    """A decided request.

    Attributes:
        decision: What is told and logged.
        choice: What the controller learns from.
        given: What each medium gets, in order.
        ran: All of it with what it is predicted to take.
        work: The same, as work.
        info: What the planner was told.
        native_tokens: Of all media that were measured, as they came.
        media: In order.
        tokens: As they are sent.
        second: What each medium gets where the model is not sure; None where it is not asked.
    """

    decision: Decision
    choice: Choice
    given: tuple[Given, ...]
    ran: Candidate
    work: Work
    info: RequestInfo
    media: tuple[Medium, ...]
    native_tokens: int
    tokens: int
    second: tuple[Given, ...] | None = None


class Plans:
    """Decides for requests to one model upstream and remembers what media of conversations had.

    Args:
        upstream: Decides and learns.
        audit: Everything is sent as it came, and the decision says what would have been done.
        gives_logprobs: Whether the engine can be asked how sure the model is.
    """

    def __init__(self, upstream: Upstream, *, audit: bool, gives_logprobs: bool) -> None:
        self.upstream, self.audit = upstream, audit
        self.looks = Looks(gives_logprobs, upstream.clock)
        self._conversations: Kept[Memory] = Kept(MOST_CONVERSATIONS)

    def decide(self, call: Call, media: Sequence[Medium], turns: Turns, elapsed_ms: float) -> Planned:
        """The plan of a request.

        Args:
            call: What it says.
            media: All that it shows, in order.
            turns: Its place in its conversation.
            elapsed_ms: Since it arrived.

        Raises:
            InfeasibleBudgetError: If nothing fits and the budget asks for a refusal.
            UnsupportedModelError: For a point that cannot be had upstream.
        """
        info = self._info(call, media, elapsed_ms)
        limits = self.upstream.budget.merge(call.budget)
        point = call.point
        if point is None and (call.sized or not info.sizes):
            decision, choice = self.upstream.planner.decide(info, limits, NATIVE, self._because(call, media))
        else:
            decision, choice = self.upstream.decide(info, call.budget, point, audit=self.audit)
        decided = decision.lane != FIXED and not self.audit
        own = [self._own(info, index) for index in range(len(info.sizes))] if decided else None
        wanted = [Given() if self.audit else self._given(decision.point, info, own, i) for i in range(len(info.sizes))]
        kept = self._kept(turns) if decided else {}
        names = [each.measured.name for each in media if each.measured is not None]
        given, change = self._staying(wanted, own or [], names, kept, info, choice, limits)
        second = None
        if choice.candidate.second is not None:
            better = choice.candidate.second.candidate.point
            second = [self._given(better, info, own, index) for index in range(len(info.sizes))]
            second = [_most(one, had) for one, had in zip(second, given, strict=True)]
        if decided and turns.own:
            self._conversations.keep(turns.own, {**kept, **dict(zip(names, given, strict=True))})
        ran, work = self._run(info, given, choice)
        decision = replace(decision, reason="; ".join([decision.reason, *_remarks(media, change)]))
        if change:
            decision = replace(decision, conversation={"change": change, "images": sum(name in kept for name in names)})
        adapter, as_they_came = self.upstream.adapter, [replace(size, most_pixels=None) for size in info.sizes]
        return Planned(
            decision,
            choice,
            tuple(_spread(given, media)),
            ran,
            work,
            info,
            tuple(media),
            adapter.plan(as_they_came, NATIVE).tokens,
            work.prompt_tokens - info.text_tokens,
            second=None if second is None else tuple(_spread(second, media)),
        )

    def rise(self, turns: Turns, media: Sequence[Medium], given: Sequence[Given]) -> None:
        """Remember that the media of a request ran at more than was planned at first."""
        kept = dict(self._kept(Turns((turns.own,), turns.own)))
        for medium, one in zip(media, given, strict=True):
            if medium.measured is not None:
                kept[medium.measured.name] = one
        if turns.own:
            self._conversations.keep(turns.own, kept)

    def frames(self, measured: Measured, given: Given) -> int | None:
        """How many frames of a clip are sent; None for all."""
        if not measured.size.clip or given.max_fps is None:
            return None
        count = len(frames_at(measured.times_s, measured.duration_s, given.max_fps))
        return count if count < measured.size.frames else None

    # How it is done

    def _info(self, call: Call, media: Sequence[Medium], elapsed_ms: float) -> RequestInfo:
        shown = [each for each in media if each.measured is not None]
        known = [each.measured for each in shown if each.measured is not None]
        sizes = [
            replace(one.size, most_pixels=LOW_DETAIL_PIXELS) if each.detail == "low" else one.size
            for each, one in zip(shown, known, strict=True)
        ]
        return RequestInfo(
            kind=kind_of([one.complexity.kind for one in known]),
            sizes=sizes,
            complexities=[one.complexity for one in known],
            prompt=call.prompt,
            max_new_tokens=call.max_new_tokens,
            text_tokens=call.text_tokens + TEMPLATE_TOKENS,
            durations_s=[one.duration_s for one in known],
            frame_times_s=[one.times_s for one in known],
            elapsed_ms=elapsed_ms,
            full_detail=any(each.detail == "high" for each in media),
            asking=self._asking(call),
            request_id=uuid.uuid4().hex,
        )

    def _asking(self, call: Call) -> Asking | None:
        rules = self.upstream.policy.escalation
        if rules is None:
            return None
        never = call.why_no_look if self.looks.are_given else "the engine gives no log-probabilities"
        return Asking(rules, prompt_kind(call.prompt) if call.prompt else "", never)

    def _because(self, call: Call, media: Sequence[Medium]) -> str:
        """Why there is nothing to decide."""
        if call.sized:
            return f"the request says by {call.sized} how large its media are to be"
        return "nothing that it shows can be planned for" if media else "it shows nothing"

    def _own(self, info: RequestInfo, index: int) -> OperatingPoint | None:
        """The fewest pixels and frames that are as good as all for one medium and the question; None where the policy
        cannot say, or it is like nothing that the policy knows."""
        planner = self.upstream.planner
        one = replace(
            info,
            sizes=[info.sizes[index]],
            complexities=[info.complexities[index]],
            durations_s=[info.durations_s[index]],
            frame_times_s=[info.frame_times_s[index]],
        )
        needs = planner.needs(one)
        if needs is None or planner.unlike(one):
            return None
        hardest, route = planner.route(one)
        offers = planner.candidates(one, route.lane, hardest, needs, Budget())
        best = max(offer.quality for offer in offers)
        enough = [offer for offer in offers if offer.quality >= best]
        return min(enough, key=lambda offer: offer.predicted.latency_ms).point

    def _given(
        self, point: OperatingPoint, info: RequestInfo, own: Sequence[OperatingPoint | None] | None, index: int
    ) -> Given:
        """What a medium gets of a request's point: no more than is enough for itself."""
        size, adapter = info.sizes[index], self.upstream.adapter
        points = [point] if own is None or (each := own[index]) is None else [point, each]
        pixels = min((p.max_pixels for p in points if p.max_pixels is not None), default=None)
        if size.most_pixels is not None:
            pixels = min(size.most_pixels, pixels if pixels is not None else size.most_pixels)
        if pixels is not None and adapter.sides(replace(size, most_pixels=None), pixels) == adapter.sides(
            replace(size, most_pixels=None), None
        ):
            pixels = None
        fps = min((p.max_fps for p in points if p.max_fps is not None), default=None) if size.clip else None
        return Given(pixels, fps)

    def _kept(self, turns: Turns) -> Memory:
        found = (self._conversations.get(each) for each in turns.before)
        return next((each for each in found if each is not None), {})

    def _staying(
        self,
        wanted: list[Given],
        own: Sequence[OperatingPoint | None],
        names: Sequence[str],
        kept: Memory,
        info: RequestInfo,
        choice: Choice,
        limits: Budget,
    ) -> tuple[list[Given], str]:
        """What media get, and what becomes of those that the conversation has shown before; empty where it has none."""
        if not any(name in kept for name in names):
            return wanted, ""
        given = [_most(one, kept[name]) if name in kept else one for one, name in zip(wanted, names, strict=True)]
        rises = any(name in kept and one != kept[name] for one, name in zip(given, names, strict=True))
        if given != wanted and choice.feasible:
            stays, falls = self._run(info, given, choice)[0], self._run(info, wanted, choice)[0]
            late = self.upstream.controller.too_late_for
            if late(stays, limits, info.elapsed_ms) and not late(falls, limits, info.elapsed_ms):
                return wanted, FALLS
        return given, RISES if rises else STAYS

    def _run(self, info: RequestInfo, given: Sequence[Given], choice: Choice) -> tuple[Candidate, Work]:
        """All media at what each is given, as a candidate of the name that was chosen, and as work."""
        sizes = [
            replace(size, most_pixels=one.max_pixels, frames=self._frames(info, index, one))
            for index, (size, one) in enumerate(zip(info.sizes, given, strict=True))
        ]
        planner, taken = self.upstream.planner, choice.candidate
        told = replace(info, sizes=sizes, durations_s=(), frame_times_s=())
        candidate = planner.candidate(NATIVE, taken.quality, told, key=taken.key)
        return replace(candidate, point=taken.point), planner.work(NATIVE, told)

    def _frames(self, info: RequestInfo, index: int, given: Given) -> int:
        size = info.sizes[index]
        if not size.clip or given.max_fps is None:
            return size.frames
        return len(frames_at(info.frame_times_s[index], info.durations_s[index], given.max_fps))


def _most(one: Given, other: Given) -> Given:
    """The more of both, of each thing."""

    def most(a: Any, b: Any) -> Any:
        return None if a is None or b is None else max(a, b)

    return Given(most(one.max_pixels, other.max_pixels), most(one.max_fps, other.max_fps))


def _spread(given: Sequence[Given], media: Sequence[Medium]) -> list[Given]:
    """What all media get, in order; those that are left as they are get what they have."""
    rest = iter(given)
    return [Given() if each.measured is None else next(rest) for each in media]


def _remarks(media: Sequence[Medium], change: str) -> list[str]:
    """What the reason says beside the planner's own."""
    why = dict.fromkeys(each.why for each in media if each.measured is None)
    counts = {each: sum(medium.why == each for medium in media if medium.measured is None) for each in why}
    left = [f"{count} of {len(media)} media left as they came: {each}" for each, count in counts.items()]
    return [*left, *([_WORDS[change]] if change else [])]
