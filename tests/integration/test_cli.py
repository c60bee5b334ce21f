"""The command line on real files: odd but valid ones are answered, bad ones refused, and nothing else is printed."""

import io
import json
import os
import shutil
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from adaptive_fusion import demo
from adaptive_fusion.cli import app
from adaptive_fusion.decisions import SCHEMA
from adaptive_fusion.point import OperatingPoint
from adaptive_fusion.reference import model_path
from adaptive_fusion.reference.screens import make_scene

KEYS = {"input", "kind", "complexity", "p_complex", "features", "lane", "point", "reason"}
RUN_KEYS = KEYS | {"text", "measurement", "budget", "met"}


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def rows_of(text: str) -> list[dict[str, Any]]:
    return [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def video(frames: int) -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4", options={"movflags": "empty_moov"}) as out:
        stream = out.add_stream("libx264", rate=4)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        out.start_encoding()
        for index in range(frames):
            picture = np.full((48, 64, 3), 20 * index, np.uint8)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture)))
        if frames:
            out.mux(stream.encode())
    return buffer.getvalue()


def blank_png(width: int, height: int) -> bytes:
    """A complete, valid 1-bit PNG of a few kilobytes."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows = zlib.compressobj(9)
    packed = b"".join(rows.compress(bytes(1 + (width + 7) // 8)) for _ in range(height)) + rows.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


def palette_with_transparency() -> bytes:
    image = noise(40, 30).quantize(16)
    return encoded(image, "PNG", transparency=3)


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(noise(64, 32), "JPEG", exif=exif)


def animation() -> bytes:
    frames = [Image.new("RGB", (48, 40), color) for color in ("red", "blue", "green", "white")]
    return encoded(frames[0], "GIF", save_all=True, append_images=frames[1:], duration=500)


ODD: dict[str, tuple[Callable[[], bytes], str]] = {
    "one pixel.png": (lambda: encoded(noise(1, 1), "PNG"), "image"),
    "cmyk.jpg": (lambda: encoded(noise(40, 30).convert("CMYK"), "JPEG"), "image"),
    "16 bit.png": (
        lambda: encoded(Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40) * 50), "PNG"),
        "image",
    ),
    "palette.png": (palette_with_transparency, "image"),
    "rotated.jpg": (rotated, "image"),
    "animated.gif": (animation, "video"),
    "150 to 1.png": (lambda: encoded(noise(1200, 8), "PNG"), "image"),
    "a video named.txt": (lambda: video(8), "video"),
}
BAD: dict[str, tuple[Callable[[], bytes] | None, str]] = {
    "missing.png": (None, "'missing.png' does not exist"),
    "empty.png": (lambda: b"", "'empty.png' is empty"),
    "text.png": (lambda: b"not a picture", "'text.png' is not an image or video of a known format; accepted: PNG"),
    "cut.jpg": (lambda: encoded(noise(80, 60), "JPEG")[:-900], "'cut.jpg' is cut short"),
    "bomb.png": (lambda: blank_png(20000, 20000), "20000x20000 pixels (400.0 megapixels); at most 64 megapixels"),
    "long.png": (lambda: encoded(noise(402, 2), "PNG"), "402x2 pixels, an aspect of 201.0:1; at most 200:1"),
    "broken.mp4": (lambda: video(8)[:200] + bytes(2000), "'broken.mp4'"),
    "no frames.mp4": (lambda: video(0), "no frames"),
    "https://example.com/a.png": (None, "URLs are never fetched"),
    ".": (None, "is not a regular file"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("files")
    for name, (make, _) in {**ODD, **BAD}.items():
        if make is not None:
            (root / name).write_bytes(make())
    return root


@pytest.fixture(scope="module")
def answered(folder: Path) -> tuple[Result, dict[str, dict[str, Any]]]:
    """One call with every file, bad ones first; its JSON by file name."""
    names = [name if "//" in name else str(folder / name) for name in (*BAD, *ODD)]
    log = folder / "log.jsonl"
    arguments = ("--prompt", "Describe the screen.", "--latency-ms", "60000", "--max-new-tokens", "2")
    result = call("run", *names, *arguments, "--log", str(log), "--json")
    rows = rows_of(result.stdout)
    assert [row["input"] for row in rows] == names, result.stderr
    return result, dict(zip((*BAD, *ODD), rows, strict=True))


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_with_the_reason(name: str, answered: tuple[Result, dict[str, Any]]) -> None:
    result, rows = answered
    row = rows[name]
    assert result.exit_code == 2
    assert row["error_type"] == "MediaError" and BAD[name][1] in row["error"]
    assert set(row) == {"input", "error", "error_type"}
    assert f"{row['input']}: MediaError: {row['error']}" in result.stderr.splitlines()


@pytest.mark.parametrize("name", ODD)
def test_odd_input_is_answered_beside_bad_input(name: str, answered: tuple[Result, dict[str, Any]]) -> None:
    row = answered[1][name]
    assert row.keys() >= RUN_KEYS, row
    assert row["kind"] == ODD[name][1]
    assert 0 <= row["complexity"] <= 1 and 0 <= row["p_complex"] <= 1
    assert row["features"] and isinstance(row["text"], str)
    assert (row["lane"] == "video") == (row["kind"] == "video")
    assert OperatingPoint.from_dict(row["point"])
    assert row["budget"]["latency_ms"] == 60000
    measured = row["measurement"]
    assert row["met"] == (measured["latency_ms"] <= 60000)
    assert measured["visual_tokens"] > 0 and 1 <= measured["new_tokens"] <= 2
    assert 0 < measured["ttft_ms"] <= measured["latency_ms"]


def test_the_log_has_one_record_per_answer_and_no_content(
    folder: Path, answered: tuple[Result, dict[str, Any]]
) -> None:
    text = (folder / "log.jsonl").read_text()
    rows = rows_of(text)
    assert [row["request_id"] for row in rows] == [answered[1][name]["request_id"] for name in ODD]
    assert all(row["schema"] == SCHEMA for row in rows)
    assert "Describe the screen." not in text and str(folder) not in text


def test_explain_decides_what_run_would_and_draws_it(folder: Path, tmp_path: Path) -> None:
    files = [str(folder / name) for name in ("palette.png", "animated.gif", "missing.png")]
    plot = tmp_path / "plot.png"
    result = call("explain", *files, "--policy", "native", "--save-plot", str(plot), "--json")
    assert result.exit_code == 2
    palette, animated, missing = rows_of(result.stdout)
    assert palette.keys() >= KEYS and missing.keys() == {"input", "error", "error_type"}
    assert palette["point"] == animated["point"] == OperatingPoint().to_dict()
    assert animated["lane"] == "video" and palette["policy"] == "native"
    with Image.open(plot) as both:
        two = both.size
    shown = call("explain", files[0], "--latency-ms", "50", "--save-plot", str(plot))
    assert shown.exit_code == 0, shown.stderr
    for said in ("edge_density", "P(complex)", "budget latency_ms 50", "predicted encode"):
        assert said in shown.stdout
    with Image.open(plot) as one:
        assert one.format == "PNG" and one.width == two[0] and one.height < two[1]
        assert len(set(one.convert("RGB").resize((64, 64)).get_flattened_data())) > 20  # not an empty canvas


def test_a_plot_without_matplotlib_names_the_extra(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in {"matplotlib", *(name for name in sys.modules if name.startswith("matplotlib."))}:
        monkeypatch.setitem(sys.modules, name, None)
    result = call("explain", str(folder / "palette.png"), "--save-plot", str(folder / "x.png"))
    assert result.exit_code == 2 and "pip install adaptive-fusion[train]" in result.stderr


def test_the_file_name_plays_no_part(tmp_path: Path) -> None:
    """The same screens under each other's names are routed by what is in them."""
    simple, dense = tmp_path / "simple.png", tmp_path / "dense.png"
    make_scene("simple", 0, "eval").image.save(dense)
    make_scene("dense", 1, "eval").image.save(simple)
    in_dense, in_simple = rows_of(call("explain", str(dense), str(simple), "--json").stdout)
    assert (in_dense["lane"], in_simple["lane"]) == ("weighted", "gated")


