"""The Triton programs of `kernels_triton`: what one block of patches goes through.

Knows pointers, strides and constants; who launches them with what is `kernels_triton`'s.
"""

import triton
import triton.language as tl


@triton.jit
def _log1pexp(x):  # type: ignore[no-untyped-def]
    return tl.maximum(x, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(x)))


@triton.jit  # type: ignore[untyped-decorator]
def _score(scores, bias, i: tl.constexpr, BIAS: tl.constexpr, inside):  # type: ignore[no-untyped-def]
    found = tl.load(scores + i, mask=inside, other=0.0)
    if BIAS:
        found += tl.load(bias + i)
    return found


# One program for all numbers of patches: what a warm-up has compiled is what later requests run.
@triton.jit(do_not_specialize=["patches", "score_stride"])  # type: ignore[untyped-decorator]
def sum_levels(  # type: ignore[no-untyped-def]
    out,
    levels,
    scores,
    bias,
    mix,
    down,
    up,
    patches,
    score_stride,
    LAW: tl.constexpr,
    BIAS: tl.constexpr,
    MIX: tl.constexpr,
    TAP: tl.constexpr,
    WIDTH: tl.constexpr,
    LEVELS: tl.constexpr,
    RANK: tl.constexpr,
    CODES: tl.constexpr,
    FACTOR: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = rows < patches
    own = scores + rows * score_stride
    highest = tl.full((ROWS,), -float("inf"), tl.float32)
    norm = tl.zeros((ROWS,), tl.float32)
    if LAW == "sigmoid":
        # Sigmoids over their sum as a softmax of their logarithms: finite where all of them underflow.
        for i in tl.static_range(LEVELS):
            highest = tl.maximum(highest, -_log1pexp(-_score(own, bias, i, BIAS, inside)))
        for i in tl.static_range(LEVELS):
            norm += tl.exp(-_log1pexp(-_score(own, bias, i, BIAS, inside)) - highest)
    if LAW == "softplus":
        for i in tl.static_range(LEVELS):
            norm += _log1pexp(_score(own, bias, i, BIAS, inside))
    mixed = 1.0
    if MIX:
        mixed = tl.load(mix)
    shares = ()
    for i in tl.static_range(LEVELS):
        share = tl.full((ROWS,), 1.0, tl.float32)
        if LAW == "given":
            share = _score(own, bias, i, BIAS, inside)
        if LAW == "sigmoid":
            share = tl.exp(-_log1pexp(-_score(own, bias, i, BIAS, inside)) - highest) / norm
        if LAW == "softplus":
            share = _log1pexp(_score(own, bias, i, BIAS, inside)) / norm
        shares = shares + (share * mixed,)  # type: ignore[assignment]  # noqa: RUF005
    ranks = tl.arange(0, CODES)
    known = ranks < RANK
    codes = ()
    if RANK > 0:
        # What the second pass reads of these rows is still in the cache.
        for i in tl.static_range(LEVELS):
            code = tl.zeros((ROWS, CODES), tl.float32)
            for start in range(0, WIDTH, COLUMNS):
                columns = start + tl.arange(0, COLUMNS)
                wide = columns < WIDTH
                level = tl.load(
                    levels[i] + rows[:, None] * WIDTH + columns[None, :],
                    mask=inside[:, None] & wide[None, :],
                    other=0.0,
                )
                into = tl.load(
                    down + (i * RANK + ranks[:, None]) * WIDTH + columns[None, :],
                    mask=known[:, None] & wide[None, :],
                    other=0.0,
                )
                into = tl.trans(into.to(level.dtype).to(FACTOR))
                code += tl.dot(level.to(FACTOR), into, input_precision="ieee")
            code = (code * shares[i][:, None]).to(out.dtype.element_ty).to(FACTOR)
            codes = codes + (code,)  # type: ignore[assignment]  # noqa: RUF005
    for start in range(0, WIDTH, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        wide = columns < WIDTH
        places = rows[:, None] * WIDTH + columns[None, :]
        mask = inside[:, None] & wide[None, :]
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        for i in tl.static_range(LEVELS):
            level = tl.load(levels[i] + places, mask=mask, other=0.0).to(tl.float32)
            total += shares[i][:, None] * level
            if i == TAP:
                total += (1.0 - mixed) * level
            if RANK > 0:
                # Contiguous as stored, [width, rank].
                back = tl.load(
                    up + (i * WIDTH + columns[:, None]) * RANK + ranks[None, :],
                    mask=wide[:, None] & known[None, :],
                    other=0.0,
                )
                back = tl.trans(back.to(out.dtype.element_ty).to(FACTOR))
                total += tl.dot(codes[i], back, input_precision="ieee")
        tl.store(out + places, total.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["patches"])  # type: ignore[untyped-decorator]
def score_levels(  # type: ignore[no-untyped-def]
    out,
    levels,
    vectors,
    gate,
    patches,
    WEIGHED: tl.constexpr,
    TAP: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    LEVELS: tl.constexpr,
    ROWS: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, PADDED)
    inside, wide = rows < patches, columns < WIDTH
    places = rows[:, None] * WIDTH + columns[None, :]
    mask = inside[:, None] & wide[None, :]
    for i in tl.static_range(LEVELS):
        level = tl.load(levels[i] + places, mask=mask, other=0.0).to(tl.float32)
        if WEIGHED:
            vector = tl.load(vectors + i * WIDTH + columns, mask=wide, other=0.0)
            tl.store(out + rows * (LEVELS + 1) + i, tl.sum(level * vector[None, :], axis=1), mask=inside)
        if i == TAP:
            own = tl.load(gate + columns, mask=wide, other=0.0)
            tl.store(out + rows * (LEVELS + 1) + LEVELS, tl.sum(level * own[None, :], axis=1), mask=inside)
