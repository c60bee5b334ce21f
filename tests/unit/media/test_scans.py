"""Scans of every depth and sense of zero give the picture that their 8-bit form gives, or are refused by name.

The files are written here byte by byte: no library writes all of them.
"""

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from media_files import near
from PIL import Image

from adaptive_fusion.errors import MediaError
from adaptive_fusion.features.complexity import measure_complexity
from adaptive_fusion.media.load import load_media

Array = np.ndarray[Any, Any]

HEIGHT, WIDTH = 12, 16
GREY = (np.arange(HEIGHT * WIDTH) * 4 // 3).reshape(HEIGHT, WIDTH)
RGB = np.dstack([GREY, GREY[::-1], GREY[:, ::-1]])
ALPHA = np.tile(np.where(np.arange(WIDTH) < WIDTH // 2, 0, 255), (HEIGHT, 1))
UNSIGNED, SIGNED, FLOAT = 1, 2, 3
WHITE_ZERO, BLACK_ZERO, TRUE_COLOUR, PALETTE, SEPARATED = 0, 1, 2, 3, 5


def packed(row: Array, bits: int, order: str = ">", kind: str = "u") -> bytes:
    """One row of samples as it stands in a file."""
    if bits in (8, 16, 32):
        return row.astype(f"{order}{kind}{bits // 8}").tobytes()
    return np.packbits((row.reshape(-1, 1) >> np.arange(bits - 1, -1, -1)) & 1).tobytes()


def png(samples: Array, depth: int, colour: int, *, transparent: bytes = b"", palette: bytes = b"") -> bytes:
    def chunk(tag: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + tag + data + struct.pack(">I", zlib.crc32(tag + data))

    head = struct.pack(">IIBBBBB", samples.shape[1], samples.shape[0], depth, colour, 0, 0, 0)
    extra = (chunk(b"PLTE", palette) if palette else b"") + (chunk(b"tRNS", transparent) if transparent else b"")
    rows = b"".join(b"\0" + packed(row, depth) for row in samples)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )


def tiff(
    samples: Array, bits: int, photometric: int, *, order: str = "<", form: int = UNSIGNED, **more: list[int]
) -> bytes:
    """An uncompressed TIFF of one strip; `more` are `extra` (samples) and `colours` (a colour map)."""
    height, width = samples.shape[:2]
    planes = samples.shape[2] if samples.ndim == 3 else 1
    kind = {UNSIGNED: "u", SIGNED: "i", FLOAT: "f"}[form]
    data = b"".join(packed(row, bits, order, kind) for row in samples)
    fields = {
        256: [width], 257: [height], 258: [bits] * planes, 259: [1], 262: [photometric], 273: [0], 277: [planes],
        278: [height], 279: [len(data)], 320: more.get("colours"), 338: more.get("extra"), 339: [form] * planes,
    }  # fmt: skip
    known = [(tag, values) for tag, values in fields.items() if values]
    after = 8 + 2 + 12 * len(known) + 4
    begin = after + sum(2 * len(values) for _, values in known if len(values) > 2)
    entries = outside = b""
    for tag, values in known:
        if len(values) > 2:
            field = struct.pack(order + "I", after + len(outside))
            outside += struct.pack(f"{order}{len(values)}H", *values)
        else:
            field = struct.pack(f"{order}{len(values)}H", *(begin if tag == 273 else v for v in values)).ljust(4, b"\0")
        entries += struct.pack(order + "HHI", tag, 3, len(values)) + field
    magic = (b"II" if order == "<" else b"MM") + struct.pack(order + "HI", 42, 8)
    return magic + struct.pack(order + "H", len(known)) + entries + bytes(4) + outside + data


def levels(bits: int, values: Array = GREY) -> tuple[Array, Array]:
    """Samples of that many bits that come nearest to 8-bit `values`, and the 8-bit values that they stand for."""
    top = (1 << bits) - 1
    samples = (values.astype(np.int64) * top + 127) // 255
    return samples, (samples * 255 + top // 2) // top


def on_white(picture: Array, alpha: Array = ALPHA) -> Array:
    """As RGB, with what is transparent in white."""
    rgb = picture if picture.ndim == 3 else np.repeat(picture[:, :, None], 3, axis=2)
    return np.where((alpha == 0)[:, :, None], 255, rgb)


OPAQUE = np.full_like(ALPHA, 255)
FILES: dict[str, tuple[bytes, Array]] = {}
for bits in (1, 2, 4, 8, 16):
    samples, shades = levels(bits)
    FILES[f"PNG grey {bits}"] = png(samples, bits, 0), on_white(shades, OPAQUE)
    key = int(samples[5, 7])
    keyed = on_white(shades, samples != key)
    FILES[f"PNG grey {bits}, one level transparent"] = png(samples, bits, 0, transparent=struct.pack(">H", key)), keyed
for bits in (1, 2, 4, 8):
    colours = np.random.default_rng(bits).integers(0, 256, (1 << bits, 3))
    indices = np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH) % (1 << bits)
    palette, clear = colours.astype(np.uint8).tobytes(), indices != 1
    FILES[f"PNG palette {bits}"] = png(indices, bits, 3, palette=palette), colours[indices]
    FILES[f"PNG palette {bits}, one transparent"] = (
        png(indices, bits, 3, palette=palette, transparent=b"\xff\0"),
        on_white(colours[indices], clear),
    )
    for order in "<>":
        FILES[f"TIFF palette {bits} {order}"] = (
            tiff(indices, bits, PALETTE, order=order, colours=(colours.T * 257).ravel().tolist()),
            colours[indices],
        )
for bits in (8, 16):
    (grey, _), (rgb, _), (alpha, _), (cmy, _) = (levels(bits, v) for v in (GREY, RGB, ALPHA, 255 - RGB))
    FILES[f"PNG grey and alpha {bits}"] = png(np.dstack([grey, alpha]), bits, 4), on_white(GREY)
    FILES[f"PNG RGB {bits}"] = png(rgb, bits, 2), RGB
    FILES[f"PNG RGBA {bits}"] = png(np.dstack([rgb, alpha]), bits, 6), on_white(RGB)
    noise = np.random.default_rng(0).integers(0, 1 << bits, RGB.shape)  # 16-bit colours that are no multiples of 257
    hidden = (noise == noise[3, 4]).all(axis=2)
    FILES[f"PNG RGB {bits}, one colour transparent"] = (
        png(noise, bits, 2, transparent=struct.pack(">3H", *noise[3, 4].tolist())),
        on_white(noise >> (bits - 8), ~hidden),
    )
    for order in "<>":
        FILES[f"TIFF RGB {bits} {order}"] = tiff(rgb, bits, TRUE_COLOUR, order=order), RGB
        FILES[f"TIFF RGBA {bits} {order}"] = (
            tiff(np.dstack([rgb, alpha]), bits, TRUE_COLOUR, order=order, extra=[2]),
            on_white(RGB),
        )
        FILES[f"TIFF CMYK {bits} {order}"] = tiff(np.dstack([cmy, 0 * grey]), bits, SEPARATED, order=order), RGB
for order in "<>":
    for zero in (BLACK_ZERO, WHITE_ZERO):
        where = f"{order}, {'black' if zero else 'white'} is zero"
        for bits in (1, 2, 4, 8, 12, 16):
            samples, shades = levels(bits)
            stored = samples if zero else (1 << bits) - 1 - samples
            if (bits, order) != (12, ">"):
                FILES[f"TIFF grey {bits} {where}"] = tiff(stored, bits, zero, order=order), on_white(shades, OPAQUE)
        shades = np.abs(GREY - (0 if zero else 255))
        FILES[f"TIFF float {where}"] = (
            tiff(shades / 255, 32, zero, order=order, form=FLOAT),
            on_white(GREY, OPAQUE),
        )
        FILES[f"TIFF grey and alpha {where}"] = (
            tiff(np.dstack([shades, ALPHA]), 8, zero, order=order, extra=[2]),
            on_white(GREY),
        )
        FILES[f"TIFF signed 16 {where}"] = (
            tiff(shades * 257 - 32768, 16, zero, order=order, form=SIGNED),
            on_white(GREY, OPAQUE),
        )
FILES["TIFF unsigned 32, all of the range"] = tiff(GREY * 0x01010101, 32, BLACK_ZERO), on_white(GREY, OPAQUE)
FILES["TIFF unsigned 32, white is zero"] = tiff((255 - GREY) * 0x01010101, 32, WHITE_ZERO), on_white(GREY, OPAQUE)
FILES["TIFF signed 8"] = tiff(GREY - 128, 8, BLACK_ZERO, form=SIGNED), on_white(GREY, OPAQUE)


@pytest.mark.parametrize("name", FILES)
def test_a_scan_is_the_picture_that_its_8_bit_form_is(name: str) -> None:
    data, expected = FILES[name]
    assert near(load_media(data), expected, 1)
    try:
        opened = Image.open(io.BytesIO(data))
    except OSError:
        return  # Pillow alone does not know this one
    assert near(load_media(opened), expected, 1)
    opened = Image.open(io.BytesIO(data))
    assert measure_complexity(opened) == measure_complexity(load_media(data))


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_deflate", "packbits"])
def test_compressed_scans_keep_the_sense_of_zero(compression: str) -> None:
    buffer = io.BytesIO()
    inverted = Image.fromarray((65535 - GREY * 257).astype(np.uint16))
    inverted.save(buffer, "TIFF", compression=compression, tiffinfo={262: WHITE_ZERO})
    assert near(load_media(buffer.getvalue()), on_white(GREY, OPAQUE), 1)


@pytest.mark.parametrize("adobe", [True, False])
def test_inverted_cmyk_photographs_come_out_right(adobe: bool) -> None:
    """Adobe's CMYK JPEGs are inverted; readers take those without its marker for the same."""
    smooth = np.kron(RGB, np.ones((8, 8, 1), int)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(smooth).convert("CMYK").save(buffer, "JPEG", quality=100, subsampling=0)
    data = buffer.getvalue()
    begin = data.index(b"\xff\xee")
    if not adobe:
        data = data[:begin] + data[begin + 2 + int.from_bytes(data[begin + 2 : begin + 4], "big") :]
    assert (b"Adobe" in data) == adobe and near(load_media(data), smooth, 12)


@pytest.mark.parametrize(
    "data",
    [
        tiff(levels(12)[0], 12, BLACK_ZERO, order=">"),
        tiff(np.dstack([GREY, ALPHA]) * 257, 16, BLACK_ZERO, extra=[2]),
        tiff(GREY, 32, WHITE_ZERO, order=">"),
    ],
)
def test_what_is_not_read_is_refused_as_a_variant_not_as_damage(data: bytes) -> None:
    with pytest.raises(MediaError, match="or of a variant that is not read"):
        load_media(data)
