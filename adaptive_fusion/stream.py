"""An answer as an iterator over pieces of text, with a worker that can neither hang the reader nor outlive it.

``TextIteratorStreamer`` alone waits forever if its worker dies, and an abandoned one leaves the model generating. Knows
a callable that generates with a streamer; nothing of models.
"""

import threading
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

from transformers import TextIteratorStreamer

T = TypeVar("T")


class Stream(Generic[T]):
    """Iterates over text; afterwards `reply` is what the worker returned.

    Args:
        work: Called in a thread with a streamer and a cancel event; generates and returns its result.
        tokenizer: Decodes the pieces.

    Raises (while iterating): whatever `work` raised.
    """

    def __init__(self, work: Callable[[Any, threading.Event], T], tokenizer: Any) -> None:
        self._streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._cancelled = threading.Event()
        self._error: BaseException | None = None
        self._reply: T | None = None
        self._thread = threading.Thread(target=self._work, args=(work,), daemon=True)
        self._thread.start()

    def _work(self, work: Callable[[Any, threading.Event], T]) -> None:
        try:
            self._reply = work(self._streamer, self._cancelled)
        except BaseException as error:  # handed to the reader, whatever it is
            self._error = error
        finally:
            self._streamer.end()

    def __iter__(self) -> Iterator[str]:
        try:
            for piece in self._streamer:
                if piece:
                    yield piece
        finally:
            self.close()
        if self._error is not None:
            raise self._error

    @property
    def reply(self) -> T:
        """The finished result; waits for it.

        Raises:
            Whatever the worker raised.
        """
        self._thread.join()
        if self._error is not None:
            raise self._error
        assert self._reply is not None  # the worker either returned or raised
        return self._reply

    def close(self) -> None:
        """End the generation at its next token, if it still runs, and wait for that."""
        if self._thread.is_alive():
            self._cancelled.set()
            self._thread.join()

    def __enter__(self) -> "Stream[T]":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
