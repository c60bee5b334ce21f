"""What operating points cost at true shapes: encoder, prefill, tokens, time to the first token and peak memory.

Beside every figure its ratio to native's and the prediction from the shape alone. The clock starts at the processor's
tensors: loading and resizing media is no work of the GPU.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any

from torch.nn.attention import SDPBackend, sdpa_kernel

from adaptive_fusion.bench.answers import NATIVE
from adaptive_fusion.bench.cost import RowRun, measure_costs, summarise_costs
from adaptive_fusion.decisions import Measurement
from adaptive_fusion.execution.meters import meter_for
from adaptive_fusion.execution.timed import TimedModel
from adaptive_fusion.models import Adapter
from adaptive_fusion.models.flash import flash_first
from adaptive_fusion.point import NATIVE as NATIVE_POINT
from adaptive_fusion.point import OperatingPoint
from adaptive_fusion.policy.rungs import Rung
from benchmarks.gpu.book import Desk, Row, Skip
from benchmarks.gpu.models import Request, Scale, analytic, exactly
from benchmarks.gpu.timing import spread

RUNGS = (
    Rung(NATIVE_POINT),
    Rung(OperatingPoint("weighted", 6, adapter_rank=4)),
    Rung(OperatingPoint("gated", 12, adapter_rank=8)),
    Rung(OperatingPoint(downsample=0.5)),
    Rung(OperatingPoint(downsample=0.25)),
    Rung(NATIVE_POINT, pixel_share=0.25),
)
CHEAP = RUNGS[-1].name
SPARED = (Rung(NATIVE_POINT), Rung(OperatingPoint(blanks=2)))
"""On an image half of which is blank: attention takes other kernels where tokens have weights."""
SIZES = ("4b", "2b", "8b")
INPUTS = {"1 MP": (1024, 1), "4 MP": (2048, 1), "0.25 MP": (512, 1), "clip": (512, 16)}
"""Side in pixels and frames."""
SECONDS = {"4b": 16.0, "2b": 12.0, "8b": 22.0}
"""About what ten rounds of one input take, building included."""
SMALLEST, NEW_TOKENS, DECODED = 64, 4, 32
FULL_MOST, CHEAP_MOST = 1.03, 0.40
"""Most of native's encoder and prefill that fusion at full tokens may take, and the cheap plan at 4 megapixels."""
COLUMNS: dict[str, Callable[[Measurement], float]] = {
    "encode_ms": lambda m: m.encode_ms,
    "prefill_ms": lambda m: m.prefill_ms,
    "encode_prefill_ms": lambda m: m.encode_ms + m.prefill_ms,
    "decode_ms_per_token": lambda m: m.decode_ms / max(1, m.new_tokens - 1),
    "ttft_ms": lambda m: m.ttft_ms,
    "peak_memory_gb": lambda m: m.peak_memory_gb,
}


def run(desk: Desk, scale: Scale) -> None:
    """Models in the order of worth; with the first also how attention is computed, and compiled decoding."""
    for size in scale.few(SIZES):
        seconds = SECONDS[size]
        for name in ("1 MP", "clip") if scale.tiny else INPUTS:
            side, frames = INPUTS[name]
            desk.row(f"{size} {name}", partial(_points, desk, scale, size, side, frames), needs_s=seconds)
        for name in ("1 MP",) if scale.tiny else ("4 MP", "1 MP"):
            work = partial(_points, desk, scale, size, *INPUTS[name], rungs=SPARED, ground=True)
            desk.row(f"{size} {name}, half blank", work, needs_s=seconds / 3)
        desk.row(f"{size} launches", partial(_launches, scale, size), needs_s=4)
        if size == SIZES[0]:
            for attention in ("flash", "efficient", "flash_attention_2"):
                desk.row(f"{size} {attention}", partial(_attention, scale, size, attention), needs_s=6)
    desk.row(f"{SIZES[0]} compiled decode", partial(_compiled, scale, SIZES[0]), needs_s=70)


def _points(
    desk: Desk, scale: Scale, size: str, side: int, frames: int, rungs: Sequence[Rung] = RUNGS, ground: bool = False
) -> Row:
    """All operating points on one input, in rounds, until there are enough or time runs short."""
    adapter = scale.adapter(size)
    request = Request(scale.side(side), NEW_TOKENS, frames if not scale.tiny else min(frames, 4), ground)
    named = {rung.name: rung for rung in rungs}
    runs: list[RowRun] = []
    with flash_first(adapter.device):
        for done in range(0, scale.repeats, 2):
            if done and desk.left_s < 5 * desk.hurry:
                break
            runs += measure_costs(adapter, named, request, repeats=2)
    cost = analytic(adapter)
    points = {name: adapter.resolve(rung, [request.size()]) for name, rung in named.items()}
    summary = summarise_costs(runs, lane=[rungs[-1].name])
    return {
        "side": request.side,
        "frames": request.frames,
        "points": {row["row"]: _figures(row, runs, cost, request, adapter, points[row["row"]]) for row in summary},
    }


