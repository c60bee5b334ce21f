"""One broken item among many, in every command that goes through items: the others come out, one error names it, and
the exit code is 2. And names are printed as they are, whatever they look like to a terminal library."""

import base64
import json
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

from adaptive_fusion.cli import app
from adaptive_fusion.execution import request
from adaptive_fusion.models import GridAdapter
from adaptive_fusion.models.chat_template import media_parts

COUNT = 5
HUNGRY, HUNGRY_HOST = (40, 24), (40, 56)
"""Height and width of pictures that there is no memory for on the device, or on the host."""


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def picture(path: Path, seed: int, height: int = 32, width: int = 48) -> Path:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, "PNG")
    return path


@pytest.fixture
def good(tmp_path: Path) -> list[Path]:
    return [picture(tmp_path / f"good {index}.png", index) for index in range(COUNT)]


def text_file(folder: Path) -> Path:
    (folder / "bad.png").write_text("no picture")
    return folder / "bad.png"


def bare_folder(folder: Path) -> Path:
    (folder / "bad.png").mkdir()
    return folder / "bad.png"


BROKEN: dict[str, tuple[Callable[[Path], Path], str]] = {
    "media": (text_file, "MediaError"),
    "name": (lambda folder: folder / "bad.png", "MediaError"),
    "folder": (bare_folder, "MediaError"),
    "device": (lambda folder: picture(folder / "bad.png", 99, *HUNGRY), "OutOfMemoryError"),
    "host": (lambda folder: picture(folder / "bad.png", 99, *HUNGRY_HOST), "OutOfMemoryError"),
}


