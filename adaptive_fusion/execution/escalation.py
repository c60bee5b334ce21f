"""A look at how sure the model is of its first tokens, and a way out of the pass before anything of it is shown.

The entropy is that of the model's own logits, in nats: a forward hook sees them before ``generate`` does anything with
them. A logits processor would not do: transformers puts those that it makes itself (repetition penalty, suppressed
tokens...) ahead of any that is handed in. The hook is there for one call and removed after it.

Knows a model, arguments of ``generate`` and a threshold. Must not know of policies, budgets or what the better plan is:
whoever asks gives a function that says whether there is time for one.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from statistics import fmean
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.generation.streamers import BaseStreamer

from adaptive_fusion.execution.arguments import Arguments
from adaptive_fusion.execution.generate_rules import is_blind, is_own

_NEVER = {
    "prefix_allowed_tokens_fn": "holds the answer to a grammar",
    "constraints": "holds the answer to a grammar",
    "force_words_ids": "holds the answer to a grammar",
    "max_time": "counts the time of one pass",
    "prefill_chunk_size": "runs the prompt in pieces",
    "synced_gpus": "needs every process to run the same passes",
}
"""Arguments under which a pass is never given up, and why."""


def why_never(arguments: Arguments, k: int, rows: int = 1, model: Any = None) -> str:
    """Why a call's first pass must not be given up, in words; empty where it may.

    Args:
        arguments: The call's.
        k: First tokens that are looked at.
        rows: Prompts in the batch.
        model: Without wrappers.
    """
    for name in ("num_beams", "num_return_sequences"):
        if (arguments.value(name) or 1) != 1:
            return f"{name} is {arguments.value(name)}"
    for name, why in _NEVER.items():
        if arguments.value(name):
            return f"{name} {why}"
    for item in arguments.value("logits_processor") or ():
        if not is_blind(item):
            return f"logits_processor has a {type(item).__name__}, which may keep a state"
    if k > 1:
        for item in arguments.value("stopping_criteria") or ():
            if not is_own(item):
                return f"stopping_criteria has a {type(item).__name__}, which may keep a state"
        if rows > 1:
            return f"{rows} rows may end at different tokens, and {k} tokens are to be looked at"
    if model is not None and getattr(model, "_compiled_call_impl", None) is not None:
        return "the model's call is compiled, which hides its logits"
    return ""


def entropies(logits: Tensor) -> Tensor:
    """Entropy of each row's distribution, in nats, of `logits` ``[rows, vocabulary]``."""
    found: Tensor = torch.special.entr(torch.softmax(logits.float(), -1)).sum(-1)
    return found


@contextmanager
def watched(model: nn.Module, see: Callable[[Tensor], bool]) -> Iterator[None]:
    """Inside this context `see` is given the last logits ``[rows, vocabulary]`` of every forward of `model`, without
    wrappers around it, until it returns True."""

    def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
        if see(output.logits[:, -1]):
            handle.remove()

    handle = model.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


class Unsure(Exception):
    """The model is not sure of its answer, and there is time for a better one."""


class FirstLook:
    """One pass's verdict, taken once, and a streamer that is shown nothing before it.

    Args:
        k: First tokens that are looked at; the mean of their entropies is compared, of several rows the highest.
        threshold: Nats above which the pass is given up.
        too_late: Says why there must be no verdict any more, in words; empty if there may be one.
        clock: Seconds, monotonic.
    """

    def __init__(
        self,
        k: int,
        threshold: float,
        too_late: Callable[[], str],
        clock: Callable[[], float],
    ) -> None:
        self.k, self.threshold, self._too_late, self._clock = k, threshold, too_late, clock
        self._seen: list[list[float]] = []
        self._streamer: _Held | None = None
        self.first_s: float | None = None
        self.decided_s: float | None = None
        self.entropy: float | None = None
        self.escalated: bool | None = None
        self.why = ""

    def run(self, model: nn.Module, options: Mapping[str, Any], generate: Callable[[Mapping[str, Any]], Any]) -> Any:
        """What `generate` gives for `options`; nothing of it is repeated if the pass is kept. One that is given up
        leaves the random numbers as they were.

        Raises:
            Unsure: If the pass is given up.
        """
        if options.get("streamer") is not None:
            self._streamer = _Held(options["streamer"])
            options = {**options, "streamer": self._streamer}
        # The first token is drawn after its logits were seen, so only a later look can follow a draw.
        before = _Random(cast(torch.device, model.device)) if self.k > 1 else None
        try:
            with watched(model, self._see):
                done = generate(options)
            if self.decided_s is None:
                self._decide()  # it ended within the first k tokens
            return done
        except Unsure:
            if before is not None:
                before.restore()
            raise

    def _see(self, logits: Tensor) -> bool:
        self._seen.append(entropies(logits).tolist())
        if self.first_s is None:
            self.first_s = self._clock()
        if len(self._seen) < self.k:
            return False
        self._decide()
        return True

    def _decide(self) -> None:
        """Take the verdict, where one may be taken, and go on or give up."""
        self.decided_s = self._clock()
        self.why = self._too_late() if self._seen else "the model's logits were not seen"
        if not self.why:
            self.entropy = max(map(fmean, zip(*self._seen, strict=True)))
            self.escalated = self.entropy > self.threshold
        self._seen.clear()
        if self.escalated:
            raise Unsure
        if self._streamer is not None:
            self._streamer.release()


class _Held(BaseStreamer):  # type: ignore[misc]
    """Keeps what it is put until it is released, and passes it on from then."""

    def __init__(self, inner: Any) -> None:
        self._inner, self._kept, self._open = inner, list[Tensor | None](), False

    def put(self, value: Tensor) -> None:
        if self._open:
            self._inner.put(value)
        else:
            self._kept.append(value)

    def end(self) -> None:
        if self._open:
            self._inner.end()
        else:
            self._kept.append(None)

    def release(self) -> None:
        """Pass on what was kept, and everything that follows."""
        self._open = True
        for value in self._kept:
            if value is None:
                self._inner.end()
            else:
                self._inner.put(value)
        self._kept.clear()


class _Random:
    """The state of the random numbers that ``generate`` draws from, on the CPU and on the model's device."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._cpu = device, torch.get_rng_state()
        self._own = None if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)

    def restore(self) -> None:
        torch.set_rng_state(self._cpu)
        if self._own is not None:
            torch.get_device_module(self._device).set_rng_state(self._own, self._device)
