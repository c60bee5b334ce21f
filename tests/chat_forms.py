"""One request in one of the forms of asking, for tests that mix them."""

import asyncio
from typing import Any

from PIL import Image

from adaptive_fusion.point import NATIVE
from adaptive_fusion.runner import AdaptiveRunner

GREEDY: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}


def mixed(runner: AdaptiveRunner, images: list[Image.Image], number: int) -> str:
    """One request in one of four forms; returns the answer."""
    image, asked = images[number % len(images)], ("Describe.", "Read the text.")[number % 3 % 2]
    form = number % 4
    if form == 0:
        return runner.chat(image, asked, **GREEDY).text
    if form == 1:
        return asyncio.run(runner.achat(image, asked, **GREEDY)).text
    if form == 2:
        return "".join(runner.stream(image, asked, **GREEDY)).strip()
    content = [{"type": "image", "image": image}, {"type": "text", "text": asked}]
    inputs = runner.adapter.prepare([{"role": "user", "content": content}], NATIVE)
    out = runner.generate(**inputs, **GREEDY)
    return str(runner.processor.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
