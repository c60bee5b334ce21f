import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptive_fusion.errors import ConfigError
from adaptive_fusion.reduction.pool import downsample, pooled_grid

grids = st.lists(st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=3)


def reference(features: torch.Tensor, shapes: list[tuple[int, int, int]], side: int) -> torch.Tensor:
    cells, start = [], 0
    for t, h, w in shapes:
        frames = features[start : start + t * h * w].reshape(t, h, w, -1)
        start += t * h * w
        for frame in frames:
            for top in range(0, h, side):
                for left in range(0, w, side):
                    cells.append(frame[top : top + side, left : left + side].flatten(0, 1).mean(0))
    return torch.stack(cells)


@settings(max_examples=100, deadline=None)
@given(grids, st.sampled_from([1.0, 0.5, 0.25, 1 / 3]))
def test_pools_frame_by_frame_over_the_tokens_a_window_really_holds(
    shapes: list[tuple[int, int, int]], ratio: float
) -> None:
    features = torch.randn(sum(t * h * w for t, h, w in shapes), 5)
    pooled = downsample(features, shapes, ratio)

    assert pooled.shape[0] == sum(math.prod(pooled_grid(*grid, ratio)) for grid in shapes)
    torch.testing.assert_close(pooled, reference(features, shapes, round(1 / ratio)))
    assert pooled.is_contiguous()


def test_edges_round_up() -> None:
    assert pooled_grid(1, 5, 7, 0.5) == (1, 3, 4)
    assert pooled_grid(8, 5, 7, 0.25) == (8, 2, 2)
    assert pooled_grid(2, 1, 1, 0.25) == (2, 1, 1)


def test_full_ratio_returns_the_same_tensor() -> None:
    features = torch.randn(35, 4)
    assert downsample(features, [(1, 5, 7)], 1.0) is features


def test_bfloat16_is_averaged_in_float32_and_rounded_once() -> None:
    features = torch.randn(64, 33).bfloat16()
    exact = downsample(features.float(), [(1, 8, 8)], 0.25).bfloat16()
    assert torch.equal(downsample(features, [(1, 8, 8)], 0.25), exact)


def test_gradient_is_shared_by_the_tokens_of_a_window() -> None:
    features = torch.randn(15, 2, requires_grad=True)
    torch.autograd.backward(downsample(features, [(1, 3, 5)], 0.5).sum())
    assert features.grad is not None
    expected = torch.tensor([[4, 4, 4, 4, 2], [4, 4, 4, 4, 2], [2, 2, 2, 2, 1]]).reciprocal()
    torch.testing.assert_close(features.grad[:, 0].view(3, 5), expected)


@pytest.mark.parametrize("ratio", [0, -0.5, 2, 0.3, 0.75, 10**400, 5e-324, math.nan, math.inf, "0.5", None, True])
def test_bad_ratio_is_named(ratio: float) -> None:
    with pytest.raises(ConfigError, match=rf"downsample is {ratio!r}.*0\.25"):
        downsample(torch.zeros(4, 2), [(1, 2, 2)], ratio)


@pytest.mark.parametrize("shapes", [[(1, 2, 3)], [], [(1, 2, 2), (1, 1, 1)], [(1, -2, -2)]])
def test_grids_that_do_not_fit_are_refused(shapes: list[tuple[int, int, int]]) -> None:
    with pytest.raises(ConfigError, match="expected"):
        downsample(torch.zeros(4, 2), shapes, 0.5)
