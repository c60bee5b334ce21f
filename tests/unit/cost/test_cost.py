import json
import math
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptive_fusion.cost.estimate import CPU, GPU, SHARE_OF_PEAK, ModelShape, Rates, analytic_profile, device_rates
from adaptive_fusion.cost.fit import Sample, fit_profile
from adaptive_fusion.cost.fit_peaks import fit_peaks
from adaptive_fusion.cost.lengths import MAX_KINDS, LengthModel
from adaptive_fusion.cost.model import CostModel, Profile, Work, memory_terms, peak_gb, prompt_memory_terms
from adaptive_fusion.cost.profiles import load_profile, profile_path, read_profile, save_profile
from adaptive_fusion.decisions import Measurement, Prediction
from adaptive_fusion.errors import ConfigError
from adaptive_fusion.point import NATIVE, OperatingPoint
from adaptive_fusion.user_cache import user_cache_dir

KEY = {"model": "abc", "device": "cpu", "dtype": "float32", "attention": "sdpa", "torch": "2.14.1"}
TRUE = Profile(
    KEY,
    encode=(3.0, 0.4, 0.02, 2e-5, 1e-3, 2e-4),
    prefill=(4.0, 0.03, 1e-5),
    decode=(5.0, 0.5, 2e-3),
    memory=(0.01, 1e-5, 2e-8, 1e-6, 1e-8),
    context=(0.005, 1e-4, 4e-5, 2e-9, 2e-6),
)
POINTS = [
    NATIVE,
    OperatingPoint("weighted", 6, 0.5),
    OperatingPoint("gated", 12, adapter_rank=8),
    OperatingPoint("top", downsample=0.25),
]


def sample(
    rng: random.Random, *, noise: float = 0.0, concurrency: int = 1, slow: float = 1.0, true: Profile = TRUE
) -> Sample:
    """A measured request whose truth is `true`."""
    point = rng.choice(POINTS)
    patches = tuple(rng.randrange(64, 2304) for _ in range(rng.choice([1, 1, 2, 6])))
    visual = int(sum(patches) / 4 * point.downsample**2)
    batch, said = rng.choice([1, 1, 2]), rng.choice([20, 20, 500, 2000])
    source = rng.randrange(10**4, 10**6)
    work = Work(patches, visual + said * batch, rng.randrange(2, 80), batch, source_pixels=source)
    p = CostModel(true).predict(point, work)

    def noisy(value: float) -> float:
        return value * slow * math.exp(rng.gauss(0, noise))

    pre, encode, prefill, decode = (
        0.1 * p.encode_ms,
        0.9 * p.encode_ms,
        noisy(p.prefill_ms),
        noisy(p.decode_ms),
    )
    ttft = noisy(pre + encode) + prefill
    measured = Measurement(
        pre,
        encode,
        prefill,
        decode,
        ttft,
        ttft + decode,
        visual,
        work.prompt_tokens,
        int(work.new_tokens),
        sum(patches),
        p.peak_memory_gb * math.exp(rng.gauss(0, noise / 4)),
    )
    return point, replace(work, concurrency=concurrency), measured


def parts(p: Prediction) -> tuple[float, ...]:
    return p.encode_ms, p.prefill_ms, p.decode_ms, p.peak_memory_gb


def test_an_exact_fit_recovers_the_truth_on_requests_not_seen() -> None:
    rng = random.Random(0)
    model = CostModel(fit_profile([sample(rng) for _ in range(120)], KEY, TRUE.context[2]))
    for _ in range(50):
        point, work, _ = sample(rng)
        assert parts(model.predict(point, work)) == pytest.approx(parts(CostModel(TRUE).predict(point, work)), rel=1e-3)
    assert model.profile.samples == 120 and max(model.profile.errors.values()) < 1e-3


