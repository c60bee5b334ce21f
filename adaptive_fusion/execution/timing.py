"""When tokens appeared, and when generation must end: a stopping criterion that is called after every token.

Knows a clock, a deadline and a cancel flag. Must not know of models; on an accelerator the caller's `synchronize`
makes the first reading honest (later ones follow from the loop's own end-of-sequence check).
"""

import threading
from collections.abc import Callable
from typing import Any

import torch
from transformers import StoppingCriteria


def synchronize(device: torch.device) -> None:
    """Wait until an accelerator has done what it was given; nothing where calls return when they are done."""
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is not None and device.type == accelerator.type:
        torch.accelerator.synchronize(device)


class GenerationClock(StoppingCriteria):  # type: ignore[misc]
    """Records the first and last token's time and stops at a deadline or when cancelled.

    Args:
        clock: Seconds, monotonic. (``MaxTimeCriteria`` reads the wall clock, which steps.)
        deadline_s: On `clock`; None lets generation finish.
        cancelled: Set by whoever abandons the request.
        synchronize: Waits for the device; called once, at the first token.
    """

    def __init__(
        self,
        clock: Callable[[], float],
        deadline_s: float | None = None,
        cancelled: threading.Event | None = None,
        synchronize: Callable[[], None] | None = None,
    ) -> None:
        self._clock, self._deadline_s, self._cancelled, self._synchronize = (
            clock,
            deadline_s,
            cancelled,
            synchronize,
        )
        self.first_s: float | None = None
        self.last_s: float | None = None
        self.steps = 0
        self.stopped_by: str | None = None

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """``[batch]`` of bool: whether each sequence must end."""
        if self.first_s is None and self._synchronize is not None:
            self._synchronize()
        now = self._clock()
        self.steps += 1
        step = now - self.last_s if self.last_s is not None else 0.0
        self.first_s = now if self.first_s is None else self.first_s
        self.last_s = now
        if self._cancelled is not None and self._cancelled.is_set():
            self.stopped_by = "cancelled"
        elif self._deadline_s is not None and now + step > self._deadline_s:
            # One more step would end after the deadline, so this token is the last.
            self.stopped_by = "deadline"
        stop = self.stopped_by is not None
        return torch.full((input_ids.shape[0],), stop, dtype=torch.bool, device=input_ids.device)
