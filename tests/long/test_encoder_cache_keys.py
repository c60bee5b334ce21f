"""Keys of the encoder cache: no two different media, sizes, tenants or fusions share one."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from adaptive_fusion.execution.encoder_cache import EncoderCache
from adaptive_fusion.execution.request import build_request
from adaptive_fusion.media.clips import Video
from adaptive_fusion.media.hashes import exact_hash
from adaptive_fusion.models import adapter_for
from adaptive_fusion.models.encoder_keys import EncoderKeys
from adaptive_fusion.models.reuse import Seen
from adaptive_fusion.point import NATIVE, OperatingPoint

TENANTS = ("", "a", "b", "ab", "1:a")
POINTS = (
    NATIVE,
    OperatingPoint(fusion="top"),
    OperatingPoint(max_pixels=4096),
    OperatingPoint(fusion="sum", layers=6),
    OperatingPoint(fusion="sum", layers=3),
)


def adversarial(rng: np.random.Generator) -> Iterator[Any]:
    """Media made from the same few bytes: transposes, flips, reshapes, palettes, modes, arrays, clips."""
    side, other = (int(n) for n in rng.integers(8, 24, 2))
    levels = int(rng.integers(1, 4))
    pixels = rng.integers(0, levels, (side, other, 3), dtype=np.uint8)
    yield pixels
    yield pixels.transpose(1, 0, 2).copy()
    yield pixels.reshape(other, side, 3)
    yield pixels[::-1].copy()
    yield pixels[:, ::-1].copy()
    yield pixels[..., ::-1].copy()
    changed = pixels.copy()
    changed[rng.integers(side), rng.integers(other), rng.integers(3)] ^= 128
    yield changed
    yield pixels[..., 0].copy()
    yield pixels.astype(np.float64) / 255
    grey = Image.fromarray(pixels[..., 0])
    yield grey
    for palette in ([0, 0, 0, 255, 0, 0, 0, 255, 0], [0, 0, 0, 0, 255, 0, 255, 0, 0]):
        indexed = Image.fromarray(pixels[..., 0]).convert("P")
        indexed.putdata([int(v) for v in pixels[..., 0].ravel()])
        indexed.putpalette(palette)
        yield indexed
    alpha = np.dstack([pixels, rng.integers(0, 2, (side, other), dtype=np.uint8) * 255])
    yield alpha
    yield Image.fromarray(pixels[..., 0] > 0)
    frames = np.stack([pixels, changed])
    for times, duration in (((0.0, 0.5), 1.0), ((0.0, 0.25), 1.0), ((0.0, 0.5), 2.0)):
        yield Video(frames, times, duration, 2)
    yield Video(frames[::-1].copy(), (0.0, 0.5), 1.0, 2)
    yield Video(np.stack([pixels, pixels]), (0.0, 0.5), 1.0, 2)


def identity(medium: Any) -> tuple[Any, ...]:
    """All that a loaded medium is, without a hash."""
    if isinstance(medium, Video):
        about = medium.timestamps_s, medium.duration_s, medium.total_frames
        return "clip", medium.frames.shape, medium.frames.tobytes(), *about
    return "image", medium.mode, medium.size, medium.tobytes()


def test_no_two_different_keys_are_the_same(
    reference_model: Any, processor: Any, share_of: Callable[[int], int], tmp_path: Path
) -> None:
    """Media that are equal once decoded, from whatever source, share a key; all else has its own."""
    adapter = adapter_for(reference_model, processor)
    keys, cache = EncoderKeys(adapter), EncoderCache(1)
    rng, wanted = np.random.default_rng(0), share_of(100_000)
    of_key: dict[str, tuple[Any, ...]] = {}
    of_identity: dict[tuple[Any, ...], str] = {}
    made = 0
    while made < wanted:
        for source in adversarial(rng):
            request = build_request(source, "?", exact=True)
            what = identity(request.media[0])
            for tenant in TENANTS:
                seen = keys.seen(cache, request.messages, request.digests, tenant)
                assert isinstance(seen, Seen)
                for point in POINTS:
                    (found,) = seen._keys(point)
                    for key, fused in ((found.merged, ""), (found.taps, (point.fusion, point.layers))):
                        if key is None:
                            continue
                        sides = adapter.encoded_sides(request.sizes[0], point)
                        exact = *what, tenant, sides, fused
                        assert of_key.setdefault(key, exact) == exact, "two that differ share a key"
                        assert of_identity.setdefault(exact, key) == key, "one has two keys"
                        made += 1
    assert len(of_key) == len(of_identity) > wanted // 20


def test_a_file_and_its_array_share_a_key_and_a_lossy_copy_does_not(tmp_path: Path) -> None:
    pixels = np.random.default_rng(1).integers(0, 255, (24, 40, 3), dtype=np.uint8)
    exact, lossy = tmp_path / "a.png", tmp_path / "a.jpg"
    Image.fromarray(pixels).save(exact)
    Image.fromarray(pixels).save(lossy)
    hashes = [exact_hash(build_request(source, "?").media[0]) for source in (pixels, exact, lossy)]  # type: ignore[arg-type]
    assert hashes[0] == hashes[1] != hashes[2]


@pytest.mark.parametrize("part", [{"max_pixels": 2048}, {"resized_height": 32, "resized_width": 32}])
def test_a_size_that_was_asked_for_is_in_the_key(reference_model: Any, processor: Any, part: dict[str, int]) -> None:
    keys, cache = EncoderKeys(adapter_for(reference_model, processor)), EncoderCache(1)
    image = Image.fromarray(np.random.default_rng(2).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    found = []
    for options in ({}, part):
        request = build_request({"type": "image", "image": image, **options}, "?", exact=True)
        seen = keys.seen(cache, request.messages, request.digests, "")
        assert seen is not None
        found.append(seen._keys(replace(NATIVE))[0].merged)
    assert found[0] != found[1]
