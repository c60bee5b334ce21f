"""Learned pooling: average pooling at start, the law in full, what learns when, and its place in a module's file."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from adaptive_fusion.errors import ConfigError
from adaptive_fusion.fusion import DeepStackFusion, FusionSpec, downsample
from adaptive_fusion.reduction.learned_pool import WindowPool

WIDTH, STREAMS = 6, 3
GRIDS = [(1, 5, 7), (2, 3, 4), (1, 1, 1)]

grids_of_batches = st.lists(st.tuples(st.integers(1, 2), st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=3)


def features(grids: list[tuple[int, int, int]], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    count = sum(t * h * w for t, h, w in grids)
    return [torch.randn(count, WIDTH, generator=generator) for _ in range(STREAMS)]


def pool_of(side: int, content: bool, rank: int = 2, trained: bool = True) -> WindowPool:
    torch.manual_seed(1)
    pool = WindowPool(side, STREAMS, WIDTH, rank, content)
    if trained:
        for parameter in pool.parameters():
            nn.init.normal_(parameter, std=0.4)
    return pool


@settings(max_examples=40, deadline=None)
@given(grids_of_batches, st.sampled_from([2, 4]), st.booleans(), st.sampled_from([0, 2]))
def test_untrained_it_is_average_pooling(
    grids: list[tuple[int, int, int]], side: int, content: bool, rank: int
) -> None:
    streams = features(grids)
    for stream, pooled in zip(streams, pool_of(side, content, rank, trained=False)(streams, grids), strict=True):
        torch.testing.assert_close(pooled, downsample(stream, grids, 1 / side), rtol=0, atol=1e-5)


@pytest.mark.parametrize("content", [False, True])
def test_the_law_in_full(content: bool) -> None:
    """Every pooled token of a trained module against a plain evaluation, cell by cell, edges included."""
    side, streams = 2, features(GRIDS)
    pool = pool_of(side, content)
    state = pool.state_dict()
    expected: list[list[Tensor]] = [[] for _ in streams]
    start = 0
    for t, h, w in GRIDS:
        for frame in range(t):
            for top in range(0, h, side):
                for left in range(0, w, side):
                    cells: dict[int, int] = {}
                    for offset in range(side * side):
                        y, x = top + offset // side, left + offset % side
                        if y < h and x < w:
                            cells[offset] = start + frame * h * w + y * w + x
                    codes = []
                    for offset in range(side * side):
                        code = torch.zeros(state["down"].shape[1])
                        if offset in cells:
                            for j, stream in enumerate(streams):
                                level = stream[cells[offset]]
                                level = (level - level.mean()) / (level.var(unbiased=False) + 1e-5).sqrt()
                                code = code + state["down"][j] @ level
                        codes.append(code)
                    hidden = state["mix"] @ torch.cat(codes) + state["bias"]
                    if content:
                        hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
                    for j, stream in enumerate(streams):
                        score = state["offsets"][j] + (state["attend"][j] @ hidden if content else 0)
                        weights = torch.softmax(score[list(cells)], 0)
                        mean = stream[list(cells.values())].mean(0)
                        mixed = (weights[:, None] * stream[list(cells.values())]).sum(0)
                        mixed = mixed * len(cells) ** torch.tanh(score[-1])
                        expected[j].append(mixed + mean.square().mean().sqrt() * (state["up"][j] @ hidden))
        start += t * h * w
    for found, rows in zip(pool(streams, GRIDS), expected, strict=True):
        torch.testing.assert_close(found, torch.stack(rows), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("content", [False, True])
def test_packed_images_do_not_see_each_other_and_inputs_stay(content: bool) -> None:
    streams, pool = features(GRIDS), pool_of(2, content)
    before = [stream.clone() for stream in streams]
    together = pool(streams, GRIDS)
    start = at = 0
    for t, h, w in GRIDS:
        stop = start + t * h * w
        alone = pool([stream[start:stop] for stream in streams], [(t, h, w)])
        count = alone[0].shape[0]
        for whole, own in zip(together, alone, strict=True):
            torch.testing.assert_close(whole[at : at + count], own, rtol=1e-4, atol=1e-4)
        start, at = stop, at + count
    assert all(torch.equal(stream, was) for stream, was in zip(streams, before, strict=True))


@pytest.mark.parametrize("content", [False, True])
def test_what_gets_gradient_when(content: bool) -> None:
    """Weights per offset, U and A at once; what they read from once they have moved."""
    pool, streams = pool_of(2, content, trained=False), features(GRIDS)
    optimizer = torch.optim.SGD(pool.parameters(), lr=0.1)
    names = {name for name, _ in pool.named_parameters()}
    moved = []
    for _ in range(2):
        optimizer.zero_grad()
        torch.autograd.backward(torch.stack(pool(streams, GRIDS)).square().mean())
        moved.append({name for name, p in pool.named_parameters() if p.grad is not None and p.grad.abs().max() > 0})
        optimizer.step()
    assert moved == [names - {"down", "mix", "bias"}, names]


@pytest.mark.parametrize("strategy", ["weighted", "gated"])
def test_a_module_pools_each_ratio_by_its_own_law_and_keeps_it_in_its_file(strategy: str, tmp_path: Path) -> None:
    spec = FusionSpec(strategy, (1, 3), (0, 1, 2, 3), 8, 2, WIDTH)
    fusion = DeepStackFusion(spec)
    streams = features(GRIDS)
    for ratio in (1.0, 0.5, 0.25, 0.125):
        for stream, pooled in zip(streams, fusion.pool(streams, GRIDS, ratio), strict=True):
            torch.testing.assert_close(pooled, downsample(stream, GRIDS, ratio), rtol=0, atol=1e-5)
    for parameter in fusion.parameters():
        nn.init.normal_(parameter, std=0.3)
    fusion.save(tmp_path / "fusion.safetensors")
    loaded = DeepStackFusion.from_file(tmp_path / "fusion.safetensors")
    assert loaded.spec == spec
    fusion.save(tmp_path / "half.safetensors", torch.float16)
    half = DeepStackFusion.from_file(tmp_path / "half.safetensors")
    for name, value in half.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name].half().float())
    for ratio, changed in ((1.0, False), (0.5, True), (0.25, True), (0.125, False)):
        found, same = fusion.pool(streams, GRIDS, ratio), loaded.pool(streams, GRIDS, ratio)
        for stream, one, other in zip(streams, found, same, strict=True):
            assert torch.equal(one, other)
            assert torch.equal(one, downsample(stream, GRIDS, ratio)) != changed
    with pytest.raises(ConfigError, match="1/k"):
        fusion.pool(streams, GRIDS, 0.3)
    with pytest.raises(ConfigError, match="as many tokens"):
        fusion.pool([stream[1:] for stream in streams], GRIDS, 0.5)


def test_half_precision_is_pooled_in_float32_and_rounded_once() -> None:
    pool, streams = pool_of(2, True), [stream.bfloat16() for stream in features(GRIDS)]
    for low, high in zip(pool(streams, GRIDS), pool([s.float() for s in streams], GRIDS), strict=True):
        assert low.dtype == torch.bfloat16
        torch.testing.assert_close(low.float(), high, rtol=2e-2, atol=2e-2)


def test_the_untrainable_strategy_averages() -> None:
    fusion = DeepStackFusion(FusionSpec("sum", (1,), (0, 1), 8, 0, WIDTH))
    assert not list(fusion.pools)
