"""Policies: routing, ladders, and files that round-trip exactly or are refused with what was found."""

import json
import math
import tomllib
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pytest
import tomli_w
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression

from adaptive_fusion.budget import Budget
from adaptive_fusion.errors import AdaptiveFusionError, ConfigError, PolicyError
from adaptive_fusion.features.complexity import FEATURE_NAMES, VERSION, Complexity
from adaptive_fusion.point import DOWNSAMPLES, FUSIONS, LAYERS, MIN_PIXELS, NATIVE, RANKS, OperatingPoint
from adaptive_fusion.policy.policy import Policy
from adaptive_fusion.policy.predictors import LinearModel, Tree, TreeModel
from adaptive_fusion.policy.router import EstimatorRouter, Inputs, PlainRouter, QualityModel, constant_router
from adaptive_fusion.policy.rungs import Rung

FEATURE = FEATURE_NAMES[0]
CHEAP = OperatingPoint("weighted", 6, 0.5, adapter_rank=4)
RICH = OperatingPoint("gated", 12, 1.0, adapter_rank=8)


def image(value: float, kind: Any = "image") -> Complexity:
    return Complexity(score=value, features={FEATURE: value}, version=VERSION, kind=kind)


def policy(**changes: Any) -> Policy:
    """A policy that reads one feature and the prompt, with every optional part but fusion weights."""
    inputs = Inputs((FEATURE, "prompt_read"))
    stump = Tree((0, 0, 0), (0.5, 0, 0), (1, -1, -1), (2, -1, -1), (True, False, False), (0, -0.1, 0.1))
    parts: dict[str, Any] = {
        "name": "mine",
        "description": 'one "line" = [with] signs, 中文',
        "router": PlainRouter(inputs, LinearModel((8.0, 2.0), (0.5, 0.0), -4.0)),
        "threshold": 0.5,
        "lanes": {
            "weighted": (Rung(CHEAP, 0.97, 0.25), Rung(CHEAP, 0.9, 1 / 7)),
            "gated": (Rung(RICH, 1.0), Rung(OperatingPoint("gated", 12, 0.5, 1 << 20, 8), 0.8)),
            "video": (Rung(RICH, 1.0), Rung(OperatingPoint(downsample=0.5, max_fps=0.5), 0.8, 0.5)),
        },
        "budget": Budget(latency_ms=800, attainment=0.99),
        "explore": 0.05,
        "quality_model": QualityModel(inputs, {Rung(RICH).name: TreeModel((stump,), 0.7)}),
    }
    return Policy(**parts | changes)


def test_stills_go_by_the_threshold_clips_and_text_by_kind() -> None:
    mine = policy()
    assert mine.route(image(0.1)).lane == "weighted"
    assert mine.route(image(0.9)) == (mine.route(image(0.9)).score, "gated")
    assert mine.route(image(0.5)) == (0.5, "gated")  # at the threshold the image counts as complex
    assert [mine.route(image(value, "video")).lane for value in (0.0, 1.0)] == ["video", "video"]
    assert mine.route(None) == (0.0, "text")
    assert mine.ladder("text") == (Rung(NATIVE),)
    with pytest.raises(PolicyError, match="lane is 'fast'; expected one of weighted, gated, video, text"):
        mine.ladder("fast")


def test_the_threshold_moves_the_lane_and_not_the_score() -> None:
    scores = {threshold: policy(threshold=threshold).route(image(0.5)) for threshold in (0.2, 0.8)}
    assert [route.lane for route in scores.values()] == ["gated", "weighted"]
    assert len({route.score for route in scores.values()}) == 1


def test_the_question_counts() -> None:
    mine = policy()
    assert mine.route(image(0.4), "Describe the screen.").lane == "weighted"
    assert mine.route(image(0.4), "Read the text.").lane == "gated"


def test_a_quality_model_takes_the_place_of_static_figures() -> None:
    mine = policy()
    assert [rung.quality for rung in mine.ladder("gated")] == [1.0, 0.8]
    assert [rung.quality for rung in mine.ladder("gated", image(0.2))] == pytest.approx([0.6, 0.8])
    assert [rung.quality for rung in mine.ladder("gated", image(0.9))] == pytest.approx([0.8, 0.8])
    points = [rung.point for rung in mine.ladder("gated", image(0.9))]
    assert points == [rung.point for rung in mine.ladder("gated")]


@settings(max_examples=100, deadline=None)
@given(
    st.floats(0.001, 1.0),
    st.one_of(st.none(), st.integers(MIN_PIXELS, 1 << 24)),
    st.integers(1, 1 << 30),
)
def test_a_share_resolves_to_pixels_within_every_limit(share: float, cap: int | None, native: int) -> None:
    rung = Rung(OperatingPoint("gated", max_pixels=cap), 1.0, share)
    point = rung.resolve(native)
    if share == 1.0:
        assert point == rung.point
        return
    assert point.max_pixels is not None
    assert point.max_pixels <= max(MIN_PIXELS, native * share + 1)
    assert cap is None or point.max_pixels <= cap
    if cap is None and MIN_PIXELS <= native * share <= 1 << 28:
        assert abs(point.max_pixels - native * share) <= 1
    assert point.fusion == "gated"
    assert Rung.from_dict(rung.to_dict()) == rung


