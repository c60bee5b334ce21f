"""What a runner is made of, wired together: one model with its policy, cost model, controller, executor and log.

Knows all parts and what becomes of them when the model moves or a state is restored. Must not know of messages, media
or how requests are asked: `answering` takes a request through these parts.
"""

import json
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Self

from torch import nn

from adaptive_fusion.budget import Budget
from adaptive_fusion.checks import integer
from adaptive_fusion.control.controller import Controller
from adaptive_fusion.control.escalating import Asking
from adaptive_fusion.control.exploring import check_share
from adaptive_fusion.control.gain import Gain
from adaptive_fusion.control.planner import Planner
from adaptive_fusion.control.request_info import RequestInfo
from adaptive_fusion.control.staying import Conversations
from adaptive_fusion.cost.lengths import LengthModel
from adaptive_fusion.cost.model import CostModel, Profile
from adaptive_fusion.cost.profiles import find_profile
from adaptive_fusion.decision_log import DecisionLog, text_hash
from adaptive_fusion.decisions import Decision, Measurement, decision_record
from adaptive_fusion.errors import ConfigError, PolicyMismatchWarning
from adaptive_fusion.execution.arguments import Arguments
from adaptive_fusion.execution.encoder_cache import MAX_MIB, EncoderCache
from adaptive_fusion.execution.escalation import why_never
from adaptive_fusion.execution.executor import Executor, Predict, Run, Task
from adaptive_fusion.execution.meters import GIB, Meter, meter_for
from adaptive_fusion.execution.request import ChatRequest
from adaptive_fusion.features.prompts import prompt_kind
from adaptive_fusion.model_face import ModelFace
from adaptive_fusion.models import adapter_for
from adaptive_fusion.models.caches import rows_part
from adaptive_fusion.models.encoder_keys import EncoderKeys
from adaptive_fusion.models.fingerprint import fingerprint
from adaptive_fusion.models.reuse import Seen
from adaptive_fusion.models.trained import add_trained
from adaptive_fusion.models.unwrap import lock_of
from adaptive_fusion.point import NATIVE, OperatingPoint
from adaptive_fusion.policy.auto import choose
from adaptive_fusion.policy.escalation import UNFITTED, Escalation
from adaptive_fusion.policy.files import AUTO
from adaptive_fusion.policy.policy import Policy


