"""`AdaptiveRunner`: a vision-language model that spends visual compute per request. The place that wires everything.

One request goes: load and measure the media, decide (policy, cost model, controller), preprocess within the pixel
budget, encode at the operating point, generate, measure, learn, log. The model is not modified: with the runner gone
it is what it was.

Longer than other modules: every way of asking has its contract written out here, and here alone all parts meet. Each
step is somebody else's: `execution` runs, `control` decides, `model_face` stands in for the model.
"""

import asyncio
import json
import os
import random
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, overload

import torch
from PIL import Image
from torch import Tensor, nn

from adaptive_fusion.budget import Budget
from adaptive_fusion.control.candidates import Candidate, Choice
from adaptive_fusion.control.controller import Controller
from adaptive_fusion.control.escalating import Asking
from adaptive_fusion.control.planner import TEMPLATE_TOKENS, Planner, RequestInfo
from adaptive_fusion.cost.lengths import LengthModel
from adaptive_fusion.cost.model import CostModel, Profile, Work
from adaptive_fusion.cost.profiles import find_profile
from adaptive_fusion.decision_log import DecisionLog, text_hash
from adaptive_fusion.decisions import Decision, Measurement, decision_record
from adaptive_fusion.errors import ConfigError, ContextLengthError, PolicyMismatchWarning
from adaptive_fusion.execution.arguments import Arguments, for_chat, resolve, settled
from adaptive_fusion.execution.escalation import why_never
from adaptive_fusion.execution.executor import Executor, Run, Task
from adaptive_fusion.execution.full_prompt import with_full_prompt
from adaptive_fusion.execution.logprobs import token_logprobs
from adaptive_fusion.execution.meters import Meter, meter_for
from adaptive_fusion.execution.request import (
    TEMPLATE_OPTIONS,
    ChatRequest,
    build_request,
    each_request,
    kind_of,
)
from adaptive_fusion.execution.shift import shift
from adaptive_fusion.execution.stream import Stream
from adaptive_fusion.features.complexity import measure_complexity
from adaptive_fusion.features.prompts import prompt_kind
from adaptive_fusion.model_face import ModelFace
from adaptive_fusion.models import adapter_for
from adaptive_fusion.models.fingerprint import fingerprint
from adaptive_fusion.models.trained import add_trained
from adaptive_fusion.models.unwrap import lock_of
from adaptive_fusion.point import NATIVE, OperatingPoint
from adaptive_fusion.policy.auto import choose
from adaptive_fusion.policy.escalation import Escalation
from adaptive_fusion.policy.files import AUTO
from adaptive_fusion.policy.policy import Policy
from adaptive_fusion.pretrained import load_pretrained
from adaptive_fusion.reference import model_path
from adaptive_fusion.reply import Reply

WARM_UP_SIDES, WARM_UP_PIXELS = (200, 180), 8192
"""Width and height of the warm-up's image, run in full once, and what other points make of it. Both are resized."""


@dataclass(frozen=True)
class _Call:
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

    runner: "AdaptiveRunner"
    request: ChatRequest
    arrived_s: float
    native_tokens: int
    text_tokens: int
    _call: _Call

    def decide(self, *, wait_ms: float = 0.0, refuse: bool = True) -> Decision:
        """The decision that would be taken in `wait_ms` from now; nothing is run.

        Args:
            wait_ms: How long it will still wait for the model.
            refuse: Whether a budget that asks for it may refuse; else the decision says that it is not feasible.

        Raises:
            InfeasibleBudgetError: If nothing fits and the budget asks for a refusal.
        """
        limits = self.runner.budget.merge(self._call.budget)
        if not refuse:
            limits = replace(limits, on_infeasible="cheapest")
        return self.runner._decide(self, limits, wait_ms)

    def offers(self) -> tuple[str, list[Candidate]]:
        """See `AdaptiveRunner.offers`."""
        return self.runner._offers(self.runner._chat_info(self.request, self._call.arguments, self.arrived_s))

    def chat(
        self, *, cancelled: threading.Event | None = None, decided: Callable[[Decision], None] | None = None
    ) -> Reply:
        """Answer it; see `AdaptiveRunner.chat`.

        Args:
            cancelled: Ends the generation at its next token once it is set.
            decided: Called with the decision before the model runs, in this thread.
        """
        return self.runner._answer_prepared(self, None, cancelled, decided)

    def stream(
        self, *, cancelled: threading.Event | None = None, decided: Callable[[Decision], None] | None = None
    ) -> Stream[Reply]:
        """The answer in pieces; see `AdaptiveRunner.stream`, and `chat` for the arguments."""

        def work(streamer: Any, ended: threading.Event) -> Reply:
            return self.runner._answer_prepared(self, streamer, ended, decided)

        return Stream(work, getattr(self.runner.processor, "tokenizer", self.runner.processor), cancelled)