@pytest.mark.parametrize("native", [0, -5, 1.5, True, None])
def test_native_pixels_must_be_a_positive_integer(native: Any) -> None:
    with pytest.raises(ConfigError, match="native_pixels is"):
        Rung(NATIVE, 1.0, 0.5).resolve(native)


def test_a_rungs_name_tells_rungs_apart() -> None:
    assert Rung(CHEAP, 0.9, 0.25).name == "weighted6r4@0.5/25%"
    assert Rung(NATIVE).name == NATIVE.name == "native@1"


def test_a_saved_policy_comes_back_exactly(tmp_path: Path) -> None:
    mine = policy()
    folder = mine.save(tmp_path / "new" / "folder")
    for source in (folder, folder / "policy.toml", str(folder)):
        again = Policy.load(source)
        assert again == mine
        assert again.to_toml() == mine.to_toml()
    again.save(tmp_path / "twice")
    files = sorted(path.name for path in folder.iterdir())
    assert files == ["policy.toml", "quality.json", "router.json"]
    for name in files:
        assert (folder / name).read_bytes() == (tmp_path / "twice" / name).read_bytes()


def test_fusion_weights_travel_with_the_policy(tmp_path: Path) -> None:
    (tmp_path / "gated12r8.safetensors").write_bytes(b"weights")
    mine = policy(fusion_weights=(tmp_path / "gated12r8.safetensors",))
    again = Policy.load(mine.save(tmp_path / "saved"))
    assert [path.read_bytes() for path in again.fusion_weights] == [b"weights"]
    assert again.fusion_weights[0].parent == tmp_path / "saved"
    assert again.save(tmp_path / "saved") == tmp_path / "saved"  # onto itself
    (tmp_path / "saved" / "gated12r8.safetensors").unlink()
    with pytest.raises(PolicyError, match=r"'gated12r8.safetensors', which is not in its folder"):
        Policy.load(tmp_path / "saved")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 3}, r"schema version 3; expected 1 or 2"),
        ({"schema": None}, r"schema version None"),
        ({"name": "../up"}, r"policy name is '../up'"),
        ({"name": 3}, r"policy name is 3"),
        ({"threshold": 1.5}, r"threshold is 1.5; expected a number from 0 to 1"),
        ({"threshold": "high"}, r"threshold is 'high'"),
        ({"explore": float("nan")}, r"explore is nan"),
        ({"treshold": 0.5}, r"unknown \['treshold'\] keys; expected .*threshold"),
        ({"lanes": None}, r"missing \['lanes'\]"),
        ({"lanes.fast": []}, r"lanes has unknown \['fast'\] keys; expected gated, video, weighted"),
        ({"lanes.video": None}, r"lanes has missing \['video'\]"),
        ({"lanes.video": []}, r"lane video has points \[\]"),
        ({"lanes.video": "native"}, r"lane video is str"),
        ({"lanes.gated": [{"fusion": "native"}]}, r"no quality"),
        ({"lanes.gated": [{"quality": 1.0}, {"quality": 0.9}]}, r"\['native@1', 'native@1'\]"),
        ({"lanes.gated": [{"quality": 0.5}, {"quality": 0.9, "fusion": "top"}]}, r"best first"),
        ({"lanes.gated": [{"quality": 2}]}, r"quality is 2; expected a number from 0 to 1"),
        ({"lanes.gated": [{"quality": 1, "pixel_share": 0}]}, r"pixel_share is 0;"),
        (
            {"lanes.gated": [{"quality": 1, "fusion": "magic"}]},
            r"fusion is 'magic'; expected one of gated, native",
        ),
        ({"lanes.gated": [{"quality": 1, "layers": 5}]}, r"layers is 5; expected one of 3, 6, 9, 12"),
        ({"lanes.gated": [{"quality": 1, "zoom": 2}]}, r"unknown knobs \['zoom'\]"),
        ({"budget": {"latency_ms": -1}}, r"latency_ms is -1"),
        ({"budget": {"patience": 1}}, r"patience"),
        ({"budget": 5}, r"budget is 5"),
        ({"features.names": ["colour"]}, r"unknown features \['colour'\]"),
        ({"features.names": []}, r"router.json has features .*prompt_read.*expected"),
        ({"features.complexity": "older"}, r"version 'older'; expected"),
        ({"router": "../router.json"}, r"'../router.json'; expected a plain name"),
        ({"router": "/etc/passwd.json"}, r"expected a plain name"),
        ({"router": "..json"}, r"expected a plain name|not in its folder"),
        ({"router": "other.json"}, r"not in its folder"),
        ({"router": "router.pkl"}, r"ending in .json or .joblib"),
        ({"quality_model": "a/b.json"}, r"expected a plain name"),
        ({"fusion_weights": ["w.bin"]}, r"ending in .safetensors"),
        ({"fusion_weights": "w.safetensors"}, r"expected a list of .safetensors"),
    ],
)
def test_a_wrong_file_is_refused_with_what_was_found(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    policy().save(tmp_path)
    values: dict[str, Any] = tomllib.loads((tmp_path / "policy.toml").read_text())
    for key, value in change.items():
        *tables, last = key.split(".")
        target = values
        for table in tables:
            target = target[table]
        if value is None:
            del target[last]
        else:
            target[last] = value
    (tmp_path / "policy.toml").write_text(tomli_w.dumps(values))
    with pytest.raises(ConfigError, match=message) as caught:
        Policy.load(tmp_path)
    assert str(tmp_path) not in str(caught.value)


def test_a_router_linked_from_elsewhere_is_refused(tmp_path: Path) -> None:
    policy().save(tmp_path / "real")
    policy().save(tmp_path / "linked")
    (tmp_path / "linked" / "router.json").unlink()
    (tmp_path / "linked" / "router.json").symlink_to(tmp_path / "real" / "router.json")
    with pytest.raises(PolicyError, match="link out of its folder"):
        Policy.load(tmp_path / "linked")
    (tmp_path / "alias").symlink_to(tmp_path / "real")  # a link to the whole folder is the user's own choice
    assert Policy.load(tmp_path / "alias") == policy()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("policy.toml", b"schema = "),
        ("policy.toml", b"\xff\xfe"),
        ("policy.toml", b"a = " + b"[" * 100_000),
        ("router.json", b"{"),
        ("router.json", b"[]"),
        ("router.json", b'{"schema": 1, "features": NaN}'),
        ("router.json", b"[" * 100_000),
        ("router.json", b'{"schema": ' + b"1" * 5000 + b"}"),
        ("policy.toml", b"schema = " + b"1" * 5000),
        ("quality.json", b"null"),
    ],
)
def test_broken_text_is_refused_by_file_name(tmp_path: Path, name: str, content: bytes) -> None:
    policy().save(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(
        PolicyError,
        match=name if content[:1] not in b"[n" or len(content) > 9 else "router has|quality model has",
    ):
        Policy.load(tmp_path)


class Touch:
    """Unpickling this makes a file: what an attacker's pickle would do."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path(self.path),))


def test_pickled_routers_load_only_where_allowed(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).normal(size=(50, 2))
    router = EstimatorRouter(Inputs((FEATURE, "prompt_read")), LogisticRegression().fit(rows, rows[:, 0] > 0))
    mine = policy(router=router)
    mine.save(tmp_path)
    with pytest.raises(PolicyError, match=r"router.joblib is pickled.*allow_pickle=True"):
        Policy.load(tmp_path)
    again = Policy.load(tmp_path, allow_pickle=True)
    assert again.route(image(0.7), "Read it") == mine.route(image(0.7), "Read it")
    joblib.dump(Touch(str(tmp_path / "owned")), tmp_path / "router.joblib")
    with pytest.raises(PolicyError):
        Policy.load(tmp_path)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    "name",
    [
        "",
        "fastest",
        "Balanced",
        "balanced/",
        "../balanced",
        "balanced/../balanced",
        "policies/nope",
        "\0",
        "x" * 5000,
        ".",
    ],
)
def test_only_shipped_names_are_names(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        PolicyError,
        match=r"unknown policy .*balanced, latency, native, quality, reference-balanced|holds no policy.toml",
    ):
        Policy.load(name)


def test_a_shipped_name_wins_over_a_folder_and_a_path_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy().save(tmp_path / "native")
    monkeypatch.chdir(tmp_path)
    assert Policy.load("native").name == "native"
    assert Policy.load("./native").name == "mine"
    assert Policy.load(Path("native")).name == "mine"


LEGACY = {
    "num_fused_layers": 6,
    "fusion_strategy": "weighted",
    "use_adapter": True,
    "adapter_r": 4,
    "downsample_ratio": 0.5,
}


@pytest.mark.parametrize("wrap", [lambda values: values, lambda values: {"vision_tower": values}])
def test_the_older_form_is_read_and_written(tmp_path: Path, wrap: Any) -> None:
    path = tmp_path / "my config.v2.json"
    path.write_text(json.dumps(wrap(LEGACY)))
    mine = Policy.load(path)
    assert {rung for lane in ("weighted", "gated", "video") for rung in mine.ladder(lane)} == {Rung(CHEAP)}
    assert mine.name == "my-config-v2"
    assert 0 < mine.route(image(0.4)).score < 1
    assert mine.to_legacy() == {"vision_tower": LEGACY}
    assert Policy.load(mine.save(tmp_path / "as-toml")).to_legacy() == {"vision_tower": LEGACY}


@settings(max_examples=60, deadline=None)
@given(
    st.builds(
        OperatingPoint,
        st.sampled_from(FUSIONS),
        st.sampled_from(LAYERS),
        st.sampled_from(DOWNSAMPLES),
        adapter_rank=st.sampled_from(RANKS),
    )
)
def test_every_point_that_the_older_form_can_hold_survives_it(point: OperatingPoint) -> None:
    whole = Policy("one", constant_router(), 0.5, dict.fromkeys(("weighted", "gated", "video"), (Rung(point),)))
    assert Policy.from_legacy(json.loads(json.dumps(whole.to_legacy()))).ladder("gated") == (Rung(point),)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_fused_layers": 5}, r"num_fused_layers is 5; expected one of 3, 6, 9, 12"),
        ({"fusion_strategy": "magic"}, r"fusion_strategy is 'magic'; expected one of gated"),
        ({"fusion_strategy": ...}, r"missing \['fusion_strategy'\]"),
        ({"use_adapter": 1}, r"use_adapter is 1; expected true or false"),
        ({"adapter_r": 0}, r"use_adapter is true and adapter_r is 0"),
        ({"adapter_r": -4}, r"adapter_r is -4; expected one of 0, 4, 8, 16"),
        ({"downsample_ratio": 0.3}, r"downsample_ratio is 0.3; expected one of 1.0, 0.5, 0.25"),
        ({"downsample_ratio": "half"}, r"downsample_ratio is 'half'"),
        ({"downsample": 0.5}, r"unknown \['downsample'\] keys; expected .*downsample_ratio"),
    ],
)
def test_wrong_older_files_are_refused_in_their_own_words(change: dict[str, Any], message: str) -> None:
    values = {key: value for key, value in {**LEGACY, **change}.items() if value is not ...}
    with pytest.raises(PolicyError, match=message):
        Policy.from_legacy({"vision_tower": values})


def test_what_the_older_form_cannot_hold_is_not_written() -> None:
    with pytest.raises(PolicyError, match=r"mine has .*; the vision_tower form holds one point"):
        policy().to_legacy()
    point = OperatingPoint(max_pixels=4096)
    limited = Policy("p", constant_router(), 0.5, dict.fromkeys(("weighted", "gated", "video"), (Rung(point),)))
    with pytest.raises(PolicyError, match="limits pixels"):
        limited.to_legacy()
    with pytest.raises(AdaptiveFusionError, match="vision_tower is list"):
        Policy.from_legacy([])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lanes": {**policy().lanes, "video": NATIVE}}, "lane video is OperatingPoint.*expected a tuple of rungs"),
        ({"lanes": {**policy().lanes, "gated": (NATIVE,)}}, "lane gated is .*expected a tuple of rungs"),
        ({"fusion_weights": ("gated.safetensors",)}, "fusion_weights is .*expected a tuple of paths"),
        ({"fusion_weights": "gated.safetensors"}, "fusion_weights is .*expected a tuple of paths"),
    ],
)
def test_parts_of_another_kind_are_refused_where_the_policy_is_built(change: dict[str, Any], message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        policy(**change)


@pytest.mark.parametrize("name", [None, 5, b"balanced", ["balanced"]])
def test_a_policy_is_asked_for_by_name_or_path(name: Any) -> None:
    with pytest.raises(PolicyError, match=r"policy is .*expected a path or one of .*balanced"):
        Policy.load(name)


@pytest.mark.parametrize("wrong", [None, pytest.param(10**400, id="10^400"), "native", [NATIVE]])
def test_rungs_and_points_are_tables(wrong: Any) -> None:
    with pytest.raises(PolicyError, match=r"rung is .*expected a table"):
        Rung.from_dict(wrong)
    with pytest.raises(ConfigError, match=r"operating point is .*expected a table of fusion, layers"):
        OperatingPoint.from_dict(wrong)
    with pytest.raises(PolicyError, match=r"point is .*expected an OperatingPoint"):
        Rung(wrong)
    with pytest.raises(ConfigError, match="unknown knobs"):
        OperatingPoint.from_dict({1: 2, "layer": 6})  # type: ignore[dict-item]


@pytest.mark.parametrize("fps", [0, -1, math.nan, math.inf, 121, pytest.param(10**400, id="10^400"), True, "2"])
def test_a_points_frame_rate_is_in_range(fps: Any) -> None:
    with pytest.raises(ConfigError, match=f"max_fps is {fps!r}; expected"):
        OperatingPoint(max_fps=fps)
