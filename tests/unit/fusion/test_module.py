"""The fusion law of the taps: what it computes, where it starts, what learns when, what its file holds."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from adaptive_fusion.errors import ConfigError
from adaptive_fusion.fusion import DeepStackFusion, FusionSpec, apply_gate, select_levels

DEPTH, TAPS, WIDTH = 12, (2, 5, 8), 16
LENGTHS = [8, 12, 4]


def captured(dtype: torch.dtype = torch.float32) -> dict[int, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {i: (torch.randn(sum(LENGTHS), WIDTH, generator=generator) * (1 + i / 4)).to(dtype) for i in range(DEPTH)}


def spec(strategy: str, layers: int, rank: int = 0) -> FusionSpec:
    return FusionSpec(strategy, TAPS, select_levels(DEPTH, TAPS, layers), WIDTH, rank)


class Mergers(nn.Module):
    """As the mergers of the model: LayerNorm, four patches side by side, two linear layers; frozen."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in TAPS)
        self.projections = nn.ModuleList(
            nn.Sequential(nn.Linear(4 * WIDTH, 32), nn.GELU(), nn.Linear(32, 10)) for _ in TAPS
        )
        self.requires_grad_(False)

    def forward(self, tap: int, features: Tensor) -> Tensor:
        merged: Tensor = self.projections[tap](self.norms[tap](features).view(-1, 4 * WIDTH))
        return merged


