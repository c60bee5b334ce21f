"""A reply in OpenAI's form, with the decision behind it under ``adaptive_fusion`` and in headers.

Knows replies, decisions and the ``openai`` package's types. Must not know of queues, or how an answer comes about.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from openai.types import CompletionUsage
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.chat.chat_completion import Choice, ChoiceLogprobs
from openai.types.chat.chat_completion_chunk import Choice as ChunkChoice
from openai.types.chat.chat_completion_chunk import ChoiceDelta
from openai.types.chat.chat_completion_chunk import ChoiceLogprobs as ChunkLogprobs
from openai.types.chat.chat_completion_message import ChatCompletionMessage
from openai.types.chat.chat_completion_token_logprob import ChatCompletionTokenLogprob, TopLogprob
from openai.types.completion_usage import CompletionTokensDetails, PromptTokensDetails

from adaptive_fusion.decisions import Decision
from adaptive_fusion.execution.logprobs import top_logprobs
from adaptive_fusion.reply import Reply
from adaptive_fusion.serving.explained import numbers_of, prediction
from adaptive_fusion.serving.pieces import until_stop

HEADER = "x-adaptive-fusion-"
_ENDS = {"stop": "stop", "length": "length", "deadline": "length", "cancelled": "length"}
"""The runner's reasons to end as OpenAI's; the runner's own stands under ``adaptive_fusion``."""


@dataclass(frozen=True)
class Asked:
    """What of a request its answer repeats.

    Attributes:
        model: The name it was called by.
        created: Seconds since the epoch.
        native_tokens: Visual tokens of the request at native.
        stops: Strings at which the answer ends.
        ignored: Fields that changed nothing.
        trial: What is said of its part in an experiment.
        top_logprobs: How many of the likeliest tokens are wanted; None wants no log-probabilities at all.
    """

    model: str
    created: int
    native_tokens: int
    stops: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    top_logprobs: int | None = None
    trial: Mapping[str, Any] = field(default_factory=dict)


def completion_id(decision: Decision) -> str:
    """The id of an answer, from which its request's can be read."""
    return f"chatcmpl-{decision.request_id}"


def request_id(text: str) -> str:
    """A request's id, from itself or from its answer's."""
    return text.removeprefix("chatcmpl-")


def shown_text(reply: Reply, tokenizer: Any, stops: Sequence[str]) -> str:
    """The answer up to its first stop string, which is looked for before spaces at the ends are taken away: it may end
    in some."""
    if not stops:
        return reply.text
    whole = tokenizer.decode(list(reply.token_ids), skip_special_tokens=True)
    shown = until_stop(whole, stops)
    return shown if reply.text == whole else shown.strip()


def completion(asked: Asked, reply: Reply, tokenizer: Any, wait_s: float) -> dict[str, Any]:
    """A whole answer as plain values."""
    text = shown_text(reply, tokenizer, asked.stops)
    logprobs = None
    if asked.top_logprobs is not None:
        logprobs = ChoiceLogprobs(content=token_rows(reply, tokenizer, asked), refusal=None)
    found = ChatCompletion(
        id=completion_id(reply.decision),
        object="chat.completion",
        created=asked.created,
        model=asked.model,
        choices=[
            Choice(
                index=0,
                message=ChatCompletionMessage(role="assistant", content=text, refusal=None, annotations=[]),
                finish_reason=_ENDS[reply.finish_reason],  # type: ignore[arg-type]
                logprobs=logprobs,
            )
        ],
        usage=usage(reply),
        adaptive_fusion=outcome(asked, reply, wait_s),  # type: ignore[call-arg]
    )
    return found.model_dump(mode="json", exclude_unset=True)


def chunk(
    asked: Asked,
    decision: Decision,
    delta: Mapping[str, Any],
    *,
    reply: Reply | None = None,
    logprobs: list[ChatCompletionTokenLogprob] | None = None,
    include_usage: bool = False,
    **extra: Any,
) -> dict[str, Any]:
    """A piece of an answer as plain values; with the `reply` the last one of its choice."""
    choice = ChunkChoice(
        index=0,
        delta=ChoiceDelta(**delta),
        finish_reason=_ENDS[reply.finish_reason] if reply is not None else None,  # type: ignore[arg-type]
        logprobs=ChunkLogprobs(content=logprobs, refusal=None) if logprobs is not None else None,
    )
    return _chunk(asked, decision, [choice], **({"usage": None} if include_usage else {}), **extra)


def usage_chunk(asked: Asked, reply: Reply) -> dict[str, Any]:
    """The piece behind the last one that has the usage and no choice."""
    return _chunk(asked, reply.decision, [], usage=usage(reply))


def _chunk(asked: Asked, decision: Decision, choices: list[ChunkChoice], **extra: Any) -> dict[str, Any]:
    found = ChatCompletionChunk(
        id=completion_id(decision),
        object="chat.completion.chunk",
        created=asked.created,
        model=asked.model,
        choices=choices,
        **extra,
    )
    return found.model_dump(mode="json", exclude_unset=True)


