"""Requests answered in one batch whatever it costs, and the same requests alone, for tests that compare the two."""

from collections.abc import Sequence
from typing import Any

import torch

from adaptive_fusion.control.gain import Gain
from adaptive_fusion.cost.model import Profile
from adaptive_fusion.decisions import Prediction
from adaptive_fusion.prepared import Turn, answer
from adaptive_fusion.reply import Reply
from adaptive_fusion.runner import AdaptiveRunner

TIE = 1e-3
"""Two logits that are no further apart are a tie: which is higher is a matter of the order of sums."""


def paying() -> Profile:
    """Costs by which a batch takes no longer than one request, so that everybody shares one."""
    nothing = (0.0,) * 6
    return Profile({}, nothing, (1.0, 0.0, 0.0), (1.0, 0.0, 0.0), (1e-6, *nothing[2:]), nothing[1:])


class Unmoved(Gain):
    """Is not told what batches take, so that the profile alone says whether one pays."""

    def ran_together(self, measured_ms: float, corrected: Prediction) -> None:
        pass


def steady(runner: AdaptiveRunner) -> AdaptiveRunner:
    """The runner, which goes on making batches however slow this machine is at them."""
    runner.gain = Unmoved()
    return runner


def together(turns: Sequence[Turn]) -> list[Reply]:
    """The replies of turns that were answered together."""
    answer(turns)
    return [turn.result.result(0) for turn in turns]


def gap(runner: AdaptiveRunner, messages: Any, reply: Reply, place: int) -> float:
    """How far the two highest logits are apart where the token at `place` of a reply was chosen, alone."""
    encoded = runner.adapter.encode(
        runner.adapter.prepare(messages, reply.decision.point), reply.decision.point
    )  # fmt: skip
    with torch.no_grad():
        out = runner.model.generate(
            **encoded.inputs,
            max_new_tokens=place + 1,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    high, low = out.logits[place][0].topk(2).values.tolist()
    return float(high - low)


def first_difference(one: Sequence[int], other: Sequence[int]) -> int:
    """Where two answers part; -1 if they are the same."""
    if tuple(one) == tuple(other):
        return -1
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
