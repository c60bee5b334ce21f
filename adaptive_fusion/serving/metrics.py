"""What the server has done, as Prometheus metrics: vLLM's names under this package's prefix, and what only we have.

Dashboards made for vLLM work once ``vllm:`` is replaced by ``adaptive_fusion:``. Labels come from closed sets (lanes,
rungs of the policy, words of this package); what is in none of them counts as ``other``, so no request can make new
series. A value that is no time or count is left out: metrics never fail a request.

Knows numbers and records. Must not know of HTTP, queues or how a decision is made.
"""

import math
import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from adaptive_fusion.checks import is_number
from adaptive_fusion.control.planner import FIXED
from adaptive_fusion.execution.encoder_cache import CacheCounts
from adaptive_fusion.point import NATIVE
from adaptive_fusion.policy.policy import LANES, TEXT
from adaptive_fusion.reply import Reply
from adaptive_fusion.serving.media_bytes import REASONS

PREFIX = "adaptive_fusion:"
OTHER = "other"
FINISHED = ("stop", "length", "deadline", "cancelled")
CODES = (
    *(
        "body_too_large",
        "body_too_slow",
        "busy",
        "budget_infeasible",
        "cancelled",
        "context_length_exceeded",
        "deadline_passed",
    ),
    *("deadline_unreachable", "draining", "internal_error", "invalid_api_key", "invalid_json", "invalid_media"),
    *("invalid_request", "invalid_value", "model_not_found", "not_ready", "out_of_memory", "queue_full"),
    *("unsupported_media_type", "unsupported_parameter", "unsupported_point", "wrong_host"),
)
"""Why requests are rejected or fail: the codes that clients are told."""
STAGES = ("preprocess", "encode", "prefill", "decode")
EVENTS = ("decisions", "infeasible", "refused", "updates", "misses", "ooms", "cancelled", "ignored")
"""What a controller counts, by the names in its state."""
_FAST_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)
_FIRST_S = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1.0,
    2.5,
    5.0,
    7.5,
    10.0,
    20.0,
    40.0,
    80.0,
)
_TOKEN_S = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0)
_WHOLE_S = (0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0)
_ROWS = (1, 2, 3, 4, 8, 16, 32, 64)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000)


class Stateful(Protocol):
    """A controller, as far as metrics look at it."""

    def state(self) -> Mapping[str, Any]: ...


MOST = 1e15
"""The largest value that is counted: sums of absurd ones would not be finite."""


