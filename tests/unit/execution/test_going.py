"""Rows that go on together and leave: each keeps its tokens, its keys and values, and its positions."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache

from adaptive_fusion.execution.going import Going
from adaptive_fusion.models.caches import _OFFSET

LAYERS = 2


def part(first: int, lengths: list[int]) -> Going:
    """Rows of these lengths, padded as a batch of one prefill is. Row ``i`` has the tokens ``100 i + 1``, ``100 i + 2``
    and so on, and keys that say where each is; the last token is not in the cache yet."""
    longest = max(lengths)
    ids, mask = torch.zeros(len(lengths), longest + 1, dtype=torch.long), torch.zeros(len(lengths), longest + 1)
    for place, length in enumerate(lengths):
        ids[place, longest - length :] = 100 * (first + place) + torch.arange(1, length + 2)
        mask[place, longest - length :] = 1
    cache = DynamicCache()
    for layer in range(LAYERS):
        keys = ids[:, None, :-1, None].float().expand(-1, 2, -1, 3) + layer / 10
        cache.update(keys, -keys, layer)
    setattr(cache, _OFFSET, torch.tensor([[7 * (first + place)] for place in range(len(lengths))]))
    return Going(tuple(range(first, first + len(lengths))), ids, mask, cache)


@given(st.data())
def test_whoever_leaves_the_others_keep_what_is_theirs(data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=3), min_size=1, max_size=4))
    parts, of_row = [], dict[int, int]()
    for each in lengths:
        parts.append(part(len(of_row), each))
        of_row |= dict(zip(parts[-1].rows, each, strict=True))
    going, over = Going.together(parts), set[int]()
    while going.rows:
        assert going.rows == tuple(row for row in of_row if row not in over)
        longest = max(of_row[row] for row in going.rows)
        # As long as its longest row, whoever was there before.
        assert going.ids.shape == going.mask.shape and going.ids.shape[1] <= max(of_row.values()) + 1
        assert not over or going.ids.shape[1] == longest + 1
        for place, row in enumerate(going.rows):
            there = going.mask[place].bool()
            assert there.tolist() == sorted(there.tolist())  # padding is on the left
            assert going.ids[place][there].tolist() == [100 * row + i for i in range(1, of_row[row] + 2)]
            for number, layer in enumerate(going.cache.layers):
                keys = layer.keys[place][:, there[:-1]]
                assert torch.equal(keys, -layer.values[place][:, there[:-1]])
                assert torch.allclose(keys[0, :, 0], going.ids[place][there][:-1] + number / 10)
            assert getattr(going.cache, _OFFSET)[place].item() == 7 * row
        over |= data.draw(st.sets(st.sampled_from(going.rows), min_size=1))
        going = going.without(sorted(over))
