"""What each operating point costs at a model's true shape: random weights, real compute, ratios to native.

Knows shapes, adapters and times. Must not know what answers are worth: random weights give none.
"""

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from adaptive_fusion.bench.answers import NATIVE
from adaptive_fusion.bench.answers import ROWS as QUALITY_ROWS
from adaptive_fusion.bench.shapes import SHAPES, Shape, ShapeProcessor, shape
from adaptive_fusion.decisions import Measurement
from adaptive_fusion.errors import ConfigError
from adaptive_fusion.execution.meters import meter_for
from adaptive_fusion.execution.timed import TimedModel
from adaptive_fusion.models import Adapter, Size, adapter_for
from adaptive_fusion.point import NATIVE as NATIVE_POINT
from adaptive_fusion.point import OperatingPoint
from adaptive_fusion.policy.policy import SIMPLE, Policy
from adaptive_fusion.policy.rungs import Rung
from adaptive_fusion.progress import Progress, Steps, silent

ROWS = (*QUALITY_ROWS, Rung(NATIVE_POINT, pixel_share=0.5), Rung(NATIVE_POINT, pixel_share=0.25))
MOST_FULL, MOST_CHEAP = 1.03, 0.45
"""Most that a fusion scheme at full tokens, and the lane for simple images, may take of native's encode + prefill at a
published shape."""
PROMPT_TOKENS = 16
_NOISE = 1 << 20


