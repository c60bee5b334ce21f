"""A content hash names the content: no two media share one."""

from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from media_files import encode, half_transparent, scene
from PIL import Image

from adaptive_fusion.media.clips import Video
from adaptive_fusion.media.hashes import content_hash
from adaptive_fusion.media.load import load_media


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