def injected(fusion: DeepStackFusion, mergers: Mergers, levels: Mapping[int, Tensor]) -> Tensor:
    merged_lengths = [length // 4 for length in LENGTHS]
    outputs = []
    for index, tap in enumerate(TAPS):
        merged = mergers(index, fusion.fuse(index, levels, LENGTHS))
        outputs.append(apply_gate(merged, fusion.gate(index, levels[tap], LENGTHS), merged_lengths))
    return torch.stack(outputs)


@pytest.mark.parametrize("strategy", ["weighted", "gated"])
@pytest.mark.parametrize("layers", [3, 6, 9, 12])
@pytest.mark.parametrize("rank", [0, 4, 8, 16])
def test_identity_at_start_and_change_after_one_step(strategy: str, layers: int, rank: int) -> None:
    fusion, mergers, levels = DeepStackFusion(spec(strategy, layers, rank)), Mergers(), captured()
    native = torch.stack([mergers(index, levels[tap]) for index, tap in enumerate(TAPS)])
    before = injected(fusion, mergers, levels)
    torch.testing.assert_close(before, native, rtol=0, atol=1e-5)

    optimizer = torch.optim.SGD(fusion.parameters(), lr=0.05)
    target = torch.randn(native.shape, generator=torch.Generator().manual_seed(3))
    torch.autograd.backward((before - target).square().mean())
    optimizer.step()
    assert (injected(fusion, mergers, levels) - native).abs().max() > 1e-5


@pytest.mark.parametrize("strategy", ["weighted", "gated"])
@pytest.mark.parametrize("layers", [3, 6])
@pytest.mark.parametrize("rank", [0, 4])
def test_what_gets_gradient_when(strategy: str, layers: int, rank: int) -> None:
    """Gates, s_t and single levels' B at once; level weights and B once s_t moved; C once B moved."""
    fusion, mergers, levels = DeepStackFusion(spec(strategy, layers, rank)), Mergers(), captured()
    single = {f"taps.{i}" for i, group in enumerate(fusion.spec.groups) if len(group) == 1}
    optimizer = torch.optim.SGD(fusion.parameters(), lr=0.1)

    moved: list[set[str]] = []
    for _ in range(3):
        optimizer.zero_grad()
        torch.autograd.backward(injected(fusion, mergers, levels).square().mean())
        moved.append({name for name, p in fusion.named_parameters() if p.grad is not None and p.grad.abs().max() > 0})
        optimizer.step()

    names = {name for name, _ in fusion.named_parameters()}
    first = {name for name in names if ".gate_" in name or name.endswith(".mix")}
    first |= {name for name in names if name.endswith("adapters.up") and name[:6] in single}
    late = {name for name in names if name.endswith("adapters.down") and name[:6] not in single}
    assert moved[0] == first
    assert moved[1] == names - late
    assert moved[2] == names


def test_the_law_in_full() -> None:
    """F_t = F_tap + s (sum a_i (F_i + B_i C_i F_i) - F_tap) and the gate, against a plain evaluation."""
    torch.manual_seed(4)
    fusion, levels = DeepStackFusion(spec("gated", 6, 4)), captured()
    for parameter in fusion.parameters():
        nn.init.normal_(parameter, std=0.3)
    for index, (tap, group) in enumerate(zip(TAPS, fusion.spec.groups, strict=True)):
        state = {name.removeprefix(f"taps.{index}."): value for name, value in fusion.state_dict().items()}
        images = []
        for image in torch.split(torch.arange(sum(LENGTHS)), LENGTHS):
            alphas = []
            for position, level in enumerate(group):
                pooled = levels[level][image].mean(0)
                score = (
                    state["weights.weight"][position] @ pooled + state["weights.bias"][position]
                    if len(group) > 1
                    else 0
                )
                alphas.append(torch.sigmoid(torch.as_tensor(score)))
            total = torch.zeros(len(image), WIDTH)
            for position, level in enumerate(group):
                low = levels[level][image] @ state["adapters.down"][position].t() @ state["adapters.up"][position].t()
                total += alphas[position] / sum(alphas) * (levels[level][image] + low)
            own = levels[tap][image]
            images.append(own + state.get("mix", torch.tensor(1.0)) * (total - own))
        with torch.no_grad():
            torch.testing.assert_close(fusion.fuse(index, levels, LENGTHS), torch.cat(images), rtol=1e-4, atol=1e-4)
            gate = fusion.gate(index, levels[tap], LENGTHS)
        pooled = torch.stack([part.mean(0) for part in torch.split(levels[tap], LENGTHS)])
        expected = 2 * torch.sigmoid(pooled @ state["gate_weight"] + state["gate_bias"])
        assert isinstance(gate, Tensor)
        torch.testing.assert_close(gate, expected)


def test_sum_adds_each_group_as_it_is() -> None:
    levels, total = captured(), DeepStackFusion(spec("sum", 6))
    for index, group in enumerate(total.spec.groups):
        torch.testing.assert_close(total.fuse(index, levels, LENGTHS), sum(levels[i] for i in group))
        assert total.gate(index, levels[TAPS[index]], LENGTHS) == 1.0


def test_gates_stay_finite_and_normalised_when_every_sigmoid_underflows() -> None:
    fusion, levels = DeepStackFusion(spec("gated", 6)), captured()
    parameters = dict(fusion.named_parameters())
    parameters["taps.0.mix"].data.fill_(1.0)
    parameters["taps.0.weights.bias"].data.copy_(torch.tensor([-500.0, -501.0]))
    share = torch.sigmoid(torch.tensor(1.0))
    fused = fusion.fuse(0, levels, LENGTHS)
    low, high = (levels[i] for i in fusion.spec.groups[0])
    torch.testing.assert_close(fused, share * low + (1 - share) * high)


def test_training_does_not_reach_frozen_features_and_reaches_live_ones() -> None:
    fusion, levels = DeepStackFusion(spec("gated", 6, 4)), captured()
    for level in levels.values():
        level.requires_grad_()
    dict(fusion.named_parameters())["taps.0.mix"].data.fill_(0.5)
    torch.autograd.backward(fusion.fuse(0, levels, LENGTHS).square().sum())
    group = fusion.spec.groups[0]
    assert {i for i, level in levels.items() if level.grad is not None} == set(group)


def test_gates_multiply_each_image_and_keep_the_dtype() -> None:
    tokens = torch.randn(6, 3).bfloat16()
    assert apply_gate(tokens, 1.0, [2, 4]) is tokens
    gated = apply_gate(tokens, torch.tensor([2.0, 0.5]), [2, 4])
    assert gated.dtype == torch.bfloat16
    assert torch.equal(gated, torch.cat([tokens[:2] * 2, tokens[2:] * 0.5]))
    with pytest.raises(ConfigError, match=r"gate has shape \[3\]"):
        apply_gate(tokens, torch.ones(3), [2, 4])


def test_a_model_without_taps_has_nothing_to_fuse() -> None:
    fusion = DeepStackFusion(FusionSpec("gated", (), select_levels(DEPTH, (), 6), WIDTH))
    assert list(fusion.parameters()) == []
    with pytest.raises(ConfigError, match="tap is 0"):
        fusion.fuse(0, captured(), LENGTHS)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"strategy": "wieghted"}, "'wieghted'; expected one of gated, "),
        ({"strategy": None}, "None; expected one of"),
        ({"taps": (2, 5, 7)}, r"\[7\]"),
        ({"levels": (2, 5, 5, 8)}, r"levels is \[2, 5, 5, 8\]"),
        ({"d_vision": 0}, "d_vision is 0"),
        ({"rank": -1}, "rank is -1"),
        ({"rank": 10**9}, "rank is 1000000000"),
        ({"rank": float("nan")}, "rank is nan"),
    ],
)
def test_a_bad_spec_is_refused_before_any_work(change: dict[str, object], named: str) -> None:
    fields = {"strategy": "gated", "taps": TAPS, "levels": (1, 2, 5, 8), "d_vision": WIDTH, "rank": 0}
    with pytest.raises(ConfigError, match=named):
        FusionSpec(**{**fields, **change})  # type: ignore[arg-type]