class Metrics:
    """The server's counters, gauges and histograms, in a registry of their own; thread-safe.

    Args:
        rungs: Names of the rungs of the policy, the values of the label ``plan``.
        codes: What `rejected` and `failed` may say, beside `CODES`.
    """

    def __init__(self, rungs: Iterable[str] = (), codes: Iterable[str] = ()) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._known = {
            "plan": frozenset((*rungs, NATIVE.name)),
            "lane": frozenset((*LANES, TEXT, FIXED)),
            "finished_reason": frozenset(FINISHED),
            "code": frozenset((*CODES, *codes)),
            "media": frozenset(REASONS),
        }
        self._lock = threading.Lock()
        self._admitted = self._at_work = 0
        self._seen = dict.fromkeys(EVENTS, 0)
        self._requests()
        self._times()
        self._tokens()
        self._decisions()
        self._controller()
        self._cache()

    # What there is.

    def _requests(self) -> None:
        self._arrived = self._counter("requests", "Requests that arrived.")
        self._running = self._gauge("num_requests_running", "Requests that the model is at.")
        self._waiting = self._gauge("num_requests_waiting", "Requests that were let in and do not run yet.")
        self._success = self._counter(
            "request_success", "Requests answered, by why the answer ended.", "finished_reason"
        )
        self._rejects = self._counter("requests_rejected", "Requests turned away before they ran, by reason.", "reason")
        self._errors = self._counter("request_errors", "Requests that ended in an error, by kind.", "kind")
        self._media = self._counter("media_refused", "Images and clips that were not let in, by reason.", "reason")

    def _times(self) -> None:
        self._first = self._histogram("time_to_first_token_seconds", "Arrival to first token.", _FIRST_S)
        self._token = self._histogram(
            "request_time_per_output_token_seconds", "Decoding of a request over its tokens after the first.", _TOKEN_S
        )
        self._whole = self._histogram("e2e_request_latency_seconds", "Arrival to last token.", _WHOLE_S)
        self._queued = self._histogram("request_queue_time_seconds", "Time in the queue.", _WHOLE_S)
        self._stages = {
            stage: self._histogram(f"request_{stage}_time_seconds", f"Time of a request's {stage}.", _FIRST_S)
            for stage in STAGES
        }
        self._deciding = self._histogram("decision_seconds", "Time that a decision took.", _FAST_S)

    def _tokens(self) -> None:
        self._prompt = self._counter("prompt_tokens", "Tokens of prompts, as the model saw them.")
        self._new = self._counter("generation_tokens", "Tokens generated.")
        self._prompt_sizes = self._histogram("request_prompt_tokens", "Tokens of a prompt.", _TOKENS)
        self._new_sizes = self._histogram("request_generation_tokens", "Tokens of an answer.", _TOKENS)
        self._visual = self._counter("visual_tokens", "Visual tokens that the model saw.")
        self._native = self._counter(
            "visual_tokens_native",
            "Visual tokens that the same media have natively; those it saw, where that is not known.",
        )

    def _decisions(self) -> None:
        self._decided = self._counter("decisions", "Requests run, by lane and rung.", "lane", "plan")
        self._escalated = self._counter("escalations", "Requests that were run again at a better point.")
        self._rows = self._histogram("request_batch_requests", "Requests in the pass that a request ran in.", _ROWS)
        self._budgets = self._counter("budget_requests", "Requests with limits, by whether all were kept.", "met")
        self._infeasible = self._counter("infeasible_decisions", "Requests run though nothing fitted their limits.")
        for met in ("true", "false"):
            self._budgets.labels(met)

    def _controller(self) -> None:
        self._price = self._gauge("miss_price", "Highest price of a miss, in answers of quality 1.")
        self._drift = self._gauge("controller_drift_ratio", "Measured over predicted time, all points.", "time")
        self._envelope = self._gauge("controller_memory_envelope_ratio", "Factor on predicted peaks of memory.")
        self._events = self._counter("controller_events", "What the controller counted.", "event")

    def _cache(self) -> None:
        self._looked = self._counter("mm_cache_queries", "Media looked for in the encoder cache; misses are no hits.")
        self._found = self._counter("mm_cache_hits", "Media that the encoder did not run for.")
        self._evicted = self._counter("encoder_cache_evictions", "Entries of the encoder cache that made room.")
        self._too_large = self._counter("encoder_cache_too_large", "Entries larger than the whole encoder cache.")
        self._held = self._gauge("encoder_cache_bytes", "Memory that the encoder cache takes.")
        self._cached = CacheCounts(0, 0, 0, 0, 0, 0)

    # What happens.

    def arrived(self) -> None:
        """A request came in."""
        self._arrived.inc()

    def queued(self, depth: int) -> None:
        """How many requests are let in and not answered, those that run among them."""
        self._show(admitted=int(_valid(depth)))

    def rejected(self, reason: str) -> None:
        """A request was turned away before it ran."""
        self._rejects.labels(self._one_of("code", reason)).inc()

    def media_refused(self, reason: str) -> None:
        """An image or clip was not let in: the `reason` of a `MediaRefused`."""
        self._media.labels(self._one_of("media", reason)).inc()

    def decided(self, seconds: float) -> None:
        """A decision took this long."""
        _observe(self._deciding, seconds)

    def started(self, wait_s: float) -> None:
        """A request's turn has come; `ended` follows, whatever becomes of it."""
        self._show(more=1)
        _observe(self._queued, wait_s)

    def ended(self) -> None:
        """A request that was `started` has left the model."""
        self._show(more=-1)

    def finished(
        self,
        reply: Reply,
        finish_reason: str,
        wait_s: float,
        e2e_s: float,
        *,
        native_visual_tokens: int | None = None,
        escalated: bool = False,
    ) -> None:
        """A request is answered.

        Args:
            reply: What came of it.
            finish_reason: Why the answer ended.
            wait_s: Seconds in the queue; they count as a part of `e2e_s`.
            e2e_s: Seconds from arrival to the last token.
            native_visual_tokens: What its media have natively; None where nobody counted.
            escalated: Whether a better point was run after a first one.
        """
        self._success.labels(self._one_of("finished_reason", finish_reason)).inc()
        took, decision = reply.measurement, reply.decision
        _observe(self._whole, e2e_s)
        # The runner may count from when it was asked; what follows the first token is the same for both.
        _observe(self._first, max(e2e_s - (took.latency_ms - took.ttft_ms) / 1e3, wait_s))
        if took.new_tokens > 1:
            _observe(self._token, took.decode_ms / 1e3 / (took.new_tokens - 1))
        # What the runner counts before encoding began with the arrival; waiting has a histogram of its own.
        waited = {"preprocess": min(wait_s, took.preprocess_ms / 1e3)}
        for stage in STAGES:
            _observe(self._stages[stage], getattr(took, f"{stage}_ms") / 1e3 - waited.get(stage, 0.0))
        self._prompt.inc(_valid(took.prompt_tokens))
        self._new.inc(_valid(took.new_tokens))
        _observe(self._prompt_sizes, took.prompt_tokens)
        _observe(self._new_sizes, took.new_tokens)
        self._visual.inc(_valid(took.visual_tokens))
        self._native.inc(_valid(took.visual_tokens if native_visual_tokens is None else native_visual_tokens))
        plan = decision.rung or (NATIVE.name if decision.point == NATIVE else OTHER)
        self._decided.labels(self._one_of("lane", decision.lane), self._one_of("plan", plan)).inc()
        _observe(self._rows, decision.batch)
        self._escalated.inc(bool(escalated))
        self._infeasible.inc(not decision.feasible)
        if (met := reply.met) is not None:
            self._budgets.labels(str(met).lower()).inc()

    def failed(self, kind: str) -> None:
        """A request ended in an error."""
        self._errors.labels(self._one_of("code", kind)).inc()

    def observe_controller(self, controller: Stateful) -> None:
        """Take over what the controller has learned and counted."""
        state = controller.state()
        self._price.set(max((_valid(row["value"]) for row in state["prices"]), default=0.0))
        for time in ("ttft", "latency"):
            self._drift.labels(time).set(math.exp(state[time]["common"]))
        self._envelope.set(math.exp(state["memory"]))
        with self._lock:  # two scrapes at once must not count the same twice
            for event in EVENTS:
                count = int(state["counts"][event])
                self._events.labels(event).inc(max(0, count - self._seen[event]))
                self._seen[event] = count

    def observe_cache(self, counts: CacheCounts) -> None:
        """Take over what the encoder cache has counted."""
        with self._lock:
            before, self._cached = self._cached, counts
            self._looked.inc(max(0, counts.hits + counts.misses - before.hits - before.misses))
            self._found.inc(max(0, counts.hits - before.hits))
            self._evicted.inc(max(0, counts.evicted - before.evicted))
            self._too_large.inc(max(0, counts.too_large - before.too_large))
            self._held.set(counts.nbytes)

    def render(self) -> tuple[bytes, str]:
        """All of it in Prometheus' text format, and the content type of that."""
        return generate_latest(self.registry), CONTENT_TYPE_LATEST

    # How it is made.

    def _show(self, *, admitted: int | None = None, more: int = 0) -> None:
        with self._lock:
            self._admitted = self._admitted if admitted is None else admitted
            self._at_work = max(0, self._at_work + more)
            self._running.set(self._at_work)
            self._waiting.set(max(0, self._admitted - self._at_work))

    def _one_of(self, label: str, value: str) -> str:
        return value if value in self._known[label] else OTHER

    def _counter(self, name: str, says: str, *labels: str) -> Counter:
        return Counter(PREFIX + name, says, labels, registry=self.registry)

    def _gauge(self, name: str, says: str, *labels: str) -> Gauge:
        return Gauge(PREFIX + name, says, labels, registry=self.registry)

    def _histogram(self, name: str, says: str, buckets: Sequence[float]) -> Histogram:
        return Histogram(PREFIX + name, says, buckets=buckets, registry=self.registry)


def _valid(value: float) -> float:
    """A finite value of at least 0, at most `MOST`; else 0."""
    return float(min(value, MOST)) if is_number(value) and value >= 0 else 0.0


def _observe(histogram: Histogram, value: float) -> None:
    if is_number(value) and value >= 0:
        histogram.observe(float(min(value, MOST)))
