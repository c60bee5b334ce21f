"""A knob inside the encoder that no module of the library has heard of: declared in a subclass of `OperatingPoint`,
applied by a subclass of its adapter, and understood everywhere else by what it says of itself.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import nn

from adaptive_fusion.errors import ConfigError, UnsupportedModelError
from adaptive_fusion.evaluation.questions import Question
from adaptive_fusion.learning.labelling.labeller import RunnerModel
from adaptive_fusion.models import Encoded, GridAdapter, Recorded
from adaptive_fusion.models.encoder_keys import EncoderKeys
from adaptive_fusion.point import NATIVE, OperatingPoint, knob
from adaptive_fusion.policy.rungs import Rung
from adaptive_fusion.runner import AdaptiveRunner


@dataclass(frozen=True, slots=True)
class DimmedPoint(OperatingPoint):
    """A point that may scale what one of the encoder's blocks gives."""

    dim: float = knob(1.0, "inside", lambda value: value in (1.0, 0.5), "1.0 or 0.5", unit="dim")


class DimmingAdapter(GridAdapter):
    """Applies `dim` with a hook on the encoder's second block."""

    knobs = GridAdapter.knobs | {"dim"}

    def _dimmed(self, point: OperatingPoint) -> Any:
        def scale(_module: nn.Module, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
            return output * getattr(point, "dim", 1.0)

        return self.model.model.visual.blocks[1].register_forward_hook(scale)

    def record(self, inputs: Mapping[str, Any], point: OperatingPoint, levels: Sequence[int]) -> Recorded:
        with self._dimmed(point):
            return super().record(inputs, point, levels)

    def encode(self, inputs: Mapping[str, Any], point: OperatingPoint, recorded: Recorded | None = None) -> Encoded:
        with self._dimmed(point):
            return super().encode(inputs, point, recorded)


def with_adapter(runner: AdaptiveRunner, adapter: GridAdapter) -> None:
    """Let a runner drive its model by another adapter."""
    runner.adapter = runner._planner.adapter = runner._executor.adapter = runner._executor.timed.adapter = adapter
    runner._encoder_keys = EncoderKeys(adapter)


POINT = DimmedPoint("weighted", 6, 0.5, dim=0.5)


def test_it_names_parses_and_checks_itself() -> None:
    assert POINT.name == "weighted6@0.5/0.5dim" and DimmedPoint.parse(POINT.name) == POINT
    assert DimmedPoint().name == NATIVE.name and DimmedPoint().is_full
    assert not replace(DimmedPoint(), dim=0.5).is_full
    assert DimmedPoint.from_dict(POINT.to_dict()) == POINT
    assert Rung(POINT, pixel_share=0.25).name == "weighted6@0.5/0.5dim/25%"
    assert Rung(POINT, pixel_share=0.25).resolve(65536) == replace(POINT, max_pixels=16384)
    assert POINT.encoder_key != replace(POINT, dim=1.0).encoder_key
    assert POINT.encoder_key == replace(POINT, fusion="gated", downsample=1.0).encoder_key
    for wrong in ({"dim": 0.3}, {"dimm": 0.5}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            DimmedPoint.from_dict(wrong)
    with pytest.raises(ConfigError, match="expected a name such as"):
        OperatingPoint.parse(POINT.name)


def test_an_adapter_without_it_sets_it_aside_by_name(tiny_dense: Any, processor: Any) -> None:
    adapter = GridAdapter(tiny_dense, processor)
    assert adapter.restrict(POINT) == (replace(POINT, dim=1.0), ("dim: the model has no such knob",))
    with pytest.raises(UnsupportedModelError, match="dim: the model has no such knob"):
        adapter.require(POINT)


def test_it_runs_is_recorded_apart_and_labelled(tiny_dense: Any, processor: Any, noise_image: Any) -> None:
    runner = AdaptiveRunner(tiny_dense, processor, policy="native")
    image, prompt = noise_image(96, 64), "Describe the screen."
    adapter = DimmingAdapter(tiny_dense, processor)
    bright = replace(POINT, dim=1.0)
    inputs = adapter.prepare(
        [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": prompt}]}], POINT
    )
    outputs = {}
    for point in (POINT, bright):
        recorded = adapter.record(inputs, point, adapter.levels(point))
        alone, again = adapter.encode(inputs, point), adapter.encode(inputs, point, recorded)
        features = [part.inputs["mm_encoder_outputs"]["image"].pooler_output[0] for part in (alone, again)]
        torch.testing.assert_close(*features)
        outputs[point] = features[0]
    assert not torch.allclose(outputs[POINT], outputs[bright])

    with_adapter(runner, adapter)
    rungs = [Rung(POINT), Rung(bright)]
    labelled = RunnerModel(runner, max_new_tokens=8).answers(Question(image, prompt), rungs)
    for rung in rungs:
        reply = runner.chat(image, prompt, point=rung.point, max_new_tokens=8, do_sample=False)
        assert reply.decision.point == rung.point and labelled[rung.name][0] == reply.text


def test_what_is_kept_of_the_encoder_is_kept_apart(tiny_dense: Any, processor: Any, noise_image: Any) -> None:
    runner, image = AdaptiveRunner(tiny_dense, processor, policy="native", encoder_cache_mb=8), noise_image(96, 64)
    with_adapter(runner, DimmingAdapter(tiny_dense, processor))
    found = []
    for dim in (1.0, 0.5, 1.0, 0.5):
        point = DimmedPoint(dim=dim)
        found.append(runner.chat(image, "?", point=point, max_new_tokens=8).decision.encoder_cache)
    assert found == ["miss", "miss", "hit", "hit"]
