import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from adaptive_fusion.errors import ConfigError
from adaptive_fusion.fusion import DeepStackFusion, FusionSpec, kernels
from adaptive_fusion.fusion.kernels import CompiledSum, global_pool, weighted_sum

lengths_lists = st.lists(st.integers(1, 40), min_size=1, max_size=4)


def exact_sum(levels: list[Tensor], weights: Tensor, lengths: list[int]) -> Tensor:
    rows = weights.double().expand(len(lengths), -1).repeat_interleave(torch.tensor(lengths), dim=0)
    return torch.einsum("nl,lnd->nd", rows, torch.stack(levels).double())


def make(
    count: int, lengths: list[int], width: int, dtype: torch.dtype, per_image: bool
) -> tuple[list[Tensor], Tensor]:
    levels = [torch.randn(sum(lengths), width).to(dtype) for _ in range(count)]
    weights = torch.randn(len(lengths) if per_image else 1, count)
    weights[torch.rand_like(weights) < 0.2] = 0.0
    return levels, weights


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 5),
    lengths_lists,
    st.integers(1, 20),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    st.booleans(),
    st.sampled_from([16, 300, 2**19]),
)
def test_sum_is_as_exact_as_wide_accumulation_rounded_once(
    count: int, lengths: list[int], width: int, dtype: torch.dtype, per_image: bool, block: int
) -> None:
    levels, weights = make(count, lengths, width, dtype, per_image)
    before = [level.clone() for level in levels]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "_BLOCK", block)
        found = weighted_sum(levels, weights, lengths)

    assert found.dtype == dtype
    exact = exact_sum(levels, weights, lengths)
    magnitude = exact_sum([level.abs() for level in levels], weights.abs(), lengths)
    wide = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    bound = 0.5 * torch.finfo(dtype).eps * exact.abs() + 4 * count * wide * magnitude + 1e-7
    assert ((found.double() - exact).abs() <= bound).all()
    assert all(torch.equal(level, was) for level, was in zip(levels, before, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("per_image", [False, True])
def test_the_form_for_other_devices_computes_the_same(dtype: torch.dtype, per_image: bool) -> None:
    lengths = [5, 9]
    levels, weights = make(4, lengths, 7, dtype, per_image)
    out = torch.empty_like(levels[0])
    kernels._add_block(out, levels, torch.split(kernels.expand_rows(weights, lengths), 1, dim=1), None)
    torch.testing.assert_close(out, weighted_sum(levels, weights, lengths))

    on_meta = weighted_sum([level.to("meta") for level in levels], weights.to("meta"), lengths)
    assert on_meta.shape == out.shape and on_meta.dtype == dtype


@pytest.mark.parametrize("lengths", [[9], [2, 3, 4]])
def test_gradients(lengths: list[int]) -> None:
    levels = [torch.randn(9, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    weights = torch.randn(len(lengths), 3, dtype=torch.float64, requires_grad=True)

    def summed(weights: Tensor, *levels: Tensor) -> Tensor:
        return weighted_sum(levels, weights, lengths)

    def pooled(*levels: Tensor) -> Tensor:
        return global_pool(levels, lengths)

    assert torch.autograd.gradcheck(summed, (weights, *levels))
    assert torch.autograd.gradcheck(pooled, tuple(levels))


def test_frozen_levels_get_no_gradient_and_weights_do() -> None:
    levels = [torch.randn(6, 3, requires_grad=index == 1) for index in range(3)]
    weights = torch.randn(3, requires_grad=True)
    torch.autograd.backward(weighted_sum(levels, weights, [6]).sum())
    assert [level.grad is None for level in levels] == [True, False, True]
    torch.testing.assert_close(weights.grad, torch.stack([level.detach().sum() for level in levels]))


def test_scratch_memory_of_inference_mode_serves_training() -> None:
    levels = [torch.randn(6, 3).bfloat16() for _ in range(2)]
    weights = torch.tensor([0.25, 0.5], requires_grad=True)
    kernels._scratch.__dict__.clear()
    with torch.inference_mode():
        first = weighted_sum(levels, weights, [6])
    second = weighted_sum(levels, weights, [6])
    torch.autograd.backward(second.sum())
    assert torch.equal(first, second.detach()) and weights.grad is not None


def test_a_weight_of_zero_skips_its_level() -> None:
    levels = [torch.randn(4, 2), torch.full((4, 2), torch.nan)]
    assert torch.equal(weighted_sum(levels, torch.tensor([1.0, 0.0]), [4]), levels[0])
    assert torch.equal(weighted_sum(levels, torch.tensor([0.0, 0.0]), [4]), torch.zeros(4, 2))


@settings(max_examples=50, deadline=None)
@given(lengths_lists, st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]))
def test_pooling_is_the_mean_of_each_image(lengths: list[int], dtype: torch.dtype) -> None:
    levels = [torch.randn(sum(lengths), 6).to(dtype) for _ in range(2)]
    pooled = global_pool(levels, lengths)
    assert pooled.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for index, level in enumerate(levels):
        exact = torch.stack([part.double().mean(0) for part in torch.split(level, lengths)])
        step = torch.finfo(dtype).eps
        torch.testing.assert_close(pooled[:, index].double(), exact, rtol=2 * step, atol=8 * step)


def test_half_precision_pooling_of_many_patches_neither_stalls_nor_overflows() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        pooled = global_pool([torch.full((20_000, 3), 60.0, dtype=dtype)], [20_000])
        torch.testing.assert_close(pooled, torch.full((1, 1, 3), 60.0), rtol=4e-3, atol=0)


def test_compilation_is_bounded_and_changes_nothing() -> None:
    compiled: list[int] = []

    def count(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        compiled.append(len(inputs))
        return graph.forward

    fast = CompiledSum(max_shapes=2, backend=count)
    for levels_used in (2, 3, 4, 5, 2, 3):
        for patches in (8, 12, 20):
            levels, weights = make(levels_used, [patches], 4, torch.float32, False)
            torch.testing.assert_close(fast(levels, weights, [patches]), exact_sum(levels, weights, [patches]).float())
    assert len(fast.kinds) == 2
    assert len(compiled) == 2


def test_compiled_sum_leaves_training_to_the_differentiable_kernel() -> None:
    fast = CompiledSum(max_shapes=1, backend="eager")
    weights = torch.tensor([0.5, 0.5], requires_grad=True)
    torch.autograd.backward(fast([torch.ones(4, 2), torch.ones(4, 2)], weights, [4]).sum())
    torch.testing.assert_close(weights.grad, torch.tensor([8.0, 8.0]))
    assert not fast.kinds


@pytest.mark.parametrize("max_shapes", [0, -1, 10_000])
def test_compiled_sum_refuses_an_unbounded_set_of_shapes(max_shapes: int) -> None:
    with pytest.raises(ConfigError, match=f"max_shapes is {max_shapes}"):
        CompiledSum(max_shapes)


@pytest.mark.parametrize(
    ("levels", "weights", "lengths", "named"),
    [
        ([], torch.ones(1), [4], "no levels"),
        ([torch.ones(4, 2), torch.ones(4, 3)], torch.ones(2), [4], r"\[4, 3\]"),
        ([torch.ones(4, 2), torch.ones(4, 2).bfloat16()], torch.ones(2), [4], "bfloat16"),
        ([torch.ones(4, 2, 1)], torch.ones(1), [4], r"\[4, 2, 1\]"),
        ([torch.ones(4, 2).int()], torch.ones(1), [4], "int32"),
        ([torch.ones(4, 2)], torch.ones(1), [3], r"lengths \[3\].*4 patches"),
        ([torch.ones(4, 2)], torch.ones(1), [4, 0], r"lengths \[4, 0\]"),
        ([torch.ones(4, 2)], torch.ones(2), [4], r"weights are \[2\]"),
        ([torch.ones(4, 2)], torch.ones(3, 1), [2, 2], r"weights are \[3, 1\]"),
    ],
)
def test_shapes_that_do_not_fit_are_named(
    levels: list[Tensor], weights: Tensor, lengths: list[int], named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        weighted_sum(levels, weights, lengths)


def test_several_compiled_sums_have_a_limit_each() -> None:
    limit = torch._dynamo.config.recompile_limit
    for _ in range(2):
        made: list[Any] = []

        def backend(graph: Any, _inputs: Any, made: list[Any] = made) -> Any:
            made.append(graph)
            return graph.forward

        combine = CompiledSum(limit, backend)
        for count in range(2, 2 + limit):
            levels = [torch.randn(4, 3) for _ in range(count)]
            torch.testing.assert_close(combine(levels, torch.ones(count), [4]), sum(levels, torch.zeros(4, 3)))
        assert len(made) == limit


def test_the_triton_kernel_is_the_eager_one() -> None:
    pytest.importorskip("triton")
    script = Path(__file__).parents[1] / "interpreted_kernels.py"
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "as eager", done.stderr


def test_without_triton_its_backend_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "adaptive_fusion.fusion.kernels_triton", raising=False)
    module = DeepStackFusion(FusionSpec("weighted", (1,), (0, 1), 8))
    with pytest.raises(ConfigError, match="'triton', which is not installed"):
        module.compile_kernels(backend="triton")
