"""Requests whose turn has come, answered together: those that may share a pass of the model in batches, others alone.

A batch is made only where nobody pays for it: by the costs that are predicted for it, it takes no longer than its
requests one after the other, and each of them keeps its limits as it would alone, at no worse quality. Each is decided
anew with what the others make the model do, since the plan that is cheapest alone need not be so in a batch.

Knows turns, decisions and predicted costs. Must not know how rows are run or where the requests come from.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from adaptive_fusion.answering import Answering
from adaptive_fusion.budget import Budget
from adaptive_fusion.control.candidates import Choice
from adaptive_fusion.control.exploring import explores
from adaptive_fusion.control.request_info import MISS, RequestInfo
from adaptive_fusion.cost.model import Work
from adaptive_fusion.decisions import Decision, Measurement, Prediction
from adaptive_fusion.errors import OutOfMemoryError, RequestsFailed
from adaptive_fusion.execution.executor import Run
from adaptive_fusion.execution.merging import ROWS, shared_options
from adaptive_fusion.execution.row import Row
from adaptive_fusion.execution.rows import run_rows
from adaptive_fusion.prepared import Call, Turn
from adaptive_fusion.reply import Reply
from adaptive_fusion.way import Way

NO_LOOK = "it is in one batch with others"


@dataclass(frozen=True)
class _Placed:
    """A turn with its decision, and what it makes the model do at the decided point if it is alone."""

    turn: Turn
    limits: Budget
    info: RequestInfo
    decision: Decision
    choice: Choice
    work: Work


class Batching(Answering):
    """Answers prepared requests, several in one pass where that pays."""

    def _answer_turns(self, turns: Sequence[Turn]) -> None:
        """Answer every turn; each has its result as soon as its own answer has ended.

        The first in line is never left waiting for the sake of others.
        """
        waiting, known = list(turns), dict[Any, _Placed]()
        while waiting:
            with self._lock:
                waiting[0] = waiting[0].come()
                group, why = self._group(waiting, known)
                if group:
                    rest, why = self._run_group(group)
                    for turn in rest:
                        self._answer_alone(turn.come(), why)
                else:
                    self._answer_alone(waiting[0], why, known.get(waiting[0].result))
            settled = [placed.turn.result for placed in group] or [waiting[0].result]
            waiting = [turn for turn in waiting if turn.result not in settled]

    def _answer_several(self, calls: Sequence[Call]) -> list[Reply]:
        """Answer calls in order, `ROWS` at a time, so that media of no more than these are in memory. None of them
        counts the time in which it waited for another, and none is lost because another fails.

        Raises:
            RequestsFailed: If any failed, when all others are answered.
        """
        outcomes: list[Reply | Exception] = []
        for start in range(0, len(calls), ROWS):
            turns: list[Turn] = []
            found: list[Turn | Exception] = []
            for call in calls[start : start + ROWS]:
                try:
                    prepared = self._prepare(call)
                except Exception as error:
                    found.append(error)
                else:
                    turns.append(Turn(prepared, lead_s=self._clock() - prepared.arrived_s))
                    found.append(turns[-1])
            self._answer_turns(turns)
            for each in found:
                try:
                    outcomes.append(each.result.result() if isinstance(each, Turn) else each)
                except Exception as error:
                    outcomes.append(error)
        replies = [each for each in outcomes if isinstance(each, Reply)]
        if len(replies) < len(outcomes):
            raise RequestsFailed(outcomes) from next(each for each in outcomes if isinstance(each, Exception))
        return replies

    def _answer_alone(self, turn: Turn, why: str, placed: _Placed | None = None) -> None:
        """Answer one alone, as it was just decided if it was."""
        decided = None
        if placed is not None and self.budget.merge(turn.prepared.call.budget).on_infeasible == "cheapest":
            decided = placed.info, placed.decision, placed.choice
        turn.settle(lambda: self._answer_turn(turn, f"alone: {why}" if why else "", decided))

    # Who shares a batch

    def _group(self, waiting: Sequence[Turn], known: dict[Any, _Placed] | None = None) -> tuple[list[_Placed], str]:
        """The first turn with those that share its batch, or nobody and why it runs alone, in words.

        Args:
            waiting: In their order.
            known: How turns were decided alone so far, by their results; kept for the next time, as deciding takes
                time. The first, and whoever is in a hurry, is decided anew.
        """
        known = {} if known is None else known
        first, others = waiting[0], waiting[1:]
        known.pop(first.result, None)
        if not others:
            return [], ""
        if why := first.prepared.apart:
            return [], why
        if self._draws(first):
            return [], "it explores"
        like = [turn for turn in others if first.prepared.fits(turn.prepared) and not self._draws(turn)]
        if not like:
            return [], "no other has the same arguments"
        placed = []
        for turn in (first, *(turn.come() for turn in like)):
            try:
                was = known.get(turn.result)
                if was is None or _hurried(was.limits):
                    was = known[turn.result] = self._placed(turn)
                placed.append(replace(was, turn=turn))
            except Exception:  # it is met again, and told, where that request runs
                if turn is first:
                    return [], ""
        return self._paying(placed)

    def _draws(self, turn: Turn) -> bool:
        """Whether a turn is of the share that explores: what it takes must not hang on who waits beside it."""
        return explores(turn.request_id, self.policy.explore, self._seed)

    def _paying(self, alone: list[_Placed]) -> tuple[list[_Placed], str]:
        """The first with as many of the others as can share its batch without anybody's loss."""
        why = "nobody else could be decided"
        while len(alone) > 1:
            singles_ms = sum(self.gain.corrected(self._predicted(each)).latency_ms for each in alone)
            if slower := self._slower(alone, singles_ms):
                why, alone = slower, self._one_less(alone)
                continue
            together = list(alone)
            for index, each in enumerate(alone):
                beside = [other.work for i, other in enumerate(together) if i != index]
                together[index] = self._placed(each.turn, beside, each.info)
            losers = [i for i, each in enumerate(alone) if self._loses(each, together[i])]
            if losers:
                why = "a batch would cost limits or quality"
                alone = _without(alone, max(losers[-1], 1))
            elif slower := self._slower(together, singles_ms):  # other plans, such as one pass in place of a look
                why, alone = slower, self._one_less(alone)
            else:
                return together, ""
        return [], why

    def _slower(self, rows: Sequence[_Placed], singles_ms: float) -> str:
        """Why a batch would take longer than its requests one after the other, in words; empty if it would not."""
        batch = self._batch(rows)
        if batch.encode_ms + (batch.prefill_ms + batch.decode_ms) * self.gain.factor <= singles_ms:
            return ""
        why = "a batch would take longer than one after the other"
        if batch.latency_ms <= singles_ms:
            self.gain.refused()
            why += ", as others did"
        return why

    def _one_less(self, rows: Sequence[_Placed]) -> list[_Placed]:
        """The first with all but that other without whom a batch takes the least for each."""
        fewer = [_without(rows, index) for index in range(1, len(rows))]
        return min(fewer, key=lambda left: self._batch(left).latency_ms / len(left))

    def _placed(self, turn: Turn, beside: Sequence[Work] = (), info: RequestInfo | None = None) -> _Placed:
        """A turn decided as if alone, or `beside` others with the `info` that it had alone. There the model is not
        asked if it is sure: a second pass of one row would be one of all."""
        call = turn.prepared.call
        limits = replace(self.budget.merge(call.budget), on_infeasible="cheapest")
        if info is None:
            info = self._within_context(replace(self._info_of(turn.prepared), request_id=turn.request_id), call)
        else:
            info = replace(info, elapsed_ms=(self._clock() - turn.prepared.arrived_s) * 1e3)
        if beside:
            asking = replace(info.asking, never=info.asking.never or NO_LOOK) if info.asking is not None else None
            info = replace(info, beside=tuple(beside), asking=asking)
        decision, choice = self._planned(info, limits, call)
        work = self._planner.work(decision.point, replace(info, beside=()))
        return _Placed(turn, limits, info, decision, choice, work)

    def _loses(self, alone: _Placed, both: _Placed) -> bool:
        """Whether a request is worse off in a batch: it may miss its limits, or is planned at a lower quality."""
        risk = max(1.0 - both.limits.attainment, alone.choice.p_late)
        if not both.choice.feasible or both.choice.p_late > risk:
            return True
        return both.choice.candidate.quality < alone.choice.candidate.quality - self.policy.tolerance

    def _predicted(self, placed: _Placed, work: Work | None = None) -> Prediction:
        """What the decided point takes for a request's own work, or for other `work`."""
        return self._planner.cost.predict(self.adapter.computed(placed.decision.point), work or placed.work)

    def _batch(self, rows: Sequence[_Placed]) -> Prediction:
        """What a batch is expected to take to the end of its longest answer."""
        longest = max(rows, key=lambda each: each.work.new_tokens)
        beside = [each.work for each in rows if each is not longest]
        whole = self._predicted(longest, self._planner.cost.beside(longest.work, beside))
        return self.gain.corrected(replace(whole, encode_ms=sum(self._predicted(each).encode_ms for each in rows)))

    def _ran_alone(self, info: RequestInfo, run: Run) -> None:
        """Learn what one alone takes beside what is predicted for it; not where a part was done before or twice."""
        took, decision = run.measurement, run.decision
        if decision.encoder_cache in ("", MISS) and decision.escalated is None and not info.pixels_fixed:
            work = self._planner.work(decision.point, replace(info, seen=None), float(took.new_tokens))
            said = self._planner.cost.predict(self.adapter.computed(decision.point), work)
            before_ms = took.latency_ms - took.prefill_ms - took.decode_ms - decision.elapsed_ms
            self.gain.ran_alone((before_ms, took.prefill_ms, took.decode_ms), said)

    def _ran_together(self, group: Sequence[_Placed], runs: Sequence[Run]) -> None:
        """The same of a batch, of which every row ran as it was decided."""
        if len(runs) < len(group) or any(
            r.decision.point != p.decision.point for r, p in zip(runs, group, strict=True)
        ):
            return
        took = [run.measurement for run in runs]
        works = [replace(p.work, new_tokens=float(t.new_tokens)) for p, t in zip(group, took, strict=True)]
        rows = [replace(placed, work=work) for placed, work in zip(group, works, strict=True)]
        self.gain.ran_together(max(t.prefill_ms + t.decode_ms for t in took), self._batch(rows))

    def _measured_together(self, turns: Sequence[Turn]) -> tuple[Work, Measurement]:
        """Run turns as one batch whatever it costs, all with the same limit of tokens, which each answer reaches; what
        that made the model do, and what it took."""
        alone = [self._placed(turn) for turn in turns]
        with self._lock:
            over, why = self._run_group([replace(each, turn=each.turn.come()) for each in alone])
        if over:
            raise OutOfMemoryError(f"{len(over)} of {len(turns)} requests were not in one batch: {why}")
        replies = [turn.result.result(0) for turn in turns]
        last = max(replies, key=lambda reply: reply.measurement.latency_ms).measurement
        works = [replace(each.work, new_tokens=float(last.new_tokens)) for each in alone]
        return self._planner.cost.beside(works[0], works[1:]), last

    # How a batch is run

    def _run_group(self, group: Sequence[_Placed]) -> tuple[list[Turn], str]:
        """Run a batch; turns for which it was not to be, and why."""
        rows: list[Row] = []
        those: list[_Placed] = []
        runs: dict[int, Run] = {}
        for index, placed in enumerate(group):
            try:
                rows.append(self._row(placed, partial(runs.__setitem__, index)))
                those.append(placed)
            except Exception as error:
                placed.turn.fail(error)
        arguments = group[0].turn.prepared.call.arguments
        over, why = run_rows(
            self._executor,
            self.controller,
            rows,
            shared_options(arguments),
            ends=arguments.end_tokens(),
            stop_strings=arguments.end_strings(),
            tokenizer=getattr(self.processor, "tokenizer", None),
            least=arguments.value("min_new_tokens") or 0,
            passes=self._planner.cost.passes,
        )
        self._ran_together(group, [runs[index] for index in sorted(runs)])
        return [those[index].turn for index in over], why

    def _row(self, placed: _Placed, ran: Callable[[Run], None]) -> Row:
        """A row of a batch; `ran` is told what came of it."""
        turn, prepared = placed.turn, placed.turn.prepared
        way = Way(self, prepared)

        def done(run: Run) -> None:
            ran(run)
            self.last = run.decision, run.measurement
            turn.settle(lambda: self._reply(prepared, run, way.prompt))

        return Row(
            task=self._task(turn, way, placed.info, placed.decision, placed.choice),
            predict=self._predict(placed.info),
            most=prepared.call.arguments.most_new_tokens(0),
            done=done,
            failed=turn.fail,
            streamer=turn.streamer,
        )


def _without(rows: Sequence[_Placed], index: int) -> list[_Placed]:
    """The rows but one, which runs next. If that one is in a hurry nobody who came later goes before it."""
    return [*rows[:index], *(() if _hurried(rows[index].limits) else rows[index + 1 :])]


def _hurried(limits: Budget) -> bool:
    return limits.latency_ms is not None or limits.ttft_ms is not None
