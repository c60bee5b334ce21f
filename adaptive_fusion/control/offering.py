"""What a policy offers a request: its lane's ladder on this model and these media, with expected quality and cost.

Knows policy, cost model and lengths of answers for one adapter. Must not know how one is chosen from what is offered.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from statistics import fmean

from adaptive_fusion.budget import Budget
from adaptive_fusion.control.candidates import Candidate
from adaptive_fusion.control.request_info import HIT, RequestInfo, found_in_cache
from adaptive_fusion.cost.lengths import LengthModel
from adaptive_fusion.cost.model import CostModel, Work
from adaptive_fusion.decisions import Prediction
from adaptive_fusion.features.complexity import Complexity, is_still
from adaptive_fusion.features.prompts import prompt_kind
from adaptive_fusion.media.sampling import frames_at
from adaptive_fusion.models.base import Planned
from adaptive_fusion.point import NATIVE, OperatingPoint
from adaptive_fusion.policy.policy import COMPLEX, SIMPLE, VIDEO, Policy, Route
from adaptive_fusion.policy.rungs import Rung
from adaptive_fusion.policy.sufficiency import STILL_FPS, Needs, together
from adaptive_fusion.reduction.blanks import expected_share

SPARE = 4
"""Of the steps that a request without limits will hardly need, every so many are predicted."""
SPARED_OCTAVES = 0.45
"""About half an octave, which the steps of a ladder meet only nearly."""
LONG_ANSWER, LONGER_THAN_USUAL = 256.0, 4.0
"""Tokens of an answer, and multiples of the usual ones, that memory is counted for if they may come."""
Rated = tuple[Rung, float]
"""A step and the quality expected of it for a request."""


class Offering:
    """What one adapter is offered by one policy.

    Args:
        adapter: The way to the model.
        policy: Has the ladders.
        cost: Predicts what a point takes.
        lengths: Expects how long answers are.
    """

    def __init__(self, adapter: Planned, policy: Policy, cost: CostModel, lengths: LengthModel) -> None:
        self.adapter, self.policy, self.cost, self.lengths = adapter, policy, cost, lengths

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
        rungs = self._rungs(info, lane, complexity)
        rated = [(rung, rung.quality if needs is None else needs.quality_of(rung)) for rung in rungs]
        return self._costed(rated if budget is None else self._worth_costing(rated, budget), info)

    def beside(
        self, candidates: Sequence[Candidate], own: str, info: RequestInfo, lane: str, needs: Needs | None
    ) -> list[Candidate]:
        """What may be explored beside the step called `own`: what another router would take (the cheap plan and where
        the lanes begin), and the lane's next cheaper step. Not the steps far below, which everybody knows to be bad,
        and of which so many would leave little for each.

        Args:
            candidates: On offer already, with their predictions.
        """
        lanes, ladder = self.policy.lanes, self.policy.lanes[lane]
        arms = [ladder[0]] if lane == VIDEO else [self.policy.cheap_rung, lanes[SIMPLE][0], lanes[COMPLEX][0]]
        at = next((rung.point.blanks for rung in ladder if rung.name == own), None)
        alike = [rung for rung in ladder if rung.point.blanks == at]  # what blank parts spare orders no ladder
        below = [after for rung, after in pairwise(alike) if rung.name == own]
        wanted = {rung.name: rung for rung in (*arms, *below)}
        found = [candidate for candidate in candidates if candidate.key in wanted]
        more = [rung for name, rung in wanted.items() if name not in {candidate.key for candidate in found}]
        rated = [(rung, rung.quality if needs is None else needs.quality_of(rung)) for rung in more]
        points = {candidate.point for candidate in found}
        return [*found, *(each for each in self._costed(rated, info) if each.point not in points)]

    def _costed(self, rated: Sequence[Rated], info: RequestInfo) -> list[Candidate]:
        """Steps as candidates, each point once."""
        best: dict[OperatingPoint, tuple[float, str]] = {}
        native = self.adapter.most_native_pixels(info.sizes)
        for rung, quality in rated:
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

    def worth_asking(self, route: Route) -> frozenset[str]:
        """Rungs that are worth a look at the model on doubt: of the lane of simple images, for which the router thinks
        the cheap plan good enough, those that have half an octave of pixels more than that one."""
        if route.lane != SIMPLE:
            return frozenset()
        least = math.log2(self.policy.cheap_rung.pixel_share) + SPARED_OCTAVES
        return frozenset(r.name for r in self.policy.lanes[SIMPLE] if math.log2(r.pixel_share) >= least)

    def sure(self, route: Route) -> frozenset[str]:
        """The rung that needs no look at the model, since the router sends such requests there for good reason."""
        rules = self.policy.escalation
        if rules is None or route.score > rules.sure.get(route.lane, -1.0):
            return frozenset()
        return frozenset({self.policy.lanes[route.lane][0].name})

    def strong(self, candidates: Sequence[Candidate], info: RequestInfo, new_tokens: float) -> list[Candidate]:
        """Where the lane for complex images begins, as a better plan for stills that are on another: what the policy
        has for those that need everything, if that is less than everything. None where it is among the `candidates`."""
        rung = self.policy.lanes[COMPLEX][0]
        if info.kind != "image" or rung.is_full or any(each.key == rung.name for each in candidates):
            return []
        point = self.adapter.resolve(rung, info.sizes)
        if any(each.point == point for each in candidates):
            return []
        return [self.candidate(point, rung.quality, info, new_tokens, rung.name)]

    def expected_tokens(self, info: RequestInfo) -> float:
        """How long an answer to this kind of prompt has been."""
        return self.lengths.expected(prompt_kind(info.prompt), info.max_new_tokens)

    def most_tokens(self, info: RequestInfo) -> float:
        """As how long an answer counts for memory: a limit has to hold for longer ones than are usual, but one that is
        allowed to be endless hardly ever is."""
        return min(float(info.max_new_tokens), max(LONG_ANSWER, LONGER_THAN_USUAL * self.expected_tokens(info)))

    def candidate(
        self, point: OperatingPoint, quality: float, info: RequestInfo, new_tokens: float | None = None, key: str = ""
    ) -> Candidate:
        """One point on offer for `info`, with its predicted cost for an answer of `new_tokens` (else as expected)."""
        # In a batch it waits for what others have to encode.
        encoded = found_in_cache(info, point) == HIT and not any(work.patches for work in info.beside)
        return Candidate(point, quality, self.predicted(point, info, new_tokens), key, encoded=encoded)

    def predicted(
        self, point: OperatingPoint, info: RequestInfo, new_tokens: float | None = None, patches: int | None = None
    ) -> Prediction:
        """What a point costs; see `work`. The peak of memory is that of encoding every patch also where blank parts are
        spared: a limit has to hold however many there are, and what is prepared for the encoder is all of them. So are
        its times where nobody knows that it saves any: no plan is taken for what it may not spare."""
        found = self.cost.predict(self.adapter.computed(point), self.work(point, info, new_tokens, patches))
        if point.blanks is None:
            return found
        whole, seen = point.without(("blanks",)), info.seen
        if seen is not None:
            info = replace(info, seen=lambda _: seen(point))  # what was kept of the whole serves no other point
        most = self.cost.predict(self.adapter.computed(whole), self.work(whole, info, new_tokens))
        return replace(found, peak_memory_gb=most.peak_memory_gb) if self.adapter.blanks_save_time else most

    def work(
        self, point: OperatingPoint, info: RequestInfo, new_tokens: float | None = None, patches: int | None = None
    ) -> Work:
        """What `point` makes the model do for `info` and an answer of `new_tokens` (else as expected), with all that is
        beside it. How many patches are encoded is expected, unless `patches` were counted."""
        sizes = info.sizes
        if point.max_fps is not None and info.frame_times_s and not info.pixels_fixed:
            sizes = [
                replace(size, frames=len(frames_at(times, duration, point.max_fps))) if size.clip else size
                for size, times, duration in zip(sizes, info.frame_times_s, info.durations_s, strict=True)
            ]
        plan = self.adapter.plan(sizes, point)
        segments = plan.segments
        if info.seen is not None and any(there := info.seen(point)):
            sizes = [size for size, known in zip(sizes, there, strict=True) if not known]
            segments = self.adapter.plan(sizes, point).segments
        if patches is not None:
            whole = sum(segments)
            segments = tuple(round(count * patches / whole) for count in segments)
        elif point.blanks is not None:
            edges = [each.features["edge_density"] for each in info.complexities if "edge_density" in each.features]
            share = fmean(expected_share(each, point.blanks) for each in edges) if edges else 1.0
            segments = tuple(round(share * count) for count in segments)
        own = Work(
            patches=segments,
            prompt_tokens=plan.tokens + info.text_tokens,
            new_tokens=self.expected_tokens(info) if new_tokens is None else new_tokens,
            most_new_tokens=self.most_tokens(info),
            batch=info.batch,
            source_pixels=sum(0 if s.exact else s.frames * s.height * s.width for s in sizes),
        )
        return self.cost.beside(own, info.beside)
