"""From what was measured on a request and what it is offered to a decision.

Wires policy, cost model and controller for one adapter. Runs nothing, loads nothing; every input is an argument.
"""

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from adaptive_fusion.budget import Budget
from adaptive_fusion.control.candidates import Candidate, Choice
from adaptive_fusion.control.controller import Controller
from adaptive_fusion.control.escalating import NO_SECOND, SURE, UNTRUSTED, Asking, doubted, level, plans, told
from adaptive_fusion.control.exploring import GREEDY, Drawn, draw
from adaptive_fusion.control.offering import Offering
from adaptive_fusion.control.request_info import RequestInfo, found_in_cache, with_cache_counted
from adaptive_fusion.control.staying import Staying, staying
from adaptive_fusion.cost.lengths import LengthModel
from adaptive_fusion.cost.model import CostModel
from adaptive_fusion.decisions import Decision
from adaptive_fusion.errors import ConfigError
from adaptive_fusion.features.prompts import prompt_features
from adaptive_fusion.models.base import Planned
from adaptive_fusion.point import NATIVE, OperatingPoint
from adaptive_fusion.policy.policy import Policy
from adaptive_fusion.policy.rungs import Rung
from adaptive_fusion.policy.sufficiency import Needs

FIXED = "fixed"
"""The lane of requests whose point was not decided here."""


class Planner(Offering):
    """Decides for one adapter with one policy."""

    def __init__(
        self,
        adapter: Planned,
        policy: Policy,
        cost: CostModel,
        controller: Controller,
        lengths: LengthModel,
        remark: str = "",
        seed: int | None = None,
    ) -> None:
        """`remark` is said in the reason of every decision: that the policy was fitted to another model. `seed` is of
        what an exploring policy draws by the ids of requests."""
        super().__init__(adapter, policy, cost, lengths)
        self.controller, self.remark, self.seed = controller, remark, seed

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
        info = with_cache_counted(info, budget)
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
            all_of_them = info.full_detail or bool(unlike) or info.asking is not None
            if info.asking is not None:
                worth, sure = self.worth_asking(route), self.sure(route)
                first = info.asking.thresholds.first_of(lane, info.asking.kind)
                asking = replace(info.asking, p_complex=route.score, worth_asking=worth, sure=sure, first=first)
                info = replace(info, asking=asking)
            candidates = self.candidates(info, lane, hardest, needs, None if all_of_them else limits)
            stay = self._staying(candidates, info, needs)
            choice, second = self._choose(candidates, limits, info, unlike, stay)
            choice, drawn = self._explored(candidates, choice, info, lane, needs) if explores else (choice, GREEDY)
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
            encoder_cache=found_in_cache(info, choice.point),
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
        return self.policy.explore > 0.0 and bool(info.request_id) and bool(info.complexities) and not careful

    def _explored(
        self, candidates: Sequence[Candidate], own: Choice, info: RequestInfo, lane: str, needs: Needs | None
    ) -> tuple[Choice, Drawn]:
        """The controller's `own` choice or one of few others that fit, drawn, with its propensity."""
        if not own.feasible:
            return own, GREEDY
        offered = self.beside(candidates, own.candidate.key, info, lane, needs)
        fitting = self.controller.fitting(offered, own, free_memory_gb=info.free_memory_gb)
        if len(fitting) == 1:
            return own, GREEDY
        taken, drawn = draw(fitting, own.candidate, info.request_id, self.policy.explore, self.seed)
        if not drawn.explored:
            return own, drawn
        so_far: dict[str, Any] = {"elapsed_ms": own.elapsed_ms, "free_memory_gb": info.free_memory_gb}
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
        always = asking is not None and asking.thresholds.always
        if asking is None or (asking.never and not always):
            return level(candidates, (), tolerance), 0
        new_tokens = self.expected_tokens(info)
        full = self.candidate(NATIVE, 1.0, info, new_tokens)
        learned: dict[str, Any] = {"share": self.controller.share, "new_tokens": new_tokens}
        if always:
            return doubted(candidates, full, asking, tolerance=tolerance, **learned)
        trusted = self.policy.sufficiency is not None and self.policy.sufficiency.own is not None
        strong = self.strong(candidates, info, new_tokens)
        return plans(candidates, full, asking, tolerance=tolerance, trusted=trusted, strong=strong, **learned)

    def _remarks(
        self, choice: Choice, second: Mapping[str, Any], needs: Needs | None, stay: Staying | None
    ) -> list[str]:
        """What the reason says beside the controller's own."""
        untrained = ""
        if self.adapter.untrained(choice.point):
            untrained = f"{choice.point.fusion} is untrained for this model: the native computation"
        none = f"{NO_SECOND}{second['why']}" if second.get("why", SURE) != SURE else ""
        if "doubt" in second:
            none = f"{none} ({second['doubt']})" if none else f"{UNTRUSTED} ({second['doubt']}), so the model is asked"
        stays = stay.in_words(choice.candidate) if stay is not None else ""
        return [none, needs.in_words() if needs is not None else "", stays, untrained, self.remark]


def _require_in_time(point: OperatingPoint, info: RequestInfo) -> None:
    """Refuse a given point of which something would have had to be done before the processor saw the media."""
    if info.pixels_fixed and info.sizes and point.before_encoder:
        late = ", ".join(point.before_encoder)
        raise ConfigError(
            f"point is {point.name}, but the media are preprocessed already, too late for {late}; expected "
            f"{point.without(point.before_encoder).name}, or the media themselves in chat"
        )
