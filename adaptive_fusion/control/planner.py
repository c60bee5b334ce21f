"""From what was measured on a request to a decision: route, candidates with predicted costs, choice.

Wires policy, cost model and controller for one adapter. Runs nothing, loads nothing; every input is an argument.
"""

import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from adaptive_fusion.budget import Budget
from adaptive_fusion.control.candidates import Candidate, Choice
from adaptive_fusion.control.controller import Controller
from adaptive_fusion.control.escalating import NO_SECOND, SURE, Asking, level, plans, told
from adaptive_fusion.control.exploring import GREEDY, Drawn, draw
from adaptive_fusion.control.staying import Plan, Staying, staying
from adaptive_fusion.cost.lengths import LengthModel
from adaptive_fusion.cost.model import CostModel, Work
from adaptive_fusion.decisions import Decision, Prediction
from adaptive_fusion.errors import ConfigError
from adaptive_fusion.features.complexity import Complexity, is_still
from adaptive_fusion.features.prompts import prompt_features, prompt_kind
from adaptive_fusion.media.sampling import frames_at
from adaptive_fusion.models.base import Adapter, Size
from adaptive_fusion.point import NATIVE, OperatingPoint
from adaptive_fusion.policy.policy import COMPLEX, VIDEO, Policy, Route
from adaptive_fusion.policy.rungs import Rung
from adaptive_fusion.policy.sufficiency import STILL_FPS, Needs, together

HIT, PART, MISS = "hit", "part", "miss"
"""How many of a request's media need no encoder: all, some, none."""
FIXED = "fixed"
"""The lane of requests whose point was not decided here."""
SPARE = 4
"""Of the steps that a request without limits will hardly need, every so many are predicted."""
Rated = tuple[Rung, float]
"""A step and the quality expected of it for a request."""
TEMPLATE_TOKENS = 16
"""What a chat template adds around a question, roughly; the prefill's share of it does not matter."""


@dataclass(frozen=True)
class RequestInfo:
    """What the planner needs to know of a request; times in milliseconds."""

    kind: str
    sizes: Sequence[Size]
    complexities: Sequence[Complexity]
    prompt: str
    max_new_tokens: int
    text_tokens: int
    durations_s: Sequence[float] = ()  # of the media, in order
    frame_times_s: Sequence[Sequence[float]] = ()  # the same, of their frames; without them clips keep their frames
    batch: int = 1
    elapsed_ms: float = 0.0
    free_memory_gb: float | None = None
    pixels_fixed: bool = False  # preprocessing is over: the knobs before the encoder no longer apply
    full_detail: bool = False  # the caller wants all pixels and tokens while the budget allows
    asking: Asking | None = None  # whether the model may be asked if it is sure of a cheap plan's answer
    beside: Sequence[Work] = ()  # what others make the model do that are in one batch with it
    seen: Callable[[OperatingPoint], Sequence[bool]] | None = None  # media whose encoder outputs are there at a point
    cached_gb: float = 0.0  # device memory that such outputs take, which counts against the budget
    kept: Plan | None = None  # what the conversation's media had before
    request_id: str = ""  # of the decision; without one it is only asked what would be done, and nothing is explored


