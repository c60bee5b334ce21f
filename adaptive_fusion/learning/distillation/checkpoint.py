"""The state of a distillation run as one safetensors file. Knows tensors and files; nothing of models or questions."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from adaptive_fusion.errors import ConfigError
from adaptive_fusion.fusion.files import read_tensors, save_tensors

FORMAT = "adaptive_fusion.distil"


@dataclass(frozen=True)
class State:
    """Where a run is.

    Attributes:
        step: Steps done.
        history: One entry per look at the held-out questions.
        now: The module's tensors.
        best: Those of the best look.
        moments: The optimizer's tensors by parameter index.
    """

    step: int
    history: list[dict[str, Any]]
    now: Mapping[str, Tensor]
    best: Mapping[str, Tensor]
    moments: Mapping[int, Mapping[str, Tensor]]


def save(path: Path, identity: str, state: State) -> None:
    """Write `state` of the run `identity` in one piece: a crash leaves the file that was there before."""
    tensors = {f"now.{name}": value.detach().clone() for name, value in state.now.items()}
    tensors |= {f"best.{name}": value for name, value in state.best.items()}
    for index, moments in state.moments.items():
        tensors |= {f"adam.{index}.{name}": value for name, value in moments.items()}
    header = {"identity": identity, "step": state.step, "history": state.history}
    save_tensors(path, tensors, {"format": FORMAT, "state": json.dumps(header)})


def load(path: Path, identity: str) -> State | None:
    """What `save` wrote to `path`, or None where there is no file.

    Raises:
        ConfigError: If it is the state of another run, or no state at all.
    """
    if not path.is_file():
        return None
    tensors, header = read_tensors(path)
    found = json.loads(header["state"]) if header.get("format") == FORMAT else {}
    if found.get("identity") != identity:
        raise ConfigError(
            f"{path.parent.name} holds the state of another run (other model, images, point or settings); "
            "expected the same, or start afresh without resuming"
        )
    parts: dict[str, dict[str, Tensor]] = {"now": {}, "best": {}, "adam": {}}
    for name, value in tensors.items():
        which, rest = name.split(".", 1)
        parts[which][rest] = value
    moments: dict[int, dict[str, Tensor]] = {}
    for name, value in parts["adam"].items():
        index, key = name.split(".")
        moments.setdefault(int(index), {})[key] = value
    return State(found["step"], found["history"], parts["now"], parts["best"], moments)
