"""Replies as a runner gives them and a controller that saw some, for the tests of what the server says about them."""

from typing import Any

from adaptive_fusion.budget import Budget
from adaptive_fusion.control.candidates import Candidate
from adaptive_fusion.control.controller import Controller
from adaptive_fusion.decisions import Decision, Measurement, Prediction
from adaptive_fusion.point import NATIVE
from adaptive_fusion.reply import Reply

SECRET = "the patient's name is Smith"


def reply(rung: str = "half", lane: str = "weighted", latency_ms: float = 120.0, **measured: Any) -> Reply:
    """An answer within a budget of 150 ms that was expected to take 100."""
    took = {
        "preprocess_ms": 5.0, "encode_ms": 20.0, "prefill_ms": 25.0, "decode_ms": 60.0, "ttft_ms": 60.0,
        "latency_ms": latency_ms, "visual_tokens": 100, "prompt_tokens": 130, "new_tokens": 13, "patches": 400,
        "peak_memory_gb": 0.5, **measured,
    }  # fmt: skip
    decision = Decision(
        "id-1", "image", None, 0.25, lane, NATIVE, Prediction(20, 20, 60, 0.5), SECRET, "balanced", rung,
        budget={"latency_ms": 150.0},
    )  # fmt: skip
    return Reply(SECRET, "stop", decision, Measurement(**took))


OFFERED = [Candidate(NATIVE, 0.9, Prediction(20, 20, 60, 0.5), "half")]


def settled(requests: int = 300) -> Controller:
    """A controller whose every request took twice what was predicted and was late."""
    controller = Controller(clock=lambda: 0.0)
    for _ in range(requests):
        choice = controller.choose(OFFERED, Budget(latency_ms=150))
        controller.update(choice, reply(latency_ms=200.0, ttft_ms=80.0).measurement)
    return controller
