"""A chat request's way through a runner's parts: prepared, decided once the model is free, run, learned from, logged.

Knows prepared requests and what is wired. Must not know how requests are asked (`runner`), or how anything is decided
or run (`control`, `execution`).
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from adaptive_fusion.budget import Budget
from adaptive_fusion.control.audits import audited
from adaptive_fusion.control.candidates import Candidate, Choice
from adaptive_fusion.control.planner import FIXED, Planner
from adaptive_fusion.control.request_info import HIT, MISS, PART, TEMPLATE_TOKENS, RequestInfo
from adaptive_fusion.control.staying import Plan
from adaptive_fusion.decisions import Decision
from adaptive_fusion.errors import ContextLengthError
from adaptive_fusion.execution.arguments import Arguments, settled
from adaptive_fusion.execution.executor import Run, Task
from adaptive_fusion.execution.logprobs import token_logprobs
from adaptive_fusion.execution.merging import why_alone
from adaptive_fusion.execution.request import ChatRequest, build_request
from adaptive_fusion.features.prompts import prompt_kind
from adaptive_fusion.point import NATIVE
from adaptive_fusion.prepared import Call, Prepared, Turn
from adaptive_fusion.reply import Reply
from adaptive_fusion.way import Way
from adaptive_fusion.wired import Wired

PIECE = 16_384
"""Characters of a text whose tokens are counted at a time."""
WARM_UP_SIDES, WARM_UP_PIXELS = (200, 180), 8192
"""Width and height of the warm-up's image, run in full once, and what other points make of it. Both are resized."""


