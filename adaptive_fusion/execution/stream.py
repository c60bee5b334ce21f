"""An answer as an iterator over pieces of text, with a worker that can neither hang the reader nor outlive it.

``TextIteratorStreamer`` alone waits forever if its worker dies or its end was read once, takes the prompt of a second
try for text, and an abandoned one leaves the model generating. Knows a callable that generates with a streamer;
nothing of models.
"""

import asyncio
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from transformers import TextIteratorStreamer

T = TypeVar("T")

_PROMPT_END = 4
"""Last tokens by which a prompt is known again: a chat template ends every one alike."""


class Stream(Generic[T]):
    """Iterates over text; afterwards `reply` is what the worker returned.

    If `work` generates anew (after running out of memory), the new answer's pieces follow those already given.

    Args:
        work: Called in a thread with a streamer and a cancel event; generates and returns its result.
        tokenizer: Decodes the pieces.
        cancelled: The event that ends the generation, if others are to set it too.

    Raises (while iterating): whatever `work` raised.
    """

    def __init__(
        self, work: Callable[[Any, threading.Event], T], tokenizer: Any, cancelled: threading.Event | None = None
    ) -> None:
        self._streamer = _Pieces(tokenizer, skip_prompt=True, skip_special_tokens=True)
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
    work: Callable[[Any, threading.Event], T], streamer: "_Pieces", cancelled: threading.Event, result: "Future[T]"
) -> None:
    try:
        result.set_result(work(streamer, cancelled))
    except BaseException as error:  # handed to the reader, whatever it is
        result.set_exception(error)
    finally:
        # Not end(): that decodes what is left, and may raise what the worker died of.
        streamer.text_queue.put(streamer.stop_signal)


class _Pieces(TextIteratorStreamer):  # type: ignore[misc]
    """Skips the prompt of every try, and ends for every reader."""

    _end: Tensor | None = None

    def put(self, value: Tensor) -> None:
        if value.ndim > 1:  # a prompt, or several tokens of assisted generation
            end = value[0, -_PROMPT_END:]
            if self._end is None:
                self._end = end
            elif torch.equal(end, self._end):
                self.token_cache.clear()
                self.print_len, self.next_tokens_are_prompt = 0, True
        super().put(value)

    def __next__(self) -> str:
        try:
            piece: str = super().__next__()
            return piece
        except StopIteration:
            self.text_queue.put(self.stop_signal)
            raise
