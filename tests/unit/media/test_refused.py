"""Bad media, absurd limits and impossible videos are refused with a clear error of the library's own."""

import dataclasses
import io
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from media_files import clip, encode, no_frames, noise_jpeg, png_header, scene, sound_only
from PIL import Image

from adaptive_fusion.errors import ConfigError, MediaError
from adaptive_fusion.media.clips import Video
from adaptive_fusion.media.hashes import content_hash
from adaptive_fusion.media.load import load_media
from adaptive_fusion.media.pixels import Limits

BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "empty bytes": (lambda: b"", "empty"),
    "text": (lambda: b"hello, I am not a picture", "PNG, JPEG, WebP"),
    "SVG": (lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>", "accepted"),
    "HLS playlist": (lambda: b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n", "accepted"),
    "AVIF": (lambda: encode(scene(), "AVIF"), "accepted"),
    "PostScript": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1 1\n", "accepted"),
    "truncated JPEG": (lambda: noise_jpeg()[:-900], "cut short"),
    "JPEG header": (lambda: noise_jpeg()[:300], "broken|cut short"),
    "truncated PNG": (lambda: encode(scene(), "PNG")[:-60], "cut short|broken"),
    "truncated WebP": (lambda: encode(scene(), "WEBP")[:-40], "broken|cut short"),
    "truncated TIFF": (lambda: encode(scene(), "TIFF")[:-300], "broken|cut short"),
    "truncated BMP": (lambda: encode(scene(), "BMP")[:-300], "cut short"),
    "PNG magic alone": (lambda: b"\x89PNG\r\n\x1a\n", "broken|cut short"),
    "20000x20000 PNG": (lambda: png_header(20000, 20000), "20000x20000.*400.0 megapixels.*64"),
    "16383x16383 WebP": (
        lambda: b"RIFF\x40\0\0\0WEBPVP8X\x0a\0\0\0" + bytes(4) + b"\xfe\x3f\x00" * 2 + bytes(40),
        "16383x16383.*megapixels",
    ),
    "0x0 PNG": (lambda: png_header(0, 5), "0x5"),
    "201:1 PNG": (lambda: encode(Image.new("L", (402, 2)), "PNG"), r"402x2.*201.0:1.*200:1"),
    "aspect of an array": (lambda: np.zeros((1, 100_000), np.uint8), r"100000.0:1.*200:1"),
    "aspect of a PIL image": (lambda: Image.new("L", (3, 1000)), r"333.3:1.*200:1"),
    "aspect of a clip": (lambda: np.zeros((4, 2, 500, 3), np.uint8), r"250.0:1.*200:1"),
    "broken video": (lambda: clip()[:200] + bytes(2000), "video|broken|frames"),
    "half a video": (lambda: clip()[: len(clip()) // 2], "broken|cut short|video"),
    "faststart MP4 cut short": (lambda: clip(flags="faststart")[:-1500], "cut short: .* of 48 frames"),
    "zero-frame video": (no_frames, "no frames"),
    "sound only": (sound_only, "no video stream"),
    "Matroska magic alone": (lambda: b"\x1aE\xdf\xa3", "broken|cut short"),
    "int64 array": (lambda: np.zeros((4, 4), np.int64), "int64.*uint8, uint16, float"),
    "float array above 1": (lambda: np.full((4, 4), 255.0), r"255.*\[0, 1\]"),
    "float array with NaN": (lambda: np.full((4, 4), np.nan), r"nan.*\[0, 1\]"),
    "array (C, H, W)": (lambda: np.zeros((3, 40, 40), np.uint8), r"\(3, 40, 40\).*\(H, W, 3\)"),
    "array of no rows": (lambda: np.zeros((0, 4, 3), np.uint8), "4x0"),
    "array of objects": (lambda: np.array([[None]]), "object"),
    "clip of no frames": (lambda: np.zeros((0, 4, 4, 3), np.uint8), "no frames"),
    "clip array of 2 channels": (lambda: np.zeros((3, 4, 4, 2), np.uint8), r"\(4, 4, 2\)"),
    "empty list": (lambda: [], "no frames"),
    "list of paths": (lambda: ["a.png", "b.png"], "holds a str"),
    "frames of two sizes": (lambda: [scene(), scene(20, 20)], "2 sizes"),
    "number": (lambda: 7, "int; accepted: path"),
    "None": (lambda: None, "NoneType"),
    "missing file": (lambda: "no/such/cat.png", "'cat.png' does not exist"),
    "NUL in the path": (lambda: "a\0b.png", "does not exist|cannot be read"),
    "endless path": (lambda: "x" * 5000 + ".png", "cannot be read"),
    "data URL of no picture": (lambda: "data:image/png;base64,AAAA", "not an image or video of a known format"),
    "data URL of text": (lambda: "data:image/svg+xml,%3Csvg/%3E", "not a data URL in base64"),
    "data URL of nothing": (lambda: "data:image/png;base64,", "is empty"),
    "data URL of another alphabet": (lambda: "data:image/png;base64,iVBORw-_", "not valid base64"),
    "data URL with another escape": (lambda: "data:image/png;base64,iVBO%41AA", "not valid base64"),
    "data URL without an encoding": (lambda: "data:image/png;nobase64,iVBO", "not a data URL in base64"),
    "data URL that is cut": (lambda: "data:image/png;base64,iVBORw0KG", "not valid base64"),
    "broken PIL image": (lambda: Image.open(io.BytesIO(noise_jpeg()[:-900])), "cut short"),
} | {
    f"URL {url}": (lambda url=url: url, "never fetched")
    for url in (
        "http://example.com/a.png", "HTTPS://example.com/a.png", " file:///etc/passwd", "ftp://h/a", "s3://b/k",
        "http:\\\\example.com\\a.png", "concat+http://h/a.mp4",
    )
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_with_a_clear_error(name: str, tmp_path: Path) -> None:
    make, message = BAD[name]
    source = make()
    with pytest.raises(MediaError, match=message) as caught:
        load_media(source)
    texts = [str(caught.value)]
    if isinstance(source, bytes):
        path = tmp_path / "file.png"
        path.write_bytes(source)
        with pytest.raises(MediaError, match=message if source else "empty") as caught:
            load_media(path)
        texts.append(str(caught.value))
        assert "'file.png'" in texts[1]
    assert not any(str(tmp_path) in text or " at 0x" in text or len(text) > 400 for text in texts)


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    for path in (tmp_path, tmp_path / "pipe.png", "/dev/zero"):
        for use in (load_media, content_hash):
            with pytest.raises(MediaError, match="is not a regular file") as caught:
                use(path)
            assert str(tmp_path) not in str(caught.value)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_an_image_bomb_is_refused_before_it_takes_memory(tmp_path: Path) -> None:
    bomb = tmp_path / "bomb.png"
    bomb.write_bytes(png_header(20_000, 20_000))
    script = (
        "import sys\n"
        "from memory import peak_mib\n"
        "from adaptive_fusion.errors import MediaError\n"
        "from adaptive_fusion.media.load import load_media\n"
        "before = peak_mib()\n"
        "try:\n    load_media(sys.argv[1])\n"
        "except MediaError:\n    print(peak_mib() - before)\n"
    )
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-c", script, str(bomb)]
    run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300, env=environ)
    assert float(run.stdout) < 32


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_megapixels", 1e9), ("max_aspect", float("nan")), ("video_fps", 0), ("min_frames", 65),
        ("max_side", 0), ("max_frames", 1), ("max_decode_megapixels", float("inf")),
    ],
)  # fmt: skip
def test_limits_refuse_absurd_values(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"{field} is {value!r}; expected an? (number|integer) "):
        Limits(**{field: value})


@pytest.mark.parametrize("value", [None, "1", True, [1], 1j])
@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Limits)])
def test_limits_refuse_what_is_no_number(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"{field} is {re.escape(repr(value))}; expected an? (number|integer)"):
        Limits(**{field: value})
    with pytest.raises(ConfigError, match=r"max_frames is 2.5; expected an integer"):
        Limits(max_frames=2.5)  # type: ignore[arg-type]


