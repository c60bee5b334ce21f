"""Images and clips made for the tests of loading media, and how their content is read back."""

import io
import struct
import tempfile
import zlib
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from adaptive_fusion.media.clips import Video
from adaptive_fusion.media.load import kind

av = pytest.importorskip("av", reason="the extra [video] (PyAV) is not installed")

FPS, SHADE = 12, 5  # of the clips made here: frame i is a flat grey of SHADE * i
CONTAINERS = [
    ("mp4", "libx264"),
    ("mov", "mjpeg"),
    ("webm", "libvpx-vp9"),
    ("matroska", "libx264"),
    ("avi", "mpeg4"),
]
RAMP = np.linspace(0, 65535, 40 * 30).reshape(30, 40)
RAMP_RGB = np.repeat((RAMP / 257).round()[:, :, None], 3, axis=2)


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
