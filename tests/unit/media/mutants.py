"""Damaged files of every accepted format, for tests that load them: each raises MediaError or loads, nothing else."""

import time
from functools import cache

import numpy as np
from media_files import CONTAINERS, RAMP, animation, clip, encode, half_transparent, noise_jpeg, scene
from PIL import Image

from adaptive_fusion.errors import MediaError
from adaptive_fusion.media.hashes import content_hash
from adaptive_fusion.media.load import kind, load_media


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
    padded = b"\0\0\0\x20free" + bytes(24) + clip(frames=10, flags="frag_keyframe+empty_moov+default_base_moof")
    return [*images, padded, *(clip(container, codec, frames=10) for container, codec in CONTAINERS)]


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
