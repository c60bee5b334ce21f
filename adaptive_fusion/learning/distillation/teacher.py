"""What a frozen model says of images at full compute: its greedy answers and the probabilities behind them.

Also what it says at any other operating point. Knows adapters and tensors; nothing of training, scores or policies.
Answers are kept on disk as they come, so an interrupted run asks nothing twice.
"""

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from adaptive_fusion.errors import ConfigError, UnsupportedModelError
from adaptive_fusion.evaluation.likelihood import teacher_forced
from adaptive_fusion.evaluation.questions import Question
from adaptive_fusion.execution.batches import collate
from adaptive_fusion.execution.request import build_request
from adaptive_fusion.execution.timed import Recordings, TimedModel, until_end
from adaptive_fusion.models import Adapter, GridAdapter, Recorded
from adaptive_fusion.point import NATIVE, OperatingPoint
from adaptive_fusion.policy.rungs import Rung
from adaptive_fusion.progress import Progress, Steps, silent

FORMAT = "adaptive_fusion.teacher"
PARTS = ("tokens", "indices", "logprobs", "length")
WINDOW = 4
"""Batches' worth of questions that are prepared at once and sorted by length."""
KEPT = 128
"""Most likely tokens whose probability is kept at each position; the others are kept as one sum."""


@dataclass(frozen=True)
class TeacherOutput:
    """The teacher's answer: `tokens` ``[n]`` (the end token included), and at each position the `indices` ``[n, k]``
    of the likeliest tokens with their log-probabilities `logprobs` ``[n, k]``. `length` ``[]`` counts the prompt's
    tokens, visual ones included, at the native point."""

    tokens: Tensor
    indices: Tensor
    logprobs: Tensor
    length: Tensor


def prepare(adapter: Adapter, question: Question, pixel_share: float = 1.0) -> dict[str, Tensor]:
    """The processor's tensors of a question at a share of its native pixels, on the model's device."""
    request = build_request(question.load(), question.prompt)
    point = adapter.resolve(Rung(NATIVE, pixel_share=pixel_share), request.sizes)
    inputs = adapter.prepare(request.messages, point)
    return {key: value for key, value in inputs.items() if isinstance(value, Tensor)}


def greedy(
    adapter: Adapter,
    rows: Sequence[Mapping[str, Tensor]],
    point: OperatingPoint,
    max_new_tokens: int,
    recorded: Recorded | None = None,
) -> list[Tensor]:
    """Each row's greedy answer ``[n]`` at `point`, up to and with its end token, generated as one batch.

    With `recorded` the vision tower is not run.
    """
    timed = TimedModel(adapter)
    recordings = None if recorded is None else Recordings((), {point.encoder_key: (recorded, 0.0)})
    encoding = timed.encode(lambda: collate(rows), point, recordings)
    new = timed.generate(encoding, {"max_new_tokens": max_new_tokens, "do_sample": False}).new_tokens
    counts = (len(until_end(row, adapter.end_tokens)) for row in new.tolist())
    return [row[:count].clone() for row, count in zip(new, counts, strict=True)]


def answer_logits(
    adapter: Adapter,
    rows: Sequence[Mapping[str, Tensor]],
    answers: Sequence[Tensor],
    point: OperatingPoint,
    recorded: Recorded | None = None,
) -> list[Tensor]:
    """The logits ``[n, vocabulary]`` that predict each row's answer, teacher-forced, in float32.

    With `recorded` the vision tower is not run; gradient reaches the point's fusion module.
    """
    encoded = adapter.encode(collate(rows, answers), point, recorded)
    return teacher_forced(adapter.outer, encoded.inputs, answers)


