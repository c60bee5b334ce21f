"""Loading images and clips: odd but valid input is read right, bad input raises MediaError, nothing else.

`python tests/unit/test_media.py 10000` runs the mutation fuzz longer and prints the slowest mutant.
"""

import io
import os
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from adaptive_fusion.errors import ConfigError, MediaError
from adaptive_fusion.media import Limits, Video, content_hash, kind, load_media, open_image, to_rgb

av = pytest.importorskip("av", reason="the extra [video] (PyAV) is not installed")

VIDEOS = Path(os.environ.get("ADAPTIVE_FUSION_DATA", "data")) / "videos"
FPS, SHADE = 12, 5  # of the clips made here: frame i is a flat grey of SHADE * i


# --------------------------------------------------------------------------------------------- made files


def scene(width: int = 48, height: int = 32) -> Image.Image:
    """RGB picture whose four corners differ, so that every flip and turn shows."""
    y, x = np.mgrid[0:height, 0:width]
    return Image.fromarray(np.dstack([x * 5 % 256, y * 7 % 256, (x + 2 * y) % 256]).astype(np.uint8))


def encode(image: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def animation(form: str, durations_ms: list[int], **options: Any) -> bytes:
    frames = [Image.new("RGB", (20, 10), (i * 10, 0, 255 - i * 10)) for i in range(len(durations_ms))]
    if form == "WEBP":
        options["lossless"] = True
    return encode(frames[0], form, save_all=True, append_images=frames[1:], duration=durations_ms, **options)


@cache
def clip(
    container: str = "mp4",
    codec: str = "libx264",
    frames: int = 48,
    size: tuple[int, int] = (64, 48),
    gop: int = 12,
    rotation: int = 0,
    ticks: tuple[int, ...] = (),
    flags: str = "",
) -> bytes:
    """Encoded clip of flat grey frames whose shade counts them; `ticks` are display times in 1/1000 s."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip"
        with av.open(str(path), "w", format=container, options={"movflags": flags} if flags else {}) as out:
            stream = out.add_stream(codec, rate=FPS)
            stream.width, stream.height = size
            stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
            stream.gop_size, stream.bit_rate = gop, 2_000_000
            if ticks:
                stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
            if rotation:
                stream.set_display_rotation(rotation)
            for i in range(frames):
                shaded = np.full((size[1], size[0], 3), SHADE * i, np.uint8)
                shaded[: size[1] // 4, : size[0] // 4] = 255  # a mark in the upper left corner
                frame = av.VideoFrame.from_ndarray(shaded)
                if ticks:
                    frame.pts, frame.time_base = ticks[i], stream.time_base
                out.mux(stream.encode(frame))
            out.mux(stream.encode())
        return path.read_bytes()


def shown_frames(video: Video) -> list[int]:
    """Numbers of the frames of a `clip`, read back from their shade below the mark."""
    shades = video.frames[:, video.frames.shape[1] // 2 :, :, :].mean(axis=(1, 2, 3))
    return [round(shade / SHADE) for shade in shades]


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and has a short body."""

    def chunk(tag: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + tag + data + struct.pack(">I", zlib.crc32(tag + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(1 << 16))) + chunk(b"IEND", b"")


def pixels(image: Any) -> np.ndarray:
    assert kind(image) == "image" and type(image) is Image.Image and image.mode == "RGB"
    return np.asarray(image).astype(int)


def near(image: Any, expected: Any, tolerance: int = 0) -> bool:
    got, wanted = pixels(image), np.asarray(expected).astype(int)
    return got.shape == wanted.shape and int(np.abs(got - wanted).max()) <= tolerance


# ---------------------------------------------------------------------------------------- odd but valid

RAMP = np.linspace(0, 65535, 40 * 30).reshape(30, 40)
RAMP_RGB = np.repeat((RAMP / 257).round()[:, :, None], 3, axis=2)


def half_transparent(mode: str) -> Image.Image:
    image = Image.new("RGBA", (20, 10), (200, 10, 10, 255))
    image.paste((0, 0, 0, 0), (0, 0, 10, 10))
    if mode == "P":
        palette = Image.new("P", (20, 10), 1)
        palette.putpalette([0, 0, 0, 200, 10, 10])
        palette.paste(0, (0, 0, 10, 10))
        palette.info["transparency"] = 0
        return palette
    return image.convert(mode)


WHITE_AND_RED = np.full((10, 20, 3), (200, 10, 10))
WHITE_AND_RED[:, :10] = 255
GREY = np.asarray(half_transparent("RGBA").convert("L"))[0, -1]
WHITE_AND_GREY = np.where(WHITE_AND_RED == 255, 255, int(GREY))

ODD: dict[str, tuple[Callable[[], Any], Any, int]] = {
    "1x1 PNG": (lambda: encode(Image.new("RGB", (1, 1), (9, 8, 7)), "PNG"), [[[9, 8, 7]]], 0),
    "1x3 GIF": (lambda: encode(Image.new("L", (1, 3), 77), "GIF"), np.full((3, 1, 3), 77), 0),
    "150:1 PNG": (lambda: encode(scene(600, 4), "PNG"), scene(600, 4), 0),
    "200:1 BMP": (lambda: encode(scene(3, 600), "BMP"), scene(3, 600), 0),
    "1-bit TIFF": (lambda: encode(scene().convert("1"), "TIFF"), scene().convert("1").convert("RGB"), 0),
    "grey JPEG": (
        lambda: encode(scene().convert("L"), "JPEG", quality=98),
        scene().convert("L").convert("RGB"),
        6,
    ),
    "CMYK JPEG": (lambda: encode(scene().convert("CMYK"), "JPEG", quality=98), scene(), 12),
    "CMYK TIFF": (lambda: encode(scene().convert("CMYK"), "TIFF"), scene(), 0),
    "LZW TIFF": (lambda: encode(scene(), "TIFF", compression="tiff_lzw"), scene(), 0),
    "16-bit PNG": (lambda: encode(Image.fromarray(RAMP.astype(np.uint16)), "PNG"), RAMP_RGB, 1),
    "16-bit TIFF": (lambda: encode(Image.fromarray(RAMP.astype(np.uint16)), "TIFF"), RAMP_RGB, 1),
    "16-bit big-endian TIFF": (lambda: encode(Image.fromarray(RAMP.astype(">u2")), "TIFF"), RAMP_RGB, 1),
    "32-bit TIFF, 16-bit data": (lambda: encode(Image.fromarray(RAMP.astype(np.int32)), "TIFF"), RAMP_RGB, 1),
    "32-bit TIFF, signed": (
        lambda: encode(Image.fromarray((RAMP * 9 - 7e5).astype(np.int32)), "TIFF"),
        RAMP_RGB,
        1,
    ),
    "float TIFF in [0, 1]": (
        lambda: encode(Image.fromarray((RAMP / 65535).astype("f4")), "TIFF"),
        RAMP_RGB,
        1,
    ),
    "float TIFF, huge": (lambda: encode(Image.fromarray((RAMP * 1e30).astype("f4")), "TIFF"), RAMP_RGB, 1),
    "float TIFF with NaN": (
        lambda: encode(Image.fromarray(np.array([[np.nan, 1.0, np.inf]], "f4")), "TIFF"),
        [[[0] * 3, [255] * 3, [0] * 3]],
        0,
    ),
    "RGBA WebP": (lambda: encode(half_transparent("RGBA"), "WEBP", lossless=True), WHITE_AND_RED, 0),
    "LA PNG": (lambda: encode(half_transparent("LA"), "PNG"), WHITE_AND_GREY, 0),
    "palette with transparency PNG": (lambda: encode(half_transparent("P"), "PNG"), WHITE_AND_RED, 0),
    "palette with transparency GIF": (lambda: encode(half_transparent("P"), "GIF"), WHITE_AND_RED, 0),
    "colour-keyed RGB PNG": (
        lambda: encode(Image.fromarray(WHITE_AND_RED.astype(np.uint8)), "PNG", transparency=(200, 10, 10)),
        np.full((10, 20, 3), 255),
        0,
    ),
    "PIL LAB": (lambda: Image.new("LAB", (4, 4), (255, 128, 128)), np.full((4, 4, 3), 255), 2),
    "PIL premultiplied": (lambda: half_transparent("RGBA").convert("RGBa"), WHITE_AND_RED, 0),
    "multi-page TIFF": (
        lambda: encode(scene(), "TIFF", save_all=True, append_images=[scene().rotate(180)]),
        scene(),
        0,
    ),
    "one-frame GIF": (lambda: animation("GIF", [100]), np.full((10, 20, 3), (0, 0, 255)), 0),
    "one-frame MP4": (lambda: clip(frames=1)[:], None, 0),
    "array (H, W)": (lambda: np.full((2, 3), 5, np.uint8), np.full((2, 3, 3), 5), 0),
    "array (H, W, 4)": (lambda: np.asarray(half_transparent("RGBA")), WHITE_AND_RED, 0),
    "array uint16": (lambda: RAMP.astype(np.uint16), RAMP_RGB, 1),
    "array big-endian uint16": (lambda: RAMP.astype(">u2"), RAMP_RGB, 1),
    "array float": (lambda: RAMP / 65535, RAMP_RGB, 1),
    "array bool": (lambda: np.eye(4, dtype=bool), np.repeat(np.eye(4)[:, :, None] * 255, 3, axis=2), 0),
    "array not contiguous": (lambda: np.asarray(scene())[::-1, ::2], np.asarray(scene())[::-1, ::2], 0),
    "list of one frame": (lambda: [scene()], scene(), 0),
    "PNG with JPEG's name": (lambda: encode(scene(), "PNG"), scene(), 0),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_but_valid_input_is_read_right(name: str, tmp_path: Path) -> None:
    make, expected, tolerance = ODD[name]
    source = make()
    if isinstance(source, bytes):
        path = tmp_path / "mislabelled.jpg"
        path.write_bytes(source)
        assert (pixels(load_media(path)) == pixels(load_media(source))).all()
    loaded = load_media(source)
    assert expected is None or near(loaded, expected, tolerance)
    assert not loaded.info  # nothing a later step could apply a second time


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_once(form: str, orientation: int) -> None:
    turn = Image.Transpose
    undo = {
        2: turn.FLIP_LEFT_RIGHT, 3: turn.ROTATE_180, 4: turn.FLIP_TOP_BOTTOM, 5: turn.TRANSPOSE,
        6: turn.ROTATE_90, 7: turn.TRANSVERSE, 8: turn.ROTATE_270,
    }.get(orientation)  # fmt: skip
    upright = scene()
    stored = upright if undo is None else upright.transpose(undo)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options: dict[str, Any] = {"JPEG": {"quality": 98}, "WEBP": {"lossless": True}}.get(form, {})
    data = encode(stored, form, exif=exif, **options)
    loaded = load_media(data)
    assert near(loaded, upright, 16 if form == "JPEG" else 0)
    assert near(load_media(loaded), loaded)
    lazy = Image.open(io.BytesIO(data))
    assert near(load_media(lazy), loaded) and lazy.size == Image.open(io.BytesIO(data)).size


@given(hnp.arrays(np.uint8, st.tuples(st.integers(1, 40), st.integers(1, 40), st.just(3))))
@settings(max_examples=60, deadline=None)
def test_rgb_arrays_survive_every_road_unchanged(array: np.ndarray) -> None:
    before = array.copy()
    for source in (array, Image.fromarray(array), encode(Image.fromarray(array), "PNG"), array / 255):
        assert near(load_media(source), before)
    assert (array == before).all()


@given(hnp.arrays(st.sampled_from([np.int32, np.float32]), st.tuples(st.integers(1, 9), st.integers(1, 9))))
@settings(max_examples=100, deadline=None)
def test_wide_samples_keep_their_order(array: np.ndarray) -> None:
    shades = pixels(load_media(Image.fromarray(array)))[:, :, 0].ravel()
    values = np.where(np.isfinite(array), array, 0).astype(float).ravel()
    assert (np.diff(shades[np.argsort(values, kind="stable")]) >= 0).all()
    if values.min() < 0 and values.max() > values.min():
        assert shades.min() == 0 and shades.max() == 255


# ------------------------------------------------------------------------------------------------- clips


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG"])
def test_animated_images_are_clips_with_their_own_times(form: str) -> None:
    video = load_media(animation(form, [100, 300, 50, 250, 0, 500]))
    assert isinstance(video, Video) and kind(video) == "video" and video.total_frames == 6
    # 0 ms counts as 100 ms; 1.3 s at 2 a second is below the minimum of 4 frames: 0, 2, 3 and 5 are taken.
    assert video.timestamps_s == pytest.approx((0.0, 0.4, 0.45, 0.8)) and video.duration_s == pytest.approx(1.3)
    assert np.abs(video.frames[:, 0, 0, 0].astype(int) - [0, 20, 30, 50]).max() <= 2


def test_a_long_animation_is_thinned_evenly_in_one_pass() -> None:
    frames = [Image.new("L", (4, 4), i) for i in range(200)]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:], duration=40)
    video = load_media(data, limits=Limits(max_frames=32, video_fps=1))
    assert video.total_frames == 200 and len(video.frames) == 8 and video.duration_s == pytest.approx(8)
    steps = np.diff(video.timestamps_s)
    assert video.timestamps_s[0] == 0 and steps.min() > 0.6 * steps.max() and video.timestamps_s[-1] > 7
    shades = video.frames[:, 0, 0, 0].astype(int)
    assert (shades == [round(t / 0.04) for t in video.timestamps_s]).all()


def test_the_still_of_an_apng_is_not_part_of_the_clip() -> None:
    frames = [Image.new("RGB", (8, 8), (i, 0, 0)) for i in (200, 10, 20)]
    data = encode(frames[0], "PNG", save_all=True, append_images=frames[1:], default_image=True, duration=100)
    assert load_media(data).frames[:, 0, 0, 0].tolist() == [10, 20]


CONTAINERS = [
    ("mp4", "libx264"),
    ("mov", "mjpeg"),
    ("webm", "libvpx-vp9"),
    ("matroska", "libx264"),
    ("avi", "mpeg4"),
]


@pytest.mark.parametrize(("container", "codec"), CONTAINERS)
def test_videos_are_sampled_at_two_frames_a_second_with_true_times(container: str, codec: str) -> None:
    video = load_media(clip(container, codec))
    wanted = [round(i * 47 / 7) for i in range(8)]  # 48 frames, 4 s: 8 frames with both ends
    assert shown_frames(video) == wanted and video.total_frames == 48
    assert video.timestamps_s == pytest.approx([i / FPS for i in wanted], abs=2e-3)
    assert video.duration_s == pytest.approx(4, abs=2e-3) and video.fps == pytest.approx(2, abs=2e-3)


@pytest.mark.parametrize("gop", [1, 7, 1000])
def test_seeking_by_keyframe_finds_the_same_frames_as_reading_on(gop: int) -> None:
    video = load_media(clip(frames=50, gop=gop), limits=Limits(video_fps=1.5))
    assert shown_frames(video) == [round(i * 49 / 5) for i in range(6)]


def test_a_variable_frame_rate_keeps_its_times() -> None:
    ticks = (0, 100, 150, 1900, 2000, 4000)
    video = load_media(clip("matroska", frames=6, ticks=ticks), limits=Limits(min_frames=6))
    assert video.timestamps_s == pytest.approx([t / 1000 for t in ticks])


def test_frames_come_upright_and_shrunk() -> None:
    video = load_media(clip(size=(128, 64), rotation=90), limits=Limits(max_side=40))
    assert video.frames.shape[1:] == (40, 20, 3)
    corner = video.frames[0, -8:, :4].mean()  # 90 degrees counter-clockwise takes the upper left mark down
    assert corner > 240 and video.frames[0, :8].mean() < 20


def test_a_video_that_is_long_to_decode_is_sampled_at_keyframes_or_refused() -> None:
    few = Limits(max_decode_megapixels=12 * 64 * 48 / 1e6)  # 12 frames
    video = load_media(clip(frames=50, gop=10), limits=few)
    assert len(video.frames) >= 4 and all(frame % 10 == 0 for frame in shown_frames(video))
    assert video.timestamps_s == pytest.approx([i / FPS for i in shown_frames(video)], abs=1e-3)
    with pytest.raises(MediaError, match="keyframes"):
        load_media(clip(frames=50, gop=1000), limits=few)
    with pytest.raises(MediaError, match="more than"):
        load_media(animation("GIF", [20] * 30), limits=Limits(max_decode_megapixels=20 * 200 / 1e6))


def test_bare_frames_are_taken_at_the_sampling_rate() -> None:
    frames = np.stack([np.full((6, 8, 3), i, np.uint8) for i in range(100)])
    for source in (frames, list(frames), [Image.fromarray(f) for f in frames]):
        video = load_media(source)
        assert len(video.frames) == 64 and video.total_frames == 100 and video.fps == pytest.approx(64 / 50)
        assert [2 * t for t in video.timestamps_s] == video.frames[:, 0, 0, 0].tolist()
        assert load_media(video) is video
    small = load_media(frames[:4] / 255, limits=Limits(max_side=4))
    assert small.frames.shape == (4, 3, 4, 3) and small.frames[3].max() == 3


def test_metadata_gives_transformers_the_true_times() -> None:
    ticks = (0, 100, 150, 1900, 2000, 4000)
    metadata = load_media(clip("matroska", frames=6, ticks=ticks), limits=Limits(min_frames=6)).metadata()
    # transformers.video_utils.VideoMetadata.timestamps, and .sampled_fps
    times = [index / metadata["fps"] for index in metadata["frames_indices"]]
    assert times == pytest.approx([t / 1000 for t in ticks])
    sampled_fps = len(times) / metadata["total_num_frames"] * metadata["fps"]
    assert sampled_fps == pytest.approx(6 / metadata["duration"])
    assert metadata["total_num_frames"] > metadata["frames_indices"][-1]


@pytest.mark.skipif(not VIDEOS.is_dir(), reason="needs the folder videos/ with real clips under $ADAPTIVE_FUSION_DATA")
@pytest.mark.parametrize("name", ["intel_asl_again.mkv", "opencv_tree.avi", "mmaction_demo.mp4"])
def test_real_clips_load_with_increasing_times(name: str) -> None:
    video = load_media(VIDEOS / name, limits=Limits(max_frames=4, max_side=160))
    assert len(video.frames) == 4 and max(video.frames.shape[1:3]) == 160
    assert 0 == video.timestamps_s[0] < video.timestamps_s[1] < video.timestamps_s[-1] <= video.duration_s


def test_without_pyav_the_message_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(MediaError, match=r"pip install adaptive-fusion\[video\]"):
        load_media(clip())


# ---------------------------------------------------------------------------------------------- refused


def noise_jpeg() -> bytes:
    noise = np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8)
    return encode(Image.fromarray(noise), "JPEG")


