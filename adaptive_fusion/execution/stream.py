"""An answer as an iterator over pieces of text, with a worker that can neither hang the reader nor outlive it.

``TextIteratorStreamer`` alone waits forever if its worker dies or its end was read once, takes the prompt of a second
try for text and gives that try's answer behind the first one's, and an abandoned one leaves the model generating.
Knows a callable that generates with a streamer; nothing of models.
"""

import asyncio
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from transformers import LogitsProcessor, TextIteratorStreamer

T = TypeVar("T")

_PROMPT_END = 4
"""Last tokens by which a prompt is known again: a chat template ends every one alike."""


class Stream(Generic[T]):
    """Iterates over text; afterwards `reply` is what the worker returned.

    What was given stays: if `work` generates anew (after running out of memory), it has to begin with the tokens that
    the streamer has `said` (see `Repeating`), and the pieces go on behind them.

    Args:
        work: Called in a thread with a streamer and a cancel event; generates and returns its result.
        tokenizer: Decodes the pieces.
        cancelled: The event that ends the generation, if others are to set it too.

    Raises (while iterating): whatever `work` raised.
    """

    def __init__(
        self, work: Callable[[Any, threading.Event], T], tokenizer: Any, cancelled: threading.Event | None = None
    ) -> None:
        self._streamer = Pieces(tokenizer, skip_special_tokens=True)
        self._cancelled = cancelled if cancelled is not None else threading.Event()
        self._result: Future[T] = Future()
        # The thread must not hold the stream: one that nobody holds is abandoned, read or not.
        args = (work, self._streamer, self._cancelled, self._result)
        self._thread = threading.Thread(target=_work, args=args, daemon=True)
        weakref.finalize(self, self._cancelled.set)
        self._thread.start()

    def __iter__(self) -> Iterator[str]:
        try:
            for piece in self._streamer:
                if piece:
                    yield piece
        finally:
            self.close()
        self._result.result()

    async def __aiter__(self) -> AsyncIterator[str]:
        """The same pieces for ``async for``: the event loop goes on while the next one is generated. A task that is
        cancelled ends the generation at its next token."""
        pieces = iter(self)
        try:
            while (piece := await asyncio.to_thread(next, pieces, None)) is not None:
                yield piece
        finally:
            # Not `close`, which waits: the loop must go on. The worker ends at its next token.
            self._cancelled.set()

    @property
    def reply(self) -> T:
        """The finished result; waits for it.

        Raises:
            Whatever the worker raised.
        """
        return self._result.result()

    def close(self) -> None:
        """End the generation at its next token, if it still runs, and wait for that."""
        if self._thread.is_alive():
            self._cancelled.set()
            self._thread.join()

    def __enter__(self) -> "Stream[T]":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _work(
    work: Callable[[Any, threading.Event], T], streamer: "Pieces", cancelled: threading.Event, result: "Future[T]"
) -> None:
    try:
        result.set_result(work(streamer, cancelled))
    except BaseException as error:  # handed to the reader, whatever it is
        result.set_exception(error)
    finally:
        # Not end(): that decodes what is left, and may raise what the worker died of.
        streamer.text_queue.put(streamer.stop_signal)


class Pieces(TextIteratorStreamer):  # type: ignore[misc]
    """Skips the prompt of every try and the tokens that an earlier try has given, and ends for every reader.

    Attributes:
        said: Tokens that were given, of all tries.
    """

    def __init__(self, tokenizer: Any, **options: Any) -> None:
        super().__init__(tokenizer, **options)
        self.said: list[int] = []
        self._end: Tensor | None = None
        self._again = 0

    def put(self, value: Tensor) -> None:
        """A prompt, a token, or several of assisted generation."""
        if value.ndim > 1 and self._is_prompt(value[0]):
            self._again = len(self.said)
            return
        tokens = value.reshape(-1)[self._again :]
        self._again -= min(self._again, value.numel())
        if len(tokens):
            self.said += tokens.tolist()
            super().put(tokens)

    def _is_prompt(self, row: Tensor) -> bool:
        end = row[-_PROMPT_END:]
        if self._end is None:
            self._end = end
            return True
        return torch.equal(end, self._end)

    def __next__(self) -> str:
        try:
            piece: str = super().__next__()
            return piece
        except StopIteration:
            self.text_queue.put(self.stop_signal)
            raise


class Repeating(LogitsProcessor):  # type: ignore[misc]
    """Makes an answer begin with given tokens, one a step, whatever the model or the sampling would choose.

    Args:
        prompt_length: Tokens before the answer.
        tokens: With which it begins.
    """

    def __init__(self, prompt_length: int, tokens: Sequence[int]) -> None:
        self._prompt_length, self._tokens = prompt_length, tuple(tokens)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores ``[rows, vocabulary]`` of the next token."""
        step = input_ids.shape[1] - self._prompt_length
        if step >= len(self._tokens):
            return scores
        alone = torch.full_like(scores, -torch.inf)
        alone[:, self._tokens[step]] = 0.0
        return alone


class Said(Pieces):
    """A streamer that says each piece of text as it comes, in the thread that generates."""

    def __init__(self, tokenizer: Any, say: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_special_tokens=True)
        self._say = say

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Called by ``TextStreamer``."""
        if text:
            self._say(text)