def build_random(of: Shape, device: str = "cpu", dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """A model of this shape with random weights.

    Raises:
        ConfigError: If the weights do not fit into the free memory.
    """
    from transformers import initialization

    config, kind = of.config(), of.model_class()
    with torch.device("meta"):
        parameters = sum(p.numel() for p in kind(config).parameters())
    needed, free = parameters * dtype.itemsize / (1 << 30), meter_for(device).free_gb()
    if free is not None and needed > free:
        raise ConfigError(f"{parameters / 1e9:.1f} billion parameters take {needed:.1f} GiB; {free:.1f} GiB are free")
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        # Buffers (rotary frequencies) are built as usual; only the parameters' own slow initialisation is skipped.
        with torch.device(device), initialization.no_init_weights():
            model = kind(config)
    finally:
        torch.set_default_dtype(before)
    model.tie_weights()
    noise = torch.randn(_NOISE, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(dtype).to(device)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data.fill_(1.0)
            continue
        for part in parameter.data.view(-1).split(_NOISE):
            part.copy_(noise[: part.numel()])
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    result: nn.Module = model.eval()
    return result


@dataclass(frozen=True)
class Workload:
    """One image of a side in pixels and a short question, answered with `new_tokens` tokens."""

    side: int = 512
    new_tokens: int = 3

    def size(self) -> Size:
        return Size(1, self.side, self.side)

    def inputs(self, adapter: Adapter, point: OperatingPoint) -> dict[str, Any]:
        """The tensors that `Adapter.prepare` would give, built without a tokenizer."""
        pixels = np.random.default_rng(0).integers(0, 256, (self.side, self.side, 3), dtype=np.uint8)
        processor = adapter.processor.image_processor
        size = {}
        if point.max_pixels is not None:
            plan = adapter.plan([self.size()], point)
            budget = plan.patches * processor.patch_size**2
            size = {
                "size": {
                    "shortest_edge": min(processor.size["shortest_edge"], budget),
                    "longest_edge": budget,
                }
            }
        made = processor(images=[Image.fromarray(pixels)], return_tensors="pt", **size)
        config, device = adapter.model.config, adapter.device
        t, h, w = made["image_grid_thw"][0].tolist()
        words = [100 + i for i in range(PROMPT_TOKENS)]
        visual = [config.image_token_id] * (t * h * w // processor.merge_size**2)
        ids = torch.tensor([[config.vision_start_token_id, *visual, config.vision_end_token_id, *words]], device=device)
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "mm_token_type_ids": (ids == config.image_token_id).int(),
            "pixel_values": made["pixel_values"].to(device, adapter.dtype),
            "image_grid_thw": made["image_grid_thw"].to(device),
        }


@dataclass(frozen=True)
class RowRun:
    """One measured request of one row."""

    row: str
    measurement: Measurement


def round_order(full: Sequence[str], rest: Sequence[str], number: int) -> list[str]:
    """The rows of one round: native before and after every two of those that do all of native's work, then the others.

    What is to be told apart by percents runs next to what it is compared with; every other round turns the order of
    `full` round, so that a machine that grows slower tells on all alike.
    """
    turned = list(full[::-1] if number % 2 else full)
    pairs = [turned[i : i + 2] for i in range(0, len(turned), 2)]
    return [NATIVE, *(row for pair in pairs for row in (*pair, NATIVE)), *rest]


def measure_costs(
    adapter: Adapter,
    rows: Mapping[str, Rung],
    workload: Workload,
    *,
    repeats: int = 3,
    progress: Progress = silent,
    clock: Callable[[], float] = time.perf_counter,
) -> list[RowRun]:
    """`repeats` rounds of all rows, native among them, in the order they ran, after one run that does not count.

    Args:
        progress: See `Progress`; a step is a run.
    """
    meter = meter_for(str(adapter.device))
    timed = TimedModel(adapter, clock)
    work = {name: _work(adapter, rung, workload) for name, rung in rows.items()}
    full = [name for name in rows if name != NATIVE and work[name] == work[NATIVE]]
    rest = [name for name in rows if work[name] != work[NATIVE]]

    def run(name: str) -> RowRun:
        point = adapter.resolve(rows[name], [workload.size()])
        inputs = workload.inputs(adapter, point)
        adapter.build(point)  # outside the clock; random weights cost what trained ones do
        exactly = {"min_new_tokens": workload.new_tokens, "max_new_tokens": workload.new_tokens, "do_sample": False}
        _, measurement = timed.request(partial(dict, inputs), point, meter, **exactly)
        return RowRun(name, measurement)

    run(min(rows, key=lambda name: sum(work[name])))  # first calls are what it is for
    todo = [name for number in range(repeats) for name in round_order(full, rest, number)]
    steps = Steps(progress, "measure", len(todo))
    found = []
    for name in todo:
        found.append(run(name))
        steps.advance()
    return found


def _work(adapter: Adapter, rung: Rung, workload: Workload) -> tuple[int, int]:
    """Patches that are encoded, and tokens that reach the language model."""
    plan = adapter.plan([workload.size()], adapter.resolve(rung, [workload.size()]))
    return plan.patches, plan.tokens


def cost_rows(policy: Policy, rungs: Sequence[Rung] = ROWS) -> dict[str, Rung]:
    """Native, `rungs` and the policy's lane for simple images, by name, each once."""
    return {rung.name: rung for rung in (Rung(NATIVE_POINT), *rungs, *policy.lanes[SIMPLE])}


def summarise_costs(runs: Sequence[RowRun], lane: Collection[str] = ()) -> list[dict[str, Any]]:
    """Median milliseconds and GiB of each row, and its ratio to native: median, least and most over the rounds.

    A ratio is to the mean of the native runs just before and just after. Native's own, to its neighbours of the same
    kind, says how much of a ratio is noise.
    """
    columns: dict[str, Callable[[Measurement], float]] = {
        "encode_ms": lambda m: m.encode_ms,
        "prefill_ms": lambda m: m.prefill_ms,
        "encode_prefill_ms": lambda m: m.encode_ms + m.prefill_ms,
        "decode_ms_per_token": lambda m: m.decode_ms / max(1, m.new_tokens - 1),
        "peak_memory_gb": lambda m: m.peak_memory_gb,
    }
    natives = [i for i, run in enumerate(runs) if run.row == NATIVE]
    records = []
    for name in dict.fromkeys(run.row for run in runs):
        own = [i for i, run in enumerate(runs) if run.row == name]
        first = runs[own[0]].measurement
        record: dict[str, Any] = {
            "row": name,
            "lane": SIMPLE if name in lane else None,
            "patches": first.patches,
            "visual_tokens": first.visual_tokens,
            "runs": len(own),
        }
        for key, read in columns.items():
            values = [read(run.measurement) for run in runs]
            record[key] = float(np.median([values[i] for i in own]))
            bases = [np.mean([values[j] for j in _beside(natives, i)]) for i in own]
            ratios = [values[i] / base for i, base in zip(own, bases, strict=True) if base]
            record[f"{key}_ratio"] = (
                {"median": float(np.median(ratios)), "low": float(min(ratios)), "high": float(max(ratios))}
                if len(ratios) == len(own)
                else None
            )
        records.append(record)
    return records


def _beside(natives: Sequence[int], index: int) -> list[int]:
    """The native runs just before and just after a run; a lone native run itself."""
    before, after = [i for i in natives if i < index], [i for i in natives if i > index]
    return [*before[-1:], *after[:1]] or [index]


def shortfalls(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Which rows take more than they should: fusion with all of native's work, and the lane for simple images."""
    [native] = [record for record in records if record["row"] == NATIVE]
    work = native["patches"], native["visual_tokens"]
    found = []
    for record in records:
        ratio = record["encode_prefill_ms_ratio"]
        full = (record["patches"], record["visual_tokens"]) == work and record is not native
        limit = MOST_CHEAP if record["lane"] else MOST_FULL if full else None
        if limit is not None and (ratio is None or ratio["median"] > limit):
            shown = "not measured" if ratio is None else f"{ratio['median']:.3f} of native's"
            found.append(f"encode + prefill of {record['row']} is {shown}, must be <= {limit:g}")
    return found


DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def dtype_for(device: str) -> str:
    """bfloat16, but float32 on a processor without instructions for it, where that is many times faster."""
    slow = torch.device(device).type == "cpu" and torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2")
    return "float32" if slow else "bfloat16"


def _check_device(device: str) -> None:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    usable = ["cpu"]
    if accelerator is not None:
        usable += [accelerator.type, *(f"{accelerator.type}:{i}" for i in range(torch.accelerator.device_count()))]
    if device not in usable:
        raise ConfigError(f"device is {device!r}; expected one of {', '.join(usable)}")


def adapter_of_size(size: str, device: str = "cpu", dtype: str | None = None) -> Adapter:
    """An adapter over a random model of a published size, or over the embedded reference model in its own dtype.

    Args:
        dtype: A name in `DTYPES`; None takes `dtype_for`.

    Raises:
        ConfigError: For an unknown size or dtype, a device that this machine does not have, or a model that does not
            fit into the free memory.
    """
    if size.lower() not in (sizes := (*SHAPES, "reference")):
        raise ConfigError(f"size is {size!r}; expected one of {', '.join(sizes)}")
    _check_device(device)
    dtype = dtype_for(device) if dtype is None else dtype
    if dtype not in DTYPES:
        raise ConfigError(f"dtype is {dtype!r}; expected one of {', '.join(DTYPES)}")
    if size.lower() == "reference":
        from transformers import AutoModelForImageTextToText, AutoProcessor

        from adaptive_fusion.reference import model_path

        model = AutoModelForImageTextToText.from_pretrained(model_path()).to(device).eval()
        return adapter_for(model, AutoProcessor.from_pretrained(model_path()))
    return adapter_for(build_random(shape(size), device, DTYPES[dtype]), ShapeProcessor())