def test_a_given_point_is_run_and_people_see_the_plan(folder: Path) -> None:
    result = call(
        "run", str(folder / "palette.png"), "--prompt", "Read.", "--point", "top@0.5", "--max-new-tokens", "1"
    )
    assert result.exit_code == 0, result.stderr
    for said in ("palette.png", "fixed lane, top@0.5", "visual", "first token", "latency", "1 new (length)"):
        assert said in result.stdout


def test_demo_shows_native_beside_adaptive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "MAX_NEW_TOKENS", 2)
    result = call("demo", "--out", str(tmp_path), "--latency-ms", "60000", "--json")
    assert result.exit_code == 0, result.stderr
    *rows, last = rows_of(result.stdout)
    assert [row["content"] for row in rows] == list(demo.CONTENT)
    assert demo.CONTENT.count("simple") >= 2 and demo.CONTENT.count("dense") >= 2 and "clip" in demo.CONTENT
    for row in rows:
        assert (tmp_path / row["input"]).is_file() and row["content"] not in row["input"]
        assert row["truth"] and row["budget"] == {**row["budget"], "latency_ms": 60000}
        assert (row["kind"] == "video") == (row["content"] == "clip")
        assert row["measurement"]["visual_tokens"] <= row["native"]["measurement"]["visual_tokens"]
    assert {row["lane"] for row in rows} == {"weighted", "gated", "video"}
    assert 0 < last["summary"]["tokens_saved"] < 1 and last["summary"]["met_adaptive"] == len(rows)
    with Image.open(tmp_path / "demo.png") as picture:
        assert picture.format == "PNG"