class Wired(ModelFace):
    """A model and everything that spends its compute per request; `AdaptiveRunner` has the arguments."""

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        *,
        policy: Policy | str | Path = AUTO,
        budget: Budget | None = None,
        profile: Profile | None = None,
        log: DecisionLog | str | Path | None = None,
        meter: Meter | None = None,
        clock: Callable[[], float] = time.monotonic,
        seed: int | None = None,
        escalate: bool | None = None,
        encoder_cache_mb: int = 0,
        explore: float | None = None,
    ) -> None:
        if isinstance(model, Wired):
            raise ConfigError("model is an AdaptiveRunner; expected the model in it, its .model")
        self.processor = processor
        self.adapter = adapter_for(model, processor)
        self._where = self.device, self.dtype
        self.fingerprint = fingerprint(self.adapter)
        chosen = choose(policy, self.fingerprint, os.environ)
        self._explore = None if explore is None else check_share(explore)
        self.policy = chosen.policy if explore is None else replace(chosen.policy, explore=explore)
        self.chosen = chosen.without_weights(add_trained(self.adapter, self.policy.fusion_weights))
        self._own_budget = budget or Budget()
        self.budget = self._own_budget.merge(self.policy.budget, Budget.from_env(os.environ))
        self.lengths = LengthModel()
        self.log = DecisionLog(log) if isinstance(log, str | Path) else log
        self.last: tuple[Decision, Measurement] | None = None
        self._clock = clock
        self._own_meter = meter is None
        self.meter = meter if meter is not None else meter_for(str(self.device))
        self._executor = Executor(self.adapter, self.meter, clock)
        integer(encoder_cache_mb, "encoder_cache_mb", 0, MAX_MIB)
        self.encoder_cache = EncoderCache(encoder_cache_mb) if encoder_cache_mb else None
        self._encoder_keys = EncoderKeys(self.adapter)
        self._executor.spare = self._spare
        self.conversations = Conversations()
        self.gain = Gain()
        self._seed = seed
        if escalate not in (True, False, None):
            raise ConfigError(f"escalate is {escalate!r}; expected True, False, or None for what the policy says")
        self._escalate = escalate
        self.use_profile(*((profile, "given") if profile else find_profile(self.adapter)))
        self._lock = lock_of(model)
        self._bypass = threading.local()
        self._warm = False
        self.model = model  # last: from here on names that the runner has not are the model's
        if self.chosen.warning:
            warnings.warn(self.chosen.warning, PolicyMismatchWarning, stacklevel=2)

    def use_profile(self, profile: Profile, note: str = "given") -> None:
        """Predict from `profile` from now on; the controller forgets what it learned about the former one."""
        self.profile, self.profile_note = profile, note
        self._learn_with(Controller(memory_margin=profile.memory_margin, clock=self._clock), self.lengths)

    def _learn_with(self, controller: Controller, lengths: LengthModel) -> None:
        self.controller, self.lengths = controller, lengths
        cost = CostModel(self.profile, parts=rows_part(self.adapter.model))
        self._planner = Planner(self.adapter, self.policy, cost, controller, lengths, self.chosen.remark, self._seed)

    def state(self) -> dict[str, Any]:
        """What was learned from requests, as plain values for JSON; `restore` reads it."""
        return {
            "profile": self.profile.to_dict(),
            "controller": self.controller.state(),
            "lengths": self.lengths.state(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on with what `state` learned.

        Raises:
            ConfigError: For a state that belongs to another model or profile, or is malformed.
        """
        if not isinstance(state, Mapping) or not {"profile", "controller", "lengths"} <= set(state):
            raise ConfigError("the state is incomplete; expected profile, controller and lengths")
        if state["profile"] != json.loads(json.dumps(self.profile.to_dict())):
            raise ConfigError("the state was learned with another model, machine or profile; expected this one's")
        if not all(isinstance(state[name], Mapping) for name in ("controller", "lengths")):
            raise ConfigError("the state is malformed; expected tables of controller and lengths")
        controller = Controller.from_state(state["controller"], clock=self._clock)
        self._learn_with(controller, LengthModel.from_state(state["lengths"]))

    def __repr__(self) -> str:
        policy = f"policy {self.policy.name!r} ({self.policy_note})"
        return self._described(policy, str(self.budget), f"profile: {self.profile_note}")

    @property
    def policy_note(self) -> str:
        """How the policy was chosen, and in what the model it was fitted to differs."""
        return self.chosen.note

    @property
    def clock(self) -> Callable[[], float]:
        """Seconds, monotonic: what `prepared` takes as time of arrival is read from it."""
        return self._clock

    @contextmanager
    def native(self) -> Iterator[Self]:
        """Inside this context (of this thread) every request runs the model untouched."""
        before = getattr(self._bypass, "on", False)
        self._bypass.on = True
        try:
            yield self
        finally:
            self._bypass.on = before

    @contextmanager
    def exclusive(self) -> Iterator[nn.Module]:
        """Inside this context the model is this thread's alone: requests of other threads wait, whichever runner they
        come through, and this thread's own go on."""
        with self._lock:
            yield self.model

    # How it is done

    def _given(self, point: OperatingPoint | None) -> OperatingPoint | None:
        """The point that a request must run, if any: what it says, or native inside `native`."""
        return NATIVE if point is None and getattr(self._bypass, "on", False) else point

    def _moved(self) -> None:
        if self._own_meter:
            self.meter = self._executor.meter = meter_for(str(self.device))
        if self.profile_note != "given":
            self.use_profile(*find_profile(self.adapter))

    def _info(self, arrived: float, **known: Any) -> RequestInfo:
        """What the planner needs to know, with the time that has passed since and the memory that is left."""
        self._follow()
        elapsed_ms, free = (self._clock() - arrived) * 1e3, self.meter.free_gb()
        return RequestInfo(**known, elapsed_ms=elapsed_ms, free_memory_gb=free)

    def _seen(self, request: ChatRequest) -> Seen | None:
        """Which media of a request are in the encoder cache, as the model is now; None where nobody knows."""
        if self.encoder_cache is None or not request.digests:
            return None
        return self._encoder_keys.seen(self.encoder_cache, request.messages, request.digests, request.tenant)

    def _spare(self) -> None:
        """Give up what is kept for later requests, where memory has run out."""
        if self.encoder_cache is not None:
            self.encoder_cache.clear()

    def _cached_gb(self) -> float:
        """Memory of the model's device that the encoder cache takes; what lies in the machine's own is not counted."""
        if self.encoder_cache is None or self.device.type == "cpu":
            return 0.0
        return self.encoder_cache.nbytes / GIB

    def _asking(self, arguments: Arguments, prompt: str, rows: int = 1) -> Asking | None:
        """Whether and how the model may be asked if it is sure of a cheap answer; None where that is switched off."""
        rules = self.policy.escalation or (Escalation() if self._escalate else None)
        if self.chosen.doubt:
            rules = UNFITTED if rows == 1 else replace(UNFITTED, k=1)  # of several rows only first tokens can be seen
        if rules is None or self._escalate is False:
            return None
        kind = prompt_kind(prompt) if prompt else ""  # nobody knows the text of a prompt that is given as tokens
        return Asking(rules, kind, why_never(arguments, rules.k, rows, self.adapter.model), self.chosen.doubt)

    def _run(self, info: RequestInfo, task: Task) -> Run:
        """Run a decided request; the caller holds the lock."""
        run = self._executor.run(task, self.controller, self._predict(info))
        self.last = run.decision, run.measurement
        return run

    def _predict(self, info: RequestInfo) -> Predict:
        """What any point would be expected to take for a request."""
        return partial(self._planner.candidate, quality=0.0, info=info)

    def _log(self, run: Run, prompt: str, content: str | None, finish: str | None) -> None:
        if self.log is not None:
            hashed = text_hash(prompt) if prompt else None
            self.log.write(
                decision_record(
                    run.decision,
                    run.measurement,
                    time_s=time.time(),
                    content_hash=content,
                    prompt_hash=hashed,
                    finish_reason=finish,
                )
            )
