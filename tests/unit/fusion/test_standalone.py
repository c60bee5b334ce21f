import runpy
from pathlib import Path

import pytest
import torch

from adaptive_fusion.errors import ConfigError
from adaptive_fusion.fusion.standalone import GatedFusion, SumFusion, TopFusion, WeightedFusion

PROFILE = (0.05, 0.08, 0.12, 0.15, 0.25, 0.35)


def test_untrained_weights_follow_the_depth_profile() -> None:
    levels = [torch.randn(2, 9, 4) for _ in PROFILE]
    expected = sum(p * level for p, level in zip(PROFILE, levels, strict=True))
    for kind in (WeightedFusion, GatedFusion):
        torch.testing.assert_close(kind([4] * 6, rank=2)(levels), expected, rtol=1e-5, atol=1e-6)


def test_sum_and_top() -> None:
    levels = [torch.randn(2, 9, 4) for _ in range(3)]
    torch.testing.assert_close(SumFusion([4] * 3)(levels), levels[0] + levels[1] + levels[2])
    assert torch.equal(TopFusion([4] * 3)(levels), levels[2])


def test_levels_of_other_resolutions_are_interpolated_onto_the_deepest_grid() -> None:
    """A linear ramp stays that ramp, sampled at the centres of the coarse cells."""
    ramp = (torch.arange(8.0) + 0.5).repeat(8, 1) / 8
    shallow = ramp.reshape(1, 64, 1)
    deep = torch.zeros(1, 16, 1)
    fused = SumFusion([1, 1])([shallow, deep])
    torch.testing.assert_close(fused.view(4, 4), ((torch.arange(4.0) + 0.5) / 4).repeat(4, 1))


def test_only_levels_of_another_width_are_projected() -> None:
    fusion = WeightedFusion([4, 6, 4])
    assert [name for name, _ in fusion.named_parameters() if "projections" in name] == ["projections.1.weight"]
    assert fusion([torch.randn(2, 9, width) for width in (4, 6, 4)]).shape == (2, 9, 4)


def test_gates_learn_per_image_and_every_part_gets_gradient() -> None:
    torch.manual_seed(0)
    fusion = GatedFusion([4, 6, 4], rank=2)
    levels = [torch.randn(2, 9, width) for width in (4, 6, 4)]
    optimizer = torch.optim.SGD(fusion.parameters(), lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        torch.autograd.backward((fusion(levels) - levels[2]).square().mean())
        optimizer.step()
    assert all(p.grad is not None and bool(p.grad.any()) for p in fusion.parameters())
    aligned = [fusion.projections[i](level).flatten(0, 1) for i, level in enumerate(levels)]
    weights = fusion.weights(aligned, [9, 9])
    torch.testing.assert_close(weights.sum(1), torch.ones(2))
    assert not torch.equal(weights[0], weights[1])


@pytest.mark.parametrize(
    ("shapes", "grids", "named"),
    [
        ([(2, 9, 4)], None, r"shapes \[\(2, 9, 4\)\]"),
        ([(2, 9, 4), (2, 9, 5)], None, r"\(2, 9, 5\)"),
        ([(2, 9, 4), (3, 9, 4)], None, r"\(3, 9, 4\)"),
        ([(2, 9, 4), (2, 0, 4)], None, r"\(2, 0, 4\)"),
        ([(2, 9, 4), (2, 10, 4)], None, "10 tokens, no square"),
        ([(2, 9, 4), (2, 10, 4)], [(3, 3), (3, 3)], r"grids are \[\(3, 3\), \(3, 3\)\]"),
        ([(2, 9, 4), (2, 9, 4)], [(3, 3)], r"grids are \[\(3, 3\)\]"),
    ],
)
def test_levels_that_do_not_fit_are_named(
    shapes: list[tuple[int, ...]], grids: list[tuple[int, int]] | None, named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        WeightedFusion([4, 4])([torch.zeros(shape) for shape in shapes], grids)


@pytest.mark.parametrize(("widths", "width", "rank"), [([], None, 0), ([4, 0], None, 0), ([4], 0, 0), ([4], 4, -1)])
def test_bad_sizes_are_refused(widths: list[int], width: int | None, rank: int) -> None:
    with pytest.raises(ConfigError, match="expected"):
        WeightedFusion(widths, width, rank)


def test_the_example_fuses_three_encoders(capsys: pytest.CaptureFixture[str]) -> None:
    example = Path(__file__).parents[3] / "examples" / "any_vit.py"
    runpy.run_path(str(example), run_name="__main__")
    printed = capsys.readouterr().out
    for encoder in ("vit", "siglip", "dinov2"):
        assert f"{encoder:7} gated     [2, 24, 64]" in printed
