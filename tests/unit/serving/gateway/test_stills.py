"""A picture is decoded once for its features and for what is sent, and both are as if it had been decoded for each."""

import struct
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import encoded, opened, scene
from PIL import Image

from adaptive_fusion.errors import MediaError
from adaptive_fusion.features.complexity import measure_complexity
from adaptive_fusion.media.load import load_media
from adaptive_fusion.serving.gateway import sizing
from adaptive_fusion.serving.gateway.processors import ImageGrid
from adaptive_fusion.serving.gateway.reencode import image, resized
from adaptive_fusion.serving.gateway.sizing import Given, Sizing
from adaptive_fusion.serving.gateway.stills import NotPlanned, decoded

GRID = ImageGrid(16, 2, 2, 4096, 1 << 20)


def turned(form: str, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(scene(320, 256), form, exif=exif)


def grey_png(bits: int, transparent: int) -> bytes:
    """A grey of few bits, white on the left and black on the right, one of them transparent."""
    width, height, most = 320, 256, (1 << bits) - 1
    row = np.where(np.arange(width) < width // 2, most, 0)
    packed = np.packbits(np.unpackbits(row.astype(np.uint8)[:, None], axis=1)[:, -bits:])
    head = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    pixels = zlib.compress((b"\0" + packed.tobytes()) * height)
    chunks = [(b"IHDR", head), (b"tRNS", struct.pack(">H", transparent)), (b"IDAT", pixels), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )


def behind_the_pixels(orientation: int) -> bytes:
    """A PNG that says only after its pixels how it is to be turned."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    data, said = encoded(scene(320, 256), "PNG"), exif.tobytes().removeprefix(b"Exif\0\0")
    chunk = struct.pack(">I", len(said)) + b"eXIf" + said + struct.pack(">I", zlib.crc32(b"eXIf" + said))
    return data[:-12] + chunk + data[-12:]


PICTURES = [
    *[encoded(scene(320, 256, mode), "PNG") for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")],
    encoded(scene(320, 256, "CMYK"), "JPEG"),
    encoded(scene(320, 256, "RGB"), "PNG", transparency=(0, 0, 255)),
    *[turned(form, orientation) for form in ("JPEG", "PNG", "WEBP") for orientation in range(1, 9)],
    *[encoded(scene(319, 257), "JPEG", subsampling=each, progressive=each == 2) for each in range(3)],
    encoded(scene(320, 256), "JPEG", keep_rgb=True),
    encoded(scene(320, 256), "JPEG") + b"and more",
    behind_the_pixels(6),
    *[grey_png(bits, white) for bits in (1, 2, 4, 8) for white in ((1 << bits) - 1, 0)],
]


@pytest.mark.parametrize("data", PICTURES)
def test_features_are_those_of_the_picture_loaded_by_itself(data: bytes) -> None:
    still, rgb = decoded(data)
    loaded = load_media(data)
    assert isinstance(loaded, Image.Image) and (rgb == np.asarray(loaded)).all()
    assert still.size == loaded.size
    assert Sizing(GRID, 64).measure(data, "image").complexity == measure_complexity(loaded)


@settings(max_examples=100)
@given(
    st.sampled_from(
        [encoded(scene(97, 65), "JPEG"), encoded(scene(97, 65), "PNG"), turned("JPEG", 6), turned("PNG", 6)]
    ),
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=3),
    st.floats(0.3, 1.7),
)
def test_what_is_broken_is_refused_as_when_it_is_loaded_by_itself(
    data: bytes, changed: list[tuple[float, int]], cut: float
) -> None:
    broken = bytearray(data)
    for where, value in changed:
        broken[int(where * (len(broken) - 1))] = value
    broken = broken[: int(len(broken) * cut)]  # all of it for more than one
    try:
        loaded = load_media(bytes(broken))
    except MediaError:
        with pytest.raises(MediaError):
            decoded(bytes(broken))
        return
    if not isinstance(loaded, Image.Image):
        return
    try:
        _, rgb = decoded(bytes(broken))
    except NotPlanned:  # another mode or form than it had
        return
    assert (rgb == np.asarray(loaded)).all()


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("white", [True, False])
def test_a_transparent_grey_of_few_bits_stays_transparent(bits: int, white: bool) -> None:
    small = opened(image(grey_png(bits, ((1 << bits) - 1) * white), 16 * 1024, GRID) or b"").convert("RGBA")
    alpha = np.asarray(small)[..., 3]
    left, right = alpha[:, : small.width // 3], alpha[:, -small.width // 3 :]
    assert (left == (0 if white else 255)).all() and (right == (255 if white else 0)).all()


def test_it_is_decoded_once_and_what_was_dropped_comes_out_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = list[bytes]()

    def counted(data: bytes, **options: Any) -> Any:
        seen.append(data)
        return decoded(data, **options)

    monkeypatch.setattr(sizing, "decoded", counted)
    data, made = encoded(scene(640, 512), "JPEG"), list[bytes | None]()
    for kept in (sizing.MOST_DECODED_MIB, 0):
        monkeypatch.setattr(sizing, "MOST_DECODED_MIB", kept)
        sizes = Sizing(GRID, 64)
        made.append(sizes.smaller(sizes.measure(data, "image"), data, Given(64 * 1024), None))
    assert made[0] is not None and made[0] == made[1]
    assert len(seen) == 1 + 2


def test_what_is_called_something_else_is_left_as_it_is_in_any_order() -> None:
    sizes = Sizing(GRID, 64)
    still = encoded(scene(320, 256), "PNG")
    clip = encoded(scene(320, 256), "GIF", save_all=True, append_images=[scene(320, 256).rotate(180)], duration=100)
    sizes.measure(still, "image"), sizes.measure(clip, "video")
    for data, kind in ((still, "video"), (clip, "image")):
        with pytest.raises(NotPlanned):
            sizes.measure(data, kind)
    with pytest.raises(MediaError):
        sizes.measure(still[: len(still) // 2], "image")


@settings(max_examples=60)
@given(
    st.integers(1, 300),
    st.integers(1, 300),
    st.floats(0.02, 1),
    st.floats(0.9, 1.1),
    st.sampled_from([(np.uint8, 0), (np.uint8, 3), (np.uint8, 4), (np.uint16, 0)]),
    st.integers(0, 99),
)
def test_pixels_are_those_of_pillows_bicubic(
    width: int, height: int, share: float, tilt: float, form: tuple[Any, int], seed: int
) -> None:
    size = max(1, int(width * share)), max(1, min(height, int(height * share * tilt)))
    kind, channels = form
    shape = (height, width, channels) if channels else (height, width)
    top = int(np.iinfo(kind).max)
    pixels = np.random.default_rng(seed).integers(0, top + 1, shape).astype(kind)
    small = resized(pixels, size)
    assert small.dtype == kind and small.shape == (*size[::-1], *shape[2:])
    for index in range(max(1, channels)):
        plane = pixels[..., index] if channels else pixels
        stored = Image.fromarray(plane if kind == np.uint8 else plane.astype(np.float32))
        by_pillow = np.asarray(stored.resize(size, Image.Resampling.BICUBIC)).astype(float).clip(0, top)
        assert abs((small[..., index] if channels else small) - by_pillow).max() <= 3
    assert (resized(np.full(shape, top // 3, kind), size) == top // 3).all()


def test_what_is_hidden_does_not_shine_through() -> None:
    pixels = np.zeros((256, 320, 4), np.uint8)
    pixels[:, :160] = (255, 0, 0, 255)
    pixels[:, 160:] = (0, 255, 0, 0)
    small = np.asarray(opened(image(encoded(Image.fromarray(pixels), "PNG"), 16 * 1024, GRID) or b""))
    assert small[small[..., 3] > 0][..., 1].max() == 0 and small[..., 3].min() == 0 and small[..., 3].max() == 255
