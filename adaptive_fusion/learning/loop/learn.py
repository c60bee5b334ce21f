"""One round of learning: logs, labels, drift, a candidate, the gate, and its way into service, in resumable steps.

Each step is what a command of its own does (`logs compact`, `logs drift`, `train`, `evaluate`); here they follow each
other on one copy of the logs, and what came of each is kept before the next begins. Knows the steps and how a round
ends. Must not know what happens inside a step, how an experiment is run, nor terminals or timers.
"""

import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from adaptive_fusion.errors import ConfigError, GateRefused, MissingExtraError
from adaptive_fusion.evaluation.statistics import Interval
from adaptive_fusion.learning.data.logs import compact
from adaptive_fusion.learning.fitting.card import finite
from adaptive_fusion.learning.fitting.train import labelled_policy, train
from adaptive_fusion.learning.judging.drawing import plot_drift
from adaptive_fusion.learning.judging.drift import drift
from adaptive_fusion.learning.judging.offpolicy import served
from adaptive_fusion.learning.loop.ahead import Ahead, count, models_of
from adaptive_fusion.learning.loop.estimates import estimates
from adaptive_fusion.learning.loop.onward import Rollout, brought_on, stated
from adaptive_fusion.learning.loop.settings import DEFAULT, Settings
from adaptive_fusion.learning.loop.state import (
    READY,
    REFUSED,
    RELEASED,
    RUNNING,
    WAITING,
    Folder,
    State,
)
from adaptive_fusion.policy.files import AUTO
from adaptive_fusion.policy.policy import Policy
from adaptive_fusion.progress import Progress, silent

STEPS = ("collect", "drift", "train", "judge", "shadow", "canary")
SNAPSHOT, CANDIDATE, PICTURE = "logs.parquet", "candidate", "drift.png"
_BETTER = "quality_at_equal_cost"


