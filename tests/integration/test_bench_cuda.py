"""The GPU benchmark at a tiny shape on the CPU: every part that can run there runs, what was measured is kept, and a
part that fails takes none of the others with it."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
GPU_ONLY = {"4b flash", "4b efficient", "4b flash_attention_2", "4b compiled decode"}


@pytest.fixture(scope="module")
def cuda(load_benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return load_benchmark("cuda")


@pytest.fixture(scope="module")
def whole(cuda: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """One run of all parts, the batches' own function broken, and its file."""
    path = tmp_path_factory.mktemp("cuda") / "cuda.json"
    run, share = cuda.PARTS["batching"]

    def broken(desk: Any, scale: Any) -> None:
        desk.row("4b native x1", lambda: {}["nothing"])
        raise RuntimeError("the part is broken")

    cuda.PARTS["batching"] = broken, share
    try:
        assert cuda.main(["--tiny", "--out", str(path)]) == 1
    finally:
        cuda.PARTS["batching"] = run, share
    return path, json.loads(path.read_text())


def test_every_part_runs_and_a_failure_is_reported(cuda: ModuleType, whole: tuple[Path, dict[str, Any]]) -> None:
    parts = whole[1]["parts"]
    assert list(parts) == list(cuda.PARTS)
    failed = {name: part["failed"] for name, part in parts.items() if part["failed"]}
    assert failed == {"batching": {"4b native x1": "KeyError: 'nothing'", "part": "RuntimeError: the part is broken"}}
    for name, part in parts.items():
        assert part["rows"] or name == "batching", name
    assert set(parts["costs"]["skipped"]) == GPU_ONLY
    for row in parts["identity"]["rows"].values():
        assert row["tokens_equal"] and row["logits_equal"] and row["prefill_equal"]
    spared = parts["costs"]["rows"]["4b 1 MP, half blank"]["points"]
    assert spared["native@1/2blank"]["patches"] < 0.8 * spared["native@1"]["patches"]
    points = parts["costs"]["rows"]["4b clip"]["points"]
    assert points["native@1/25%"]["patches"] < points["native@1"]["patches"] == points["gated12r8@1"]["patches"]
    assert points["native@1"]["encode_ms"]["predicted"] > 0 and points["native@0.5"]["prefill_ms"]["ratio"]
    starved = parts["starved"]["rows"]["4b"]["with a pixel budget"]
    assert starved["answered"] == starved["stepped_down"] == starved["requests"]
    assert parts["budgets"]["rows"]["reference beside"]["requests"] == 6
    assert whole[1]["header"]["tiny"] and whole[1]["header"]["torch"]


def test_a_second_run_keeps_what_was_measured(
    cuda: ModuleType, whole: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    path, first = whole
    assert cuda.main(["--tiny", "--out", str(path), "--json"]) == 0
    said = capsys.readouterr()
    found = json.loads(said.out)
    for name, part in first["parts"].items():
        assert part["rows"].items() <= found["parts"][name]["rows"].items()
        assert all(f"{name} {key}: measured before" in said.err for key in part["rows"])
    assert len(found["parts"]["batching"]["rows"]) == 4 and not found["parts"]["batching"]["failed"]


def test_rows_without_time_say_so(cuda: ModuleType, tmp_path: Path) -> None:
    from benchmarks.gpu.book import Book, Desk

    book = Book(tmp_path / "cuda.json", {"card": "one"}, ("card",))
    desk = Desk(book, "part", 10.0, clock=lambda: 4.0)
    assert desk.row("long", lambda: {"made": True}, needs_s=7.0) is None
    assert desk.row("short", lambda: {"made": True}, needs_s=5.0) is not None
    part = json.loads((tmp_path / "cuda.json").read_text())["parts"]["part"]
    assert part["skipped"] == {"long": "no time: about 7 s needed, 6 s left"} and list(part["rows"]) == ["short"]
    with pytest.raises(SystemExit, match="card 'one' is now 'two'"):
        Book(tmp_path / "cuda.json", {"card": "two"}, ("card",))


def test_wheels_that_are_needed_are_told_from_those_that_are_not(cuda: ModuleType, tmp_path: Path) -> None:
    from benchmarks.gpu.missing import missing

    (tmp_path / "pyproject.toml").write_text('[project]\ndependencies = ["pytest>=9999", "numpy>=1"]\n')
    for name in ("pytest-9999.0", "numpy-9999.0", "nobody_has_this-1.0", "pillow-9999.0", "torch-0.1"):
        (tmp_path / f"{name}-py3-none-any.whl").touch()
    needed = [path.name.split("-")[0] for path in missing(tmp_path, tmp_path / "pyproject.toml")]
    assert needed == ["nobody_has_this", "pillow", "pytest"]  # numpy is new enough, torch newer
    command = [ROOT / "benchmarks/cuda.sh", tmp_path / "none"]
    refused = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert refused.returncode == 2 and "WHEELS is a folder" in refused.stderr


def test_other_benchmarks_of_the_folder_get_their_torch() -> None:
    """torch looks for NVIDIA's package `cuda`, and the folder of the script comes first on its path."""
    command = [sys.executable, "-c", "import torch, benchmarks"]
    found = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": f"{ROOT / 'benchmarks'}:{ROOT}"}, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr
