"""The forms of asking: awaited, streamed in an event loop, several requests at once, from many threads; what a reply
has beside its text.
"""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from chat_forms import GREEDY, mixed
from PIL import Image

from adaptive_fusion.errors import ConfigError
from adaptive_fusion.point import NATIVE, OperatingPoint
from adaptive_fusion.reply import Reply
from adaptive_fusion.runner import AdaptiveRunner

HALF = OperatingPoint(downsample=0.5)


@pytest.fixture(scope="module")
def runner(reference_model: Any, processor: Any) -> AdaptiveRunner:
    return AdaptiveRunner(reference_model, processor, policy="reference-balanced")


@pytest.fixture(scope="module")
def images(noise_image: Any) -> list[Image.Image]:
    return [noise_image(48 + 16 * i, 64, i) for i in range(4)]


def test_awaited_and_streamed_answers_are_those_of_chat(runner: AdaptiveRunner, images: list[Image.Image]) -> None:
    expected = [runner.chat(image, "Describe.", **GREEDY).text for image in images]

    async def all_at_once() -> tuple[list[Reply], str]:
        replies = await asyncio.gather(*(runner.achat(image, "Describe.", **GREEDY) for image in images))
        stream = runner.stream(images[0], "Describe.", **GREEDY)
        return replies, "".join([piece async for piece in stream])

    replies, streamed = asyncio.run(all_at_once())
    assert [reply.text for reply in replies] == expected and streamed.strip() == expected[0]


def test_a_cancelled_task_ends_its_generation_and_frees_the_model(
    runner: AdaptiveRunner, images: list[Image.Image], reference_model: Any
) -> None:
    begun = threading.Event()
    steps: list[int] = []

    def seen(*_: Any) -> None:
        steps.append(1)
        begun.set()

    async def give_up(start: Callable[[], Any]) -> None:
        task = asyncio.ensure_future(start())
        await asyncio.to_thread(begun.wait, 20)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    async def read() -> None:
        async for _ in runner.stream(images[0], "?", max_new_tokens=4000, min_new_tokens=4000):
            pass

    for start in (lambda: runner.achat(images[0], "?", max_new_tokens=4000, min_new_tokens=4000), read):
        begun.clear()
        handle = reference_model.register_forward_pre_hook(seen)
        try:
            asyncio.run(give_up(start))
        finally:
            handle.remove()
        with runner.exclusive():  # the generation is over, or this would wait for 4,000 tokens
            assert len(steps) < 1000


def test_native_holds_for_what_is_awaited_inside_it(runner: AdaptiveRunner, images: list[Image.Image]) -> None:
    with runner.native():
        reply = asyncio.run(runner.achat(images[0], "Describe.", **GREEDY))
    assert reply.decision.point == NATIVE


def test_several_requests_in_one_call(runner: AdaptiveRunner, images: list[Image.Image]) -> None:
    questions = ["Describe.", "Read the text.", "Describe.", "What is it?"]
    alone = [runner.chat(image, asked, **GREEDY).text for image, asked in zip(images, questions, strict=True)]
    together = runner.chat(images, questions, **GREEDY)
    assert [reply.text for reply in together] == alone
    assert len({reply.decision.request_id for reply in together}) == 4
    talks = [
        [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": asked}]}]
        for image, asked in zip(images, questions, strict=True)
    ]
    assert [reply.text for reply in runner.chat(talks, **GREEDY)] == alone  # type: ignore[attr-defined]
    assert runner.chat(None, ["Hello"], **GREEDY)[0].decision.kind == "text"
    # One question about several images stays one request.
    assert isinstance(runner.chat(images[:2], "Compare.", **GREEDY), Reply)
    for media, found in ((images[:3], "3 media"), (images[0], "Image")):
        with pytest.raises(ConfigError, match=f"4 prompts and {found}"):
            runner.chat(media, questions)


@pytest.mark.parametrize("point", [NATIVE, HALF], ids=lambda p: p.name)
def test_a_reply_has_tokens_and_their_log_probabilities(
    runner: AdaptiveRunner, images: list[Image.Image], point: OperatingPoint
) -> None:
    plain = runner.chat(images[0], "Describe.", point=point, **GREEDY)
    asked = runner.chat(images[0], "Describe.", point=point, output_logits=True, output_scores=True, **GREEDY)
    assert plain.logprobs is None and plain.output is None and plain.token_ids == asked.token_ids
    tokenizer = runner.processor.tokenizer
    assert tokenizer.decode(asked.token_ids, skip_special_tokens=True).strip() == asked.text
    assert asked.logprobs is not None and len(asked.logprobs) == len(asked.token_ids) == asked.measurement.new_tokens
    content = [{"type": "image", "image": images[0]}, {"type": "text", "text": "Describe."}]
    encoded = runner.adapter.encode(runner.adapter.prepare([{"role": "user", "content": content}], point), point)
    ids = encoded.inputs["input_ids"]
    full = torch.cat([ids, torch.tensor([asked.token_ids])], 1)
    types = torch.nn.functional.pad(encoded.inputs["mm_token_type_ids"], (0, len(asked.token_ids)))
    more = {"input_ids": full, "mm_token_type_ids": types, "attention_mask": torch.ones_like(full)}
    with torch.no_grad():
        logits = runner.model(**{**encoded.inputs, **more}).logits[0, ids.shape[1] - 1 : -1].log_softmax(-1)
    expected = [float(row[token]) for row, token in zip(logits, asked.token_ids, strict=True)]
    assert asked.logprobs == pytest.approx(expected, abs=1e-3)
    assert len(asked.output.scores) == len(asked.token_ids)
    assert runner.chat(images[0], "?", num_beams=2, output_scores=True, **GREEDY).logprobs is None


def test_stop_strings_need_no_tokenizer(runner: AdaptiveRunner, images: list[Image.Image]) -> None:
    free = runner.chat(images[0], "Describe.", max_new_tokens=40, do_sample=False)
    stop = next(part for i in range(3, len(free.text)) if (part := free.text[i : i + 3]) == "".join(part.split()))
    stopped = runner.chat(images[0], "Describe.", max_new_tokens=40, do_sample=False, stop_strings=[stop])
    assert stopped.text.endswith(stop) and len(stopped.text) < len(free.text) and stopped.finish_reason == "stop"


def test_many_threads_get_the_answers_of_one(runner: AdaptiveRunner, images: list[Image.Image]) -> None:
    numbers = range(16)
    serial = [mixed(runner, images, number) for number in numbers]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda number: mixed(runner, images, number), numbers)) == serial
