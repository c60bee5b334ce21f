"""Where lanes begin and which rungs stay, on labels whose best answer is known; and the recipe that uses it."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from learning_data import CHEAP, MIDDLE, RUNGS, STRONG, base_policy, rung, subject, write_jsonl

from adaptive_fusion.errors import AdaptiveFusionError, ConfigError
from adaptive_fusion.learning.data.dataset import Dataset
from adaptive_fusion.learning.data.labels import label_record
from adaptive_fusion.learning.data.matrix import build_dataset
from adaptive_fusion.learning.fitting.ladders import choose_lanes, prune
from adaptive_fusion.policy.policy import LANES, Policy

RECIPE = Path(__file__).resolve().parents[4] / "training" / "policies" / "train_policies.py"
TINY = "weighted3@0.25"
COSTS = {STRONG: 100.0, MIDDLE: 70.0, CHEAP: 30.0, TINY: 20.0}
LANES_OFFERED = {
    "weighted": (rung(MIDDLE), rung(CHEAP), rung(TINY)),
    "gated": (rung(STRONG), rung("gated3@0.5")),
    "video": (rung(STRONG), rung(CHEAP), rung(TINY)),
}


def dataset(folder: Path, *, tiny_keeps: float, half_keeps: float = 0.7) -> Dataset:
    """Simple stills keep everything at CHEAP and a share at TINY; hard ones only at STRONG; clips down to CHEAP."""
    rng = np.random.default_rng(0)
    records = []
    for i in range(400):
        row = rng.normal(size=4)
        hard, clip = row[0] > 0, i % 5 == 0
        kept = {STRONG: 0.9, MIDDLE: 0.6 if hard else 0.9, CHEAP: 0.3 if hard else 0.9, "gated3@0.5": half_keeps}
        kept[TINY] = 0.2 if hard else 0.9 * tiny_keeps
        if clip:
            kept = {STRONG: 0.9, CHEAP: 0.9, TINY: 0.4, MIDDLE: 0.9, "gated3@0.5": 0.9}
        known = subject(row, i, kind="video" if clip else "image")
        costs = COSTS | {"gated3@0.5": 60.0}
        records.append(label_record(known, "oracle", quality=kept, reference_quality=0.9, cost=costs))
    path = write_jsonl(folder / "l.jsonl", records)
    return build_dataset([path], cheap=CHEAP, rungs=[*RUNGS, TINY, "gated3@0.5"])


@pytest.mark.parametrize(("tiny_keeps", "begins"), [(1.0, TINY), (0.5, CHEAP)])
def test_lanes_begin_where_the_whole_costs_least_within_the_tolerance(
    tiny_keeps: float, begins: str, tmp_path: Path
) -> None:
    lanes, tried = choose_lanes(LANES_OFFERED, dataset(tmp_path, tiny_keeps=tiny_keeps), tolerance=0.02, n=50)
    names = {lane: [step.name for step in lanes[lane]] for lane in LANES}
    assert names["weighted"][0] == begins and names["gated"][0] == STRONG and names["video"] == [CHEAP, TINY]
    costs = {name: found["cost"]["mean"] for name, found in tried["weighted"].items() if found["met"]}
    assert min(costs, key=costs.__getitem__) == begins
    assert tried["video"][TINY]["kept"]["mean"] < 0.98


@pytest.mark.parametrize(("half_keeps", "begins"), [(0.89, "gated3@0.5"), (0.87, STRONG)])
def test_the_strong_lane_begins_with_the_last_rung_that_is_worth_as_much(
    half_keeps: float, begins: str, tmp_path: Path
) -> None:
    data = dataset(tmp_path, tiny_keeps=1.0, half_keeps=half_keeps)
    lanes, _ = choose_lanes(LANES_OFFERED, data, tolerance=0.02, n=20)
    assert lanes["gated"][0].name == begins


def test_rungs_without_labels_are_not_offered(tmp_path: Path) -> None:
    data = dataset(tmp_path, tiny_keeps=1.0)
    offered = {**LANES_OFFERED, "weighted": (rung("weighted3@1"), rung("sum3@0.5"))}
    lanes, _ = choose_lanes(offered, data, tolerance=0.02, n=20)
    assert [step.name for step in lanes["weighted"]] == [MIDDLE]
    with pytest.raises(ConfigError, match=r"expected some of \['sum3@0\.5'\]"):
        choose_lanes({**LANES_OFFERED, "weighted": (rung("sum3@0.5"),)}, data, tolerance=0.02)


def test_a_rung_that_a_cheaper_one_matches_is_dropped_and_the_first_stays() -> None:
    qualities = [0.9, 0.9, 0.7, 0.7, 0.5]
    names = ("gated3@1", "gated3@0.5", "weighted3@0.5", "sum3@0.5", "top3@0.25")
    steps = tuple(replace(rung(name), quality=quality) for name, quality in zip(names, qualities, strict=True))
    found = prune(replace(base_policy(), lanes=dict.fromkeys(LANES, steps)))
    assert [step.quality for step in found.lanes["gated"]] == [0.9, 0.7, 0.5]
    assert found.lanes["gated"][0] == steps[0] and found.lanes["gated"][1] == steps[3]


@contextmanager
def recipe_on_path() -> Iterator[None]:
    sys.path.insert(0, str(RECIPE.parent))
    try:
        yield
    finally:
        sys.path.remove(str(RECIPE.parent))


def recipe_labels(path: Path, count: int, seed: int) -> Path:
    """Labels of made-up scenes at every rung that the recipe knows, with the slices that it reads."""
    with recipe_on_path():
        from recipes import RECIPES
    rungs = {step.name: step for recipe in RECIPES.values() for ladder in recipe.lanes.values() for step in ladder}
    rng = np.random.default_rng(seed)
    records = []
    for i in range(count):
        scene, task = (("simple", "describe"), ("dense", "describe"), ("reading", "read"), ("clip", "event"))[i % 4]
        known = subject(rng.normal(size=4) + (1.5 if scene in ("dense", "reading") else -1.5), seed * 10**6 + i)
        kind = "video" if scene == "clip" else "image"
        known = replace(known, kind=kind, slices={"scene": scene, "task": task})
        shares = {name: step.pixel_share * step.point.downsample**2 for name, step in rungs.items()} | {"native@1": 1.0}
        loses = 0.8 if scene in ("dense", "reading") else 0.01
        quality = {name: 0.9 * (1 - loses * (1 - share) ** 4) for name, share in shares.items()}
        spared = {name: 0.5 for name, step in rungs.items() if step.point.blanks is not None}
        cost = {name: 10 + 90 * share * spared.get(name, 1.0) for name, share in shares.items()}
        records.append(label_record(known, "oracle", quality=quality, reference_quality=0.9, cost=cost))
    return write_jsonl(path, records)


def test_the_recipe_writes_policies_whose_cards_have_the_held_out_figures(tmp_path: Path) -> None:
    train, held = recipe_labels(tmp_path / "train.jsonl", 320, 1), recipe_labels(tmp_path / "eval.jsonl", 160, 2)
    out, reports = tmp_path / "policies", tmp_path / "reports"
    command = [sys.executable, str(RECIPE), str(train), "--held-out", str(held), "--out", str(out)]
    command += ["--reports", str(reports), "--only", "reference-balanced", "--resamples", "20"]
    shown = subprocess.run(command, check=True, capture_output=True, text=True, timeout=600).stdout
    assert "Held to, on all traffic:" in shown and "- yes: quality kept of native's" in shown
    policy = Policy.load(out / "reference-balanced")
    card = (out / "reference-balanced" / "README.md").read_text(encoding="utf-8")
    assert not {"log_pixels", "log_aspect"} & set(policy.router.inputs.names)
    for heading in ("Lanes", "Router", "Figures", "Slices", "Held-out traffic", "Training data", "Limits", "Command"):
        assert f"\n## {heading}\n" in card
    found = json.loads((reports / "reference-balanced.json").read_text())
    assert found["held_out"]["traffic"]["rows"] == 160 and found["data"]["sha256"] in card
    for lane in LANES:
        qualities = [step.quality for step in policy.lanes[lane]]
        assert len(set(qualities)) == len(qualities)
    assert len({step.name for lane in LANES for step in Policy.load(out / "native").lanes[lane]}) == 1


def test_held_out_labels_are_those_of_scenes_and_are_read_before_their_file_is_written(tmp_path: Path) -> None:
    with recipe_on_path():
        from train_policies import mixed
    held = recipe_labels(tmp_path / "mixed.jsonl", 20, 2)
    before = [json.loads(line) for line in held.read_text().splitlines()]
    assert [json.loads(line) for line in mixed([held], held).read_text().splitlines()] == before
    other = write_jsonl(tmp_path / "other.jsonl", [{**before[0], "slices": {}}])
    with pytest.raises(AdaptiveFusionError, match="a scene and its task"):
        mixed([other], tmp_path / "out.jsonl")