def test_a_noisy_fit_is_non_negative_close_and_enveloped() -> None:
    rng = random.Random(1)
    samples = [sample(rng, noise=0.1) for _ in range(150)]
    profile = fit_profile(samples, KEY, TRUE.context[2])
    held_out = [sample(rng, noise=0.1) for _ in range(200)]
    model = CostModel(profile)
    for name in ("encode", "prefill", "decode", "memory"):
        assert min(getattr(profile, name)) >= 0.0
    errors = sorted(abs(model.predict(p, w).latency_ms / m.latency_ms - 1) for p, w, m in held_out)
    assert errors[len(errors) // 2] < 0.08
    peaks = sorted(abs(model.predict(p, w).peak_memory_gb / m.peak_memory_gb - 1) for p, w, m in held_out)
    assert peaks[int(0.95 * len(peaks))] < 0.15
    over = [m.peak_memory_gb / (model.predict(p, w).peak_memory_gb * profile.memory_margin) for p, w, m in held_out]
    assert max(over) < 1.02 and profile.memory_margin < 1.3


def test_a_peak_is_the_largest_of_encoder_prompt_and_answer_and_no_sum() -> None:
    model = CostModel(TRUE)

    def dot(coefficients: tuple[float, ...], terms: tuple[float, ...]) -> float:
        return sum(c * t for c, t in zip(coefficients, terms, strict=True))

    def peak(work: Work) -> float:
        return model.predict(POINTS[2], work).peak_memory_gb

    c0, c1, c2, c3, c4 = TRUE.context
    large, long = Work((4000,), 100, 8), Work((64,), 5000, 8)
    assert peak(large) == pytest.approx(dot(TRUE.memory, memory_terms(POINTS[2], large)))
    assert peak(long) == pytest.approx(dot((c0, c1, c3, c4), prompt_memory_terms(long)))
    # What the encoder made before, and a text alone, leave the language model's.
    assert peak(replace(large, patches=(), prompt_tokens=5000)) == pytest.approx(peak(long) - 64 * c4)
    # A long answer needs its cache, whether it is expected or only counted.
    told = c0 + c2 * (100 + 2 * 9000) + c4 * 64
    assert peak(Work((64,), 100, 9000, 2)) == peak(Work((64,), 100, 8, 2, most_new_tokens=9000)) == pytest.approx(told)


def test_where_one_part_explains_all_peaks_the_fit_finds_it_and_takes_the_cache_as_it_is_told() -> None:
    c0, c1, _, c3, c4 = TRUE.context
    samples = [sample(random.Random(seed)) for seed in range(60)]
    truth = [c0 + c1 * w.prompt_tokens + c3 * w.prompt_tokens**2 / w.batch + c4 * sum(w.patches) for _, w, _ in samples]
    memory, context = fit_peaks([(p, w, gb) for (p, w, _), gb in zip(samples, truth, strict=True)], 1e-6)
    assert context[2] == 1e-6
    for (point, work, _), gb in zip(samples, truth, strict=True):
        assert peak_gb(memory, context, point, work) == pytest.approx(gb, rel=0.02)


def test_sharing_is_fitted_from_concurrent_requests() -> None:
    rng = random.Random(2)
    samples = [sample(rng) for _ in range(80)] + [sample(rng, concurrency=3, slow=1 + 0.4 * 2) for _ in range(20)]
    profile = fit_profile(samples, KEY, 0.0)
    assert profile.sharing == pytest.approx(0.4, rel=0.02)
    point, work, measured = sample(rng, concurrency=3, slow=1.8)
    assert CostModel(profile).predict(point, work).latency_ms == pytest.approx(measured.latency_ms, rel=0.02)


def test_unusable_samples_are_left_out_and_too_few_are_refused() -> None:
    rng = random.Random(3)
    good = [sample(rng) for _ in range(40)]
    broken = [(p, w, replace(m, prefill_ms=math.nan, peak_memory_gb=-1.0)) for p, w, m in good[:5]]
    assert fit_profile(good + broken, KEY, 0.0).prefill == pytest.approx(fit_profile(good, KEY, 0.0).prefill, rel=1e-6)
    with pytest.raises(ConfigError, match="3 usable samples; expected at least 8"):
        fit_profile(good[:3], KEY, 0.0)


works = st.builds(
    Work,
    patches=st.lists(st.integers(0, 10**6), max_size=40).map(tuple),
    prompt_tokens=st.integers(0, 10**6),
    new_tokens=st.floats(0, 1e5),
    batch=st.integers(1, 64),
    concurrency=st.integers(1, 64),
)


@settings(max_examples=100, deadline=None)
@given(works, st.sampled_from(POINTS), st.integers(1, 1000))
def test_predictions_are_finite_and_grow_with_work(work: Work, point: OperatingPoint, more: int) -> None:
    model = CostModel(TRUE)
    base = parts(model.predict(point, work))
    assert all(0 <= value < math.inf for value in base)
    for bigger in (
        replace(work, patches=(*work.patches, more)),
        replace(work, prompt_tokens=work.prompt_tokens + more),
        replace(work, new_tokens=work.new_tokens + more),
        replace(work, concurrency=work.concurrency + more),
    ):
        assert all(b >= a for a, b in zip(base, parts(model.predict(point, bigger)), strict=True))


def partitions(places: list[int]) -> Iterator[list[list[int]]]:
    """Every way of putting places into groups."""
    if not places:
        yield []
        return
    for rest in partitions(places[1:]):
        yield [[places[0]], *rest]
        for i, group in enumerate(rest):
            yield [*rest[:i], [places[0], *group], *rest[i + 1 :]]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 3000), min_size=1, max_size=5),
    st.tuples(st.floats(0, 100), st.floats(0, 1), st.floats(0, 1e-3)),
    st.sampled_from((0.0, 500.0)),
)
def test_no_other_way_to_prefill_a_batch_is_predicted_to_be_done_sooner(
    lengths: list[int], prefill: tuple[float, float, float], hidden: float
) -> None:
    model = CostModel(replace(TRUE, prefill=prefill, hidden_tokens=hidden))
    first = max(prefill[0], TRUE.decode[0])  # a pass takes no less than a step of decoding
    counted = CostModel(replace(model.profile, prefill=(first, *prefill[1:])))

    def took(groups: list[list[int]]) -> float:
        passes = tuple((len(group), max(lengths[place] for place in group)) for group in groups)
        work = Work((), len(lengths) * max(lengths), batch=len(lengths), passes=passes)
        return counted.predict(NATIVE, work).prefill_ms

    groups = model.passes(lengths)
    assert sorted(place for group in groups for place in group) == list(range(len(lengths)))
    least = min(took(each) for each in partitions(list(range(len(lengths)))))
    assert took(groups) == pytest.approx(least, rel=1e-9, abs=1e-9)
    own, *others = [Work((), length, 8.0) for length in lengths]
    assert counted.predict(NATIVE, model.beside(own, others)).prefill_ms == pytest.approx(least, rel=1e-9, abs=1e-9)


