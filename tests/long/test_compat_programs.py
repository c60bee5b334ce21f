"""Programs of others that drive a model: given a runner in its place they go on, adaptively."""

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from adaptive_fusion.budget import Budget
from adaptive_fusion.point import NATIVE
from adaptive_fusion.reference import model_path
from adaptive_fusion.reference.screens import make_scene
from adaptive_fusion.runner import AdaptiveRunner


@pytest.fixture
def scenes() -> list[Image.Image]:
    return [make_scene("simple", seed, "eval").image for seed in range(2)]


@pytest.mark.parametrize("kind", ["simple", "chat"])
def test_lmms_evals_stock_wrapper_evaluates_a_runner(kind: str, scenes: list[Image.Image]) -> None:
    """The wrapper loads the model itself; a runner is put in its place afterwards."""
    pytest.importorskip("lmms_eval", reason="needs pip install lmms-eval qwen-vl-utils decord")
    from importlib import import_module

    instance = import_module("lmms_eval.api.instance").Instance
    stock = import_module(f"lmms_eval.models.{kind}.qwen3_vl").Qwen3_VL
    wrapper = stock(pretrained=str(model_path()), device="cpu", device_map="cpu", max_pixels=147456, min_pixels=1024)
    wrapper.task_dict = {"screens": {"test": [{"image": image} for image in scenes]}}

    def messages(doc: dict[str, Any]) -> list[dict[str, Any]]:
        content = [{"type": "image", "url": doc["image"]}, {"type": "text", "text": "Describe the screen."}]
        return [{"role": "user", "content": content}]

    def answers() -> list[str]:
        first, second = ("Describe the screen.", {"max_new_tokens": 6}), lambda doc: [doc["image"]]
        requests = []
        for index in range(len(scenes)):
            where = (index, "screens", "test")
            arguments = (*first, second, *where) if kind == "simple" else (first[0], messages, first[1], *where)
            metadata = {"task": "screens", "doc_id": index, "repeats": 1}
            requests.append(instance("generate_until", arguments, idx=index, metadata=metadata))
        return [getattr(answer, "text", answer) for answer in wrapper.generate_until(requests)]

    model, expected = wrapper._model, answers()
    assert len(set(expected)) == len(scenes)
    wrapper._model = AdaptiveRunner(model, wrapper.processor, policy="native")
    assert answers() == expected
    cheap = AdaptiveRunner(model, wrapper.processor, policy="reference-latency", budget=Budget(latency_ms=0.001))
    wrapper._model = cheap
    assert len(answers()) == len(scenes)
    assert cheap.last is not None and cheap.last[0].point != NATIVE


def test_a_gradio_chat_shows_a_stream(
    reference_model: Any, processor: Any, scenes: list[Image.Image], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    gradio = pytest.importorskip("gradio", reason="needs pip install adaptive-fusion[compat]")
    client = pytest.importorskip("gradio_client", reason="needs pip install adaptive-fusion[compat]")
    runner = AdaptiveRunner(reference_model, processor, seed=0)
    scenes[0].save(path := tmp_path / "screen.png")

    def answer(message: dict[str, Any], history: list[Any]) -> Any:
        text = ""
        for piece in runner.stream(message["files"], message["text"], max_new_tokens=8):
            text += piece
            yield text

    page = gradio.ChatInterface(answer, multimodal=True, api_name="chat")
    _, address, _ = page.launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True)
    try:
        asked = {"text": "Describe the screen.", "files": [client.handle_file(str(path))]}
        job = client.Client(address, verbose=False).submit(message=asked, api_name="/chat")
        shown = job.result(timeout=120)
        partial = [str(each) for each in job.outputs()]
    finally:
        page.close()
    expected = runner.chat(path, "Describe the screen.", max_new_tokens=8).text
    text = shown if isinstance(shown, str) else shown[0]
    assert text.strip() == expected
    assert len(partial) > 1 and partial[0] != partial[-1]  # it came piece by piece