def sound_only() -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as out:
        stream = out.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return buffer.getvalue()


def no_frames() -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4", options={"movflags": "empty_moov"}) as out:
        stream = out.add_stream("libx264", rate=FPS)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        out.start_encoding()
    return buffer.getvalue()


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
    "broken PIL image": (lambda: Image.open(io.BytesIO(noise_jpeg()[:-900])), "cut short"),
} | {
    f"URL {url}": (lambda url=url: url, "never fetched")
    for url in (
        "http://example.com/a.png", "HTTPS://example.com/a.png", " file:///etc/passwd", "ftp://h/a", "s3://b/k",
        "http:\\\\example.com\\a.png", "data:image/png;base64,AAAA", "concat+http://h/a.mp4",
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
        for use in (load_media, open_image, content_hash):
            with pytest.raises(MediaError, match="is not a regular file") as caught:
                use(path)
            assert str(tmp_path) not in str(caught.value)


def test_an_image_bomb_is_refused_before_it_takes_memory(tmp_path: Path) -> None:
    bomb = tmp_path / "bomb.png"
    bomb.write_bytes(png_header(20_000, 20_000))
    script = (
        "import resource, sys\n"
        "from adaptive_fusion.errors import MediaError\n"
        "from adaptive_fusion.media import load_media\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try:\n    load_media(sys.argv[1])\n"
        "except MediaError:\n    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    run = subprocess.run([sys.executable, "-c", script, str(bomb)], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 32 * 1024  # KiB


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_megapixels", 1e9), ("max_aspect", float("nan")), ("video_fps", 0), ("min_frames", 65),
        ("max_side", 0), ("max_frames", 1), ("max_decode_megapixels", float("inf")),
    ],
)  # fmt: skip
def test_limits_refuse_absurd_values(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"{field} must be .*, got {value!r}"):
        Limits(**{field: value})


def test_a_video_refuses_parts_that_do_not_fit() -> None:
    frames = np.zeros((2, 4, 4, 3), np.uint8)
    for bad in (
        (frames.astype(float), (0.0, 1.0), 2.0, 2), (frames[:1], (0.0,), 1.0, 1), (frames, (0.0,), 2.0, 2),
        (frames, (1.0, 0.0), 2.0, 2), (frames, (0.0, float("nan")), 2.0, 2), (frames, (0.0, 1.0), 0.0, 2),
        (frames, (0.0, 1.0), 2.0, 1),
    ):  # fmt: skip
        with pytest.raises(MediaError):
            Video(*bad)


# ------------------------------------------------------------------------------------------ lazy opening


def test_open_image_checks_the_header_and_leaves_the_decoding() -> None:
    data = encode(scene(1600, 800), "JPEG")
    with open_image(data) as image:
        image.draft("RGB", (200, 100))
        assert to_rgb(image).size == (200, 100)
    assert open_image(noise_jpeg()[:-900]).size == (80, 60)  # damage behind the header is not seen yet
    with pytest.raises(MediaError, match="megapixels"):
        open_image(png_header(20_000, 20_000))
    with pytest.raises(MediaError, match="is a video"):
        open_image(clip())


# ----------------------------------------------------------------------------------------------- hashing


def test_content_hash_names_the_content(tmp_path: Path) -> None:
    data = encode(scene(), "PNG")
    path = tmp_path / "a.bin"
    path.write_bytes(data)
    assert content_hash(path) == content_hash(data) == content_hash(str(path)) != content_hash(data + b"\0")
    for size in ((1, 1), (1, 3), (600, 4), (48, 32), (1500, 1100)):
        image = scene(*size)
        array = np.asarray(image)
        assert content_hash(image) == content_hash(array.copy()) and len(content_hash(image)) == 64
    image, array = scene(), np.asarray(scene())
    palettes = [half_transparent("P") for _ in range(2)]
    palettes[1].putpalette([200, 10, 10, 0, 0, 0])
    frames = np.stack([array, array[::-1]])
    sources = [
        data, image, image.transpose(Image.Transpose.TRANSPOSE), image.convert("L"), image.convert("RGBA"),
        *palettes, array.reshape(48, 32, 3), array.astype(np.uint16), array[:, :, 0].astype(bool), frames,
        frames[::-1].copy(), [image, image], [image, image, image], load_media(frames),
        Video(frames, (0.0, 2.0), 3.0, 2), array[:1, :16], array[:1, :16].reshape(16, 1, 3),
    ]  # fmt: skip
    assert len({content_hash(source) for source in sources}) == len(sources)


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6), st.binary(min_size=36, max_size=36)), max_size=30))
@settings(max_examples=100, deadline=None)
def test_different_arrays_have_different_hashes(rows: list[tuple[int, int, bytes]]) -> None:
    arrays = [np.frombuffer(b, np.uint8)[: h * w].reshape(h, w) for h, w, b in rows]
    distinct = {(a.shape, a.tobytes()) for a in arrays}
    assert len({content_hash(a) for a in arrays}) == len(distinct)


