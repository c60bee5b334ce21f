"""`AdaptiveRunner`: a vision-language model that spends visual compute per request. The place that wires everything.

One request goes: load and measure the media, decide (policy, cost model, controller), preprocess within the pixel
budget, encode at the operating point, generate, measure, learn, log. The model is not modified: with the runner gone
it is what it was.
"""

import os
import random
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from adaptive_fusion.budget import Budget
from adaptive_fusion.checks import integer
from adaptive_fusion.control.candidates import Candidate
from adaptive_fusion.control.controller import Controller
from adaptive_fusion.control.planner import TEMPLATE_TOKENS, Planner, RequestInfo
from adaptive_fusion.cost.lengths import LengthModel
from adaptive_fusion.cost.model import CostModel, Profile, Work
from adaptive_fusion.cost.profiles import find_profile
from adaptive_fusion.decision_log import DecisionLog, record, text_hash
from adaptive_fusion.decisions import Decision, Measurement
from adaptive_fusion.errors import ConfigError
from adaptive_fusion.execution.executor import Executor, Prepare, Run, Task
from adaptive_fusion.execution.meters import meter_for
from adaptive_fusion.execution.request import ChatRequest, build_request
from adaptive_fusion.execution.stream import Stream
from adaptive_fusion.features.complexity import measure_complexity
from adaptive_fusion.features.prompts import prompt_kind
from adaptive_fusion.fusion import DeepStackFusion
from adaptive_fusion.models import Adapter, adapter_for
from adaptive_fusion.models.placeholders import restore_prompt
from adaptive_fusion.point import NATIVE, OperatingPoint
from adaptive_fusion.policy.policy import Policy
from adaptive_fusion.reference import model_path
from adaptive_fusion.reply import Reply

WARM_UP_SIDES, WARM_UP_PIXELS = (200, 180), 8192
"""Width and height of the warm-up's image, run in full once, and what other points make of it. Both are resized."""

# A model keeps M-RoPE state between prefill and decode, so two generations on one model must not interleave,
# whichever runner they come from.
_LOCKS: "weakref.WeakKeyDictionary[nn.Module, threading.RLock]" = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class _Call:
    """The arguments of `chat` and `stream`."""

    media: Any
    prompt: str | None
    budget: Budget | None
    max_new_tokens: int
    point: OperatingPoint | None
    generate_kwargs: dict[str, Any]

    def __post_init__(self) -> None:
        integer(self.max_new_tokens, "max_new_tokens", 1)


