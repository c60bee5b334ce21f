"""The Triton kernel against the eager one, for a process of its own that has ``TRITON_INTERPRET=1``: Triton reads that
when it is first imported. Says ``as eager`` at the end."""

import copy
import warnings

import torch

from adaptive_fusion.errors import ConfigError
from adaptive_fusion.fusion import DeepStackFusion, FusionSpec, kernels_triton, triton_launch
from adaptive_fusion.fusion.kernels import Gating, Law, weighted_sum
from adaptive_fusion.fusion.kernels_triton import TritonSum

LENGTHS = [5, 12]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def levels(count: int, width: int, dtype: torch.dtype, rows: int = sum(LENGTHS)) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    return [torch.randn(rows, width, generator=generator).to(dtype) for _ in range(count)]


def check_sums(kernel: TritonSum) -> None:
    for dtype in DTYPES:
        for count, width, images in ((1, 8, 1), (3, 24, 2), (4, 1152, 1)):
            features = levels(count, width, dtype)
            weights = torch.rand(images, count, generator=torch.Generator().manual_seed(1)) - 0.3
            found = kernel(features, weights, LENGTHS)
            assert found.dtype == dtype
            torch.testing.assert_close(found, weighted_sum(features, weights, LENGTHS))
            # Wider numbers and levels that are not contiguous go to the eager kernel.
            wide = [feature.double() for feature in features]
            torch.testing.assert_close(kernel(wide, weights, LENGTHS), weighted_sum(wide, weights, LENGTHS))
            assert kernel.by_law(wide, LENGTHS, Law("unit"), None, None) is None
            gating = Gating(None, None, wide[0][0], weights[0, 0], None, 0)
            assert kernel.gated(wide, LENGTHS, gating, None, None) is None


def check_modules() -> None:
    for dtype in DTYPES:
        for strategy in ("sum", "weighted", "gated"):
            for lengths in (LENGTHS, [sum(LENGTHS)]):
                for blocks in ((0, 1, 3, 4, 5), (1, 5)):  # the second leaves one level a tap
                    check_module(dtype, strategy, lengths, blocks)


def check_large() -> None:
    """Images of several blocks and one of a single patch, more columns than a step takes, more codes than a sum makes
    itself, half of a block that is not there."""
    check_module(torch.float32, "gated", [70, 1, 20], (0, 1, 5), width=288)
    check_module(torch.float32, "weighted", [35], (0, 1, 5), width=288)
    one_pass, kernels_triton.ONE_PASS = kernels_triton.ONE_PASS, 4
    try:
        check_module(torch.float32, "weighted", [30, 3], (0, 1, 3, 4, 5))
        check_module(torch.float32, "sum", [30, 3], (0, 1, 3, 4, 5))
    finally:
        kernels_triton.ONE_PASS = one_pass


def check_module(
    dtype: torch.dtype, strategy: str, lengths: list[int], blocks: tuple[int, ...], width: int = 24
) -> None:
    torch.manual_seed(0)
    module = DeepStackFusion(FusionSpec(strategy, (1, 5), blocks, width, 4)).eval()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    features = dict(zip(module.spec.levels, levels(len(blocks), width, dtype, sum(lengths)), strict=True))
    # Eagerly, half precision rounds the adapters' codes and the pooled levels too.
    tolerance = {} if dtype == torch.float32 else {"atol": 0.1, "rtol": 0.03}
    with torch.no_grad():
        eager = [both(module, tap, features, lengths) for tap in range(2)]
        module.compile_kernels(backend="triton")
        assert all(isinstance(tap.combine, TritonSum) for tap in module.taps)
        fused = [both(module, tap, features, lengths) for tap in range(2)]
        alone = [module.fuse(tap, features, lengths) for tap in range(2)]
    for found, expected, own in zip(fused, eager, alone, strict=True):
        torch.testing.assert_close(found[0], expected[0], **tolerance)
        torch.testing.assert_close(found[1], expected[1], **(tolerance and {"atol": 0.01, "rtol": 0.01}))
        assert torch.equal(own, found[0])
    assert all(tap.combine.broken is None for tap in module.taps)
    assert module.fuse(0, features, lengths).requires_grad  # by the kernel that has gradients


def check_device() -> None:
    """Launches are on the device of the levels, whichever is the current one."""
    asked: list[torch.Tensor] = []
    own = torch.cuda.device_of

    class Noted(own):  # type: ignore[misc, valid-type]
        def __init__(self, tensor: torch.Tensor) -> None:
            asked.append(tensor)
            super().__init__(tensor)

    features, kernel = levels(3, 24, torch.float32), TritonSum()
    torch.cuda.device_of = Noted  # type: ignore[misc]
    try:
        kernel(features, torch.rand(1, 3), LENGTHS)
        assert kernel.by_law(features, LENGTHS, Law("unit"), None, None) is not None
    finally:
        torch.cuda.device_of = own  # type: ignore[misc]
    assert len(asked) == 2 and all(each is features[0] for each in asked)


