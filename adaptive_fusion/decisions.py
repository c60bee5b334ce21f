"""What was decided, predicted and measured for one request.

One frozen record serves the reply, the log, the metrics and the training rows. Knows nothing of models, policies or
files; `decision_log` keeps it.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from adaptive_fusion.decision_log import DecisionLog as DecisionLog  # under the name that users know
from adaptive_fusion.features.complexity import Complexity
from adaptive_fusion.features.prompts import PROMPT_VERSION
from adaptive_fusion.log_schema import SCHEMA as SCHEMA
from adaptive_fusion.log_schema import new_record
from adaptive_fusion.point import OperatingPoint


@dataclass(frozen=True, slots=True)
class Prediction:
    """What the cost model expects of a request; times in milliseconds, memory in GiB above the resting set."""

    encode_ms: float
    prefill_ms: float
    decode_ms: float
    peak_memory_gb: float

    @property
    def ttft_ms(self) -> float:
        """Time to the first token."""
        return self.encode_ms + self.prefill_ms

    @property
    def latency_ms(self) -> float:
        """Time to the last token."""
        return self.ttft_ms + self.decode_ms


@dataclass(frozen=True, slots=True)
class Measurement:
    """What a request really took.

    Times are milliseconds on a monotonic clock: `preprocess_ms` (media to tensors, with all that came before: failed
    tries, and a first pass that was given up), `encode_ms` (vision encoder and fusion), `prefill_ms`, `decode_ms`,
    `ttft_ms` (to the first token that could be shown) and `latency_ms` (all of it).
    `peak_memory_gb` is the high-water mark less the resting set, in GiB; 0.0 if it was not measured, as on processors
    without a memory budget, and of all rows of a batch but the one that ended last, which has the batch's.

    Of a row of a batch, encoding is that of all its rows, and the prompt is counted without its padding.
    """

    preprocess_ms: float
    encode_ms: float
    prefill_ms: float
    decode_ms: float
    ttft_ms: float
    latency_ms: float
    visual_tokens: int
    prompt_tokens: int
    new_tokens: int
    patches: int
    peak_memory_gb: float


@dataclass(frozen=True, slots=True)
class Rejected:
    """An operating point that was considered and not taken, and why."""

    point: OperatingPoint
    reason: str
    predicted: Prediction | None = None


@dataclass(frozen=True, slots=True)
class Decision:
    """One routing and control decision.

    `p_complex` is P(complex), which decides the lane: that people judge it complex, or that the cheap plan loses by
    it. `complexity.score` is agreement with human judgement: two numbers. `propensity` is the probability with which
    `point` was chosen (1.0 unless exploring), so that explored traffic can be evaluated off-policy; `explored` says
    that it was drawn at random. `rung` names the ladder's step, the same for every size of input, where `point` holds
    the pixels of this one. `p_late` is the risk taken that a limit is missed; the predicted times x `margin` are kept
    with the probability that the budget asks for (`attainment`). `needs` are the native pixels that the media have and
    that each thing in them needs for the question, by the policy; empty where it cannot say. `audit` is what would
    have been run, and saved by prediction, where a request ran natively to find out; empty else.

    `batch` is the number of rows of the pass that it ran in: its own prompts, and requests put together with it.

    `escalated` says whether the better plan ran after the first pass, because the model was not sure of what it would
    answer; None where no verdict was taken. `point`, `rung` and `predicted` are those of the pass that answered.
    `escalation` has the rest: ``to``, ``k``, ``threshold`` and ``share`` as planned, ``entropy`` as seen,
    ``first_rung`` and ``first_ms`` of the pass that was given up, and ``why`` where there was no verdict. It is empty
    where asking is switched off.

    `encoder_cache` says whether what the vision encoder makes of the media was there already: ``hit`` (of all),
    ``part`` or ``miss``; empty without such a cache, and without media. `conversation` says what became of the plan
    that the conversation had before: ``from`` and ``to`` by rung and the ``change`` (``stays``, ``rises``, ``falls``
    or ``shifts``, to another fusion of as much); empty where there was none.
    """

    request_id: str
    kind: str
    complexity: Complexity | None
    p_complex: float | None
    lane: str
    point: OperatingPoint
    predicted: Prediction | None
    reason: str
    policy: str
    rung: str = ""
    feasible: bool = True
    propensity: float = 1.0
    explored: bool = False
    margin: float = 1.0
    p_late: float = 0.0
    elapsed_ms: float = 0.0
    budget: Mapping[str, Any] = field(default_factory=dict)
    prompt_features: Mapping[str, float] = field(default_factory=dict)
    needs: Mapping[str, Any] = field(default_factory=dict)
    rejected: tuple[Rejected, ...] = ()
    audit: Mapping[str, Any] = field(default_factory=dict)
    escalated: bool | None = None
    escalation: Mapping[str, Any] = field(default_factory=dict)
    batch: int = 1
    encoder_cache: str = ""
    conversation: Mapping[str, Any] = field(default_factory=dict)

    def explain(self, took: Measurement | None = None) -> str:
        """Budget, prediction, margin, what it `took` and the rejected points with their reasons, as readable lines."""
        lines = [f"{self.kind} -> {self.lane} lane -> {self.point.name}: {self.reason}"]
        if self.policy:
            lines.append(f"  policy {self.policy}")
        if self.complexity is not None and self.p_complex is not None:
            lines.append(f"  complexity {self.complexity.score:.2f}, P(complex) {self.p_complex:.2f}")
        if self.budget:
            lines.append(
                "  budget "
                + ", ".join(f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}" for k, v in self.budget.items())
            )
        if self.predicted is not None:
            p = self.predicted
            lines.append(
                f"  predicted encode {p.encode_ms:.1f} + prefill {p.prefill_ms:.1f} + decode {p.decode_ms:.1f} ms"
                f" (x{self.margin:.2f} margin, late with {100 * self.p_late:.0f} %), {p.peak_memory_gb:.3f} GiB"
            )
        if took is not None:
            memory = f", {took.peak_memory_gb:.3f} GiB" if took.peak_memory_gb else ""
            before_ms = took.ttft_ms - took.prefill_ms - self.escalation.get("first_ms", 0.0)
            lines.append(
                f"  took encode {before_ms:.1f} + prefill {took.prefill_ms:.1f} + decode "
                f"{took.decode_ms:.1f} = {took.latency_ms:.1f} ms{memory}, {took.new_tokens} tokens"
            )
        if self.escalated is not None:
            e, what = self.escalation, "went on" if self.escalated else "kept"
            cost = f" after {e['first_ms']:.1f} ms at {e['first_rung']}" if self.escalated else ""
            lines.append(f"  {what}{cost}: entropy {e['entropy']:.3f}, threshold {e['threshold']:.3f}")
        if self.batch > 1:
            lines.append(f"  in one batch of {self.batch}")
        if self.encoder_cache:
            lines.append(f"  encoder cache: {self.encoder_cache}")
        lines += [f"  not {r.point.name}: {r.reason}" for r in self.rejected]
        return "\n".join(lines)


def decision_record(
    decision: Decision,
    measurement: Measurement | None,
    *,
    time_s: float,
    content_hash: str | None = None,
    prompt_hash: str | None = None,
    error: str | None = None,
    finish_reason: str | None = None,
) -> dict[str, Any]:
    """One decision and what came of it as a flat record of the log, without media and prompt."""
    return new_record(
        "decision",
        time_s=time_s,
        request_id=decision.request_id,
        content_hash=content_hash,
        prompt_hash=prompt_hash,
        kind=decision.kind,
        complexity=decision.complexity.score if decision.complexity else None,
        features={**decision.complexity.features, **decision.complexity.detail} if decision.complexity else {},
        features_version=decision.complexity.version if decision.complexity else None,
        detail_version=(decision.complexity.detail_version or None) if decision.complexity else None,
        prompt_features=dict(decision.prompt_features),
        prompt_version=PROMPT_VERSION if decision.prompt_features else None,
        p_complex=decision.p_complex,
        lane=decision.lane,
        point=decision.point.to_dict(),
        rung=decision.rung,
        needs=dict(decision.needs),
        propensity=decision.propensity,
        explored=decision.explored,
        policy=decision.policy,
        budget=dict(decision.budget),
        feasible=decision.feasible,
        predicted=asdict(decision.predicted) if decision.predicted else None,
        p_late=decision.p_late,
        reason=decision.reason,
        batch=decision.batch,
        escalated=decision.escalated,
        escalation=dict(decision.escalation),
        encoder_cache=decision.encoder_cache or None,
        conversation=dict(decision.conversation),
        measurement=asdict(measurement) if measurement else None,
        finish_reason=finish_reason,
        audit=dict(decision.audit) or None,
        error=error,
    )