class Answering(Wired):
    """Answers prepared requests."""

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

    def _text_tokens(self, request: ChatRequest) -> int:
        tokenizer = getattr(self.processor, "tokenizer", None)
        said = "\n".join(request.texts)
        if not tokenizer or not said:
            return TEMPLATE_TOKENS
        first, *others = _pieces(said)
        more = sum(len(tokenizer(piece, add_special_tokens=False).input_ids) for piece in others)
        return len(tokenizer(first).input_ids) + more + TEMPLATE_TOKENS

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
            seen=self._seen(request),
            cached_gb=self._cached_gb(),
            kept=self.conversations.find(request.turns.before),
        )

    def _request(self, media: Any, prompt: str | None, *, hashed: bool = False, **told: Any) -> ChatRequest:
        """A request, loaded and measured, with the hashes that somebody has a use for: one that is to be `hashed` for
        the log is if there is a log."""
        exact = self.encoder_cache is not None
        return build_request(media, prompt, hashed=hashed and self.log is not None, exact=exact, **told)

    def _prepare(self, call: Call) -> Prepared:
        arrived = self._clock() if call.arrived_s is None else call.arrived_s
        request = self._request(call.media, call.prompt, hashed=True, tenant=call.tenant, **call.of_prompt)
        native_tokens = self.adapter.plan(request.sizes, NATIVE).tokens if request.sizes else 0
        return Prepared(self, request, arrived, native_tokens, self._text_tokens(request), call)

    def _why_apart(self, prepared: Prepared) -> str:
        """Why a request is not put together with others, in words; empty where it may be."""
        call = prepared.call
        if not self.adapter.packed:
            return "the model takes the images of one request"
        if call.seed is not None and call.arguments.value("do_sample"):
            return "its sampling is seeded"
        if self.budget.merge(call.budget).vram_gb is not None:
            return "its memory is limited"
        return why_alone(call.arguments)

    def _decide(self, prepared: Prepared, limits: Budget, wait_ms: float) -> Decision:
        info = self._info_of(prepared)
        info = self._within_context(replace(info, elapsed_ms=info.elapsed_ms + wait_ms), prepared.call)
        return self._planner.decide(info, limits, *settled(prepared.call.arguments, prepared.call.point))[0]

    def _info_of(self, prepared: Prepared) -> RequestInfo:
        return self._chat_info(prepared.request, prepared.call.arguments, prepared.arrived_s, prepared.text_tokens)

    def _offers(self, info: RequestInfo) -> tuple[str, list[Candidate]]:
        hardest, route = self._planner.route(info)
        found = self._planner.candidates(info, route.lane, hardest, self._planner.needs(info))
        return route.lane, sorted(found, key=lambda candidate: -candidate.quality)

    def _answer(self, call: Call, streamer: Any = None, cancelled: threading.Event | None = None) -> Reply:
        return self._answer_turn(Turn(self._prepare(call), cancelled, streamer=streamer))

    def _answer_turns(self, turns: Sequence[Turn]) -> None:
        """Answer every turn, one after the other; see `Batching`."""
        for turn in turns:
            turn.settle(partial(self._answer_turn, turn))

    def _answer_turn(
        self, turn: Turn, remark: str = "", decided: tuple[RequestInfo, Decision, Choice] | None = None
    ) -> Reply:
        """Answer one request alone, as `decided` where it was just now; `remark` is said in its reason."""
        prepared, call = turn.prepared, turn.prepared.call
        way, limits = Way(self, prepared, turn.streamer), self.budget.merge(call.budget)
        with self._lock:
            self._warm_up_for(limits)
            # Decided once the model is free, so that waiting for it counts as elapsed.
            if call.arguments.see_prompt:
                way.prompt()
            if decided is None:
                info = replace(self._info_of(prepared), request_id=turn.request_id)
                decided = info, *self._planned(self._within_context(info, call), limits, call)
            info, decision, choice = decided
            if remark:
                decision = replace(decision, reason=f"{decision.reason}; {remark}")
            task = self._task(turn, way, info, decision, choice)
            with _seeded(call.seed, self.device):
                run = self._run(info, task)
            self._ran_alone(info, run)
        return self._reply(prepared, run, way.prompt)

    def _ran_alone(self, info: RequestInfo, run: Run) -> None:
        """Called with what came of a request that was answered alone; see `Batching`."""

    def _task(self, turn: Turn, way: "Way", info: RequestInfo, decision: Decision, choice: Choice) -> Task:
        """A decided request; whoever asked is told of the decision.

        Raises:
            ContextLengthError: If its prompt is too long, by estimate, before anything is encoded for it; the exact
                length follows.
        """
        call = turn.prepared.call
        estimate = self._planner.work(decision.point, replace(info, beside=())).prompt_tokens - 2 * TEMPLATE_TOKENS
        self._require_context(call, max(1, estimate), "about ")
        if turn.decided is not None:
            turn.decided(decision)
        whole = call.arguments.whole is not None
        return Task(decision, choice, turn.prepared.arrived_s, way.prepare, way.options, whole, turn.cancelled)

    def _warm_up_for(self, limits: Budget) -> None:
        if limits.vram_gb is not None and not self._warm:
            with self._lock:
                if not self._warm:  # another thread may have done it meanwhile
                    self.warm_up()

    def _require_context(self, call: Call, prompt_tokens: int, about: str = "") -> None:
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

    def _within_context(self, info: RequestInfo, call: Call) -> RequestInfo:
        """`info`, without a second pass where its prompt might not fit into the call's context."""
        if call.context is None or info.asking is None:
            return info
        full = self._planner.work(NATIVE, info).prompt_tokens + 2 * TEMPLATE_TOKENS
        if full + call.arguments.most_new_tokens(full) <= call.context:
            return info
        return replace(info, asking=replace(info.asking, never="full compute might not fit into the model's context"))

    def _planned(self, info: RequestInfo, limits: Budget, call: Call) -> tuple[Decision, Choice]:
        """The decision; of an audit the native one, which says what would have been done."""
        decide = audited if call.audit else Planner.decide
        return decide(self._planner, info, limits, *settled(call.arguments, call.point))

    def _reply(self, prepared: Prepared, run: Run, prompt: Callable[[], Tensor]) -> Reply:
        """What goes out; lengths learn from it and it is logged."""
        request, arguments = prepared.request, prepared.call.arguments
        run = replace(run, decision=_with_cache_told(run, len(request.media)))
        self._remember(request, run.decision)
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

    def _remember(self, request: ChatRequest, decision: Decision) -> None:
        """Keep the plan of a conversation for its next question, if it was decided here and not drawn at random."""
        if request.turns.own and decision.lane != FIXED and not decision.audit and not decision.explored:
            self.conversations.keep(request.turns.own, Plan(decision.rung, decision.point))


def _pieces(text: str) -> Iterator[str]:
    """A text in pieces of at most `PIECE` characters, cut between words where there are some: counting the tokens of a
    very long one at once would take some two hundred times its memory."""
    begin = 0
    while len(text) - begin > PIECE:
        cut = text.rfind(" ", begin + 1, begin + PIECE)
        end = cut if cut > 0 else begin + PIECE
        yield text[begin:end]
        begin = end
    yield text[begin:]


def _with_cache_told(run: Run, media: int) -> Decision:
    """The decision with what became of the media: a later pass finds what the first has left, and what was there may
    have made room for others before its turn came."""
    decision, took = run.decision, run.measurement
    if not decision.encoder_cache or not took.visual_tokens:
        return decision
    if not took.patches:
        return replace(decision, encoder_cache=HIT)
    if decision.encoder_cache != HIT:
        return decision
    return replace(decision, encoder_cache=MISS if media == 1 and not decision.escalated else PART)


@contextmanager
def _seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """Random numbers from `seed` inside, those of everybody else as if nothing had been drawn; None changes nothing."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
        torch.manual_seed(seed)
        yield
