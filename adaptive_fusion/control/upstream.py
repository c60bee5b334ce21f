"""What decides for a model behind an address: policy, ladder of pixels and frames, costs as seen from here, what was
learned of them.

The same policy, planner, controller and cost model as beside a model of one's own, wired for one that only pixels and
frames can be chosen for. Knows plans and times. Must not know of media, messages, HTTP or files.
"""

import json
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import replace
from os import environ
from pathlib import Path
from typing import Any

from adaptive_fusion.budget import Budget
from adaptive_fusion.control.audits import audited
from adaptive_fusion.control.candidates import Candidate, Choice
from adaptive_fusion.control.controller import Controller
from adaptive_fusion.control.planner import Planner
from adaptive_fusion.control.request_info import RequestInfo
from adaptive_fusion.cost.lengths import LengthModel
from adaptive_fusion.cost.model import CostModel, Profile, Work
from adaptive_fusion.cost.upstream import Seen, guessed, learned
from adaptive_fusion.decisions import Decision, Measurement
from adaptive_fusion.errors import ConfigError
from adaptive_fusion.models.remote import Grid, RemoteAdapter
from adaptive_fusion.point import OperatingPoint
from adaptive_fusion.policy.auto import choose
from adaptive_fusion.policy.files import AUTO
from adaptive_fusion.policy.fitted import Fingerprint
from adaptive_fusion.policy.policy import Policy
from adaptive_fusion.policy.projected import projected

KEPT = 256
"""The last requests of which work and times are kept to learn the costs from."""
LEARN_AT = (16, 64, 256)
"""After how many requests the costs are learned anew; each time from all that are kept."""