# ------------------------------------------------------------------------------------------ mutation fuzz


@cache
def seeds() -> list[bytes]:
    grey16 = Image.fromarray(RAMP.astype(np.uint16))
    exif = Image.Exif()
    exif[0x0112] = 6
    images = [
        encode(scene(), "PNG"), encode(half_transparent("P"), "PNG"), encode(grey16, "PNG"),
        encode(scene(), "JPEG", exif=exif), encode(scene(), "JPEG", progressive=True), noise_jpeg(),
        encode(scene().convert("CMYK"), "JPEG"), encode(scene(), "WEBP"),
        encode(half_transparent("RGBA"), "WEBP", lossless=True), encode(scene(), "GIF"),
        encode(scene(), "TIFF"), encode(scene(), "TIFF", compression="tiff_lzw"), encode(grey16, "TIFF"),
        encode(scene(), "TIFF", compression="jpeg"), encode(scene(), "BMP"),
        encode(scene().convert("P"), "BMP"), *(animation(form, [90] * 5) for form in ("GIF", "PNG", "WEBP")),
    ]  # fmt: skip
    return images + [clip(container, codec, frames=10) for container, codec in CONTAINERS]


def mutate(data: bytes, rng: np.random.Generator) -> bytes:
    """One to three of: flipped bytes, extreme 32-bit fields, cuts, repeats, gaps, noise."""
    mutant = bytearray(data)
    for _ in range(rng.integers(1, 4)):
        size = len(mutant)
        span = min(size, 96) if rng.random() < 0.5 else size
        at = int(rng.integers(0, span))
        match int(rng.integers(0, 6)):
            case 0:
                for _ in range(rng.integers(1, 9)):
                    mutant[int(rng.integers(0, span))] ^= int(rng.integers(1, 256))
            case 1:
                field = (0, 1, 0x7FFFFFFF, 0xFFFFFFFF, 0x10000, 0x4000)[int(rng.integers(0, 6))]
                mutant[at : at + 4] = field.to_bytes(4, "little" if rng.random() < 0.5 else "big")
            case 2:
                del mutant[int(rng.integers(1, size + 1)) :]
            case 3:
                mutant[at:at] = mutant[at : at + int(rng.integers(1, 200))]
            case 4:
                del mutant[at : at + int(rng.integers(1, 60))]
            case _:
                mutant[at : at + 16] = rng.bytes(16)
        mutant = mutant or bytearray(b"\0")
    # Most damage to the magic bytes only tests the sniffing.
    return bytes(mutant) if rng.random() < 0.1 else data[:12] + bytes(mutant[12:])