def test_doctor_reports_on_this_machine() -> None:
    result = call("doctor", "--json")
    (report,) = rows_of(result.stdout)
    checks = {check["name"]: check for check in report["checks"]}
    broken = [name for name, check in checks.items() if check["status"] == "broken"]
    assert (result.exit_code, report["ok"]) == ((1, False) if broken else (0, True))
    assert "sdpa" in checks["attention"]["found"] and "float32" in checks["device cpu"]["found"]
    assert "visual tokens" in checks["reference model"]["found"] and checks["profile"]["found"]
    assert all(check["advice"] for check in checks.values() if check["status"] != "ok")


def test_right_share_counts_true_parts_that_were_stated() -> None:
    assert demo.right_share("red circle left, gray ground", "gray ground, Red Circle left") == 1
    assert demo.right_share("AB 12\nCD", "CD\nAB 13") == 0.5
    assert demo.right_share("red bar moves left", "") == 0


@pytest.mark.parametrize("damage", ["no config", "no JSON", "cut weights", "no vision model"])
def test_a_model_folder_that_cannot_be_loaded_is_a_config_error(damage: str, tmp_path: Path) -> None:
    model = tmp_path / "model"
    if damage == "no config":
        model.mkdir()
    else:
        shutil.copytree(model_path(), model)
    if damage == "no JSON":
        (model / "config.json").write_text("{")
    elif damage == "cut weights":
        weights = (model / "model.safetensors").read_bytes()
        (model / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    elif damage == "no vision model":
        (model / "config.json").write_text('{"model_type": "bert"}')
    result = call("run", "a.png", "b.png", "--prompt", "?", "--model", str(model), "--json")
    assert result.exit_code == 2
    assert "cannot be loaded" in result.stderr and "expected reference, a folder" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert [row["error_type"] for row in rows_of(result.stdout)] == ["ConfigError"] * 2


def test_an_unknown_hub_id_offline_is_a_config_error_without_network() -> None:
    reached: list[str] = []
    watching = True

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if watching and event in ("socket.connect", "socket.getaddrinfo"):
            reached.append(f"{event} {arguments}")

    sys.addaudithook(audit)  # cannot be taken off again, only silenced
    result = call("run", "a.png", "--prompt", "?", "--model", "nobody/nothing-at-all")
    watching = False
    assert result.exit_code == 2 and result.stdout == "" and not reached
    assert result.stderr.startswith("ConfigError: model 'nobody/nothing-at-all' cannot be loaded")
    assert len(result.stderr.splitlines()) == 1


def test_in_a_process_of_its_own_json_is_all_that_is_printed(folder: Path) -> None:
    files = [str(folder / "missing.png"), str(folder / "palette.png")]
    command = [sys.executable, "-m", "adaptive_fusion.cli", "run", *files, "--prompt", "?", "--max-new-tokens", "1"]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    found = subprocess.run([*command, "--json"], env=environ, capture_output=True, text=True, timeout=300)
    assert found.returncode == 2
    missing, palette = rows_of(found.stdout)
    assert "error" in missing and palette.keys() >= RUN_KEYS
    assert found.stderr == f"{files[0]}: MediaError: {missing['error']}\n"