def test_bad_calls_are_named() -> None:
    fusion, levels = DeepStackFusion(spec("weighted", 6)), captured()
    with pytest.raises(ConfigError, match="tap is 3; expected 0 to 2"):
        fusion.fuse(3, levels, LENGTHS)
    with pytest.raises(ConfigError, match=r"\[0\] are not among \[2\]"):
        fusion.fuse(0, {2: levels[2]}, LENGTHS)
    with pytest.raises(ConfigError, match="3 wide; expected d_vision 16"):
        fusion.gate(0, torch.ones(24, 3), LENGTHS)


def test_a_file_that_does_not_fit_is_refused_with_what_was_found(tmp_path: Path) -> None:
    path = tmp_path / "fusion.safetensors"
    fusion = DeepStackFusion(spec("gated", 6, 4))
    fusion.save(path)
    good, header = load_file(path), fusion.spec.metadata()
    target = DeepStackFusion(spec("gated", 6, 4))
    before = {name: value.clone() for name, value in target.state_dict().items()}

    other = DeepStackFusion(spec("weighted", 9, 8))
    with pytest.raises(ConfigError, match=r"strategy='gated'.*rank=4.*expected.*strategy='weighted'.*rank=8"):
        other.load(path)

    name = next(iter(good))
    hostile: list[tuple[dict[str, Tensor], dict[str, str], str]] = [
        (good, {**header, "version": "9"}, "version '9'"),
        (good, {"format": "pt"}, "format 'pt'"),
        (good, {**header, "extra": "1"}, "extra"),
        (good, {**header, "rank": "many"}, "unusable header"),
        (good, {**header, "strategy": "best"}, "best"),
        (good, {**header, "rank": "1000000000"}, "rank is 1000000000"),
        (good, {**header, "d_text": "-1"}, "d_text is -1"),
        ({**good, name: torch.full_like(good[name], torch.nan)}, header, f"not finite.*{name}"),
        ({**good, name: torch.zeros(3, 3)}, header, name),
        ({key: value for key, value in good.items() if key != name}, header, name),
        ({**good, "stranger": torch.zeros(1)}, header, "stranger"),
    ]
    for tensors, metadata, named in hostile:
        save_file(tensors, path, metadata=metadata)
        with pytest.raises(ConfigError, match=named):
            target.load(path)
    # A header that claims terabytes is found out before any of them is asked for.
    save_file(good, path, metadata={**header, "rank": "65536", "d_vision": "65536", "d_text": "65536"})
    with pytest.raises(ConfigError, match="differ in these tensors"):
        DeepStackFusion.from_file(path)
    path.write_bytes(b"\x80\x04not safetensors")
    with pytest.raises(ConfigError, match=r"fusion\.safetensors is not a readable safetensors file"):
        DeepStackFusion.from_file(path)
    with pytest.raises(ConfigError, match=r"'none\.safetensors' does not exist"):
        FusionSpec.read(tmp_path / "none.safetensors")
    assert all(torch.equal(value, before[name]) for name, value in target.state_dict().items())


def test_compiled_kernels_give_the_same_tap() -> None:
    fusion, levels = DeepStackFusion(spec("gated", 12, 4)), captured()
    for parameter in fusion.parameters():
        nn.init.normal_(parameter, std=0.3)
    with torch.no_grad():
        plain = fusion.fuse(2, levels, LENGTHS)
        fusion.compile_kernels(max_shapes=2, backend="eager")
        torch.testing.assert_close(fusion.fuse(2, levels, LENGTHS), plain)
