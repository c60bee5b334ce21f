"""Memory budgets of many requests: what is counted is what was measured, and the errors are those of the pairs."""

from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import pytest
import torch

from adaptive_fusion.calibrate import calibrate, relative_errors
from adaptive_fusion.cost import plan
from adaptive_fusion.cost.model import Profile
from adaptive_fusion.features.prompts import prompt_kind
from adaptive_fusion.point import NATIVE
from adaptive_fusion.runner import AdaptiveRunner


@pytest.fixture(scope="module")
def benchmark(load_benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return load_benchmark("memory")


class Fixed:
    """A meter that always reads the same peak."""

    free_of_charge = True

    def __init__(self, peak_gb: float | None) -> None:
        self.peak_gb = peak_gb

    def start(self) -> None: ...

    def free_gb(self) -> None: ...

    def stop(self) -> float | None:
        return self.peak_gb


@pytest.mark.parametrize(("peak_gb", "exceeds"), [(1e-6, False), (1e3, True), (None, False)])
def test_what_exceeds_its_budget_is_counted(
    tiny_dense: Any, processor: Any, benchmark: ModuleType, peak_gb: float | None, exceeds: bool
) -> None:
    runner = AdaptiveRunner(tiny_dense, processor, policy="reference-latency", meter=Fixed(peak_gb))
    steps: list[int] = []
    found = benchmark.keep_budgets(runner, 4, sides=(40, 64), progress=lambda done, _total, _stage: steps.append(done))
    feasible = 4 - found["infeasible"] - found["unmeasured"]
    assert steps == [0, 1, 2, 3, 4] and found["requests"] == 4
    assert found["unmeasured"] == (4 if peak_gb is None else 0)
    assert found["exceeded"] == (feasible if exceeds else 0)
    if peak_gb is not None:
        assert feasible >= 1 and (found["worst"] > 1.02) == exceeds and found["errors"]["p95"] > 0.5


def test_errors_of_known_pairs() -> None:
    found = relative_errors([(1.1, 1.0), (0.9, 1.0), (1.8, 2.0)])
    assert found["median"] == pytest.approx(0.1) and found["p95"] == pytest.approx(0.1)
    assert found["bias"] == pytest.approx(-0.1)
    # Of a constant c the larger of c - 1 and 1 - c / 2 is least at 4/3.
    assert found["constant_p95"] == pytest.approx(1 / 3, abs=0.005)


def test_where_memory_costs_nothing_one_request_gives_peak_and_times(
    tiny_dense: Any, processor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adaptive_fusion.cost.plan.SHAPES", ((64, 64), (48, 64), (64, 48)))
    totals: dict[bool, int] = {}
    for free in (True, False):
        meter = Fixed(0.5)
        meter.free_of_charge = free
        meter.skip = lambda: None  # type: ignore[attr-defined]
        runner = AdaptiveRunner(tiny_dense, processor, policy="native", meter=meter)
        seen: set[int] = set()
        found = calibrate(
            runner, repeats=1, save=False, progress=lambda _done, total, _stage, seen=seen: seen.add(total)
        )
        [totals[free]] = seen
        assert all(sum(getattr(found.profile, stage)) > 0 for stage in ("encode", "prefill", "decode"))
        assert found.profile.errors["memory"] < 0.01  # always the same peak
    alone = {free: total - len(plan.BATCHES) for free, total in totals.items()}  # batches never say a peak
    assert alone[True] * 3 == alone[False] * 2


def test_a_gpu_is_calibrated_with_images_of_use(tiny_dense: Any, processor: Any) -> None:
    adapter = AdaptiveRunner(tiny_dense, processor, policy="native").adapter
    told = {
        "packed": True,
        "restrict": adapter.restrict,
        "model": adapter.model,
        "native_pixels": lambda size: min(size.height * size.width, 3_000_000),
    }
    gpu, cpu = (cast(Any, SimpleNamespace(device=torch.device(kind), **told)) for kind in ("cuda", "cpu"))
    areas = [width * height for width, height in plan.shapes(gpu)]
    assert 2_900_000 < max(areas) < 3_100_000 and min(areas) < 200_000 and len(areas) < len(plan.shapes(cpu))
    assert max(each.sides[0] * each.sides[1] for each in plan.check_requests(gpu) if each.sides) > 2_000_000
    asked = plan.requests(gpu)
    first = plan.first(gpu, asked)
    same = [each._replace(tokens=0) for each in asked]
    assert [each._replace(tokens=0) for each in first] == same  # every kernel is there when it is measured
    assert {each.tokens for each in first} == {min(each.tokens for each in asked)}
    assert plan.first(cpu, plan.requests(cpu)) == plan.requests(cpu)


def test_prompts_are_measured_that_need_more_memory_than_their_images(reference_model: Any, processor: Any) -> None:
    adapter = AdaptiveRunner(reference_model, processor, policy="native").adapter
    for listed in (plan.requests(adapter), plan.check_requests(adapter)):
        long = [each for each in listed if each.words]
        assert {each.sides is None for each in long} == {True, False}
        assert len({(each.sides, len(each.prompt)) for each in long}) == len(long)
        most = adapter.model.config.get_text_config().max_position_embeddings
        assert max(each.words for each in long) <= most // 2
    alone = plan.requests(adapter)
    assert sum(each.sides is None for each in alone) >= 5


def test_memory_is_counted_for_answers_that_may_come_and_not_for_endless_ones(tiny_dense: Any, processor: Any) -> None:
    none = (0.0,) * 5
    by_cache = Profile({}, (1.0, *none), (1.0, 0.0, 0.0), (1.0, 0.0, 0.0), none, (0.0, 0.0, 1e-6, 0.0, 0.0))
    runner = AdaptiveRunner(tiny_dense, processor, policy="native", profile=by_cache)

    def counted(most: int) -> float:
        """Tokens of the answer, beside those of the prompt."""
        [native] = runner.offers(None, "Anything?", max_new_tokens=most)[1]
        return native.predicted.peak_memory_gb * 1e6 - runner.work(None, "Anything?", NATIVE, 1).prompt_tokens

    assert [counted(most) for most in (20, 200, 10_000)] == pytest.approx([20, 200, 256])
    for _ in range(60):
        runner.lengths.observe("", 500)
    runner.lengths.observe(prompt_kind("Anything?"), 500)
    assert counted(10_000) == pytest.approx(2000, rel=0.02)
