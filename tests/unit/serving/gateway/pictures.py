"""Pictures for tests of what is sent upstream: made here, in every form that is written again."""

import io
from functools import cache
from typing import Any

import numpy as np
from PIL import Image, ImageCms


def scene(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Red to the right, green downwards, a blue corner at the upper left."""
    across, down = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    pixels = np.stack([across, down, np.zeros_like(across)], axis=-1).astype(np.uint8)
    pixels[: height // 4, : width // 4, 2] = 255
    image = Image.fromarray(pixels)
    if mode == "RGBA":
        image.putalpha(Image.fromarray(across.astype(np.uint8)))
        return image
    if mode == "LA":
        grey = image.convert("L")
        grey.putalpha(Image.fromarray(down.astype(np.uint8)))
        return grey
    if mode == "I;16":
        return Image.fromarray((across * 257).astype(np.uint16))
    return image.quantize(64) if mode == "P" else image.convert(mode)


def encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def opened(data: bytes) -> Any:
    found = Image.open(io.BytesIO(data))
    found.load()
    return found


@cache
def profile() -> bytes:
    """Always the same: a profile has the second in which it was made."""
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
