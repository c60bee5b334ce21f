"""Learned pooling of merged tokens on their grid: average pooling, and what training adds to it.

Averaging a k x k window keeps what the window holds but not which cell held what, and a token that matters is
diluted by those that do not. For stream j (the last level's features, then every tap's) with the window's cells
f_1 ... f_n, n <= k * k at the edges:

    pooled_j = n^tanh(g_j) * (sum over cells c of w_jc f_jc) + |mean_j| U_j h
    h = act(W [code_1; ...; code_n] + b),  code_c = sum over streams of V_j LayerNorm(f_jc)
    w_j = softmax over the window's cells of (o_j + A_j h),  g_j = p_j + B_j h

|.| is the root mean square, so that U_j learns at the same pace whatever the model's scale; n^tanh(g_j) lies between
1 / n and n, so the most it can do is undo the average. `weighted` has one law for every window: A_j = B_j = 0 and act
the identity, so h is one linear map per cell offset. `gated` decides by content: A_j and B_j are learned and act is
GELU. The codes are 8 * rank wide, h is 16 * rank; rank 0 leaves only o_j and p_j.

Identity at start: o_j, p_j, U_j, A_j, B_j start at 0, so an untrained module is average pooling; these get gradient in
the first step, V, W and b as soon as one of the last three has left 0.

Knows packed tokens and grids; nothing of ViT levels, model families or files.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor, nn

from adaptive_fusion.reduction.pool import Grid, downsample

CODE, HIDDEN = 8, 16
"""Width of a cell's code and of a window's hidden layer, per rank."""


class WindowPool(nn.Module):
    """The law above for one window side.

    Args:
        side: k, at least 2.
        streams: how many feature streams are pooled together.
        width: their width D.
        rank: of the adapters that go with it; 0 learns weights per cell offset only.
        content: whether a window's weights depend on what it holds.
    """

    def __init__(self, side: int, streams: int, width: int, rank: int, content: bool) -> None:
        super().__init__()
        cells, code, hidden = side * side, CODE * rank, HIDDEN * rank
        self.side, self.streams, self.content = side, streams, content
        self.offsets = nn.Parameter(torch.zeros(streams, cells + 1))
        if rank:
            self.down = nn.Parameter(torch.randn(streams, code, width) / math.sqrt(streams * width))
            self.mix = nn.Parameter(torch.randn(hidden, cells * code) / math.sqrt(cells * code))
            self.bias = nn.Parameter(torch.zeros(hidden))
            self.up = nn.Parameter(torch.zeros(streams, width, hidden))
            if content:
                self.attend = nn.Parameter(torch.zeros(streams, cells + 1, hidden))
        self.rank = rank

    def forward(self, streams: Sequence[Tensor], grids: Sequence[Grid]) -> list[Tensor]:
        """``[tokens, D]`` per stream to ``[pooled, D]`` in its dtype, computed in float32; see `downsample`."""
        index, present = _windows(tuple(grids), self.side)
        index, present = index.to(streams[0].device), present.to(streams[0].device)
        means = [downsample(stream, grids, 1 / self.side) for stream in streams]
        scores = self.offsets[:, None]
        hidden = None
        if self.rank:
            hidden = self._hidden(streams, index, present)
            if self.content:
                scores = scores + torch.einsum("mh,sch->smc", hidden, self.attend)
        scores, gains = scores[..., :-1], scores[..., -1:]
        weights = torch.softmax(scores.masked_fill(~present, -torch.inf), dim=-1)
        counts = present.sum(1, keepdim=True)
        even, gains = present / counts, counts ** torch.tanh(gains)
        pooled = []
        for i, (stream, mean) in enumerate(zip(streams, means, strict=True)):
            wide = mean.float()
            shifted = torch.einsum("mc,mcd->md", weights[i] - even, stream[index].float())
            out = (wide + shifted) * gains[i]
            if hidden is not None:
                scale = wide.detach().square().mean(1, keepdim=True).sqrt()
                out = out + scale * (hidden @ self.up[i].t())
            pooled.append(out.to(mean.dtype))
        return pooled

    def _hidden(self, streams: Sequence[Tensor], index: Tensor, present: Tensor) -> Tensor:
        """h of every window, ``[M, HIDDEN * rank]``."""
        levelled = [nn.functional.layer_norm(stream.float(), stream.shape[-1:]) for stream in streams]
        codes = torch.stack([level @ down.t() for level, down in zip(levelled, self.down, strict=True)]).sum(0)
        cells = (codes[index] * present[..., None]).flatten(1)
        hidden = torch.addmm(self.bias, cells, self.mix.t())
        return nn.functional.gelu(hidden) if self.content else hidden


@lru_cache(maxsize=256)
@torch.inference_mode(False)
def _windows(grids: tuple[Grid, ...], side: int) -> tuple[Tensor, Tensor]:
    """For every pooled token its cells' indices ``[M, k * k]`` in the packed tokens, and which of them exist."""
    found, exists, start = [], [], 0
    inside = torch.arange(side)
    for t, h, w in grids:
        rows = torch.arange(-(-h // side))[:, None, None, None] * side + inside[:, None]
        columns = torch.arange(-(-w // side))[:, None, None] * side + inside
        real = ((rows < h) & (columns < w)).reshape(-1, side * side)
        cell = (rows.clamp(max=h - 1) * w + columns.clamp(max=w - 1)).reshape(-1, side * side)
        for frame in range(t):
            found.append(cell + start + frame * h * w)
            exists.append(real)
        start += t * h * w
    return torch.cat(found), torch.cat(exists)