@pytest.fixture
def no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no memory for the hungry picture: on the host where it is measured, on the device where it is run."""
    features, prepare = request.measure_complexity, GridAdapter.prepare

    def measured(image: Any) -> Any:
        if getattr(image, "size", None) == HUNGRY_HOST[::-1]:
            raise MemoryError
        return features(image)

    def prepared(self: GridAdapter, messages: Any, *arguments: Any, **more: Any) -> Any:
        if any(part["image"].size == HUNGRY[::-1] for part in media_parts(messages)):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return prepare(self, messages, *arguments, **more)

    monkeypatch.setattr(request, "measure_complexity", measured)
    monkeypatch.setattr(GridAdapter, "prepare", prepared)


def told(result: Result, name: str) -> None:
    """One error that names the item, exit code 2, and no traceback."""
    assert result.exit_code == 2, (result.output, result.exception)
    assert isinstance(result.exception, SystemExit)
    assert len([line for line in result.stderr.splitlines() if name in line]) == 1, result.stderr


@pytest.mark.parametrize(
    ("command", "what"),
    # explain runs nothing on the device
    [pair for pair in product(("run", "explain"), BROKEN) if pair != ("explain", "device")],
)
def test_run_and_explain_go_on(command: str, what: str, good: list[Path], tmp_path: Path, no_memory: None) -> None:
    make, error = BROKEN[what]
    names = [str(path) for path in (*good[:2], make(tmp_path), *good[2:])]
    more = ["--max-new-tokens", "1"] if command == "run" else []
    result = call(command, *names, "--prompt", "What is <|im_end|> here?", *more, "--json")
    told(result, "bad.png")
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [row["input"] for row in rows] == names
    assert [row.get("error_type") for row in rows] == [None, None, error, None, None, None]


@pytest.mark.parametrize("command", ["run", "explain"])
def test_a_question_with_half_a_character_is_refused_for_each_file(command: str, good: list[Path]) -> None:
    result = call(command, *map(str, good), "--prompt", "what\udcff?", "--json")
    assert result.exit_code == 2 and isinstance(result.exception, SystemExit)
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [row["error_type"] for row in rows] == ["ConfigError"] * COUNT
    assert all("half a character (U+DCFF) at position 4" in row["error"] for row in rows)


@pytest.mark.parametrize("what", [*BROKEN, "question"])
def test_label_goes_on(what: str, good: list[Path], tmp_path: Path, no_memory: None) -> None:
    bad = picture(tmp_path / "bad.png", 7) if what == "question" else BROKEN[what][0](tmp_path)
    table, out = tmp_path / "answers.csv", tmp_path / "labels.jsonl"
    asked = {path: "<|image_pad|> and <|im_end|>?" for path in good} | {
        bad: "what\ud83d?" if what == "question" else "?"
    }
    rows = [f"{path},something,{question}" for path, question in asked.items()]
    table.write_bytes("\n".join(["path,reference,prompt", *rows]).encode("utf-8", "surrogatepass"))
    arguments = ("--references", str(table), "--out", str(out), "--points", "native@0.5", "--max-new-tokens", "2")
    result = call("label", *map(str, asked), *arguments, "--json")
    told(result, "bad.png")
    assert len(out.read_text().splitlines()) == COUNT
    (summary,) = [json.loads(line) for line in result.stdout.splitlines()]
    assert [failure["input"] for failure in summary["failed"]] == ["bad.png"] and summary["scored"] == COUNT


@pytest.mark.parametrize("what", ["media", "device", "question"])
def test_bench_quality_goes_on(what: str, good: list[Path], tmp_path: Path, no_memory: None) -> None:
    bad = picture(tmp_path / "bad.png", 7) if what == "question" else BROKEN[what][0](tmp_path)
    files = [good[0], bad, *good[1:]]  # in the middle: the one before it loses its partner
    said = {path: f"a picture {index}" for index, path in enumerate(files)}
    if what == "question":
        said[bad] = "half \ud83d"
    captions = tmp_path / "captions.json"
    captions.write_text(
        json.dumps(
            {
                "images": [{"id": i, "file_name": path.name} for i, path in enumerate(files)],
                "annotations": [{"image_id": i, "caption": said[path]} for i, path in enumerate(files)],
            }
        )
    )
    arguments = ("--data", str(tmp_path), "--captions", str(captions), "--points", "native@0.5")
    result = call("bench", "quality", *arguments, "--max-new-tokens", "1", "--json")
    told(result, "bad.png")
    (found,) = [json.loads(line) for line in result.stdout.splitlines()]
    assert [failure["input"] for failure in found["failed"]] == ["bad.png"]
    assert {record["n"] for record in found["slices"]["captions"]} == {COUNT}
    assert {record["row"] for record in found["slices"]["captions"]} >= {"native@1", "native@0.5", "shuffled", "chance"}


@pytest.mark.parametrize("what", ["media", "name", "folder"])
def test_bench_real_goes_on(what: str, good: list[Path], tmp_path: Path) -> None:
    bad = BROKEN[what][0](tmp_path)
    rows = [json.dumps({"file": path.name, "boxes": [{"name": "x", "box": [0, 0, 30, 30]}]}) for path in (*good, bad)]
    (tmp_path / "truth.jsonl").write_text("\n".join([*rows[:2], '{"file": "[bold]', *rows[2:]]))
    page = tmp_path / "page.html"
    result = call("bench", "real", str(tmp_path), "--policy", "balanced", "--html", str(page), "--json")
    assert result.exit_code == 2 and isinstance(result.exception, SystemExit)
    (found,) = [json.loads(line) for line in result.stdout.splitlines()]
    source = tmp_path.name
    assert [one["input"] for one in found["failed"]] == [f"{source}/truth.jsonl, line 3", f"{source}/bad.png"]
    assert {record["n"] for record in found["kinds"]["objects"]["rows"]} == {COUNT}
    assert len(result.stderr.splitlines()) == 2 and f"{source}/bad.png" in page.read_text()


@pytest.mark.parametrize("command", ["run", "label"])
def test_a_fault_of_the_program_ends_the_run_with_what_was_done_on_disk(
    command: str, good: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare = GridAdapter.prepare
    faulty = picture(tmp_path / "faulty.png", 5, *HUNGRY)

    def prepared(self: GridAdapter, messages: Any, *arguments: Any, **more: Any) -> Any:
        if any(part["image"].size == HUNGRY[::-1] for part in media_parts(messages)):
            raise IndexError("a fault")
        return prepare(self, messages, *arguments, **more)

    monkeypatch.setattr(GridAdapter, "prepare", prepared)
    out = tmp_path / "done.jsonl"
    names = [str(path) for path in (*good[:2], faulty, *good[2:])]
    where = ("--log", str(out)) if command == "run" else ("--out", str(out), "--points", "native@0.5")
    result = call(command, *names, "--prompt", "?", "--max-new-tokens", "1", *where)
    assert isinstance(result.exception, IndexError)
    assert len(out.read_text().splitlines()) == 2


NAMES = ["[slug] a.png", ":smile: b.png", "x[/y].png", "[bold]c[/bold].png", "[link=http://h]d.png", "\\[e].png"]


@pytest.mark.parametrize("command", ["run", "explain"])
def test_names_are_printed_as_they_are(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for index, name in enumerate(NAMES):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        picture(path, index)
    more = ["--max-new-tokens", "1"] if command == "run" else []
    monkeypatch.chdir(tmp_path)
    result = call(command, *NAMES, "--prompt", "?", *more)
    assert result.exit_code == 0, (result.output, result.exception)
    for name in NAMES:
        assert f" {name} " in result.stdout
    missing = call(command, "[b]no:smile:[/c].png", "--prompt", "?", *more)
    assert missing.exit_code == 2 and missing.stderr.startswith("[b]no:smile:[/c].png: MediaError: ")


def test_other_commands_print_names_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    picture(tmp_path / "a.png", 1)
    out = "[x/y]:smile:.jsonl".replace("/", "")
    result = call("label", "a.png", "--out", out, "--points", "native@0.5", "--max-new-tokens", "1")
    assert result.exit_code == 0 and f"Labels are in {out}" in result.stdout, result.output
    packed = call("logs", "compact", out, "--out", "[p]:smile:.parquet")
    assert packed.exit_code == 0 and "[p]:smile:.parquet" in packed.stdout, packed.output


def test_a_data_url_is_a_file_to_the_commands(tmp_path: Path) -> None:
    url = "data:image/png;base64," + base64.b64encode(picture(tmp_path / "a.png", 3).read_bytes()).decode()
    result = call("explain", url, "data:image/png;base64,!!", "--json")
    first, second = [json.loads(line) for line in result.stdout.splitlines()]
    assert first["kind"] == "image" and first["input"] == url
    assert second["error_type"] == "MediaError" and result.exit_code == 2
    shown = call("explain", url)
    assert shown.exit_code == 0 and "data:image/png;base64," in shown.stdout