def fuzz(count: int, seed: int) -> dict[str, float]:
    """Load `count` mutants; any exception but MediaError passes through. Times are reported, not judged."""
    rng = np.random.default_rng(seed)
    report = {"loaded": 0.0, "refused": 0.0, "max_ms": 0.0, "max_cpu_ms": 0.0, "slowest": 0.0}
    for i in range(count):
        mutant = mutate(seeds()[i % len(seeds())], rng)
        start, start_cpu = time.perf_counter(), time.process_time()
        try:
            media = load_media(mutant)
            content_hash(media)
            assert kind(media) == "video" or media.mode == "RGB"
            report["loaded"] += 1
        except MediaError as error:
            assert " at 0x" not in str(error)
            report["refused"] += 1
        elapsed_ms = 1000 * (time.perf_counter() - start)
        report["max_cpu_ms"] = max(report["max_cpu_ms"], 1000 * (time.process_time() - start_cpu))
        if elapsed_ms > report["max_ms"]:
            report |= {"max_ms": elapsed_ms, "slowest": float(i)}
    return report


@pytest.mark.filterwarnings("ignore")  # Pillow warns of corrupt metadata, as it should
def test_mutants_raise_nothing_but_media_error() -> None:
    report = fuzz(1_500, seed=1)
    assert report["loaded"] > 100 and report["refused"] > 300  # both roads are really taken


if __name__ == "__main__":
    import warnings

    warnings.simplefilter("ignore")
    print(fuzz(int(sys.argv[1]) if len(sys.argv) > 1 else 10_000, seed=2))
