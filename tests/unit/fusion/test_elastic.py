"""One module for several counts of levels: a part of it is a module as any other; what it learns, the whole learns."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from adaptive_fusion.errors import ConfigError
from adaptive_fusion.fusion import DeepStackFusion, FusionSpec, cut, select_levels

DEPTH, TAPS, WIDTH, LENGTHS = 12, (2, 5, 8), 16, [8, 12, 4]
TRAINED = ["gated", "weighted"]


def disturbed(strategy: str, rank: int, elastic: tuple[int, ...] = ()) -> DeepStackFusion:
    """All levels, with nothing left at its start."""
    torch.manual_seed(3)
    module = DeepStackFusion(FusionSpec(strategy, TAPS, tuple(range(DEPTH)), WIDTH, rank, 24, elastic))
    for parameter in module.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return module


def levels() -> dict[int, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {i: torch.randn(sum(LENGTHS), WIDTH, generator=generator) for i in range(DEPTH)}


def said(module: DeepStackFusion) -> Tensor:
    taken = levels()
    fused = [module.fuse(tap, taken, LENGTHS).flatten() for tap in range(len(TAPS))]
    gates = [torch.as_tensor(module.gate(tap, taken[at], LENGTHS)).flatten() for tap, at in enumerate(TAPS)]
    streams = [torch.ones(24, 24) * torch.arange(24) for _ in range(1 + len(TAPS))]
    return torch.cat([*fused, *gates, *(t.flatten() for t in module.pool(streams, [(1, 4, 6)], 0.5))])


@pytest.mark.parametrize("strategy", TRAINED)
@pytest.mark.parametrize("rank", [0, 4])
def test_a_part_is_the_law_over_its_levels(strategy: str, rank: int, tmp_path: Path) -> None:
    """Of a part with all its levels the whole itself; of a smaller one a module that holds those levels' parameters."""
    whole = disturbed(strategy, rank)
    assert torch.equal(said(cut(whole, range(DEPTH))), said(whole))
    # Two levels for every tap: a module of that spec has all the parameters that a part has.
    chosen = (1, 2, 4, 5, 7, 8)
    part = cut(whole, chosen)
    alone = DeepStackFusion(part.spec)
    own = whole.state_dict()
    for name, value in alone.state_dict().items():
        at = own[name]
        if value.shape != at.shape:
            tap = int(name.split(".")[1])
            group = whole.spec.groups[tap]
            at = at[[group.index(level) for level in part.spec.groups[tap]]]
        value.copy_(at)
    assert torch.equal(said(part), said(alone))
    assert not torch.equal(said(part), said(whole))
    part.save(tmp_path / "part.safetensors")
    assert torch.equal(said(DeepStackFusion.from_file(tmp_path / "part.safetensors")), said(part))


@pytest.mark.parametrize("strategy", TRAINED)
@pytest.mark.parametrize("count", [3, 6, 9, 12])
def test_gradient_reaches_what_takes_part_and_nothing_else(strategy: str, count: int) -> None:
    whole = disturbed(strategy, 4)
    chosen = select_levels(DEPTH, TAPS, count)
    part = cut(whole, chosen)
    assert not list(part.parameters())
    said(part).square().sum().backward()  # type: ignore[no-untyped-call]
    for tap, group in zip(whole.taps, whole.spec.groups, strict=True):
        reached = tap.adapters.up.grad.abs().sum((1, 2)) > 0  # type: ignore[union-attr]
        assert reached.tolist() == [level in chosen for level in group]


def test_which_counts_it_serves_is_in_its_file(tmp_path: Path) -> None:
    whole = disturbed("gated", 4, (3, 6))
    whole.save(tmp_path / "m.safetensors")
    found = DeepStackFusion.from_file(tmp_path / "m.safetensors")
    assert found.spec.elastic == (3, 6) and torch.equal(said(found), said(whole))
    # Interchangeable with one that serves itself alone, as far as its own levels go.
    assert found.spec == disturbed("gated", 4).spec
    tensors = load_file(tmp_path / "m.safetensors")
    for wrong in ("12", "0", "x", "3;6"):
        save_file(tensors, tmp_path / "w.safetensors", {**whole.spec.metadata(), "elastic": wrong})
        with pytest.raises(ConfigError, match=r"elastic|unusable"):
            FusionSpec.read(tmp_path / "w.safetensors")


def test_levels_that_are_not_the_modules_are_named() -> None:
    with pytest.raises(ConfigError, match=r"levels \[12\]"):
        cut(disturbed("gated", 0), (2, 5, 8, 12))
    with pytest.raises(ConfigError, match="taps"):
        cut(disturbed("gated", 0), (2, 5))
