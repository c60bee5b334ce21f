"""Streams of text: every reader ends, a second try's prompt stays out, and nobody's stream is given up."""

import gc
import threading
from typing import Any

import pytest
import torch
from waits import MOST_S

from adaptive_fusion.execution.stream import Stream

WAIT_S = MOST_S  # far beyond what any of this takes: only a stream that hangs waits so long


def read(stream: Stream[Any], into: list[Any]) -> None:
    try:
        into.append("".join(stream))
    except Exception as error:
        into.append(error)


def in_time(stream: Stream[Any]) -> Any:
    """What reading gives, the text or the error; fails if it never ends."""
    found: list[Any] = []
    reader = threading.Thread(target=read, args=(stream, found), daemon=True)
    reader.start()
    reader.join(WAIT_S)
    assert found, "the reader still waits"
    return found[0]


def test_every_reading_ends(processor: Any) -> None:
    tokens = processor.tokenizer("red circle top left", return_tensors="pt").input_ids

    def answers(streamer: Any, _cancelled: threading.Event) -> str:
        streamer.put(tokens)
        for token in tokens[0]:
            streamer.put(token[None])
        streamer.end()
        return "done"

    stream = Stream(answers, processor.tokenizer)
    assert [in_time(stream) for _ in range(4)] == ["red circle top left", "", "", ""]
    assert stream.reply == "done"


def test_a_worker_that_dies_of_its_own_tokenizer_still_ends_the_reading(processor: Any) -> None:
    class Broken:
        def decode(self, *_: Any, **__: Any) -> str:
            raise OverflowError("token beyond the vocabulary")

    def answers(streamer: Any, _cancelled: threading.Event) -> None:
        streamer.put(torch.tensor([[1, 2]]))
        streamer.put(torch.tensor([3]))

    stream = Stream(answers, Broken())
    for _ in range(3):
        assert isinstance(in_time(stream), OverflowError)
    with pytest.raises(OverflowError):
        _ = stream.reply


def test_the_prompt_of_a_second_try_is_not_taken_for_text(processor: Any) -> None:
    def ids(text: str) -> torch.Tensor:
        found: torch.Tensor = processor.tokenizer(text, return_tensors="pt").input_ids
        return found

    asked = "Describe the screen.<|im_end|>\n<|im_start|>assistant\n"
    answer = ids("blue star")

    def answers(streamer: Any, _cancelled: threading.Event) -> None:
        streamer.put(ids("<|image_pad|><|image_pad|><|image_pad|>" + asked))  # runs out of memory in the prefill
        streamer.put(ids("<|image_pad|>" + asked))  # a shorter prompt, at a cheaper point
        streamer.put(answer[:, :2])  # several tokens at once, as assisted generation gives them
        for token in answer[0, 2:]:
            streamer.put(token[None])
        streamer.end()

    assert in_time(Stream(answers, processor.tokenizer)) == "blue star"


def test_a_second_try_goes_on_behind_what_the_first_has_given(processor: Any) -> None:
    prompt, answer = (processor.tokenizer(text, return_tensors="pt").input_ids for text in ("said is said", "red star"))

    def answers(streamer: Any, _cancelled: threading.Event) -> list[int]:
        for count in (2, 0, 3, len(answer[0])):  # each try goes as far before memory runs out
            streamer.put(prompt)
            for token in answer[0, :count]:
                streamer.put(token[None])
        streamer.end()
        return list(streamer.said)

    stream = Stream(answers, processor.tokenizer)
    assert in_time(stream) == "red star" and stream.reply == answer[0].tolist()


def test_a_stream_that_nobody_holds_is_cancelled(processor: Any) -> None:
    seen = threading.Event()

    def answers(_streamer: Any, cancelled: threading.Event) -> None:
        if cancelled.wait(WAIT_S):
            seen.set()

    stream = Stream(answers, processor.tokenizer)
    worker = stream._thread
    del stream
    gc.collect()
    worker.join(WAIT_S)
    assert seen.is_set()