def test_rows_that_have_ended_cost_nothing_where_they_can_leave() -> None:
    own, short = Work((), 100, 65.0), Work((), 100, 5.0)
    none, parting, padded = (
        model.predict(NATIVE, model.beside(own, others)).decode_ms
        for model, others in (
            (CostModel(TRUE), ()),
            (CostModel(TRUE), (short, short)),
            (CostModel(TRUE, parts=False), (short, short)),
        )
    )
    assert none < parting < padded
    each_row = 64 * TRUE.decode[1]
    assert parting - none == pytest.approx(2 * (5 / 65) * (each_row + 64 * TRUE.decode[2] * (100 + 65 / 2)), rel=1e-6)


@pytest.mark.parametrize(
    "values",
    [{"new_tokens": math.nan}, {"batch": 0}, {"concurrency": 0}, {"prompt_tokens": -1}, {"patches": (4, -4)}],
)
def test_absurd_work_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(values))):
        Work(**values)


SHAPE_2B = ModelShape(24, 1024, 4096, 1536, 28, 2048, 6144, 16, 8, 128, 151_936)


def test_the_analytic_estimate_has_the_right_magnitude_at_the_2b_shape() -> None:
    # encode: 24 x (8 x 1024^2 + 4 x 1024 x 4096) x 1024 patches + attention = 0.72 TFLOP;
    # prefill: 1.4 G weights x 2 x 276 tokens = 0.78 TFLOP
    model = CostModel(analytic_profile(SHAPE_2B, KEY, rates=Rates(1e12, 1e11)))
    full = model.predict(NATIVE, Work((1024,), 276, 10))
    assert full.encode_ms == pytest.approx(720, rel=0.1)
    assert full.prefill_ms == pytest.approx(780, rel=0.1)
    assert full.decode_ms / 9 == pytest.approx(1.72e9 * (2 / 1e11 + 2 / 1e12) * 1e3, rel=0.05)
    quarter = model.predict(replace(NATIVE, downsample=0.5), Work((1024,), 84, 10))
    assert quarter.encode_ms == full.encode_ms and quarter.prefill_ms < 0.4 * full.prefill_ms
    assert 0 < quarter.peak_memory_gb < full.peak_memory_gb < 1