def _figures(
    summary: Mapping[str, Any],
    runs: Sequence[RowRun],
    cost: Any,
    request: Request,
    adapter: Adapter,
    point: OperatingPoint,
) -> Row:
    """Medians with quartiles, ratios to native and what was predicted, of one operating point."""
    own = [run.measurement for run in runs if run.row == summary["row"]]
    said = cost.predict(point, request.work(adapter, point))
    predicted = {
        "encode_ms": said.encode_ms,
        "prefill_ms": said.prefill_ms,
        "encode_prefill_ms": said.ttft_ms,
        "decode_ms_per_token": said.decode_ms / (request.new_tokens - 1),
        "ttft_ms": said.ttft_ms,
        "peak_memory_gb": said.peak_memory_gb,
    }
    figures: Row = {key: summary[key] for key in ("patches", "visual_tokens", "runs")}
    for key, read in COLUMNS.items():
        figures[key] = {**spread([read(each) for each in own]), "predicted": round(predicted[key], 4)}
        figures[key]["ratio"] = summary.get(f"{key}_ratio")
    return figures


def _native(scale: Scale, size: str, request: Request, **options: Any) -> Row:
    """Native alone."""
    adapter = scale.adapter(size)
    timed, meter = TimedModel(adapter), meter_for(str(adapter.device))
    inputs = request.inputs(adapter, NATIVE_POINT)
    taken = []
    for turn in range(scale.repeats + 2):
        _, measured = timed.request(
            partial(dict, inputs), NATIVE_POINT, meter, **exactly(request.new_tokens), **options
        )
        if turn > 1:
            taken.append(measured)
    return {key: spread([read(each) for each in taken]) for key, read in COLUMNS.items()}


def _launches(scale: Scale, size: str) -> Row:
    """Native on next to no pixels: what is left is the time of launching kernels, below which no plan comes."""
    return _native(scale, size, Request(SMALLEST, NEW_TOKENS))


def _attention(scale: Scale, size: str, kind: str) -> Row:
    """Native at one megapixel with one way of computing attention and no other."""
    if scale.device.type != "cuda":
        raise Skip("the attention kernels are those of a GPU")
    request, model = Request(scale.side(1024), NEW_TOKENS), scale.adapter(size).model
    if kind != "flash_attention_2":
        backend = SDPBackend.FLASH_ATTENTION if kind == "flash" else SDPBackend.EFFICIENT_ATTENTION
        try:
            with sdpa_kernel([backend]):
                return _native(scale, size, request)
        except RuntimeError as error:
            if "No available kernel" not in str(error):
                raise
            raise Skip("this kernel does not take all of the model's inputs") from None
    if find_spec("flash_attn") is None:
        raise Skip("flash_attn is not installed")
    before = model.config._attn_implementation
    model.set_attn_implementation(kind)
    try:
        return _native(scale, size, request)
    finally:
        model.set_attn_implementation(before)


def _compiled(scale: Scale, size: str) -> Row:
    """Tokens after the first with a static cache, for which ``generate`` compiles the step, beside the usual cache."""
    if scale.device.type != "cuda":
        raise Skip("generate compiles the decoding step on a GPU only")
    request = Request(scale.side(1024), DECODED)
    key = "decode_ms_per_token"
    usual = _native(scale, size, request)[key]
    static = _native(scale, size, request, cache_implementation="static")[key]
    return {"usual": usual, "compiled": static, "ratio": round(static["median"] / usual["median"], 4)}


def shortfalls(rows: Mapping[str, Any]) -> list[str]:
    """Which points take more of native's encoder and prefill than they may."""
    found = []
    for key, row in rows.items():
        for name, figures in row.get("points", {}).items():
            limit = FULL_MOST if figures["visual_tokens"] == row["points"][NATIVE]["visual_tokens"] else None
            limit = CHEAP_MOST if name == CHEAP and key == "4b 4 MP" else limit
            ratio = figures["encode_prefill_ms"]["ratio"]
            if limit is not None and name != NATIVE and (ratio is None or ratio["median"] > limit):
                shown = "not measured" if ratio is None else f"{ratio['median']:.3f} of native's"
                found.append(f"{key}: encode + prefill of {name} is {shown}, must be <= {limit:g}")
    return found