def check_packed() -> None:
    """A parameter that changes, in place, for another or in its type, is packed anew; a copy packs its own."""
    torch.manual_seed(0)
    module = DeepStackFusion(FusionSpec("gated", (1, 5), (0, 1, 3, 4, 5), 24, 4)).eval()
    module.compile_kernels(backend="triton")
    features = dict(zip(module.spec.levels, levels(5, 24, torch.float32), strict=True))
    same_as_eager(module, features)
    forms = len(module.taps[0].combine.packed._kept)
    assert forms == 4
    for change in ("in place", "another", "loaded", "there and back", "there and back", "trained", "inference"):
        state = {name: 0.3 * torch.randn_like(value) for name, value in module.state_dict().items()}
        with torch.no_grad():
            if change == "in place":
                for name, parameter in module.named_parameters():
                    parameter.copy_(state[name])
            elif change == "another":
                for name, parameter in module.named_parameters():
                    parameter.data = state[name]
            elif change == "there and back":  # the allocator gives one parameter the place of another
                module.double().float()
            elif change == "inference":
                with torch.inference_mode():
                    module.load_state_dict({name: value + 0 for name, value in state.items()}, assign=True)
            elif change == "trained":
                train(module, features)
            else:
                module.load_state_dict(state)
            same_as_eager(module, features)
            same_as_eager(copy.deepcopy(module), features)
        assert len(module.taps[0].combine.packed._kept) == forms


@torch.enable_grad()
def train(module: DeepStackFusion, features: dict[int, torch.Tensor]) -> None:
    """A step of an optimizer that says nothing to the parameters' versions."""
    before = [(parameter._version, parameter.detach().clone()) for parameter in module.parameters()]
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, fused=True)
    sum(module.fuse(tap, features, LENGTHS).square().mean() for tap in range(2)).backward()
    optimizer.step()
    assert any(
        parameter._version == version and not torch.equal(parameter, value)
        for parameter, (version, value) in zip(module.parameters(), before, strict=True)
    )


def same_as_eager(module: DeepStackFusion, features: dict[int, torch.Tensor]) -> None:
    own = [tap.combine for tap in module.taps]
    with torch.no_grad():
        kernel, again = ([module.fuse(tap, features, LENGTHS) for tap in range(2)] for _ in range(2))
        for tap in module.taps:
            tap.combine = weighted_sum
        eager = [module.fuse(tap, features, LENGTHS) for tap in range(2)]
    for tap, combine in zip(module.taps, own, strict=True):
        assert isinstance(combine, TritonSum) and combine.broken is None
        tap.combine = combine
    assert all(map(torch.equal, kernel, again))  # as they were packed
    for found, expected in zip(kernel, eager, strict=True):
        torch.testing.assert_close(found, expected)


def check_broken_numbers() -> None:
    """An image with a value that is none has none in what becomes of it, and no other image has."""
    torch.manual_seed(0)
    module = DeepStackFusion(FusionSpec("gated", (1, 5), (0, 1, 3, 4, 5), 24, 4)).eval()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    for level in (0, 1):  # the second is the tap's own, by which its gate goes
        features = dict(zip(module.spec.levels, levels(5, 24, torch.float32), strict=True))
        features[level][2, 3] = float("nan")
        with torch.no_grad():
            for tap in module.taps:
                tap.combine = weighted_sum
            eager = both(module, 0, features, LENGTHS)
            module.compile_kernels(backend="triton")
            for found, expected in zip(both(module, 0, features, LENGTHS), eager, strict=True):
                torch.testing.assert_close(found, expected, equal_nan=True)
                assert found.isnan().any() == (level == 1 or found.ndim == 2) and not found.isnan().all()


def both(
    module: DeepStackFusion, tap: int, features: dict[int, torch.Tensor], lengths: list[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    fused, gate = module.fuse_and_gate(tap, features, lengths)
    return fused, torch.as_tensor(gate)


def check_refusals(kernel: TritonSum) -> None:
    try:
        kernel(levels(3, 8, torch.float32), torch.rand(2), LENGTHS)
    except ConfigError as error:
        assert "weights are" in str(error)
    else:
        raise AssertionError("weights of another number were taken")


def check_no_kernels() -> None:
    """Where Triton cannot build them, fusion says so once and runs eagerly."""
    kernel, features = TritonSum(), levels(3, 8, torch.float32)
    tile, triton_launch.PLAIN = triton_launch.PLAIN, triton_launch.Tile(3, 1024, 8)  # no power of two
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            found = [kernel(features, torch.ones(3), LENGTHS) for _ in range(2)]
    finally:
        triton_launch.PLAIN = tile
    assert len(said) == 1 and "fusion runs without them" in str(said[0].message)
    for each in found:
        torch.testing.assert_close(each, weighted_sum(features, torch.ones(3), LENGTHS))


if __name__ == "__main__":
    torch.set_num_threads(1)
    check_sums(TritonSum())
    check_modules()
    check_large()
    check_device()
    check_packed()
    check_broken_numbers()
    check_refusals(TritonSum())
    check_no_kernels()
    print("as eager")
