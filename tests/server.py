"""A server on a free port of this machine, in a thread; and what requests are made of."""

import base64
import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import av
import numpy as np
from openai import OpenAI
from PIL import Image
from waits import MOST_S

from adaptive_fusion.runner import AdaptiveRunner
from adaptive_fusion.serving.run import DrainingServer, server_for
from adaptive_fusion.serving.settings import Settings
from adaptive_fusion.serving.trials import Trials


@contextmanager
def serving(runner: AdaptiveRunner, trials: Trials | None = None, **settings: Any) -> Iterator[DrainingServer]:
    """A server that is ready; it drains at the end."""
    ready = threading.Event()
    server = server_for(runner, Settings(port=0, **settings), lambda line: ready.set(), trials)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    assert ready.wait(MOST_S)
    try:
        yield server
    finally:
        if thread.is_alive():
            assert server.loop is not None
            server.loop.call_soon_threadsafe(server.stop)
            thread.join(MOST_S)
        assert not thread.is_alive()


def client_of(server: DrainingServer, key: str = "none", **options: Any) -> OpenAI:
    """The official client."""
    return OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key=key, **{"max_retries": 0, **options})


def data_url(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def png(width: int, height: int, colour: tuple[int, int, int] = (200, 30, 40)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(buffer, "PNG")
    return buffer.getvalue()


def mp4(frames: int) -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4", options={"movflags": "empty_moov"}) as out:
        stream = out.add_stream("libx264", rate=4)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for index in range(frames):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((48, 64, 3), 20 * index, np.uint8))))
        out.mux(stream.encode())
    return buffer.getvalue()


def image(width: int = 64, height: int = 48, **options: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_url(png(width, height)), **options}}


def text(said: str) -> dict[str, Any]:
    return {"type": "text", "text": said}


def asking(*parts: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts)}]
