"""Batches of 1, 2, 4 and 8 alike requests: requests a second, time to the first token and memory, few tokens beside
native.

The batch goes through the adapter once, as the requests of a server would that waits for several.
"""

from functools import partial

from adaptive_fusion.execution.batches import collate
from adaptive_fusion.execution.meters import meter_for
from adaptive_fusion.execution.timed import TimedModel
from adaptive_fusion.point import NATIVE
from adaptive_fusion.policy.rungs import Rung
from benchmarks.gpu.book import Desk, Row
from benchmarks.gpu.models import Request, Scale, analytic, exactly
from benchmarks.gpu.timing import spread

BATCHES = (1, 2, 4, 8)
RUNGS = {"native": Rung(NATIVE), "native@1/25%": Rung(NATIVE, pixel_share=0.25)}
SIDE, TOKENS = 1024, 16


def run(desk: Desk, scale: Scale, size: str = "4b") -> None:
    """Both points at each size of batch, and the ratio of what they get through."""
    for batch in scale.few(BATCHES, 2):
        native = None
        for name in RUNGS:
            make = partial(_row, scale, size, name, batch, native)
            found = desk.row(f"{size} {name} x{batch}", make, needs_s=4 + batch)
            native = found if name == "native" else native


def _row(scale: Scale, size: str, name: str, batch: int, native: Row | None) -> Row:
    adapter = scale.adapter(size)
    tokens = 4 if scale.tiny else TOKENS
    request = Request(scale.side(SIDE), tokens)
    point = adapter.resolve(RUNGS[name], [request.size()])
    inputs = collate([request.inputs(adapter, point)] * batch)
    timed, meter = TimedModel(adapter), meter_for(str(adapter.device))
    taken = []
    for turn in range(scale.repeats + 1):
        _, measured = timed.request(partial(dict, inputs), point, meter, **exactly(tokens))
        if turn:
            taken.append(measured)
    predicted = analytic(adapter).predict(point, request.work(adapter, point, batch))
    made: Row = {
        "batch": batch,
        "visual_tokens": taken[0].visual_tokens,
        "requests_per_s": spread([batch / took.latency_ms * 1e3 for took in taken]),
        "ttft_ms": spread([took.ttft_ms for took in taken]),
        "peak_gb": spread([took.peak_memory_gb for took in taken]),
        "predicted_requests_per_s": round(batch / predicted.latency_ms * 1e3, 4),
        "predicted_ttft_ms": round(predicted.ttft_ms, 3),
    }
    if native is not None:
        for key in ("requests_per_s", "ttft_ms", "peak_gb"):
            base = native[key]["median"]
            made[f"{key}_ratio"] = round(made[key]["median"] / base, 4) if base else None
    return made