def usage(reply: Reply) -> CompletionUsage:
    """Tokens that the model saw and made; ``image_tokens`` are those of images and clips."""
    took = reply.measurement
    return CompletionUsage(
        prompt_tokens=took.prompt_tokens,
        completion_tokens=took.new_tokens,
        total_tokens=took.prompt_tokens + took.new_tokens,
        prompt_tokens_details=PromptTokensDetails(
            cached_tokens=0,
            audio_tokens=0,
            image_tokens=took.visual_tokens,
            text_tokens=took.prompt_tokens - took.visual_tokens,
        ),
        completion_tokens_details=CompletionTokensDetails(reasoning_tokens=0, audio_tokens=0),
    )


def token_rows(reply: Reply, tokenizer: Any, asked: Asked) -> list[ChatCompletionTokenLogprob]:
    """Each token of the shown text with its log-probability, from the model's own logits."""
    most = asked.top_logprobs or 0
    ids = [token for token in reply.token_ids if token not in set(tokenizer.all_special_ids)]
    tops = top_logprobs(reply.output, reply.token_ids, most) if most else []
    shown = len(until_stop(tokenizer.decode(ids), asked.stops))
    rows, said = [], 0
    for place, (token, logprob) in enumerate(zip(reply.token_ids, reply.logprobs or (), strict=False)):
        if token in tokenizer.all_special_ids:
            continue
        if said >= shown and said > 0:
            break
        text = tokenizer.decode([token])
        said += len(text)
        top = [_top(tokenizer, *pair) for pair in tops[place]] if most else []
        rows.append(
            ChatCompletionTokenLogprob(token=text, bytes=_bytes(text), logprob=_finite(logprob), top_logprobs=top)
        )
    return rows


def _top(tokenizer: Any, token: int, logprob: float) -> TopLogprob:
    text = tokenizer.decode([token])
    return TopLogprob(token=text, bytes=_bytes(text), logprob=_finite(logprob))


def _bytes(text: str) -> list[int] | None:
    """None of a token that is a part of a character, whose bytes its text does not tell."""
    return None if "\ufffd" in text else list(text.encode())


def _finite(logprob: float) -> float:
    """JSON has no infinities; OpenAI writes -9999 for what cannot be."""
    return max(logprob, -9999.0)


def outlook(decision: Decision, native_tokens: int) -> dict[str, Any]:
    """A decision before it is carried out."""
    return {
        "request_id": decision.request_id,
        "kind": decision.kind,
        "plan": decision.point.name,
        "point": decision.point.to_dict(),
        "rung": decision.rung,
        "lane": decision.lane,
        "policy": decision.policy,
        "reason": decision.reason,
        "feasible": decision.feasible,
        "escalated": decision.escalated is True,
        "batch": decision.batch,
        "budget": dict(decision.budget),
        "predicted": prediction(decision.predicted),
        "margin": decision.margin,
        "p_late": decision.p_late,
        "tokens": {"visual_native": native_tokens},
        **({"escalation": dict(decision.escalation)} if decision.escalation else {}),
        **({"encoder_cache": decision.encoder_cache} if decision.encoder_cache else {}),
        **({"conversation": dict(decision.conversation)} if decision.conversation else {}),
        **({"audit": dict(decision.audit)} if decision.audit else {}),
    }


def outcome(asked: Asked, reply: Reply, wait_s: float) -> dict[str, Any]:
    """A decision and what came of it. What was saved is ``visual_native - visual_used`` of ``tokens``."""
    took = reply.measurement
    return {
        **outlook(reply.decision, asked.native_tokens),
        "tokens": {
            "visual_native": asked.native_tokens,
            "visual_used": took.visual_tokens,
            "visual_saved": asked.native_tokens - took.visual_tokens,
            "prompt_used": took.prompt_tokens,
            "new": took.new_tokens,
        },
        "actual": {"queue_ms": wait_s * 1e3, **numbers_of(took)},
        "met": reply.met,
        "finish_reason": reply.finish_reason,
        "ignored": list(asked.ignored),
        **asked.trial,
    }


def headers(decision: Decision, native_tokens: int, reply: Reply | None = None) -> dict[str, str]:
    """What is known when headers are sent; with the `reply` also what it took."""
    values: dict[str, Any] = {
        "request-id": decision.request_id,
        "plan": decision.point.name,
        "rung": decision.rung,
        "lane": decision.lane,
        "policy": decision.policy,
        "visual-tokens-native": native_tokens,
    }
    if decision.predicted is not None:
        values["predicted-ttft-ms"] = f"{decision.predicted.ttft_ms:.1f}"
        values["predicted-latency-ms"] = f"{decision.predicted.latency_ms:.1f}"
    if reply is not None:
        values["escalated"] = str(decision.escalated is True).lower()
        values["visual-tokens"] = reply.measurement.visual_tokens
        values["ttft-ms"] = f"{reply.measurement.ttft_ms:.1f}"
        values["latency-ms"] = f"{reply.measurement.latency_ms:.1f}"
    named = {f"{HEADER}{name}": plain(str(value)) for name, value in values.items()}
    return {"x-request-id": decision.request_id, "cache-control": "no-store", **named}


def plain(text: str) -> str:
    """Without what headers cannot carry."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if c.isascii() and c.isprintable() else "?" for c in text)


def model_list(models: Sequence[str], created: int) -> dict[str, Any]:
    """The models there are."""
    rows = [{"id": name, "object": "model", "created": created, "owned_by": "adaptive-fusion"} for name in models]
    return {"object": "list", "data": rows}
