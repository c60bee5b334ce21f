"""What the gateway adds to a request, beside an engine that answers at once: in pairs with direct requests.

    python benchmarks/gateway.py [--pairs 60] [--json]

Ends with exit code 1 where a target is missed. Run it with nothing else running.
"""

import argparse
import io
import json
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from gateway import gateway, url_of
from server import asking, data_url, text
from upstream import engine

TARGETS = {"native_ms": 5.0, "first_piece_ms": 10.0, "jpeg_ms_per_mp": 12.0, "png_ms_per_mp": 20.0}


def picture(width: int, height: int, form: str, seed: int) -> bytes:
    """Shapes of plain colours with a little grain, as photographs of scenes have it."""
    rng = np.random.default_rng(seed)
    values = np.full((height, width, 3), 230, np.int16)
    for _ in range(12):
        left, top = rng.integers(0, width * 3 // 4), rng.integers(0, height * 3 // 4)
        values[top : top + height // 4, left : left + width // 4] = rng.integers(0, 200, 3)
    if form == "JPEG":
        values += rng.integers(-3, 4, values.shape, dtype=np.int16)
    buffer = io.BytesIO()
    Image.fromarray(np.clip(values, 0, 255).astype(np.uint8)).save(buffer, form, quality=90)
    return buffer.getvalue()


def body_of(data: bytes, form: str, *, stream: bool, point: str | None = None) -> bytes:
    part = {"type": "image_url", "image_url": {"url": data_url(data, f"image/{form.lower()}")}}
    own = {} if point is None else {"adaptive_fusion": {"point": point}}
    return json.dumps({"model": "m", "stream": stream, "messages": asking(part, text("What is it?")), **own}).encode()


def whole_ms(client: httpx.Client, url: str, body: bytes) -> float:
    began = time.perf_counter()
    client.post(url, content=body).raise_for_status()
    return (time.perf_counter() - began) * 1e3


def first_ms(client: httpx.Client, url: str, body: bytes) -> float:
    began = time.perf_counter()
    with client.stream("POST", url, content=body) as answer:
        pieces = answer.iter_raw()
        next(pieces)
        took = (time.perf_counter() - began) * 1e3
        for _ in pieces:
            pass
    return took


def measured(pairs: int) -> dict[str, float]:
    """Medians, in milliseconds."""
    found: dict[str, list[float]] = {name: [] for name in TARGETS}
    width, height = 1600, 1200
    megapixels = width * height / 1e6
    with engine() as behind, httpx.Client(timeout=120) as client:
        direct = f"{behind.url}/v1/chat/completions"
        with gateway(behind.url, "native") as server:
            for index in range(pairs + 5):
                data = picture(800, 600, "JPEG", index)
                for name, take, stream in (("native_ms", whole_ms, False), ("first_piece_ms", first_ms, True)):
                    body = body_of(data, "JPEG", stream=stream)
                    order = [direct, url_of(server)] if index % 2 else [url_of(server), direct]
                    times = {url: take(client, url, body) for url in order}
                    found[name].append(times[url_of(server)] - times[direct])
        with gateway(behind.url) as server:
            for index in range(max(5, pairs // 3) + 5):
                for form in ("JPEG", "PNG"):
                    data = picture(width, height, form, 1000 + index)  # another each time: nothing is found again
                    small = body_of(data, form, stream=False, point="native/786432px")
                    through, past = whole_ms(client, url_of(server), small), whole_ms(client, direct, small)
                    found[f"{form.lower()}_ms_per_mp"].append((through - past) / megapixels)
    return {name: median(times[5:]) for name, times in found.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=60)
    parser.add_argument("--json", action="store_true")
    asked: Any = parser.parse_args()
    found = measured(asked.pairs)
    if asked.json:
        print(json.dumps(found))
    for name, target in TARGETS.items() if not asked.json else ():
        print(f"{name:16} {found[name]:7.2f}  target {target:g}{'' if found[name] <= target else '  MISSED'}")
    return int(any(found[name] > target for name, target in TARGETS.items()))


if __name__ == "__main__":
    raise SystemExit(main())
