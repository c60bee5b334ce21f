"""Rows under way: prompts that were prefilled apart go on as one batch, and those that have ended leave it.

A prompt is computed without the padding that a longer one beside it would cost, and nothing is computed for a row that
is over. Both follow from ``generate`` being called again with what its cache holds. Knows token tensors, caches and
timed passes. Must not know requests, or when and why a row ends.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from adaptive_fusion.execution.timed import Encoding, Pass
from adaptive_fusion.models import Encoded
from adaptive_fusion.models.caches import cache_name, cache_of, joined, keep_rows

KEEPS_CACHE: Mapping[str, Any] = {"return_dict_in_generate": True}
"""Options with which ``generate`` gives what `Going.after` needs."""
AGAIN: Mapping[str, Any] = {
    **KEEPS_CACHE,
    "cache_implementation": None,  # there is a cache already
    "begin_suppress_tokens": None,  # of an answer's first token
}
"""Options with which it goes on from such a cache."""


@dataclass(frozen=True)
class Going:
    """Rows whose last token is chosen and not yet in their cache.

    Attributes:
        rows: Their numbers, in the order of all that follows.
        ids: Prompts and tokens so far, padded on the left, ``[rows, length]``.
        mask: 0 where a row is padded, of the same shape.
        cache: Of all but the last token of each.
    """

    rows: tuple[int, ...]
    ids: Tensor
    mask: Tensor
    cache: Any

    @classmethod
    def after(cls, done: Pass, rows: Sequence[int]) -> "Going":
        """What goes on behind a pass of these rows."""
        ids, before = done.sequences, done.encoding.encoded.inputs["attention_mask"]
        mask = nn.functional.pad(before, (0, ids.shape[1] - before.shape[1]), value=1)
        return cls(tuple(rows), ids, mask, cache_of(done.result))

    @classmethod
    def together(cls, parts: Sequence["Going"]) -> "Going":
        """The rows of all parts, one after the other. The parts themselves are of no use any more."""
        if len(parts) == 1:
            return parts[0]
        longest = max(part.ids.shape[1] for part in parts)
        ids, masks = (
            torch.cat([nn.functional.pad(each, (longest - each.shape[1], 0)) for each in kind])
            for kind in ([part.ids for part in parts], [part.mask for part in parts])
        )
        rows = tuple(row for part in parts for row in part.rows)
        return cls(rows, ids, masks, joined([part.cache for part in parts]))

    def without(self, over: Sequence[int]) -> "Going":
        """The same without some rows, and without the padding that nobody else needs."""
        left = [place for place, row in enumerate(self.rows) if row not in over]
        if len(left) == len(self.rows) or not left:
            return self if left else replace(self, rows=())
        mask = self.mask[left]
        cut = int(mask.argmax(1).min())  # of the first 1 of each row
        keep_rows(self.cache, left, cut)
        return replace(
            self, rows=tuple(self.rows[place] for place in left), ids=self.ids[left, cut:], mask=mask[:, cut:]
        )

    def encoding(self, like: Encoding, model: Any) -> Encoding:
        """For the next pass, with the times of `like`."""
        inputs = {"input_ids": self.ids, "attention_mask": self.mask, cache_name(model): self.cache}
        return replace(like, encoded=Encoded(inputs, like.encoded.visual_tokens, like.encoded.patches))
