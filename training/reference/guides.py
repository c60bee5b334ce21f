"""What guides the reference model beside the answers while it trains, and is thrown away afterwards: heads that say
what lies where and what happened there, and attention that is told where to look.

Knows scenes, features and layers. Must not know of optimizers or of the run.
"""

from functools import partial

import torch
from data import CHARS, EVENTS, Encoded, where_targets
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Qwen3VLForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.qwen3_vl.modeling_qwen3_vl import apply_rotary_pos_emb

from adaptive_fusion.reference.screens import BINS, COLORS, SHAPES


class WhereHeads(nn.Module):
    """What lies where, read off the merged tokens while training (thrown away afterwards).

    The scenes know where every character and icon is, and saying so patch by patch teaches an encoder far faster than
    the answers alone. Characters are read off the middle tap and, later on, off the last one too; the rest off the
    last level: so fine detail comes to live in the taps, as it does in large models.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.glyph = nn.Linear(width, 8 * (len(CHARS) + 1))
        self.color = nn.Linear(width, 4 * (len(COLORS) + 1))
        self.shape = nn.Linear(width, 4 * (len(SHAPES) + 1))
        self.place = nn.Linear(width, 2 * BINS)
        self.late = nn.Linear(width, 8 * (len(CHARS) + 1))

    def forward(self, out: BaseModelOutputWithPooling, batch: Encoded) -> list[tuple[Tensor, Tensor]]:
        found = where_targets(batch)
        last = out.pooler_output
        _, fine, finer = out.deepstack_features or (last, last, last)  # a model without taps has all in one level
        pairs = (
            (self.glyph(fine), found.glyphs),
            (self.color(last), found.colors),
            (self.shape(last), found.shapes),
            (self.place(last), found.places),
            (self.late(finer), found.glyphs),
        )
        return [(logits.view(target.numel(), -1), target.flatten()) for logits, target in pairs]


def where_loss(pairs: list[tuple[Tensor, Tensor]], late: float) -> Tensor:
    """Cross-entropy, empty patches (by far the most) at a twentieth of the weight; places count a fifth."""
    total = torch.zeros(())
    for i, ((logits, target), share) in enumerate(zip(pairs, (1, 1, 1, 0.2, late), strict=False)):
        weight = torch.ones(logits.shape[-1])
        if i != 3:
            weight[0] = 0.05
        if share:
            total = total + share * F.cross_entropy(logits, target, weight=weight)
    return total


def where_accuracy(pairs: list[tuple[Tensor, Tensor]]) -> list[float]:
    """Share of the occupied patches named rightly: characters, colours, shapes (0 where a batch has none), places,
    characters off the last tap."""
    found = []
    for i, (logits, target) in enumerate(pairs):
        taken = target >= 0 if i == 3 else target > 0
        found.append(float((logits.argmax(-1) == target)[taken].float().mean()) if taken.any() else 0.0)
    return found


class Events(nn.Module):
    """What has happened where in a clip, read off the visual tokens behind one layer of the language model.

    The encoder sees pairs of frames one by one, so that only the language model can compare them; an answer's first
    word alone tells it little of where.
    """

    LAYER = 2

    def __init__(self, model: Qwen3VLForConditionalGeneration) -> None:
        super().__init__()
        self.head = nn.Linear(model.config.text_config.hidden_size, 1 + len(EVENTS))
        self.hidden = torch.empty(0)
        model.model.language_model.layers[self.LAYER].register_forward_hook(self._keep)

    def _keep(self, _module: nn.Module, _args: object, output: Tensor | tuple[Tensor, ...]) -> None:
        self.hidden = output if isinstance(output, Tensor) else output[0]

    def pair(self, visual: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and targets ``[tokens]`` of the positions ``[rows, length]`` that hold visual tokens."""
        return self.head(self.hidden[visual]), targets

    @staticmethod
    def loss(pair: tuple[Tensor, Tensor]) -> Tensor:
        """Cross-entropy, nothing (nearly everywhere) at a fiftieth of the weight."""
        weight = torch.tensor([0.02, *(1.0 for _ in EVENTS)])
        return F.cross_entropy(*pair, weight=weight)


class Gaze:
    """Trains one attention head of each later layer of the language model to look at what is about to be said.

    Guided attention (Tachibana et al. 2018 for speech; the screens know the true alignment): the negative log of the
    attention that falls on the visual tokens that show the next word. Only queries and keys are watched, through
    hooks that live while training; the model itself stays as it is.
    """

    LAYERS = (1, 2, 3)

    def __init__(self, model: Qwen3VLForConditionalGeneration) -> None:
        self.seen: dict[tuple[int, str], Tensor] = {}
        self.angles: tuple[Tensor, Tensor] | None = None
        for i in self.LAYERS:
            attention = model.model.language_model.layers[i].self_attn
            attention.q_norm.register_forward_hook(partial(self._keep, (i, "q")))
            attention.k_norm.register_forward_hook(partial(self._keep, (i, "k")))
        model.model.language_model.rotary_emb.register_forward_hook(self._turn)

    def _keep(self, key: tuple[int, str], _module: nn.Module, _args: object, output: Tensor) -> None:
        self.seen[key] = output[:, :, :1].transpose(1, 2)

    def _turn(self, _module: nn.Module, _args: object, output: tuple[Tensor, Tensor]) -> None:
        self.angles = output

    def loss(self, asking: Tensor, looked_at: Tensor) -> tuple[Tensor, list[float]]:
        """The mean over layers, and each layer's mean attention on the right tokens."""
        assert self.angles is not None
        rows, at = asking.T
        later = torch.arange(looked_at.shape[1]) > at[:, None]
        losses = []
        for i in self.LAYERS:
            q, k = apply_rotary_pos_emb(self.seen[i, "q"], self.seen[i, "k"], *self.angles)
            scores = (q[:, 0] @ k[:, 0].transpose(1, 2) / q.shape[-1] ** 0.5)[rows, at].masked_fill(later, -torch.inf)
            losses.append(-scores.log_softmax(-1).masked_fill(~looked_at, -torch.inf).logsumexp(-1))
        return torch.stack(losses).mean(), [float((-loss.detach()).exp().mean()) for loss in losses]
