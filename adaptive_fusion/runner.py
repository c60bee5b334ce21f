"""`AdaptiveRunner`: a vision-language model that spends visual compute per request. Every way of asking it.

One request goes: load and measure the media, decide (policy, cost model, controller), preprocess within the pixel
budget, encode at the operating point, generate, measure, learn, log. The model is not modified: with the runner gone
it is what it was.

Has the contracts of what users call. What happens is somebody else's: `answering` takes a request through the parts
that `wired` has put together, `batching` several at once, `model_face` stands in for the model.
"""

import asyncio
import json
import threading
import uuid
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import torch

from adaptive_fusion.batching import Batching
from adaptive_fusion.budget import Budget
from adaptive_fusion.control.candidates import Candidate
from adaptive_fusion.cost.model import Profile, Work
from adaptive_fusion.decision_log import DecisionLog
from adaptive_fusion.decisions import Decision, Measurement
from adaptive_fusion.errors import ConfigError
from adaptive_fusion.execution.arguments import Arguments, for_chat, resolve, settled
from adaptive_fusion.execution.executor import Task
from adaptive_fusion.execution.full_prompt import with_full_prompt
from adaptive_fusion.execution.request import TEMPLATE_OPTIONS, build_request, each_request, kind_of
from adaptive_fusion.execution.shift import shift
from adaptive_fusion.execution.stream import Stream
from adaptive_fusion.features.complexity import measure_complexity
from adaptive_fusion.point import NATIVE, OperatingPoint
from adaptive_fusion.policy.files import AUTO
from adaptive_fusion.policy.policy import Policy
from adaptive_fusion.prepared import Call, Prepared, Turn
from adaptive_fusion.pretrained import load_pretrained
from adaptive_fusion.reference import model_path
from adaptive_fusion.reply import Reply

if TYPE_CHECKING:
    from adaptive_fusion.serving.gateway.remote import Remote

__all__ = ["AdaptiveRunner", "Prepared"]