class Loop:
    """A learning loop in a folder.

    Args:
        logs: See `log_files`.
        folder: Of the loop.
        settings: See `Settings`.
        rollout: Takes a candidate on from the gate; None ends there.
        progress: See `Progress`.
        clock: Seconds since the epoch.

    Raises:
        ConfigError: If the folder cannot be one of a loop.
    """

    def __init__(
        self,
        logs: Iterable[str | Path],
        folder: Path,
        settings: Settings = DEFAULT,
        *,
        rollout: Rollout | None = None,
        progress: Progress = silent,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.logs, self.settings, self.rollout = [Path(path) for path in logs], settings, rollout
        self.folder, self.progress, self._clock = Folder(folder), progress, clock

    # What will be done

    def ahead(self) -> Ahead:
        """What the next round would use and change; nothing is written.

        Raises:
            ConfigError: If there are no logs, or they cannot be read.
            PolicyError: If the policy in service cannot be loaded.
        """
        state = self.folder.load()
        found = count(self.logs)
        policy = self._in_service(state)[1]
        going_on = state.status == RUNNING and state.terms == self._terms(policy)
        number = state.round if going_on else state.round + 1
        candidate = _candidate_name(policy.name, number)
        where = f"{self.folder.path.name}/{self.folder.of_round(number).name}"
        on = "a shadow run of it begins, then a canary" if self.rollout else "you are told how to roll it out"
        changes = (
            f"a copy of the {found.records} records and a report of drift in {where}",
            f"a policy {candidate}, if it is better than {policy.name} on contents that neither was fitted on",
            f"{on}; until then {policy.name} stays in service",
        )
        return replace(
            found,
            new=max(0, found.records - state.records),
            round=number,
            resumes=next((step for step in STEPS if step not in state.done), "") if going_on else "",
            policy=policy.name,
            candidate=candidate,
            changes=changes,
        )

    def _in_service(self, state: State) -> tuple[str | Policy, Policy]:
        """The policy in service as it was named, and loaded."""
        named = self.settings.policy
        if named != AUTO:
            return named, Policy.load(named)
        for past in reversed([*state.history, *self._last(state)]):
            if past["status"] == RELEASED and (folder := self.folder.path / past["folder"]).is_dir():
                return str(folder), Policy.load(folder)
        found = self.settings.served or labelled_policy(self.logs, self.settings.jobs)
        return (found.name if found.name in Policy.shipped() else found), found

    def _last(self, state: State) -> list[dict[str, Any]]:
        return [self._summary(state)] if state.status and state.status != RUNNING else []

    def _terms(self, policy: Policy) -> str:
        """What the steps of a round hang on beside the logs, of which it has a copy."""
        settings = self.settings
        model = settings.model.digest if settings.model is not None else ""
        said = (policy.name, model, settings.tolerance, settings.objective, *settings.estimators, settings.seed)
        return " ".join(map(str, said))

    # Doing it

    def run(self) -> State:
        """Go on with the round under way, or make the next one; how far it came is in the state that is returned.

        Raises:
            ConfigError: If another run is at work here, or labels are of another model.
            OSError: If the folder cannot be written; what was done so far is kept.
        """
        with self.folder.alone():
            state = self.folder.load()
            named, policy = self._in_service(state)
            if state.status != RUNNING or state.terms != self._terms(policy):
                state = self._begin(state, policy)
            work: Mapping[str, Callable[[State, str | Policy], dict[str, Any]]] = {
                "collect": self._collect,
                "drift": self._drift,
                "train": self._train,
                "judge": self._judge,
                "shadow": self._shadow,
                "canary": self._canary,
            }
            for number, step in enumerate(STEPS):
                self.progress(number, len(STEPS), step)
                if step not in state.done:
                    found = work[step](state, named)
                    if found.get("pending"):
                        state.reason = found["pending"]
                        self.folder.save(state)
                        return state
                    state.done[step] = found
                    if end := found.get("end"):
                        state.status, state.reason, state.ended_s = end, found["reason"], self._clock()
                        (self._place(state) / SNAPSHOT).unlink(missing_ok=True)
                    self.folder.save(state)
                if state.status != RUNNING:
                    break
            self.progress(len(STEPS), len(STEPS), "done")
            return state

    def _begin(self, state: State, policy: Policy) -> State:
        """A new round; one that was begun on other terms is given up."""
        history = [*state.history, *([self._summary(state)] if state.round else [])]
        if state.status == RUNNING and "judge" not in state.done:  # else servers may run its candidate
            shutil.rmtree(self._place(state), ignore_errors=True)
        new = State(state.round + 1, RUNNING, "", self._terms(policy), history=history, records=state.records)
        shutil.rmtree(self._place(new), ignore_errors=True)
        self.folder.save(new)
        return new

    def _place(self, state: State) -> Path:
        return self.folder.of_round(state.round)

    def _summary(self, state: State) -> dict[str, Any]:
        """A round that is over, for the history."""
        judged = state.done.get("judge", {})
        return {
            "round": state.round,
            "candidate": state.done.get("train", {}).get("candidate", ""),
            "folder": f"{self._place(state).name}/{CANDIDATE}",
            "status": state.status if state.status != RUNNING else "given up",
            "reason": state.reason,
            "estimate": judged.get("estimate"),
        }

    # The steps

    def _collect(self, state: State, named: str | Policy) -> dict[str, Any]:
        """One copy of the logs, which all steps read: they go on growing meanwhile."""
        table = compact(self.logs, self._place(state) / SNAPSHOT, threads=self.settings.jobs)
        state.records = table.rows
        labels = models_of([self._place(state) / SNAPSHOT])
        wanted = self.settings.model
        if wanted is not None and labels is not None and not wanted.is_same(labels):
            raise ConfigError(f"the labels are of {labels.in_words()}; expected those of {wanted.in_words()}")
        return {"records": table.rows, "files": len(table.files), "broken_lines": table.broken}

    def _drift(self, state: State, named: str | Policy) -> dict[str, Any]:
        found = drift([self._place(state) / SNAPSHOT], named)
        picture = ""
        if found.changes:
            try:
                plot_drift(found, self._place(state) / PICTURE)
                picture = f"{self._place(state).name}/{PICTURE}"
            except MissingExtraError:
                pass  # the figures say the same
        return {**finite(found.to_dict()), "said": found.in_words(), "picture": picture}

    def _train(self, state: State, named: str | Policy) -> dict[str, Any]:
        place, settings = self._place(state), self.settings
        part, folder = place / f".{CANDIDATE}", place / CANDIDATE
        for stale in (part, folder):
            shutil.rmtree(stale, ignore_errors=True)
        name = _candidate_name(named.name if isinstance(named, Policy) else Policy.load(named).name, state.round)
        try:
            trained = train(
                [place / SNAPSHOT],
                part,
                base=named,
                incumbent=named,
                name=name,
                objective=settings.objective,
                tolerance=settings.tolerance,
                estimators=settings.estimators,
                widen=True,
                seed=settings.seed,
                jobs=settings.jobs,
                n=settings.n,
            )
        except GateRefused as refused:
            figures = _figures(refused.verdict.figures)
            return {"end": REFUSED, "reason": str(refused), "figures": figures, "rows": refused.verdict.rows}
        except ConfigError as error:
            return {"end": WAITING, "reason": f"nothing can be learned yet: {error}"}
        os.replace(part, folder)
        return {"candidate": name, "figures": _figures(trained.verdict.figures), "rows": trained.verdict.rows}

    def _judge(self, state: State, named: str | Policy) -> dict[str, Any]:
        """Whether the candidate is better, and what it would have been worth on the logged traffic."""
        figures = state.done["train"]["figures"]
        gain = figures[_BETTER]
        settings = self.settings
        estimate = estimates(self._place(state) / SNAPSHOT, self._place(state) / CANDIDATE, named, settings)
        if not gain["low"] > 0:
            reason = (
                f"the candidate is not better: {_BETTER} is {gain['mean']:.4f} (95 % interval {gain['low']:.4f} to"
                f" {gain['high']:.4f}) on {state.done['train']['rows']} contents; expected all of it above 0"
            )
            return {"end": REFUSED, "reason": reason, **estimate}
        return {"gain": gain, **estimate}

    def _shadow(self, state: State, named: str | Policy) -> dict[str, Any]:
        if self.rollout is None:
            return {"end": READY, "reason": "the candidate is better; nothing here rolls it out"}
        return self._experiment(state, named, "shadow")

    def _canary(self, state: State, named: str | Policy) -> dict[str, Any]:
        return self._experiment(state, named, "canary")

    def _experiment(self, state: State, named: str | Policy, kind: str) -> dict[str, Any]:
        control = named.name if isinstance(named, Policy) else Policy.load(named).name
        name, candidate = f"{state.done['train']['candidate']}-{kind}", self._place(state) / CANDIDATE
        estimate = stated(state.done.get("judge", {}).get("estimate"))
        return brought_on(self.rollout, kind, name, str(candidate.resolve()), control, estimate)

    # Afterwards

    def compared(self) -> list[dict[str, Any]]:
        """Of each candidate that ran: what it was estimated to be worth before, and what was measured since."""
        state, found = self.folder.load(), []
        for past in [*state.history, *([self._summary(state)] if state.round else [])]:
            after = served(self.logs, past["candidate"], seed=self.settings.seed) if past["candidate"] else None
            if after is None:
                continue
            before = stated(past["estimate"])
            found.append(
                {
                    "candidate": past["candidate"],
                    "before": None if before is None else asdict(before),
                    "after": finite(asdict(after.value)),
                    "labels": after.labels,
                    "agrees": None if before is None else after.agrees(before),
                }
            )
        return found


def _candidate_name(policy: str, number: int) -> str:
    """The policy's name with the round, in place of an earlier round's."""
    stem, _, last = policy.rpartition("-r")
    return f"{(stem if stem and last.isdigit() else policy)[:56]}-r{number}"


def _figures(figures: Mapping[str, Interval]) -> dict[str, Any]:
    found: dict[str, Any] = finite({name: asdict(value) for name, value in figures.items()})
    return found