class Planner:
    """Decides for one adapter with one policy."""

    def __init__(
        self,
        adapter: Adapter,
        policy: Policy,
        cost: CostModel,
        controller: Controller,
        lengths: LengthModel,
        remark: str = "",
        seed: int | None = None,
    ) -> None:
        """`remark` is said in the reason of every decision: that the policy was fitted to another model. `seed` is of
        what an exploring policy draws by the ids of requests."""
        self.adapter, self.policy, self.cost = adapter, policy, cost
        self.controller, self.lengths, self.remark, self.seed = controller, lengths, remark, seed

    def decide(
        self, info: RequestInfo, budget: Budget, point: OperatingPoint | None = None, because: str | None = None
    ) -> tuple[Decision, Choice]:
        """The decision for `info` under `budget`, and the choice that the controller learns from afterwards.

        A given `point` is taken as it is, with its prediction. `because` says why a request has no other than
        `point` to run at: then the budget may still refuse it.

        An estimate of the costs that no request has confirmed yet refuses nothing.

        Raises:
            UnsupportedModelError: If `point` has a knob that the model lacks.
            ConfigError: If `point` has a knob that acts before the encoder and the media are preprocessed already.
            InfeasibleBudgetError: If nothing fits and the budget asks for a refusal.
        """
        limits = budget
        given = point is not None and because is None
        if given or not (self.cost.profile.samples or self.controller.informed):
            limits = replace(budget, on_infeasible="cheapest")
        second: dict[str, Any]
        stay: Staying | None = None
        info = _with_cache_counted(info, budget)
        hardest, route = self.route(info)
        needs, unlike = self.needs(info), self.unlike(info)
        features = {k: v for k, v in prompt_features(info.prompt).items() if v} if info.prompt else {}
        if point is not None:
            self.adapter.require(point)
            _require_in_time(point, info)
            candidates = [self.candidate(point, 1.0, info)]
            lane, drawn = FIXED, GREEDY
            second = {"why": because or "the point was given"} if info.asking is not None else {}
            choice = self.controller.choose(candidates, limits, elapsed_ms=info.elapsed_ms)
            reason = because or "the point was given"
            if info.full_detail and not point.is_full:
                reason += ", over the full detail that was asked for"
            choice = replace(choice, reason=reason, rejected=())
        else:
            lane = route.lane
            explores = self._may_explore(info, unlike)
            all_of_them = info.full_detail or bool(unlike) or explores or info.asking is not None
            candidates = self.candidates(info, lane, hardest, needs, None if all_of_them else limits)
            stay = self._staying(candidates, info, needs)
            choice, second = self._choose(candidates, limits, info, unlike, stay)
            choice, drawn = self._explored(candidates, choice, info) if explores else (choice, GREEDY)
        remarks = self._remarks(choice, second if lane != FIXED else {}, needs, stay)
        decision = Decision(
            request_id=info.request_id or uuid.uuid4().hex,
            kind=info.kind,
            complexity=hardest,
            p_complex=route.score if hardest is not None else None,
            lane=lane,
            point=choice.point,
            predicted=choice.candidate.predicted,
            reason="; ".join(filter(None, (choice.reason, *remarks))),
            policy=self.policy.name,
            rung=choice.candidate.key,
            feasible=choice.feasible,
            propensity=drawn.propensity,
            explored=drawn.explored,
            margin=choice.margin,
            p_late=choice.p_late,
            elapsed_ms=info.elapsed_ms,
            budget=budget.to_dict(),
            prompt_features=features,
            needs=needs.to_dict() if needs is not None else {},
            rejected=choice.rejected,
            escalation=second,
            batch=info.batch + len(info.beside),
            encoder_cache=_found(info, choice.point),
            conversation=stay.said(choice.candidate) if stay is not None else {},
        )
        return decision, choice

    def as_given(self, kind: str, why: str, limits: Budget, own: Budget | None) -> Decision:
        """The decision for a call that goes to the model as it is, because of `why`: nothing is predicted.

        `limits` are kept as far as one way to run allows: an answer ends at a hard deadline, others are recorded.

        Raises:
            ConfigError: If the call's `own` budget asks to refuse what does not fit.
        """
        if own is not None and "on_infeasible" in own.given and own.on_infeasible == "refuse":
            raise ConfigError(
                f"on_infeasible is 'refuse', but {why}, so its cost is not predicted; expected 'cheapest'"
            )
        return Decision(
            request_id=uuid.uuid4().hex,
            kind=kind,
            complexity=None,
            p_complex=None,
            lane=FIXED,
            point=NATIVE,
            predicted=None,
            reason="; ".join(filter(None, (f"native: {why}", self.remark))),
            policy=self.policy.name,
            budget=limits.to_dict(),
        )

    def route(self, info: RequestInfo) -> tuple[Complexity | None, Route]:
        """The most demanding medium and its route; a clip anywhere sends the request to the video lane."""
        if not info.complexities:
            return None, self.policy.route(None)
        routes = [(c, self.policy.route(c, info.prompt)) for c in info.complexities]
        hardest, route = max(routes, key=lambda pair: (pair[1].lane == VIDEO, pair[1].lane == COMPLEX, pair[1].score))
        return hardest, route

    def needs(self, info: RequestInfo) -> Needs | None:
        """Pixels and frames that are enough for the question, of all media; None where the policy cannot say.

        After preprocessing there is nothing left to plan of them.
        """
        enough = self.policy.sufficiency
        if enough is None or not info.complexities or info.pixels_fixed:
            return None
        kind = prompt_kind(info.prompt)
        floor = self.policy.floors.get(kind, 0)
        found = []
        for size, complexity in zip(info.sizes, info.complexities, strict=True):
            native, tokens = self.adapter.native_pixels(size), 0
            if floor:
                tokens = self.adapter.plan([replace(size, frames=1)], NATIVE).tokens
            each = enough.needs(
                kind,
                complexity,
                size.height * size.width,
                native,
                margin=self.policy.margin,
                floor=floor * native / tokens if tokens else 0.0,
            )
            if each is None:
                return None
            found.append(each)
        return together(found)

    def unlike(self, info: RequestInfo) -> str:
        """Why an image is like nothing that the policy was fitted on, in words; empty where all are like some."""
        return next(filter(None, map(self.policy.unlike, info.complexities)), "")

    def candidates(
        self,
        info: RequestInfo,
        lane: str,
        complexity: Complexity | None,
        needs: Needs | None = None,
        budget: Budget | None = None,
    ) -> list[Candidate]:
        """The lane's ladder on this model and these media, each point once, with predicted cost.

        What the media need says what quality to expect, where it is known. With a `budget`, steps that could not be
        chosen under it are left out, since every prediction takes time.
        """
        best: dict[OperatingPoint, tuple[float, str]] = {}
        native = self.adapter.most_native_pixels(info.sizes)
        rungs = self._rungs(info, lane, complexity)
        rated = [(rung, rung.quality if needs is None else needs.quality_of(rung)) for rung in rungs]
        for rung, quality in rated if budget is None else self._worth_costing(rated, budget):
            point = self.adapter.resolve(rung, info.sizes, native)
            if info.pixels_fixed and point.before_encoder:
                point = point.without(point.before_encoder)
            if point not in best or quality > best[point][0]:
                best[point] = quality, rung.name
        # The rung's name is the same for every size of image, so drift is learned per rung.
        new_tokens = self.expected_tokens(info)
        return [self.candidate(point, quality, info, new_tokens, name) for point, (quality, name) in best.items()]

    def _worth_costing(self, rated: Sequence[Rated], budget: Budget) -> list[Rated]:
        """Without steps that another one beats whatever they cost: of those within the tolerance that differ in pixels
        alone, all but the fewest pixels. Where no time and no memory is asked for, of the steps below only some, for
        want of memory.
        """
        best = max(quality for _, quality in rated)
        enough = best - self.policy.tolerance
        fewest: dict[OperatingPoint, Rated] = {}
        below: list[Rated] = []
        for rung, quality in rated:
            if quality < enough:
                below.append((rung, quality))
            elif rung.point not in fewest or rung.pixel_share < fewest[rung.point][0].pixel_share:
                fewest[rung.point] = rung, best  # as good as the best, or the tolerance would be taken off twice
        asked = budget.latency_ms is not None or budget.ttft_ms is not None or budget.vram_gb is not None
        few = len(below) <= 2 * SPARE
        return [*fewest.values(), *(below if asked or few else below[::-SPARE])]  # the last is the cheapest

    def _rungs(self, info: RequestInfo, lane: str, complexity: Complexity | None) -> tuple[Rung, ...]:
        """The lane's ladder; a clip in which nothing changes is offered at few frames too, as good as with many."""
        rungs = self.policy.ladder(lane, complexity, info.prompt)
        if lane == VIDEO and complexity is not None and is_still(complexity):
            few = [replace(rung.point, max_fps=min(STILL_FPS, rung.point.max_fps or STILL_FPS)) for rung in rungs]
            rungs = (*rungs, *(replace(rung, point=point) for rung, point in zip(rungs, few, strict=True)))
        return rungs

    def expected_tokens(self, info: RequestInfo) -> float:
        """How long an answer to this kind of prompt has been."""
        return self.lengths.expected(prompt_kind(info.prompt), info.max_new_tokens)

    def candidate(
        self, point: OperatingPoint, quality: float, info: RequestInfo, new_tokens: float | None = None, key: str = ""
    ) -> Candidate:
        """One point on offer for `info`, with its predicted cost for an answer of `new_tokens` (else as expected)."""
        # In a batch it waits for what others have to encode.
        encoded = _found(info, point) == HIT and not any(work.patches for work in info.beside)
        return Candidate(point, quality, self._predicted(point, info, new_tokens), key, encoded=encoded)

    def _predicted(self, point: OperatingPoint, info: RequestInfo, new_tokens: float | None) -> Prediction:
        return self.cost.predict(self.adapter.computed(point), self.work(point, info, new_tokens))

    def work(self, point: OperatingPoint, info: RequestInfo, new_tokens: float | None = None) -> Work:
        """What `point` makes the model do for `info` and an answer of `new_tokens` (else as expected), with all that is
        beside it."""
        sizes = info.sizes
        if point.max_fps is not None and info.frame_times_s and not info.pixels_fixed:
            sizes = [
                replace(size, frames=len(frames_at(times, duration, point.max_fps))) if size.clip else size
                for size, times, duration in zip(sizes, info.frame_times_s, info.durations_s, strict=True)
            ]
        plan, segments = self.adapter.plan(sizes, point), None
        if info.seen is not None and any(there := info.seen(point)):
            sizes = [size for size, known in zip(sizes, there, strict=True) if not known]
            segments = self.adapter.plan(sizes, point).segments
        own = Work(
            patches=plan.segments if segments is None else segments,
            prompt_tokens=plan.tokens + info.text_tokens,
            new_tokens=self.expected_tokens(info) if new_tokens is None else new_tokens,
            batch=info.batch,
            source_pixels=sum(0 if s.exact else s.frames * s.height * s.width for s in sizes),
        )
        return own.beside(info.beside)

    def _choose(
        self, candidates: list[Candidate], budget: Budget, info: RequestInfo, unlike: str, stay: Staying | None
    ) -> tuple[Choice, dict[str, Any]]:
        """As `_choose_staying`, but at full compute where that was asked for or the image is unlike all known, and
        it fits; where it does not, the reason says so."""
        why = "full detail was asked for" if info.full_detail else unlike
        if not why:
            return self._choose_staying(candidates, budget, info, stay)
        full = [c for c in candidates if c.point.is_full] or [self.candidate(NATIVE, 1.0, info)]
        lenient = replace(budget, on_infeasible="cheapest")
        choice = self.controller.choose(full, lenient, elapsed_ms=info.elapsed_ms, free_memory_gb=info.free_memory_gb)
        if choice.feasible:
            return replace(choice, reason=f"{why}; {choice.reason}"), {}
        choice, second = self._choose_staying(candidates, budget, info, stay)
        return replace(choice, reason=f"{why}, but full compute does not fit; {choice.reason}"), second

    def _staying(self, candidates: list[Candidate], info: RequestInfo, needs: Needs | None) -> Staying | None:
        """What a conversation's plan leaves to choose from; None where it has none."""
        if info.kept is None:
            return None
        name = info.kept.rung
        plan = next((candidate for candidate in candidates if candidate.key == name), None)
        if plan is None:
            ladders = (rung for ladder in self.policy.lanes.values() for rung in ladder)
            rung = next((rung for rung in ladders if rung.name == name), None) or Rung.parse(name)
            quality = rung.quality if needs is None else needs.quality_of(rung)
            plan = self.candidate(self.adapter.resolve(rung, info.sizes), quality, info, key=name)
        return staying(candidates, plan, self.policy.tolerance, info.kept.point)

    def _choose_staying(
        self, candidates: list[Candidate], budget: Budget, info: RequestInfo, stay: Staying | None
    ) -> tuple[Choice, dict[str, Any]]:
        """As `_choose_once`, but what a conversation's plan leaves comes first, as far as it meets the budget."""
        for offered in stay.offers if stay is not None else ():
            lenient = replace(budget, on_infeasible="cheapest")
            choice, second = self._choose_once(list(offered), lenient, info)
            if choice.feasible and choice.p_late <= 1.0 - budget.attainment:
                return replace(choice, budget=budget), second
        return self._choose_once(candidates, budget, info)

    def _choose_once(
        self, candidates: list[Candidate], budget: Budget, info: RequestInfo
    ) -> tuple[Choice, dict[str, Any]]:
        """The controller's choice, and what is said of a second pass."""
        asking = self._asks(info)
        offered, doubles = self._plans(candidates, info, asking)
        choice = self.controller.choose(offered, budget, elapsed_ms=info.elapsed_ms, free_memory_gb=info.free_memory_gb)
        return choice, told(choice, asking, doubles > 0)

    def _asks(self, info: RequestInfo) -> Asking | None:
        """How the model may be asked; never where the policy explores, or a plan's worth would not be its point's."""
        asking = info.asking
        if asking is not None and not asking.never and self.policy.explore > 0.0:
            return replace(asking, never="the policy explores, so what was drawn is what runs")
        return asking

    def _may_explore(self, info: RequestInfo, unlike: str) -> bool:
        """Whether a request may take a random point: not where full detail was asked for, where the policy is careful
        with an image, where a conversation has a plan, and where it is only asked what would be done."""
        careful = info.full_detail or bool(unlike) or info.kept is not None
        return self.policy.explore > 0.0 and bool(info.request_id) and not careful

    def _explored(self, candidates: list[Candidate], own: Choice, info: RequestInfo) -> tuple[Choice, Drawn]:
        """The controller's `own` choice or a random point that fits, with its propensity."""
        if not own.feasible:
            return own, GREEDY
        offered, _ = self._plans(candidates, info, self._asks(info))
        so_far: dict[str, Any] = {"elapsed_ms": own.elapsed_ms, "free_memory_gb": info.free_memory_gb}
        fitting = self.controller.fitting(offered, own, free_memory_gb=info.free_memory_gb)
        if len(fitting) == 1:
            return own, GREEDY
        taken, drawn = draw(fitting, own.candidate, info.request_id, self.policy.explore, self.seed)
        if not drawn.explored:
            return own, drawn
        choice = self.controller.choose([taken], replace(own.budget, on_infeasible="cheapest"), **so_far)
        reason = f"exploring: drawn of {len(fitting)} that fit, else {own.candidate.key}"
        return replace(choice, reason=reason, budget=own.budget), drawn

    def _plans(
        self, candidates: list[Candidate], info: RequestInfo, asking: Asking | None
    ) -> tuple[list[Candidate], int]:
        """What the controller chooses from, and how many of these are plans of two passes.

        Qualities within the policy's tolerance of the best count as equal to it.
        """
        tolerance = self.policy.tolerance
        if asking is None or asking.never:
            return level(candidates, (), tolerance), 0
        new_tokens = self.expected_tokens(info)
        return plans(
            candidates,
            self.candidate(NATIVE, 1.0, info, new_tokens),
            asking,
            tolerance=tolerance,
            share=self.controller.share,
            new_tokens=new_tokens,
            trusted=self.policy.sufficiency is not None and self.policy.sufficiency.own is not None,
        )

    def _remarks(
        self, choice: Choice, second: Mapping[str, Any], needs: Needs | None, stay: Staying | None
    ) -> list[str]:
        """What the reason says beside the controller's own."""
        untrained = ""
        if self.adapter.untrained(choice.point):
            untrained = f"{choice.point.fusion} is untrained for this model: the native computation"
        none = f"{NO_SECOND}{second['why']}" if second.get("why", SURE) != SURE else ""
        stays = stay.in_words(choice.candidate) if stay is not None else ""
        return [none, needs.in_words() if needs is not None else "", stays, untrained, self.remark]


def _found(info: RequestInfo, point: OperatingPoint) -> str:
    """How far what the encoder makes of the media at `point` is there; empty where nobody knows."""
    if info.seen is None or not info.sizes:
        return ""
    there = info.seen(point)
    return HIT if all(there) else PART if any(there) else MISS


def _with_cache_counted(info: RequestInfo, budget: Budget) -> RequestInfo:
    """`info` with the memory that cached encoder outputs take counted against the budget's."""
    if not info.cached_gb or budget.vram_gb is None:
        return info
    left = max(0.0, budget.vram_gb - info.cached_gb)
    return replace(info, free_memory_gb=left if info.free_memory_gb is None else min(left, info.free_memory_gb))


def _require_in_time(point: OperatingPoint, info: RequestInfo) -> None:
    """Refuse a given point of which something would have had to be done before the processor saw the media."""
    if info.pixels_fixed and info.sizes and point.before_encoder:
        late = ", ".join(point.before_encoder)
        raise ConfigError(
            f"point is {point.name}, but the media are preprocessed already, too late for {late}; expected "
            f"{point.without(point.before_encoder).name}, or the media themselves in chat"
        )
