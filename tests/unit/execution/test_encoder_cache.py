"""The encoder cache holds no more than its bound, whatever is put into it, and the newest of what fits."""

import threading
from collections import OrderedDict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adaptive_fusion.errors import ConfigError
from adaptive_fusion.execution.encoder_cache import MIB, OVERHEAD, EncoderCache
from adaptive_fusion.models.reuse import Entry

KIB = 1024


def entry(kib: int) -> Entry:
    return Entry(dict, (1, 1, 1), (torch.zeros(kib * KIB, dtype=torch.uint8),))


STEPS = st.lists(
    st.tuples(st.sampled_from(("put", "get", "look", "clear")), st.integers(0, 12), st.integers(0, 1100)), max_size=60
)


@given(STEPS)
def test_memory_stays_within_its_bound_and_what_was_used_last_stays(steps: list[tuple[str, int, int]]) -> None:
    cache, model = EncoderCache(1), OrderedDict[str, Entry]()
    for what, number, kib in steps:
        key = str(number)
        if what == "put":
            cache.put(key, new := entry(kib))
            model.pop(key, None)
            if new.nbytes + OVERHEAD <= MIB:
                model[key] = new
            while sum(each.nbytes + OVERHEAD for each in model.values()) > MIB:
                model.popitem(last=False)
        elif what == "get":
            assert cache.get(key) is model.get(key)
            if key in model:
                model.move_to_end(key)
        elif what == "look":
            assert (key in cache) == (key in model)
        elif number == 0:
            cache.clear()
            model.clear()
        counts = cache.counts()
        assert counts.nbytes == cache.nbytes == sum(each.nbytes + OVERHEAD for each in model.values()) <= MIB
        assert counts.entries == len(model)


def test_an_entry_holds_no_more_than_it_is_counted_for() -> None:
    whole = torch.zeros(1000, 64)
    part = Entry.owned(dict, (1, 2, 5), [whole[:10]])
    assert part.nbytes == 10 * 64 * 4 == sum(each.untyped_storage().nbytes() for each in part.tensors)
    assert Entry.owned(dict, (1, 1, 1), [whole]).tensors[0].data_ptr() == whole.data_ptr()  # nothing to save


def test_threads_lose_no_count_and_keep_the_bound() -> None:
    cache = EncoderCache(1)

    def work(first: int) -> None:
        for number in range(first, first + 200):
            cache.put(str(number % 37), entry(number % 90))
            cache.get(str(number % 11))
            cache.count(1, 2)
            assert cache.nbytes <= MIB

    threads = [threading.Thread(target=work, args=(100 * number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    counts = cache.counts()
    assert (counts.hits, counts.misses) == (1600, 3200) and not any(thread.is_alive() for thread in threads)


@pytest.mark.parametrize("mib", [0, -1, 2.5, True, "64"])
def test_other_bounds_are_refused(mib: object) -> None:
    with pytest.raises(ConfigError, match="encoder_cache_mb"):
        EncoderCache(mib)  # type: ignore[arg-type]