def test_what_launching_hides_takes_no_less_in_an_estimate() -> None:
    model = CostModel(analytic_profile(SHAPE_2B, KEY, rates=Rates(1e15, 5e12, 1.0)))
    small, larger, large = (model.predict(NATIVE, Work((n,), n // 4 + 20, 3)) for n in (256, 1024, 65536))
    # A millisecond a layer: 24 in the encoder and 28 in the language model, beside what they add up to themselves.
    assert 24 < small.encode_ms < larger.encode_ms < 30 < large.encode_ms
    assert 28 < small.prefill_ms < larger.prefill_ms < 33 < large.prefill_ms
    assert small.decode_ms == pytest.approx(2 * 28, rel=0.01)


def test_a_gpu_is_taken_for_what_its_clocks_say(monkeypatch: pytest.MonkeyPatch) -> None:
    assert device_rates("cpu") == CPU and device_rates("mps") == CPU
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert device_rates("cuda:0") == GPU
    about = SimpleNamespace(
        major=9,
        minor=0,
        multi_processor_count=132,
        clock_rate=1_980_000,
        memory_bus_width=6144,
        memory_clock_rate=3_201_000,
    )  # of an H200
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _device: about)
    rates = device_rates("cuda:0")
    # Its peaks are 990 TFLOP/s and 4.8 TB/s by the datasheet.
    assert 0.8 < rates.flops_per_s / (SHARE_OF_PEAK * 990e12) < 1.2
    assert 0.8 < rates.bytes_per_s / (SHARE_OF_PEAK * 4.8e12) < 1.2
    monkeypatch.setattr(
        "torch.cuda.get_device_properties", lambda _device: SimpleNamespace(major=7, minor=5, multi_processor_count=40)
    )
    assert device_rates("cuda:0") == GPU  # clocks that an older torch does not tell


def test_a_fit_finds_what_launching_hides() -> None:
    rng, true = random.Random(2), replace(TRUE, hidden_pairs=3e6, hidden_tokens=500.0)
    samples = [sample(rng, true=true) for _ in range(150)]
    fitted = CostModel(fit_profile(samples, KEY, 0.0))
    assert fitted.profile.hidden_pairs > 0 and fitted.profile.hidden_tokens > 0
    plain = CostModel(replace(fit_profile(samples, KEY, 0.0), hidden_pairs=0.0, hidden_tokens=0.0))
    unseen = [sample(rng, true=true) for _ in range(100)]
    errors = [[abs(model.predict(p, w).ttft_ms / m.ttft_ms - 1) for p, w, m in unseen] for model in (fitted, plain)]
    assert sorted(errors[0])[95] < 0.1 < sorted(errors[1])[95]
    assert fit_profile([sample(rng) for _ in range(150)], KEY, 0.0).hidden_tokens == 0.0  # nothing is hidden


def test_profiles_survive_the_disk_and_are_keyed(tmp_path: Path) -> None:
    assert load_profile(tmp_path, KEY)[0] is None
    path = save_profile(tmp_path, TRUE)
    assert path == profile_path(tmp_path, dict(reversed(KEY.items()))) and path.parent.parent == tmp_path
    assert load_profile(tmp_path, KEY)[0] == TRUE
    assert [p.name for p in path.parent.iterdir()] == [path.name], "no temporary file is left"
    other = {**KEY, "dtype": "bfloat16"}
    assert profile_path(tmp_path, other) != path and load_profile(tmp_path, other)[0] is None
    found, why = read_profile(path, other)
    assert found is None and "dtype was float32, is bfloat16" in why
    assert user_cache_dir({"XDG_CACHE_HOME": str(tmp_path)}) == tmp_path / "adaptive_fusion"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda d: "{", "not valid JSON"),
        (lambda d: "[" * 100_000, "not valid JSON"),
        (lambda d: "[]", "no table"),
        (lambda d: "x" * (2 << 20), "larger"),
        (lambda d: json.dumps({**d, "version": 99}), "99"),
        (lambda d: json.dumps({**d, "extra": 1}), "extra"),
        (lambda d: json.dumps({**d, "encode": [1, 2]}), "2 coefficients"),
        (lambda d: json.dumps({**d, "decode": "fast"}), "fast"),
        (lambda d: json.dumps({**d, "prefill": [1, math.nan, 1]}), "nan"),
        (lambda d: json.dumps({**d, "prefill": [1, -1, 1]}), "-1"),
        (lambda d: json.dumps({**d, "memory": [1, "1", 1, 1, 1]}), "'1'"),
        (lambda d: json.dumps({**d, "memory_margin": 1e9}), "memory_margin"),
        (lambda d: json.dumps({**d, "key": 3}), "tables"),
    ],
)
def test_broken_profile_files_are_refused_with_a_reason(tmp_path: Path, change: Any, says: str) -> None:
    path = save_profile(tmp_path, TRUE)
    path.write_text(change(TRUE.to_dict()))
    found, why = load_profile(tmp_path, KEY)
    assert found is None and says in why and str(tmp_path) not in why
    path.unlink()
    path.mkdir()
    assert load_profile(tmp_path, KEY)[0] is None