def fingerprint(model: Any) -> str:
    """Changes whenever a model's configuration or weights do: a hash over a sample of every parameter.

    Raises:
        UnsupportedModelError: If weights are offloaded, so that there is nothing to sample.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        raise UnsupportedModelError(f"weights of the {type(model).__name__} are offloaded; expected all in memory")
    digest = hashlib.sha256(model.config.to_json_string().encode())
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 64)][:64].float().cpu()
        digest.update(name.encode() + sample.numpy().tobytes())
    return digest.hexdigest()[:32]


class Teacher:
    """Asks the model at its native point and keeps what it says in `folder`, one file per batch.

    Args:
        adapter: Reaches the model.
        folder: Of the answers; made if need be. Answers of another model or length limit in it are left alone.
        max_new_tokens: Upper bound of an answer.
        batch: Questions asked at once.
    """

    def __init__(self, adapter: GridAdapter, folder: Path, *, max_new_tokens: int = 160, batch: int = 8) -> None:
        self.adapter, self.folder = adapter, folder
        self.max_new_tokens, self.batch = max_new_tokens, batch
        self._header = {"format": FORMAT, "model": fingerprint(adapter.model), "max_new_tokens": str(max_new_tokens)}
        self._known: dict[str, Path] = {}
        folder.mkdir(parents=True, exist_ok=True)
        for path in sorted(folder.glob("told-*.safetensors")):
            with _opened(path) as file:
                if file.metadata() == self._header:
                    names = [name for name in file.keys() if name.endswith(".tokens")]  # noqa: SIM118
                    self._known |= {name.removesuffix(".tokens"): path for name in names}

    def ask(self, questions: Sequence[Question], progress: Progress = silent) -> list[TeacherOutput]:
        """What the model says of each question; only what is not on disk yet is asked.

        A step of `progress` is a question.
        """
        missing = list({q.key: q for q in questions if q.key not in self._known}.values())
        steps = Steps(progress, "ask", len(questions), done=len(questions) - len(missing))
        # A batch is as long as its longest row, so rows of like lengths are put together.
        for start in range(0, len(missing), WINDOW * self.batch):
            asked = [(question, prepare(self.adapter, question)) for question in missing[start:][: WINDOW * self.batch]]
            asked.sort(key=lambda pair: pair[1]["input_ids"].shape[1])
            for low in range(0, len(asked), self.batch):
                part, rows = zip(*asked[low : low + self.batch], strict=True)
                self._keep(part, self._answers(rows))
                steps.advance(len(part))
        return list(self._read([question.key for question in questions]))

    @torch.no_grad()
    def _answers(self, rows: Sequence[Mapping[str, Tensor]]) -> list[TeacherOutput]:
        recorded = self.adapter.record(collate(rows), NATIVE, self.adapter.levels(NATIVE))
        answers = greedy(self.adapter, rows, NATIVE, self.max_new_tokens, recorded)
        behind = answer_logits(self.adapter, rows, answers, NATIVE, recorded)
        found = []
        for row, tokens, logits in zip(rows, answers, behind, strict=True):
            best = torch.log_softmax(logits, -1).topk(min(KEPT, logits.shape[-1]), sorted=False)
            length = torch.tensor(row["input_ids"].shape[1])
            found.append(TeacherOutput(tokens.cpu(), best.indices.int().cpu(), best.values.cpu(), length))
        return found

    def _keep(self, questions: Sequence[Question], found: Sequence[TeacherOutput]) -> None:
        tensors = {}
        for question, output in zip(questions, found, strict=True):
            for name in PARTS:
                tensors[f"{question.key}.{name}"] = getattr(output, name).contiguous()
        digest = hashlib.sha256("".join(q.key for q in questions).encode() + repr(self._header).encode())
        path = self.folder / f"told-{digest.hexdigest()[:16]}.safetensors"
        save_file(tensors, path.with_suffix(".partial"), metadata=self._header)
        os.replace(path.with_suffix(".partial"), path)
        self._known |= {question.key: path for question in questions}

    def _read(self, keys: Sequence[str]) -> Iterator[TeacherOutput]:
        found: dict[str, TeacherOutput] = {}
        for path in sorted({self._known[key] for key in keys}):
            with _opened(path) as file:
                for key in {key for key in keys if self._known[key] == path}:
                    found[key] = TeacherOutput(*(file.get_tensor(f"{key}.{name}") for name in PARTS))
        return (found[key] for key in keys)


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ConfigError(f"{path.name} is not a readable safetensors file: {error}") from error
