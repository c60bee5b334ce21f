"""The Triton programs of fusion: what one block of patches goes through.

A block holds patches of one image alone, so that weights are scalars in it. Knows pointers, strides and constants; who
launches them with what is `triton_launch`'s.
"""

import triton
import triton.language as tl

# `several` is the number of images where there are more than one, else 0. It, and the number of patches, are no
# constants: what a warm-up has compiled is what later requests run.
VARYING = ["patches", "several"]


@triton.jit
def _log1pexp(x):  # type: ignore[no-untyped-def]
    return tl.maximum(x, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(x)))


@triton.jit  # type: ignore[untyped-decorator]
def _place(block, lengths, several, patches, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of a block of ROWS patches: its image, its first patch, the image's first and the one after its last."""
    image, own, first, end = block * 0, block * ROWS, block * 0, block * 0 + patches
    blocks, row = block * 0, block * 0
    for i in range(several):
        length = tl.load(lengths + i)
        more = tl.cdiv(length, ROWS)
        here = (block >= blocks) & (block < blocks + more)
        image = tl.where(here, i, image)
        own = tl.where(here, row + (block - blocks) * ROWS, own)
        first, end = tl.where(here, row, first), tl.where(here, row + length, end)
        blocks, row = blocks + more, row + length
    return image, own, first, end


@triton.jit  # type: ignore[untyped-decorator]
def _fixed(value, SCALE: tl.constexpr):  # type: ignore[no-untyped-def]
    """A block's sum as a whole number: such are the same in whatever order blocks add theirs. What is beyond 2^30
    weighs all or nothing anyway."""
    return (tl.minimum(tl.maximum(value, -1073741824.0), 1073741824.0) * SCALE).to(tl.int64)


@triton.jit  # type: ignore[untyped-decorator]
def _shares(  # type: ignore[no-untyped-def]
    weights, image, ranks, mixed, LAW: tl.constexpr, LEVELS: tl.constexpr
):
    """What each level is weighed by, the mix included: a vector whose first LEVELS entries count."""
    known = ranks < LEVELS
    if LAW == "given":
        share = tl.load(weights + image * LEVELS + ranks, mask=known, other=0.0)
    elif LAW == "softplus":
        share = tl.where(known, _log1pexp(tl.load(weights + ranks, mask=known, other=0.0).to(tl.float32)), 0.0)
        share = share / tl.sum(share, axis=0)
    else:
        share = tl.where(known, 1.0, 0.0)
    return share * mixed


@triton.jit  # type: ignore[untyped-decorator]
def _at(vector, ranks, i: tl.constexpr):  # type: ignore[no-untyped-def]
    return tl.sum(tl.where(ranks == i, vector, 0.0), axis=0)


@triton.jit  # type: ignore[untyped-decorator]
def _by_code(shares, ranks, places, LEVELS: tl.constexpr, RANK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The share of the level that each place among the codes belongs to."""
    found = tl.zeros_like(places).to(tl.float32)
    for i in tl.static_range(LEVELS):
        found = tl.where(places // RANK == i, _at(shares, ranks, i), found)
    return found


@triton.jit(do_not_specialize=VARYING)  # type: ignore[untyped-decorator]
def score_levels(  # type: ignore[no-untyped-def]
    sums,
    codes,
    levels,
    into,
    lengths,
    several,
    patches,
    TAP: tl.constexpr,
    WIDTH: tl.constexpr,
    LEVELS: tl.constexpr,
    PADDED: tl.constexpr,
    RANK: tl.constexpr,
    SLOTS: tl.constexpr,
    FACTOR: tl.constexpr,
    SCALE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One level's codes, and its scores added to its image's: ``into`` has the rows of `packed.scored`."""
    image, own, _, end = _place(tl.program_id(0), lengths, several, patches, ROWS)
    rows = own.to(tl.int64) + tl.arange(0, ROWS)
    inside = rows < end
    slots = tl.arange(0, SLOTS)
    for i in tl.static_range(LEVELS):
        if tl.program_id(1) == i:
            found = tl.zeros((ROWS, SLOTS), tl.float32)
            for begin in range(0, WIDTH, COLUMNS):
                columns = begin + tl.arange(0, COLUMNS)
                wide = columns < WIDTH
                level = tl.load(
                    levels[i] + rows[:, None] * WIDTH + columns[None, :],
                    mask=inside[:, None] & wide[None, :],
                    other=0.0,
                )
                vectors = tl.load(
                    into + (i * SLOTS + slots[None, :]) * WIDTH + columns[:, None], mask=wide[:, None], other=0.0
                )
                found += tl.dot(level.to(FACTOR), vectors.to(FACTOR), input_precision="ieee")
            if RANK > 0:
                tl.store(
                    codes + rows[:, None] * (LEVELS * RANK) + i * RANK + slots[None, :],
                    found,
                    mask=inside[:, None] & (slots < RANK)[None, :],
                )
            total = tl.sum(found, axis=0)
            mine = sums + image * PADDED
            score = tl.sum(tl.where((slots == RANK) | (slots == RANK + 1), total, 0.0), axis=0)
            tl.atomic_add(mine + i, _fixed(score, SCALE))
            if score != score:  # no whole number says so
                tl.atomic_add(mine + LEVELS + 1, 1)
            if i == TAP:
                gate = tl.sum(tl.where((slots == RANK + 2) | (slots == RANK + 3), total, 0.0), axis=0)
                tl.atomic_add(mine + LEVELS, _fixed(gate, SCALE))
                if gate != gate:
                    tl.atomic_add(mine + LEVELS + 2, 1)


@triton.jit(do_not_specialize=VARYING)  # type: ignore[untyped-decorator]
def sum_levels(  # type: ignore[no-untyped-def]
    out,
    gates,
    levels,
    weights,
    sums,
    gate_bias,
    mix,
    codes,
    back,
    lengths,
    several,
    patches,
    LAW: tl.constexpr,
    BIAS: tl.constexpr,
    MIX: tl.constexpr,
    TAP: tl.constexpr,
    WIDTH: tl.constexpr,
    LEVELS: tl.constexpr,
    PADDED: tl.constexpr,
    RANK: tl.constexpr,
    CODES: tl.constexpr,
    FACTOR: tl.constexpr,
    SCALE: tl.constexpr,
    ACROSS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The weighted sum of levels, and of what adapters add by their codes; under ``sigmoid`` the image's gate too.

    PADDED is at least LEVELS + 3: of each image the levels' scores, the gate's, and how many blocks had none of either.
    CODES is at least LEVELS * RANK.
    """
    # Programs that run together share rows: memory is read in longer pieces than one of them takes.
    block, part = tl.program_id(0) // ACROSS, tl.program_id(0) % ACROSS
    image, own, first, end = _place(block, lengths, several, patches, ROWS)
    rows = own.to(tl.int64) + tl.arange(0, ROWS)
    columns = part * COLUMNS + tl.arange(0, COLUMNS)
    inside, wide = rows < end, columns < WIDTH
    places = rows[:, None] * WIDTH + columns[None, :]
    mask = inside[:, None] & wide[None, :]
    # All that comes from memory is asked for before anything is waited for.
    read = ()
    for i in tl.static_range(LEVELS):
        read = read + (tl.load(levels[i] + places, mask=mask, other=0.0),)  # type: ignore[assignment]  # noqa: RUF005
    at = tl.arange(0, CODES)
    if RANK > 0:
        known = at < LEVELS * RANK
        code = tl.load(
            codes + rows[:, None] * (LEVELS * RANK) + at[None, :], mask=inside[:, None] & known[None, :], other=0.0
        )
        out_of = tl.load(back + at[:, None] * WIDTH + columns[None, :], mask=known[:, None] & wide[None, :], other=0.0)
    ranks = tl.arange(0, PADDED)
    mixed = 1.0
    if MIX:
        mixed = tl.load(mix).to(tl.float32)
    if LAW == "sigmoid":
        score = tl.load(sums + image * PADDED + ranks).to(tl.float32) / (SCALE * (end - first).to(tl.float32))
        if (own == first) & (part == 0):
            gate = _at(score, ranks, LEVELS) + tl.load(gate_bias).to(tl.float32)
            gate = tl.where(_at(score, ranks, LEVELS + 2) > 0, float("nan"), gate)
            tl.store(gates + image, 2.0 / (1.0 + tl.exp(-gate)))
        lost = _at(score, ranks, LEVELS + 1) > 0
        if BIAS:
            score += tl.load(weights + ranks, mask=ranks < LEVELS, other=0.0).to(tl.float32)
        # Sigmoids over their sum as a softmax of their logarithms: finite where all of them underflow.
        share = tl.where(ranks < LEVELS, -_log1pexp(-score), -float("inf"))
        share = tl.exp(share - tl.max(share, axis=0))
        shares = tl.where(lost, float("nan"), share / tl.sum(share, axis=0) * mixed)
    else:
        shares = _shares(weights, image, ranks, mixed, LAW, LEVELS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for i in tl.static_range(LEVELS):
        share = _at(shares, ranks, i)
        if i == TAP:
            share += 1.0 - mixed
        total += share * read[i].to(tl.float32)
    if RANK > 0:
        code = code * _by_code(shares, ranks, at, LEVELS, RANK)[None, :]
        code = code.to(out.dtype.element_ty).to(FACTOR)
        total += tl.dot(code, out_of.to(FACTOR), input_precision="ieee")
    tl.store(out + places, total.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=VARYING)  # type: ignore[untyped-decorator]
def adapt_levels(  # type: ignore[no-untyped-def]
    out,
    levels,
    weights,
    mix,
    into,
    back,
    lengths,
    several,
    patches,
    LAW: tl.constexpr,
    MIX: tl.constexpr,
    TAP: tl.constexpr,
    WIDTH: tl.constexpr,
    LEVELS: tl.constexpr,
    PADDED: tl.constexpr,
    RANK: tl.constexpr,
    CODES: tl.constexpr,
    FACTOR: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """`sum_levels` where the weights are the same for all: codes are made here, and levels read again while they are in
    the cache."""
    image, own, _, end = _place(tl.program_id(0), lengths, several, patches, ROWS)
    rows = own.to(tl.int64) + tl.arange(0, ROWS)
    inside = rows < end
    ranks, at = tl.arange(0, PADDED), tl.arange(0, CODES)
    mixed = 1.0
    if MIX:
        mixed = tl.load(mix).to(tl.float32)
    shares = _shares(weights, image, ranks, mixed, LAW, LEVELS)
    code = tl.zeros((ROWS, CODES), tl.float32)
    for i in tl.static_range(LEVELS):
        for begin in range(0, WIDTH, COLUMNS):
            columns = begin + tl.arange(0, COLUMNS)
            wide = columns < WIDTH
            level = tl.load(
                levels[i] + rows[:, None] * WIDTH + columns[None, :], mask=inside[:, None] & wide[None, :], other=0.0
            )
            vectors = tl.load(
                into + (i * CODES + at[None, :]) * WIDTH + columns[:, None], mask=wide[:, None], other=0.0
            )
            code += tl.dot(level.to(FACTOR), vectors.to(FACTOR), input_precision="ieee")
    code = code * _by_code(shares, ranks, at, LEVELS, RANK)[None, :]
    code = code.to(out.dtype.element_ty).to(FACTOR)
    for chunk in tl.static_range(CHUNKS):
        columns = chunk * COLUMNS + tl.arange(0, COLUMNS)
        wide = columns < WIDTH
        places = rows[:, None] * WIDTH + columns[None, :]
        mask = inside[:, None] & wide[None, :]
        known = (at < LEVELS * RANK)[:, None] & wide[None, :]
        out_of = tl.load(back + at[:, None] * WIDTH + columns[None, :], mask=known, other=0.0)
        read = ()
        for i in tl.static_range(LEVELS):
            read = read + (tl.load(levels[i] + places, mask=mask, other=0.0),)  # type: ignore[assignment]  # noqa: RUF005
        total = tl.dot(code, out_of.to(FACTOR), input_precision="ieee")
        for i in tl.static_range(LEVELS):
            share = _at(shares, ranks, i)
            if i == TAP:
                share += 1.0 - mixed
            total += share * read[i].to(tl.float32)
        tl.store(out + places, total.to(out.dtype.element_ty), mask=mask)