class Upstream:
    """Decides for one model upstream and learns from what its requests took; thread-safe.

    Args:
        grid: How the model resizes what it is shown.
        model: Its name.
        policy: As for `AdaptiveRunner`.
        budget: Limits of every request.
        clock: Seconds, monotonic.
        seed: Of exploring.
    """

    def __init__(
        self,
        grid: Grid,
        model: str,
        *,
        policy: Policy | str | Path = AUTO,
        budget: Budget | None = None,
        clock: Callable[[], float] = time.monotonic,
        seed: int | None = None,
    ) -> None:
        self.adapter = RemoteAdapter(grid, model)
        unread = "it runs behind an address"
        self.fingerprint = Fingerprint(model or "upstream", {}, {}, "", unread=unread)
        chosen = choose(policy, self.fingerprint, environ)
        self.policy, told = projected(chosen.policy)
        self.warning, self.remark = chosen.warning, "; ".join(filter(None, (chosen.remark, told)))
        self.budget = (budget or Budget()).merge(self.policy.budget, Budget.from_env(environ))
        self.clock, self._seed, self._lock = clock, seed, threading.Lock()
        self._seen: deque[tuple[Seen, Candidate]] = deque(maxlen=KEPT)
        self._count = 0
        key = {"upstream": model, "patch": str(grid.patch), "merge": str(grid.merge)}
        self._learn_with(guessed(key), Controller(clock=clock), LengthModel())

    @property
    def always_full(self) -> bool:
        """Whether the policy never takes anything away, so that nothing has to be measured for it."""
        return all(rung.is_full for ladder in self.policy.lanes.values() for rung in ladder)

    @property
    def planner(self) -> Planner:
        """The planner with the costs as they are known now."""
        return self._planner

    def _learn_with(self, profile: Profile, controller: Controller, lengths: LengthModel) -> None:
        self.profile, self.controller, self.lengths = profile, controller, lengths
        cost = CostModel(profile)
        self._planner = Planner(self.adapter, self.policy, cost, controller, lengths, self.remark, self._seed)

    def decide(
        self, info: RequestInfo, own: Budget | None = None, point: OperatingPoint | None = None, *, audit: bool = False
    ) -> tuple[Decision, Choice]:
        """The decision for a request under the limits of all with its `own` put over them; of an audit the native one.

        Raises:
            UnsupportedModelError: If `point` has a knob that cannot be chosen from here.
            InfeasibleBudgetError: If nothing fits and the budget asks for a refusal.
        """
        limits = self.budget.merge(own)
        if audit:
            return audited(self._planner, info, limits, point, None)
        return self._planner.decide(info, limits, point)

    def took(
        self,
        choice: Choice,
        ran: Candidate,
        work: Work,
        kind: str,
        measured: Measurement,
        *,
        ended: bool,
        lost_ms: float = 0.0,
    ) -> None:
        """Learn from an answer.

        Args:
            choice: The decision's.
            ran: What was sent, with what it was predicted to take.
            work: The same, as work.
            kind: Of the question.
            measured: What it took as its client saw it; times that nobody saw are NaN.
            ended: Whether the answer ended by itself.
            lost_ms: What a first pass took that was given up.
        """
        self.controller.update(choice, measured, ran=ran, lost_ms=lost_ms)
        self.lengths.observe(kind, measured.new_tokens, finished=ended)
        before_ms = choice.elapsed_ms + lost_ms
        ttft_ms = measured.ttft_ms - before_ms if measured.ttft_ms > before_ms else None
        with self._lock:
            done = replace(work, new_tokens=float(max(1, measured.new_tokens)))
            self._seen.append(((done, ttft_ms, measured.latency_ms - before_ms), ran))
            self._count += 1
            again = self._count in LEARN_AT or self._count % KEPT == 0
        if again:
            self._learn_again()

    def _learn_again(self) -> None:
        """Costs from what was seen, and a controller that has seen the same requests with these costs."""
        with self._lock:
            rows = list(self._seen)
            profile = learned([seen for seen, _ in rows], self.profile)
            if profile is None:
                return
            cost, controller = CostModel(profile), Controller(clock=self.clock)
            for (work, ttft_ms, latency_ms), ran in rows:
                again = replace(ran, predicted=cost.predict(ran.point, work), second=None)
                choice = controller.choose([again], Budget())
                controller.update(choice, _times(ttft_ms, latency_ms, work))
            self._learn_with(profile, controller, self.lengths)

    # Over a restart

    def state(self) -> dict[str, Any]:
        """What was learned, as plain values for JSON; `restore` reads it."""
        return {
            "profile": self.profile.to_dict(),
            "controller": self.controller.state(),
            "lengths": self.lengths.state(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on with what `state` learned.

        Raises:
            ConfigError: For a state of another model upstream, or a malformed one.
        """
        parts = {"profile", "controller", "lengths"}
        if not parts <= set(state) or not all(isinstance(state[name], Mapping) for name in parts):
            raise ConfigError("the state is incomplete; expected tables of profile, controller and lengths")
        profile = Profile.from_dict(json.loads(json.dumps(state["profile"])))
        if profile.mismatch(self.profile.key):
            raise ConfigError("the state was learned of another model upstream; expected this one's")
        controller = Controller.from_state(state["controller"], clock=self.clock)
        with self._lock:
            self._learn_with(profile, controller, LengthModel.from_state(state["lengths"]))


def _times(ttft_ms: float | None, latency_ms: float, work: Work) -> Measurement:
    first = float("nan") if ttft_ms is None else ttft_ms
    return measured_from_outside(first, latency_ms, 0, work.prompt_tokens, int(work.new_tokens))


def measured_from_outside(
    ttft_ms: float, latency_ms: float, visual_tokens: int, prompt_tokens: int, new_tokens: int
) -> Measurement:
    """What can be known of a request from outside of the engine; NaN where nobody saw the first token."""
    decode = latency_ms - ttft_ms if ttft_ms > 0 else float("nan")
    return Measurement(
        preprocess_ms=0.0,
        encode_ms=0.0,
        prefill_ms=ttft_ms,
        decode_ms=decode,
        ttft_ms=ttft_ms,
        latency_ms=latency_ms,
        visual_tokens=visual_tokens,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        patches=0,
        peak_memory_gb=0.0,
    )