class AdaptiveRunner:
    """Wraps a vision-language model; unknown attributes are those of the model.

    Args:
        model: A transformers vision-language model in eval mode on its device; see `adaptive_fusion.models`.
        processor: Its processor.
        policy: A `Policy`, a shipped policy's name or a path.
        budget: Limits for every request, the weakest source but one: the policy's defaults are put over it, then the
            environment's (``ADAPTIVE_FUSION_*``), then the request's own.
        profile: Measured costs of this model on this machine; None looks for one in the user's cache directory and else
            starts from an analytic estimate that the first requests correct.
        log: A `DecisionLog` or a path for one; None logs nothing.
        clock: Seconds, monotonic.
        seed: Of the exploring policies' choices.

    Raises:
        UnsupportedModelError: If the model cannot be driven.
        PolicyError: If the policy cannot be loaded.
    """

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        *,
        policy: Policy | str | Path = "balanced",
        budget: Budget | None = None,
        profile: Profile | None = None,
        log: DecisionLog | str | Path | None = None,
        clock: Callable[[], float] = time.monotonic,
        seed: int | None = None,
    ) -> None:
        self.model = model
        self.processor = processor
        self.policy = policy if isinstance(policy, Policy) else Policy.load(policy)
        self.adapter: Adapter = adapter_for(model, processor)
        for path in self.policy.fusion_weights:
            self.adapter.add_fusion(DeepStackFusion.from_file(path))
        self.budget = (budget or Budget()).merge(self.policy.budget, Budget.from_env(os.environ))
        self.lengths = LengthModel()
        self.log = DecisionLog(log) if isinstance(log, str | Path) else log
        self.last: tuple[Decision, Measurement] | None = None
        self._clock = clock
        self._executor = Executor(self.adapter, meter_for(str(getattr(model, "device", "cpu"))), clock)
        self._rng = random.Random(seed)
        self.use_profile(*((profile, "given") if profile else find_profile(self.adapter)))
        self._lock = _LOCKS.setdefault(model, threading.RLock())
        self._bypass = threading.local()
        self._warm = False

    def use_profile(self, profile: Profile, note: str = "given") -> None:
        """Predict from `profile` from now on; the controller forgets what it learned about the former one."""
        self.profile, self.profile_note = profile, note
        self.controller = Controller(memory_margin=profile.memory_margin, clock=self._clock)
        self._planner = Planner(self.adapter, self.policy, CostModel(profile), self.controller, self.lengths, self._rng)

    @classmethod
    def from_pretrained(
        cls,
        id_or_path: str | Path = "reference",
        *,
        policy: Policy | str | Path = "balanced",
        budget: Budget | None = None,
        device: str | torch.device | None = None,
        profile: Profile | None = None,
        log: DecisionLog | str | Path | None = None,
        seed: int | None = None,
        **model_kwargs: Any,
    ) -> "AdaptiveRunner":
        """Load a model and its processor with transformers and wrap them.

        ``reference`` is the embedded reference model. `model_kwargs` go to
        ``AutoModelForImageTextToText.from_pretrained`` (``dtype``, ``attn_implementation``, ``device_map``...).
        No remote code is executed.
        """
        from transformers import AutoModelForImageTextToText, AutoProcessor

        if model_kwargs.pop("trust_remote_code", False):
            raise ConfigError("trust_remote_code is True; expected False: load the model yourself and wrap it")
        source = str(model_path()) if str(id_or_path) == "reference" else str(id_or_path)
        # Said, not left out: left out, transformers asks on the terminal.
        model = AutoModelForImageTextToText.from_pretrained(source, trust_remote_code=False, **model_kwargs)
        if device is not None:
            model = model.to(device)
        processor = AutoProcessor.from_pretrained(source, trust_remote_code=False)
        return cls(model.eval(), processor, policy=policy, budget=budget, profile=profile, log=log, seed=seed)

    def __getattr__(self, name: str) -> Any:
        # Only reached for names the runner does not have; "model" itself is missing while unpickling or copying.
        if name == "model":
            raise AttributeError(name)
        return getattr(self.model, name)

    # Asking

    def chat(
        self,
        media: Any,
        prompt: str | None = None,
        *,
        budget: Budget | None = None,
        max_new_tokens: int = 256,
        point: OperatingPoint | None = None,
        **generate_kwargs: Any,
    ) -> Reply:
        """Answer one request.

        Args:
            media: None, a path, encoded bytes, PIL image, array, `Video`, a list of these, or chat messages.
            prompt: The question.
            budget: Limits of this request; what it leaves unset comes from the runner's.
            max_new_tokens: Upper bound of the answer.
            point: Run exactly this operating point instead of deciding.
            generate_kwargs: For the model's ``generate`` (sampling, beams...).

        Raises:
            MediaError: For a medium that cannot be used.
            UnsupportedModelError: For a `point` that the model cannot run.
            InfeasibleBudgetError: If nothing fits and the budget asks for a refusal.
        """
        return self._answer(_Call(media, prompt, budget, max_new_tokens, self._given(point), generate_kwargs))

    def stream(
        self,
        media: Any,
        prompt: str | None = None,
        *,
        budget: Budget | None = None,
        max_new_tokens: int = 256,
        point: OperatingPoint | None = None,
        **generate_kwargs: Any,
    ) -> Stream[Reply]:
        """As `chat`, but an iterator over pieces of text; its ``reply`` holds the `Reply` once it has ended.

        Closing or abandoning the stream ends the generation at its next token and frees the model.
        """
        # Its thread is not inside `native`, whatever this one is in.
        call = _Call(media, prompt, budget, max_new_tokens, self._given(point), generate_kwargs)
        return Stream(partial(self._answer, call), getattr(self.processor, "tokenizer", self.processor))

    def decide(
        self,
        media: Any,
        prompt: str | None = None,
        *,
        budget: Budget | None = None,
        max_new_tokens: int = 256,
    ) -> Decision:
        """The decision `chat` would take, without running the model."""
        arrived = self._clock()
        request = build_request(media, prompt)
        return self._planner.decide(self._chat_info(request, max_new_tokens, arrived), self.budget.merge(budget))[0]

    def offers(
        self, media: Any, prompt: str | None = None, *, max_new_tokens: int = 256
    ) -> tuple[str, list[Candidate]]:
        """The lane that a request takes, and what it offers with expected quality and predicted cost, best first."""
        info = self._chat_info(build_request(media, prompt), max_new_tokens, self._clock())
        hardest, route = self._planner.route(info)
        found = self._planner.candidates(info, route.lane, hardest)
        return route.lane, sorted(found, key=lambda candidate: -candidate.quality)

    def work(self, media: Any, prompt: str, point: OperatingPoint, new_tokens: int) -> Work:
        """What `point` makes the model do for a request that is answered in `new_tokens`."""
        info = self._chat_info(build_request(media, prompt), new_tokens, self._clock())
        return replace(self._planner.work(point, info), new_tokens=float(new_tokens))

    def generate(
        self, *args: Any, budget: Budget | None = None, point: OperatingPoint | None = None, **kwargs: Any
    ) -> Any:
        """Drop-in for ``model.generate(**inputs)`` with the processor's own tensors; the same return type.

        The knobs that still apply after preprocessing are used (fusion, downsampling), with one plan for the whole
        call. The caller's full prompt and the new tokens are returned at every operating point; a returned cache is
        that of the reduced prompt. Positional inputs, inputs without pixels, calls that bring a cache and calls inside
        `native` go to the model as they are.
        """
        pixels = any(kwargs.get(key) is not None for key in ("pixel_values", "pixel_values_videos"))
        # A cache goes with the tokens that made it: a reduced prompt would not fit one that was filled before.
        known = kwargs.get("input_ids") is not None and kwargs.get("past_key_values") is None
        if args or not pixels or not known or getattr(self._bypass, "on", False):
            return self._plain(args, kwargs)
        arrived = self._clock()
        limits = self.budget.merge(budget)
        self._warm_up_for(limits)
        ids: Tensor = kwargs["input_ids"]
        complexities = tuple(measure_complexity(array) for array in self.adapter.thumbnails(kwargs))
        sizes = self.adapter.sizes(kwargs)
        visual = self.adapter.plan(sizes, NATIVE).tokens // ids.shape[0]
        configs = [kwargs.get("generation_config"), getattr(self.model, "generation_config", None)]
        limits_new = [kwargs.get("max_new_tokens"), *(getattr(config, "max_new_tokens", None) for config in configs)]
        most = int(next((limit for limit in limits_new if limit), 256))
        info = self._info(
            arrived,
            kind="mixed" if len({c.kind for c in complexities}) > 1 else complexities[0].kind,
            sizes=sizes,
            complexities=complexities,
            prompt="",
            max_new_tokens=most,
            text_tokens=max(1, ids.shape[1] - visual),
            batch=ids.shape[0],
            pixels_fixed=True,
        )
        tensors = {key: value for key, value in kwargs.items() if isinstance(value, Tensor)}
        options = {key: value for key, value in kwargs.items() if key not in tensors}
        with self._lock:
            run = self._run(info, limits, point, arrived, lambda _: tensors, options)
        self._log(run, prompt="", content=None, finish=run.stopped_by)
        sequences = run.sequences
        if isinstance(sequences, Tensor):
            return restore_prompt(sequences, run.reduced_length, ids)
        sequences.sequences = restore_prompt(sequences.sequences, run.reduced_length, ids)
        return sequences

    def warm_up(self) -> None:
        """Run a small image through the model once at every kind of point that the policy has.

        The first request of a process brings libraries, kernels and fusion modules into memory (30 MiB on the CPU,
        several times what the request itself takes), and would break any memory budget with it. So the first request
        that has one does this before it is decided; the time, about that of a short request for each of the policy's
        points, counts in its latency. Whoever serves calls this at start instead. Nothing is learned or logged, and
        later outputs are what they would have been.
        """
        request = build_request(Image.new("RGB", WARM_UP_SIDES), "?")
        rungs = [rung for ladder in self.policy.lanes.values() for rung in ladder]
        points = [NATIVE, *(replace(rung.point, max_pixels=WARM_UP_PIXELS, max_fps=None) for rung in rungs)]
        with self._lock:
            self._warm = True
            self._executor.warm_up(
                dict.fromkeys(self.adapter.restrict(point)[0] for point in points),
                partial(self.adapter.prepare, request.messages),
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

    def _plain(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with self._lock:
            return self.model.generate(*args, **kwargs)  # type: ignore[operator]

    def _given(self, point: OperatingPoint | None) -> OperatingPoint | None:
        """The point that a request must run, if any: what it says, or native inside `native`."""
        return NATIVE if point is None and getattr(self._bypass, "on", False) else point

    def _warm_up_for(self, limits: Budget) -> None:
        if limits.vram_gb is not None and not self._warm:
            with self._lock:
                if not self._warm:  # another thread may have done it meanwhile
                    self.warm_up()

    def _info(self, arrived: float, **known: Any) -> RequestInfo:
        """What the planner needs to know, with the time that has passed since and the memory that is left."""
        elapsed_ms, free = (self._clock() - arrived) * 1e3, self._executor.meter.free_gb()
        return RequestInfo(**known, elapsed_ms=elapsed_ms, free_memory_gb=free)

    def _chat_info(self, request: ChatRequest, max_new_tokens: int, arrived: float) -> RequestInfo:
        tokenizer = getattr(self.processor, "tokenizer", None)
        said = "\n".join(request.texts)
        text = len(tokenizer(said).input_ids) if tokenizer and said else 0
        return self._info(
            arrived,
            kind=request.kind,
            sizes=request.sizes,
            durations_s=request.durations_s,
            complexities=request.complexities,
            prompt=request.prompt,
            max_new_tokens=max_new_tokens,
            text_tokens=text + TEMPLATE_TOKENS,
        )

    def _answer(self, call: _Call, streamer: Any = None, cancelled: threading.Event | None = None) -> Reply:
        arrived = self._clock()
        config = call.generate_kwargs.get("generation_config")
        several = call.generate_kwargs.get("num_return_sequences") or getattr(config, "num_return_sequences", None) or 1
        if several != 1:
            raise ConfigError(f"num_return_sequences is {several!r}; chat and stream give 1 answer, generate several")
        request = build_request(call.media, call.prompt, hashed=self.log is not None)
        extra = {"max_new_tokens": call.max_new_tokens, **call.generate_kwargs}
        if streamer is not None:
            extra["streamer"] = streamer

        limits = self.budget.merge(call.budget)
        with self._lock:
            self._warm_up_for(limits)
            # Decided once the model is free, so that waiting for it counts as elapsed.
            info = self._chat_info(request, call.max_new_tokens, arrived)
            prepare = partial(self.adapter.prepare, request.messages)
            run = self._run(info, limits, call.point, arrived, prepare, extra, cancelled)
        whole = run.sequences if isinstance(run.sequences, Tensor) else run.sequences.sequences
        new = whole[0, run.reduced_length :]
        tokenizer = getattr(self.processor, "tokenizer", self.processor)
        text = tokenizer.decode(new, skip_special_tokens=True)
        # Short of the limit it ended by itself: at a token that ends answers, or as `generate_kwargs` say.
        ended = len(new) < call.max_new_tokens or (len(new) > 0 and int(new[-1]) in self.adapter.end_tokens)
        finish = run.stopped_by or ("stop" if ended else "length")
        self.lengths.observe(prompt_kind(request.prompt), run.measurement.new_tokens, finished=finish == "stop")
        self._log(run, request.prompt, request.content_hash, finish)
        return Reply(text.strip(), finish, run.decision, run.measurement)

    def _run(
        self,
        info: RequestInfo,
        limits: Budget,
        point: OperatingPoint | None,
        arrived: float,
        prepare: Prepare,
        options: dict[str, Any],
        cancelled: threading.Event | None = None,
    ) -> Run:
        """Decide and run; the caller holds the lock."""
        decision, choice = self._planner.decide(info, limits, point)
        predict = partial(self._planner.candidate, quality=0.0, info=info)
        run = self._executor.run(Task(decision, choice, arrived, prepare, options, predict, cancelled), self.controller)
        self.last = run.decision, run.measurement
        return run

    def _log(self, run: Run, prompt: str, content: str | None, finish: str | None) -> None:
        if self.log is not None:
            hashed = text_hash(prompt) if prompt else None
            self.log.write(
                record(
                    run.decision,
                    run.measurement,
                    time_s=time.time(),
                    content_hash=content,
                    prompt_hash=hashed,
                    finish_reason=finish,
                )
            )