@pytest.mark.parametrize("fps", [0, -1, float("nan"), float("inf"), "2", [2]])
def test_a_clip_is_not_thinned_to_an_absurd_rate(fps: Any) -> None:
    clip = Video(np.zeros((4, 4, 4, 3), np.uint8), (0.0, 0.5, 1.0, 1.5), 2.0, 4)
    with pytest.raises(ConfigError, match=re.escape(f"max_fps is {fps!r}; expected None or a finite number above 0")):
        clip.at_most(fps)


def test_a_video_refuses_parts_that_do_not_fit() -> None:
    frames = np.zeros((2, 4, 4, 3), np.uint8)
    for bad in (
        (frames.astype(float), (0.0, 1.0), 2.0, 2), (frames[:1], (0.0,), 1.0, 1), (frames, (0.0,), 2.0, 2),
        (frames, (1.0, 0.0), 2.0, 2), (frames, (0.0, float("nan")), 2.0, 2), (frames, (0.0, 1.0), 0.0, 2),
        (frames, (0.0, 1.0), 2.0, 1), (frames.tolist(), (0.0, 1.0), 2.0, 2), (frames, 1.0, 2.0, 2),
        (frames, (0.0, 1.0), 2.0, float("nan")),
    ):  # fmt: skip
        with pytest.raises(MediaError):
            Video(*bad)