class AdaptiveRunner(Batching):
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
        seed: Of what is explored: with the same one the same request id is drawn alike everywhere, in any process.
        escalate: Whether a request goes on to the better plan where the model is not sure of what it would answer at
            the cheap one; None does as the policy says, which may have learned when, and always asks where the policy
            was not fitted to this model.
        encoder_cache_mb: MiB in which to keep what the vision encoder made of media, so that it does not run again for
            one that comes back at the same pixels; 0 keeps nothing. On an accelerator it lies there, and counts against
            a request's memory budget.
        explore: Share of requests, up to a quarter, that take a random point of those that fit their budget, so that
            logs say what other policies would be worth (see ``docs/learn.md``); None does as the policy says, which
            explores nothing unless it was made to.

    Raises:
        UnsupportedModelError: If the model cannot be driven.
        PolicyError: If the policy cannot be loaded.
        ConfigError: For a value out of range.
    """

    def with_policy(self, policy: Policy | str | Path, *, apart: bool = False) -> "AdaptiveRunner":
        """A runner of the same model with another policy, which learns together with this one.

        Args:
            policy: As the runner takes it.
            apart: Whether it goes on by itself from what this one has learned so far: its faults then leave no trace in
                this one's prices and drifts, and the plans of conversations are its own.

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
            escalate=self._escalate,
            seed=self._seed,
            explore=self._explore,
        )
        other.profile_note, other._warm = self.profile_note, self._warm
        other.encoder_cache, other.gain = self.encoder_cache, self.gain
        if apart:
            other.restore(json.loads(json.dumps(self.state())))
        else:
            other._learn_with(self.controller, self.lengths)
            other.conversations = self.conversations
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
        encoder_cache_mb: int = 0,
        explore: float | None = None,
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
            model,
            processor,
            policy=policy,
            budget=budget,
            profile=profile,
            log=log,
            seed=seed,
            escalate=escalate,
            encoder_cache_mb=encoder_cache_mb,
            explore=explore,
        )

    @staticmethod
    def remote(
        url: str,
        model: str,
        *,
        processor: str = "qwen3-vl",
        engine: str = "openai",
        policy: Policy | str | Path = AUTO,
        budget: Budget | None = None,
        log: DecisionLog | str | Path | None = None,
        key: str | None = None,
        seed: int | None = None,
    ) -> "Remote":
        """A model that an engine with OpenAI's API serves: ``chat``, ``stream`` and ``decide`` with the same decisions,
        log and policies, applied to what is sent. See ``docs/remote.md``; needs the extra ``[serve]``.

        Args:
            url: Of the engine, such as ``http://127.0.0.1:8000/v1``.
            model: Its name there.
            processor: How it resizes: a preset, a folder or a hub id; see `serving.gateway.processors`.
            engine: Which engine it is; see `serving.gateway.engines`.
            policy, budget, log, seed: As for a model of one's own.
            key: Sent as bearer token; None takes ``ADAPTIVE_FUSION_UPSTREAM_KEY`` of the environment.

        Raises:
            ConfigError: For an address, engine or processor that is none.
        """
        # The one import that goes up: what is given back stands on the server's parts.
        from adaptive_fusion.serving.gateway.remote import Remote

        return Remote(
            url,
            model,
            processor=processor,
            engine=engine,
            policy=policy,
            budget=budget,
            log=log,
            key=key,
            seed=seed,
        )

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
        """Answer one request, or several, up to four of them in one pass of the model where that pays.

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
            RequestsFailed: For several requests, if any of them failed as said below, when the others are answered: its
                ``outcomes`` have their replies.
            MediaError: For a medium that cannot be used.
            ConfigError: For an argument that does not go with chat or with the `point`, by name.
            UnsupportedModelError: For a `point` that the model cannot run.
            InfeasibleBudgetError: If nothing fits and the budget asks for a refusal.
        """
        call = partial(self._call, budget=budget, max_new_tokens=max_new_tokens, point=point, options=generate_kwargs)
        if (several := each_request(media, prompt)) is not None:
            return self._answer_several([call(*one) for one in several])
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
        tenant: str = "",
        **generate_kwargs: Any,
    ) -> Prepared:
        """Load and measure one request, without waiting for the model; what is returned runs it.

        Arguments are those of `chat`, and:

        Args:
            arrived_s: When it arrived, on the runner's clock, if that was before now.
            seed: Of its sampling; the random numbers of everybody else are left as they are.
            audit: Run it natively; the decision's `audit` has what would have been run, and saved by prediction.
            context: Tokens that prompt and answer may have together; what is longer is refused before the model runs.
            tenant: Whose it is, where several ask: nothing is reused of another's media, nor of its conversations.

        Raises:
            See `chat`; of the context a ContextLengthError comes when it is run and its plan is known.
        """
        call = self._call(media, prompt, budget, max_new_tokens, point, generate_kwargs)
        return self._prepare(replace(call, arrived_s=arrived_s, seed=seed, audit=audit, context=context, tenant=tenant))

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
        request, arguments = self._request(media, prompt, to_run=False), for_chat(self.model, {}, max_new_tokens)
        info = self._chat_info(request, arguments, arrived)
        return self._planner.decide(info, self.budget.merge(budget))[0]

    def offers(
        self, media: Any, prompt: str | None = None, *, max_new_tokens: int | None = None
    ) -> tuple[str, list[Candidate]]:
        """The lane that a request takes, and what it offers with expected quality and predicted cost, best first."""
        arguments = for_chat(self.model, {}, max_new_tokens)
        return self._offers(self._chat_info(self._request(media, prompt, to_run=False), arguments, self._clock()))

    def work(self, media: Any, prompt: str, point: OperatingPoint, new_tokens: int) -> Work:
        """What `point` makes the model do for a request that is answered in `new_tokens`."""
        arguments = for_chat(self.model, {}, new_tokens)
        info = self._chat_info(build_request(media, prompt, to_run=False), arguments, self._clock())
        # Whether the encoder has run for it before is of no account: `info` was not asked to look.
        return replace(self._planner.work(point, info), new_tokens=float(new_tokens), most_new_tokens=0.0)

    def work_together(
        self, requests: Sequence[tuple[Any, str]], point: OperatingPoint, new_tokens: int
    ) -> tuple[Work, Measurement]:
        """Run requests as one batch, each at `point` and answered in exactly `new_tokens`: what that makes the model
        do, and what it took until the last answer, to calibrate by."""
        exactly: dict[str, Any] = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}
        prepared = [self.prepared(media, prompt, point=point, **exactly) for media, prompt in requests]
        return self._measured_together([Turn(each, lead_s=0.0) for each in prepared])

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
            request_id=uuid.uuid4().hex,
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

    # How it is done

    def _call(
        self,
        media: Any,
        prompt: Any,
        budget: Budget | None,
        max_new_tokens: int | None,
        point: OperatingPoint | None,
        options: dict[str, Any],
    ) -> Call:
        of_prompt = {name: options[name] for name in TEMPLATE_OPTIONS if name in options}
        others = {name: value for name, value in options.items() if name not in of_prompt}
        arguments = for_chat(self.model, others, max_new_tokens, getattr(self.processor, "tokenizer", None))
        return Call(media, prompt, budget, self._given(point), arguments, of_prompt)

    def _untouched(self, arguments: Arguments, why: str, limits: Budget, own: Budget | None, arrived: float) -> Any:
        kinds = {"pixel_values": "image", "pixel_values_videos": "video"}
        kind = kind_of([kind for name, kind in kinds.items() if arguments.inputs.get(name) is not None])
        decision = self._planner.as_given(kind, why, limits, own)
        with self._lock:
            run = self._executor.untouched(decision, arguments.inputs, arguments.options, arrived, limits)
            self.last = run.decision, run.measurement
        self._log(run, "", None, run.stopped_by)
        return run.sequences
