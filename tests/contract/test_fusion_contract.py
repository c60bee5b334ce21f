"""What every registered fusion strategy must do, in a model's taps and standing alone."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from adaptive_fusion.errors import ConfigError
from adaptive_fusion.fusion import STRATEGIES, DeepStackFusion, FusionSpec
from adaptive_fusion.fusion.standalone import STANDALONE

TAPS, LEVELS, WIDTH, LENGTHS = (2, 5), (0, 2, 3, 4, 5, 7), 8, [6, 10, 3]
DTYPES = [torch.float32, torch.bfloat16]


def trained(module: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.2)
    return module.eval()


def fusion_of(strategy: str, rank: int = 2) -> DeepStackFusion:
    module = trained(DeepStackFusion(FusionSpec(strategy, TAPS, LEVELS, WIDTH, rank)))
    assert isinstance(module, DeepStackFusion)
    return module


def captured(dtype: torch.dtype) -> dict[int, Tensor]:
    torch.manual_seed(1)
    return {i: torch.randn(sum(LENGTHS), WIDTH).to(dtype) for i in LEVELS}


def run(fusion: DeepStackFusion, levels: dict[int, Tensor], lengths: list[int]) -> list[tuple[Tensor, Tensor]]:
    """Merger input and gate (one value per image) of every tap."""
    with torch.no_grad():
        outputs = []
        for index, tap in enumerate(TAPS):
            gate = fusion.gate(index, levels[tap], lengths)
            gate = gate if isinstance(gate, Tensor) else torch.full((len(lengths),), gate)
            outputs.append((fusion.fuse(index, levels, lengths), gate))
        return outputs


def test_the_registries_list_themselves_sorted() -> None:
    assert STRATEGIES.names() == ["gated", "sum", "weighted"]
    assert STANDALONE.names() == ["gated", "sum", "top", "weighted"]


@pytest.mark.parametrize("registry", [STRATEGIES, STANDALONE])
def test_a_registry_refuses_duplicates_and_unknown_names(registry: type) -> None:
    with pytest.raises(ConfigError, match="'gated' is registered already"):
        registry.register("gated")(object)  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=r"'softmax'; expected one of gated, .*weighted"):
        registry.get("softmax")  # type: ignore[attr-defined]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("strategy", STRATEGIES.names())
def test_tap_fusion_is_deterministic_and_leaves_its_inputs_alone(strategy: str, dtype: torch.dtype) -> None:
    fusion, levels = fusion_of(strategy), captured(dtype)
    before = {i: level.clone() for i, level in levels.items()}
    first, second = run(fusion, levels, LENGTHS), run(fusion, levels, LENGTHS)
    for (fused, gate), (again, gate_again) in zip(first, second, strict=True):
        assert fused.shape == (sum(LENGTHS), WIDTH) and fused.dtype == dtype
        assert gate.shape == (len(LENGTHS),) and bool(gate.isfinite().all())
        assert torch.equal(fused, again) and torch.equal(gate, gate_again)
    assert all(torch.equal(level, before[i]) for i, level in levels.items())


@pytest.mark.parametrize("strategy", STRATEGIES.names())
def test_packed_images_do_not_see_each_other(strategy: str) -> None:
    fusion, levels = fusion_of(strategy), captured(torch.float32)
    together = run(fusion, levels, LENGTHS)
    start = 0
    for image, length in enumerate(LENGTHS):
        alone = run(fusion, {i: level[start : start + length] for i, level in levels.items()}, [length])
        for (fused, gate), (fused_alone, gate_alone) in zip(together, alone, strict=True):
            torch.testing.assert_close(fused[start : start + length], fused_alone)
            torch.testing.assert_close(gate[image : image + 1], gate_alone)
        start += length


@pytest.mark.parametrize("strategy", STRATEGIES.names())
def test_training_and_inference_compute_the_same(strategy: str) -> None:
    fusion, levels = fusion_of(strategy), captured(torch.bfloat16)
    for index, (fused, _) in enumerate(run(fusion, levels, LENGTHS)):
        torch.testing.assert_close(fusion.fuse(index, levels, LENGTHS).detach(), fused)


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("strategy", STRATEGIES.names())
def test_weights_survive_a_round_trip_to_disk(strategy: str, rank: int, tmp_path: Path) -> None:
    fusion, levels = fusion_of(strategy, rank), captured(torch.float32)
    fusion.save(tmp_path / "fusion.safetensors")
    loaded = DeepStackFusion.from_file(tmp_path / "fusion.safetensors")
    assert loaded.spec == fusion.spec
    for (fused, gate), (same, same_gate) in zip(
        run(fusion, levels, LENGTHS), run(loaded, levels, LENGTHS), strict=True
    ):
        assert torch.equal(fused, same) and torch.equal(gate, same_gate)
    assert [file.name for file in tmp_path.iterdir()] == ["fusion.safetensors"]


@pytest.mark.parametrize("strategy", ["weighted", "gated"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_untrained_fusion_is_the_identity_bit_for_bit(strategy: str, dtype: torch.dtype) -> None:
    fusion, levels = DeepStackFusion(FusionSpec(strategy, TAPS, LEVELS, WIDTH, 2)), captured(dtype)
    for tap, (fused, gate) in zip(TAPS, run(fusion, levels, LENGTHS), strict=True):
        assert torch.equal(fused, levels[tap])
        assert torch.equal(gate, torch.ones(len(LENGTHS)))


@pytest.mark.parametrize("strategy", STANDALONE.names())
def test_standalone_fusion_is_deterministic_per_image_and_differentiable(strategy: str) -> None:
    fusion = trained(STANDALONE.get(strategy)(widths=[4, 6, 5], width=5))
    torch.manual_seed(2)
    levels = [torch.randn(3, tokens, width, requires_grad=True) for tokens, width in ((24, 4), (6, 6), (12, 5))]
    grids = [(4, 6), (2, 3), (3, 4)]
    before = [level.detach().clone() for level in levels]

    fused = fusion(levels, grids)
    assert fused.shape == (3, 12, 5)
    assert torch.equal(fused, fusion(levels, grids))
    torch.testing.assert_close(fusion([level[1:2] for level in levels], grids), fused[1:2])
    torch.autograd.backward(fused.square().sum())
    reached = [level.grad is not None and bool(level.grad.any()) for level in levels]
    assert reached == ([False, False, True] if strategy == "top" else [True, True, True])
    assert all(torch.equal(level.detach(), was) for level, was in zip(levels, before, strict=True))
