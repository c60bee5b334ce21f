"""The vision tower's levels of questions seen before, so that training runs the tower once per question.

Knows adapters and questions; nothing of what is trained or of answers.
"""

from collections.abc import Sequence

from torch import Tensor

from adaptive_fusion.evaluation.questions import Question
from adaptive_fusion.learning.distillation.teacher import prepare
from adaptive_fusion.models import GridAdapter, Recorded
from adaptive_fusion.point import NATIVE


class LevelCache:
    """Keeps levels in memory up to a bound: those that come first stay.

    Every epoch visits every question once in a new order, so a question seen lately is no likelier to be next.

    Args:
        adapter: Reaches the model.
        levels: The blocks whose outputs are kept.
        cache_gb: The bound, in GiB.
    """

    def __init__(self, adapter: GridAdapter, levels: Sequence[int], cache_gb: float) -> None:
        self._adapter, self._levels = adapter, tuple(levels)
        self._room = cache_gb * 2**30
        self._kept: dict[tuple[str, float], tuple[dict[str, Tensor], Recorded]] = {}

    def of(self, question: Question, pixel_share: float = 1.0) -> tuple[dict[str, Tensor], Recorded]:
        """The question's tensors without its pixels, and its levels, at a share of its native pixels."""
        key = question.key, pixel_share
        if key in self._kept:
            return self._kept[key]
        inputs = prepare(self._adapter, question, pixel_share)
        found = (
            {name: value for name, value in inputs.items() if "pixel" not in name},
            self._adapter.record(inputs, NATIVE, self._levels),
        )
        size = found[1].nbytes
        if size <= self._room:
            self._room -= size
            self._kept[key] = found
        return found