class AdaptiveRunner(ModelFace):
    """Wraps a vision-language model; unknown attributes are those of the model, see `ModelFace`.

    Args:
        model: A transformers vision-language model in eval mode on its device, also one that is wrapped by PEFT or
            ``torch.compile``, or offloaded by accelerate; see `adaptive_fusion.models`.
        processor: Its processor.
        policy: A `Policy`, a shipped policy's name or a path; ``auto`` takes the one that was fitted to this model and
            else a general one, see `adaptive_fusion.policy.auto`. One that was fitted to another model runs, with a
            `PolicyMismatchWarning` and the same in every decision's reason.
        budget: Limits for every request, the weakest source but one: the policy's defaults are put over it, then the
            environment's (``ADAPTIVE_FUSION_*``), then the request's own.
        profile: Measured costs of this model on this machine; None looks for one in the user's cache directory and else
            starts from an analytic estimate that the first requests correct.
        log: A `DecisionLog` or a path for one; None logs nothing.
        meter: Measures the memory of requests; None takes the one of the model's device.
        clock: Seconds, monotonic.
        seed: Of the exploring policies' choices.
        escalate: Whether a request goes on to the better plan where the model is not sure of what it would answer at
            the cheap one; None does as the policy says, which may have learned when.

    Raises:
        UnsupportedModelError: If the model cannot be driven.
        PolicyError: If the policy cannot be loaded.
    """

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
    ) -> None:
        if isinstance(model, AdaptiveRunner):
            raise ConfigError("model is an AdaptiveRunner; expected the model in it, its .model")
        self.processor = processor
        self.adapter = adapter_for(model, processor)
        self._where = self.device, self.dtype
        self.fingerprint = fingerprint(self.adapter)
        chosen = choose(policy, self.fingerprint, os.environ)
        self.policy = chosen.policy
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
        self._rng = random.Random(seed)
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
        cost, remark = CostModel(self.profile), self.chosen.remark
        self._planner = Planner(self.adapter, self.policy, cost, controller, lengths, self._rng, remark)

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

    def with_policy(self, policy: Policy | str | Path) -> "AdaptiveRunner":
        """A runner of the same model with another policy, which learns together with this one.

        Raises:
            PolicyError: If the policy cannot be loaded.
        """
        other = AdaptiveRunner(
            self.model,
            self.processor,
            policy=policy,
            budget=self._own_budget,
            profile=self.profile,
            log=self.log,
            meter=self.meter,
            clock=self._clock,
        )
        other.profile_note, other._warm = self.profile_note, self._warm
        other._learn_with(self.controller, self.lengths)
        return other

    @classmethod
    def from_pretrained(
        cls,
        id_or_path: str | Path = "reference",
        *,
        policy: Policy | str | Path = AUTO,
        budget: Budget | None = None,
        device: str | torch.device | None = None,
        profile: Profile | None = None,
        log: DecisionLog | str | Path | None = None,
        seed: int | None = None,
        escalate: bool | None = None,
        **options: Any,
    ) -> "AdaptiveRunner":
        """Load a model and its processor with transformers and wrap them.

        ``reference`` is the embedded reference model. `options` are those of ``from_pretrained``: where to load from
        (``revision``, ``subfolder``...) holds for model and processor, the rest for one of them (``dtype``,
        ``max_pixels``...), by the table in `adaptive_fusion.pretrained`. No remote code is executed.

        Raises:
            ConfigError: For an option that is refused, by name.
        """
        source = str(model_path()) if str(id_or_path) == "reference" else str(id_or_path)
        model, processor = load_pretrained(source, device, options)
        return cls(
            model, processor, policy=policy, budget=budget, profile=profile, log=log, seed=seed, escalate=escalate
        )

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

    # Asking

    @overload
    def chat(
        self,
        media: Any,
        prompt: str | None = ...,
        *,
        budget: Budget | None = ...,
        max_new_tokens: int | None = ...,
        point: OperatingPoint | None = ...,
        **generate_kwargs: Any,
    ) -> Reply: ...

    @overload
    def chat(
        self,
        media: Any,
        prompt: Sequence[str],
        *,
        budget: Budget | None = ...,
        max_new_tokens: int | None = ...,
        point: OperatingPoint | None = ...,
        **generate_kwargs: Any,
    ) -> list[Reply]: ...

    def chat(
        self,
        media: Any,
        prompt: str | Sequence[str] | None = None,
        *,
        budget: Budget | None = None,
        max_new_tokens: int | None = None,
        point: OperatingPoint | None = None,
        **generate_kwargs: Any,
    ) -> Reply | list[Reply]:
        """Answer one request, or several one after the other.

        Args:
            media: None, a path, encoded bytes, data URL, PIL image, array, `Video`, a list of these, or chat messages
                (see ``docs/messages.md``). Where the last message is the assistant's, it is a begun answer: the model
                goes on with it, and the reply's text is what follows, without what was given. Of several requests a
                list with the media of each, or a list of conversations.
            prompt: The question; a list of questions makes as many requests.
            budget: Limits of this request; what it leaves unset comes from the runner's.
            max_new_tokens: Upper bound of the answer; without it that of a ``generation_config`` argument, of the
                model's own, or 256.
            point: Run exactly this operating point instead of deciding.
            generate_kwargs: For the model's ``generate`` (sampling, beams...). What needs every token of the prompt
                runs native, with the reason in the decision. With ``output_logits`` or ``output_scores`` the reply has
                log-probabilities. For the chat template: ``tools`` (JSON schemas or functions) and
                ``continue_final_message`` (False begins a new answer after the assistant's last message).

        Returns:
            The reply, or the list of replies to several requests.

        Raises:
            MediaError: For a medium that cannot be used.
            ConfigError: For an argument that does not go with chat or with the `point`, by name.
            UnsupportedModelError: For a `point` that the model cannot run.
            InfeasibleBudgetError: If nothing fits and the budget asks for a refusal.
        """
        call = partial(self._call, budget=budget, max_new_tokens=max_new_tokens, point=point, options=generate_kwargs)
        if (several := each_request(media, prompt)) is not None:
            return [self._answer(call(*one)) for one in several]
        return self._answer(call(media, prompt))

    async def achat(
        self,
        media: Any,
        prompt: str | None = None,
        *,
        budget: Budget | None = None,
        max_new_tokens: int | None = None,
        point: OperatingPoint | None = None,
        **generate_kwargs: Any,
    ) -> Reply:
        """As `chat`, for one request, without holding up the event loop. A task that is cancelled ends its generation
        at the next token."""
        # Its thread is not inside `native`, whatever this one is in: what is in force is part of the call.
        call = self._call(media, prompt, budget, max_new_tokens, point, generate_kwargs)
        cancelled = threading.Event()
        try:
            return await asyncio.to_thread(self._answer, call, None, cancelled)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    def stream(
        self,
        media: Any,
        prompt: str | None = None,
        *,
        budget: Budget | None = None,
        max_new_tokens: int | None = None,
        point: OperatingPoint | None = None,
        **generate_kwargs: Any,
    ) -> Stream[Reply]:
        """As `chat`, for one request, but an iterator over pieces of text, for ``for`` and ``async for``; its ``reply``
        holds the `Reply` once it has ended.

        Closing or abandoning the stream ends the generation at its next token and frees the model.
        """
        if generate_kwargs.get("streamer") is not None:
            raise ConfigError("streamer is given; expected none: stream has its own, chat and generate take one")
        # Its thread is not inside `native`, whatever this one is in.
        call = self._call(media, prompt, budget, max_new_tokens, point, generate_kwargs)
        return Stream(partial(self._answer, call), getattr(self.processor, "tokenizer", self.processor))

    def prepared(
        self,
        media: Any,
        prompt: str | None = None,
        *,
        budget: Budget | None = None,
        max_new_tokens: int | None = None,
        point: OperatingPoint | None = None,
        arrived_s: float | None = None,
        seed: int | None = None,
        audit: bool = False,
        context: int | None = None,
        **generate_kwargs: Any,
    ) -> Prepared:
        """Load and measure one request, without waiting for the model; what is returned runs it.

        Arguments are those of `chat`, and:

        Args:
            arrived_s: When it arrived, on the runner's clock, if that was before now.
            seed: Of its sampling; the random numbers of everybody else are left as they are.
            audit: Run it natively; the decision's `audit` has what would have been run, and saved by prediction.
            context: Tokens that prompt and answer may have together; what is longer is refused before the model runs.

        Raises:
            See `chat`; of the context a ContextLengthError comes when it is run and its plan is known.
        """
        call = self._call(media, prompt, budget, max_new_tokens, point, generate_kwargs)
        return self._prepare(replace(call, arrived_s=arrived_s, seed=seed, audit=audit, context=context))

    def decide(
        self,
        media: Any,
        prompt: str | None = None,
        *,
        budget: Budget | None = None,
        max_new_tokens: int | None = None,
    ) -> Decision:
        """The decision `chat` would take, without running the model.

        Of an image that is an array, only the values that are measured are checked; `chat` converts and checks all.
        """
        arrived = self._clock()
        request, arguments = build_request(media, prompt, to_run=False), for_chat(self.model, {}, max_new_tokens)
        info = self._chat_info(request, arguments, arrived)
        return self._planner.decide(info, self.budget.merge(budget))[0]

    def offers(
        self, media: Any, prompt: str | None = None, *, max_new_tokens: int | None = None
    ) -> tuple[str, list[Candidate]]:
        """The lane that a request takes, and what it offers with expected quality and predicted cost, best first."""
        arguments = for_chat(self.model, {}, max_new_tokens)
        return self._offers(self._chat_info(build_request(media, prompt, to_run=False), arguments, self._clock()))

    def _offers(self, info: RequestInfo) -> tuple[str, list[Candidate]]:
        hardest, route = self._planner.route(info)
        found = self._planner.candidates(info, route.lane, hardest, self._planner.needs(info))
        return route.lane, sorted(found, key=lambda candidate: -candidate.quality)

    def work(self, media: Any, prompt: str, point: OperatingPoint, new_tokens: int) -> Work:
        """What `point` makes the model do for a request that is answered in `new_tokens`."""
        arguments = for_chat(self.model, {}, new_tokens)
        info = self._chat_info(build_request(media, prompt, to_run=False), arguments, self._clock())
        return replace(self._planner.work(point, info), new_tokens=float(new_tokens))

    def generate(
        self, *args: Any, budget: Budget | None = None, point: OperatingPoint | None = None, **kwargs: Any
    ) -> Any:
        """Drop-in for ``model.generate(**inputs)`` with the processor's own tensors; the same return type.

        The knobs that still apply after preprocessing are used (fusion, downsampling), with one plan for the whole
        call. Every argument means what it means to the model at every operating point: lengths that count the prompt
        are shifted, callbacks are shown the caller's full prompt, and it is the full prompt and the new tokens that
        are returned. A returned cache of a reduced prompt is a `ReducedCache`, which no later call takes. What needs
        the whole prompt runs native. What fits no other prompt than the caller's (a cache, positions, embeddings)
        goes to the model as it is, as do calls inside `native`: a hard deadline still ends them, nothing is predicted.
        The decision has the reason.

        Raises:
            ConfigError: For an argument that would run remote code, or does not go with the `point` or `budget` given.
            UnsupportedModelError: For a `point` that the model cannot run.
            InfeasibleBudgetError: If nothing fits and the budget asks for a refusal.
        """
        arguments, arrived = resolve(self.model, args, kwargs), self._clock()
        limits = self.budget.merge(budget)
        if point is None and getattr(self._bypass, "on", False):
            arguments = replace(arguments, as_is=arguments.as_is or "the call is inside native")
        point, because = settled(arguments, point)
        if arguments.as_is is not None:
            return self._untouched(arguments, arguments.as_is, limits, budget, arrived)
        self._warm_up_for(limits)
        inputs, ids = dict(arguments.inputs), arguments.inputs["input_ids"]
        sizes = self.adapter.sizes(inputs)
        visual = self.adapter.plan(sizes, NATIVE).tokens
        complexities = tuple(measure_complexity(array, detail=False) for array in self.adapter.thumbnails(inputs))
        info = self._info(
            arrived,
            kind=kind_of([complexity.kind for complexity in complexities]),
            sizes=sizes,
            complexities=complexities,
            prompt="",
            max_new_tokens=arguments.most_new_tokens(ids.shape[1]),
            text_tokens=max(1, ids.shape[1] - visual // ids.shape[0]),
            batch=ids.shape[0],
            pixels_fixed=True,
            asking=self._asking(arguments, "", ids.shape[0]),
        )
        with self._lock:
            decision, choice = self._planner.decide(info, limits, point, because)
            options = partial(shift, arguments, prompt=lambda: ids)
            run = self._run(
                info, Task(decision, choice, arrived, lambda _: inputs, options, arguments.whole is not None)
            )
        self._log(run, "", None, run.stopped_by)
        if run.measurement.visual_tokens == visual:
            return run.sequences
        return with_full_prompt(run.sequences, run.reduced_length, ids)

    def warm_up(self, **generate_kwargs: Any) -> None:
        """Run a small image through the model once at every kind of point that the policy has.

        The first request of a process brings libraries, kernels and fusion modules into memory (30 MiB on the CPU,
        several times what the request itself takes), and would break any memory budget with it. So the first request
        that has one does this before it is decided; the time, about that of a short request for each of the policy's
        points, counts in its latency. Whoever serves calls this at start instead. Nothing is learned or logged, and
        later outputs are what they would have been.

        Args:
            generate_kwargs: Options of ``generate`` that every request will have, such as a kind of cache.
        """
        request = build_request(Image.new("RGB", WARM_UP_SIDES), "?")
        rungs = [rung for ladder in self.policy.lanes.values() for rung in ladder]
        points = [NATIVE, *(replace(rung.point, max_pixels=WARM_UP_PIXELS, max_fps=None) for rung in rungs)]
        with self._lock:
            self._warm = True
            self._executor.warm_up(
                dict.fromkeys(self.adapter.computed(self.adapter.restrict(point)[0]) for point in points),
                partial(self.adapter.prepare, request.messages),
                **generate_kwargs,
            )

    @contextmanager
    def native(self) -> Iterator["AdaptiveRunner"]:
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

    def _call(
        self,
        media: Any,
        prompt: Any,
        budget: Budget | None,
        max_new_tokens: int | None,
        point: OperatingPoint | None,
        options: dict[str, Any],
    ) -> _Call:
        of_prompt = {name: options[name] for name in TEMPLATE_OPTIONS if name in options}
        others = {name: value for name, value in options.items() if name not in of_prompt}
        arguments = for_chat(self.model, others, max_new_tokens, getattr(self.processor, "tokenizer", None))
        return _Call(media, prompt, budget, self._given(point), arguments, of_prompt)

    def _untouched(self, arguments: Arguments, why: str, limits: Budget, own: Budget | None, arrived: float) -> Any:
        kinds = {"pixel_values": "image", "pixel_values_videos": "video"}
        kind = kind_of([kind for name, kind in kinds.items() if arguments.inputs.get(name) is not None])
        decision = self._planner.as_given(kind, why, limits, own)
        with self._lock:
            run = self._executor.untouched(decision, arguments.inputs, arguments.options, arrived, limits)
            self.last = run.decision, run.measurement
        self._log(run, "", None, run.stopped_by)
        return run.sequences

    def _given(self, point: OperatingPoint | None) -> OperatingPoint | None:
        """The point that a request must run, if any: what it says, or native inside `native`."""
        return NATIVE if point is None and getattr(self._bypass, "on", False) else point

    def _warm_up_for(self, limits: Budget) -> None:
        if limits.vram_gb is not None and not self._warm:
            with self._lock:
                if not self._warm:  # another thread may have done it meanwhile
                    self.warm_up()

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

    def _text_tokens(self, request: ChatRequest) -> int:
        tokenizer = getattr(self.processor, "tokenizer", None)
        said = "\n".join(request.texts)
        return (len(tokenizer(said).input_ids) if tokenizer and said else 0) + TEMPLATE_TOKENS

    def _chat_info(
        self, request: ChatRequest, arguments: Arguments, arrived: float, text_tokens: int | None = None
    ) -> RequestInfo:
        text = self._text_tokens(request) if text_tokens is None else text_tokens
        visual = self.adapter.plan(request.sizes, NATIVE).tokens if "max_length" in arguments.lengths else 0
        return self._info(
            arrived,
            kind=request.kind,
            sizes=request.sizes,
            durations_s=request.durations_s,
            frame_times_s=request.frame_times_s,
            complexities=request.complexities,
            prompt=request.prompt,
            max_new_tokens=arguments.most_new_tokens(text + visual),
            text_tokens=text,
            full_detail=request.full_detail,
            asking=self._asking(arguments, request.prompt),
        )

    def _asking(self, arguments: Arguments, prompt: str, rows: int = 1) -> Asking | None:
        """Whether and how the model may be asked if it is sure of a cheap answer; None where that is switched off."""
        rules = self.policy.escalation or (Escalation() if self._escalate else None)
        if rules is None or self._escalate is False:
            return None
        kind = prompt_kind(prompt) if prompt else ""  # nobody knows the text of a prompt that is given as tokens
        return Asking(rules, kind, why_never(arguments, rules.k, rows, self.adapter.model))

    def _prepare(self, call: _Call) -> Prepared:
        arrived = self._clock() if call.arrived_s is None else call.arrived_s
        request = build_request(call.media, call.prompt, hashed=self.log is not None, **call.of_prompt)
        native_tokens = self.adapter.plan(request.sizes, NATIVE).tokens if request.sizes else 0
        return Prepared(self, request, arrived, native_tokens, self._text_tokens(request), call)

    def _decide(self, prepared: Prepared, limits: Budget, wait_ms: float) -> Decision:
        point, because = settled(prepared._call.arguments, prepared._call.point)
        info = self._chat_info(prepared.request, prepared._call.arguments, prepared.arrived_s, prepared.text_tokens)
        info = self._within_context(replace(info, elapsed_ms=info.elapsed_ms + wait_ms), prepared._call)
        return self._planner.decide(info, limits, point, because)[0]

    def _answer(self, call: _Call, streamer: Any = None, cancelled: threading.Event | None = None) -> Reply:
        return self._answer_prepared(self._prepare(call), streamer, cancelled)

    def _answer_prepared(
        self,
        prepared: Prepared,
        streamer: Any = None,
        cancelled: threading.Event | None = None,
        decided: Callable[[Decision], None] | None = None,
    ) -> Reply:
        call, request, arguments = prepared._call, prepared.request, prepared._call.arguments

        def prepare(at: OperatingPoint) -> dict[str, Any]:
            return self.adapter.prepare(request.messages, at, **request.of_prompt)

        # Nobody holds the full prompt: it is the one that the media would have had natively.
        prompt = cache(lambda: prepare(NATIVE)["input_ids"])

        def options(reduced: Tensor) -> dict[str, Any]:
            self._require_context(call, reduced.shape[-1])
            return _with_streamer(arguments, prompt, streamer, reduced)

        limits = self.budget.merge(call.budget)
        with self._lock:
            self._warm_up_for(limits)
            # Decided once the model is free, so that waiting for it counts as elapsed.
            if arguments.see_prompt:
                prompt()
            info = self._chat_info(request, arguments, prepared.arrived_s, prepared.text_tokens)
            decision, choice = self._planned(self._within_context(info, call), limits, call)
            # By estimate, before anything is encoded for it; the exact length follows.
            estimate = self._planner.work(decision.point, info).prompt_tokens - 2 * TEMPLATE_TOKENS
            self._require_context(call, max(1, estimate), "about ")
            if decided is not None:
                decided(decision)
            task = Task(decision, choice, prepared.arrived_s, prepare, options, arguments.whole is not None, cancelled)
            with _seeded(call.seed, self.device):
                run = self._run(info, task)
        return self._reply(prepared, run, prompt)

    def _require_context(self, call: _Call, prompt_tokens: int, about: str = "") -> None:
        """Raise ContextLengthError where a prompt of that length, exact or `about`, and its answer do not fit into the
        call's context."""
        if call.context is None:
            return
        answer = call.arguments.most_new_tokens(prompt_tokens)
        if prompt_tokens + answer > call.context:
            raise ContextLengthError(
                f"the prompt has {about}{prompt_tokens} tokens, its answer may have {answer}, but the model's context "
                f"is {call.context} tokens for both; expected a shorter prompt, fewer or smaller images, or fewer "
                "new tokens"
            )

    def _within_context(self, info: RequestInfo, call: _Call) -> RequestInfo:
        """`info`, without a second pass where its prompt might not fit into the call's context."""
        if call.context is None or info.asking is None:
            return info
        full = self._planner.work(NATIVE, info).prompt_tokens + 2 * TEMPLATE_TOKENS
        if full + call.arguments.most_new_tokens(full) <= call.context:
            return info
        return replace(info, asking=replace(info.asking, never="full compute might not fit into the model's context"))

    def _planned(self, info: RequestInfo, limits: Budget, call: _Call) -> tuple[Decision, Choice]:
        """The decision; of an audit the native one, which says what would have been done."""
        point, because = settled(call.arguments, call.point)
        if not call.audit:
            return self._planner.decide(info, limits, point, because)
        would = self._planner.decide(info, replace(limits, on_infeasible="cheapest"), point, because)[0]
        decision, choice = self._planner.decide(info, limits, NATIVE)
        used, full = (self._planner.work(p, info).prompt_tokens for p in (would.point, NATIVE))
        saved: dict[str, Any] = {"tokens": full - used}
        if would.predicted is not None and decision.predicted is not None:
            saved["ttft_ms"] = decision.predicted.ttft_ms - would.predicted.ttft_ms
            saved["latency_ms"] = decision.predicted.latency_ms - would.predicted.latency_ms
        audit = {
            "point": would.point.to_dict(),
            "plan": would.point.name,
            "rung": would.rung,
            "lane": would.lane,
            "reason": would.reason,
            "feasible": would.feasible,
            "predicted": asdict(would.predicted) if would.predicted else None,
            "saved": saved,
        }
        return replace(decision, reason=f"audit: {decision.reason}", audit=audit), choice

    def _reply(self, prepared: Prepared, run: Run, prompt: Callable[[], Tensor]) -> Reply:
        """What goes out; lengths learn from it and it is logged."""
        request, arguments = prepared.request, prepared._call.arguments
        new = run.new_tokens
        tokenizer = getattr(self.processor, "tokenizer", self.processor)
        text = tokenizer.decode(new, skip_special_tokens=True)
        # Short of the limit it ended by itself; at the limit, with a token or a string that ends answers.
        most = arguments.most_new_tokens(prompt().shape[1] if "max_length" in arguments.lengths else 0)
        ended = len(new) < most or (len(new) > 0 and int(new[-1]) in arguments.end_tokens())
        ended = ended or any(end in text for end in arguments.end_strings())
        finish = run.stopped_by or ("stop" if ended else "length")
        self.lengths.observe(prompt_kind(request.prompt), run.measurement.new_tokens, finished=finish == "stop")
        self._log(run, request.prompt, request.content_hash, finish)
        tokens = tuple(new.tolist())
        return Reply(
            text if request.continues else text.strip(),  # a begun answer's spaces stay
            finish,
            run.decision,
            run.measurement,
            tokens,
            token_logprobs(run.sequences, tokens),
            run.output,
        )

    def _run(self, info: RequestInfo, task: Task) -> Run:
        """Run a decided request; the caller holds the lock."""
        predict = partial(self._planner.candidate, quality=0.0, info=info)
        run = self._executor.run(task, self.controller, predict)
        self.last = run.decision, run.measurement
        return run

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


@contextmanager
def _seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """Random numbers from `seed` inside, those of everybody else as if nothing had been drawn; None changes nothing."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
        torch.manual_seed(seed)
        yield


def _with_streamer(
    arguments: Arguments, prompt: Callable[[], Tensor], streamer: Any, reduced: Tensor
) -> dict[str, Any]:
    """``generate``'s options, with a stream's own streamer, which sees the prompt that the model sees."""
    options = shift(arguments, reduced, prompt)
    return options if streamer is None else {**options, "streamer": streamer}