def test_answer_lengths_are_learned_per_kind() -> None:
    model = LengthModel(prior=64)
    assert model.expected("read", 1000) == 64 and model.expected("read", 10) == 10
    for _ in range(60):
        model.observe("read", 8)
        model.observe("describe", 120)
    assert model.expected("read", 1000) == pytest.approx(8) and model.expected("describe", 1000) == pytest.approx(120)
    assert 8 < model.expected("new", 1000) < 120
    for _ in range(20):
        model.observe("describe", 30, finished=False)  # cut off short of the expectation: says nothing
    assert model.expected("describe", 1000) == pytest.approx(120)
    for _ in range(200):
        model.observe("describe", 200, finished=False)
    assert model.expected("describe", 1000) > 180
    copy = LengthModel.from_state(json.loads(json.dumps(model.state())))
    assert copy.state() == model.state()


def test_length_kinds_are_bounded_and_bad_lengths_ignored() -> None:
    model = LengthModel()
    model.observe("kept", 10)
    for index in range(3 * MAX_KINDS):
        model.expected("kept", 100)
        model.observe(f"kind {index}", 50)
    assert len(model.state()["kinds"]) == MAX_KINDS and "kept" in model.state()["kinds"]
    before = model.state()
    for bad in (0, -5, math.nan, math.inf):
        model.observe("kept", bad)  # type: ignore[arg-type]
    assert model.state() == before
    for state in ({}, {"version": 1}, {**before, "kinds": {"a": [math.nan, 1]}}, {**before, "all": [1]}):
        with pytest.raises(ConfigError):
            LengthModel.from_state(state)
