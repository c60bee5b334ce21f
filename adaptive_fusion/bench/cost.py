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
from adaptive_fusion.bench.shapes import Shape, ShapeProcessor, shape
from adaptive_fusion.bench.trial import run_request
from adaptive_fusion.decisions import Measurement
from adaptive_fusion.errors import ConfigError
from adaptive_fusion.ladder import Rung
from adaptive_fusion.meters import meter_for
from adaptive_fusion.models import Adapter, Size, adapter_for
from adaptive_fusion.point import NATIVE as NATIVE_POINT
from adaptive_fusion.point import OperatingPoint
from adaptive_fusion.policy import SIMPLE, Policy

ROWS = (*QUALITY_ROWS, Rung(NATIVE_POINT, pixel_share=0.5), Rung(NATIVE_POINT, pixel_share=0.25))
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
    new_tokens: int = 4

    def size(self) -> Size:
        return Size(1, self.side, self.side)

    def inputs(self, adapter: Adapter, point: OperatingPoint) -> dict[str, Any]:
        """The tensors a processor would give, built without a tokenizer."""
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
        config = adapter.model.config
        t, h, w = made["image_grid_thw"][0].tolist()
        words = [100 + i for i in range(PROMPT_TOKENS)]
        visual = [config.image_token_id] * (t * h * w // processor.merge_size**2)
        ids = torch.tensor([[config.vision_start_token_id, *visual, config.vision_end_token_id, *words]])
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "mm_token_type_ids": (ids == config.image_token_id).int(),
            "pixel_values": made["pixel_values"].to(adapter.model.dtype),
            "image_grid_thw": made["image_grid_thw"],
        }


def measure_costs(
    adapter: Adapter,
    rows: Mapping[str, Rung],
    workload: Workload,
    *,
    repeats: int = 3,
    advance: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[Measurement]]:
    """`repeats` measurements of each row, taken in rounds, after one that does not count."""
    meter = meter_for(str(adapter.model.device))
    native = adapter.native_pixels(workload.size())
    found: dict[str, list[Measurement]] = {name: [] for name in rows}
    for round_ in range(repeats + 1):
        # The round that does not count runs the cheapest row only: first calls are what it is for.
        todo = rows if round_ else dict([min(rows.items(), key=lambda row: _patches(adapter, row[1], workload))])
        for name, rung in todo.items():
            point = rung.resolve(native)
            inputs = workload.inputs(adapter, point)
            adapter.fusion(point)  # built outside the clock
            outcome = run_request(
                adapter,
                partial(dict, inputs),
                point,
                meter,
                max_new_tokens=workload.new_tokens,
                exactly=True,
                clock=clock,
            )
            if round_:
                found[name].append(outcome.measurement)
                advance()
    return found


def _patches(adapter: Adapter, rung: Rung, workload: Workload) -> int:
    plan = adapter.plan([workload.size()], rung.resolve(adapter.native_pixels(workload.size())))
    return plan.patches + plan.tokens


def cost_rows(policy: Policy, rungs: Sequence[Rung] = ROWS) -> dict[str, Rung]:
    """Native, `rungs` and the policy's lane for simple images, by name, each once."""
    return {rung.name: rung for rung in (Rung(NATIVE_POINT), *rungs, *policy.lanes[SIMPLE])}


def summarise_costs(found: Mapping[str, Sequence[Measurement]], lane: Collection[str] = ()) -> list[dict[str, Any]]:
    """Median milliseconds and GiB of each row, and the median over rounds of its ratio to native in the same round."""
    columns: dict[str, Callable[[Measurement], float]] = {
        "encode_ms": lambda m: m.encode_ms,
        "prefill_ms": lambda m: m.prefill_ms,
        "encode_prefill_ms": lambda m: m.encode_ms + m.prefill_ms,
        "decode_ms_per_token": lambda m: m.decode_ms / max(1, m.new_tokens - 1),
        "peak_memory_gb": lambda m: m.peak_memory_gb,
    }
    records = []
    for name, measured in found.items():
        record: dict[str, Any] = {
            "row": name,
            "lane": SIMPLE if name in lane else None,
            "patches": measured[0].patches,
            "visual_tokens": measured[0].visual_tokens,
        }
        for key, read in columns.items():
            own = np.array([read(m) for m in measured])
            base = np.array([read(m) for m in found[NATIVE]])
            record[key] = float(np.median(own))
            record[f"{key}_ratio"] = float(np.median(own / base)) if base.all() else None
        records.append(record)
    return records


DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def adapter_of_size(size: str, device: str = "cpu", dtype: str = "bfloat16") -> Adapter:
    """An adapter over a random model of a published size, or over the embedded reference model in its own dtype.

    Raises:
        ConfigError: For an unknown size or dtype, or a model that does not fit into the free memory.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype is {dtype!r}; expected one of {', '.join(DTYPES)}")
    if size.lower() == "reference":
        from transformers import AutoModelForImageTextToText, AutoProcessor

        from adaptive_fusion.reference import model_path

        model = AutoModelForImageTextToText.from_pretrained(model_path()).to(device).eval()
        return adapter_for(model, AutoProcessor.from_pretrained(model_path()))
    return adapter_for(build_random(shape(size), device, DTYPES[dtype]), ShapeProcessor())
