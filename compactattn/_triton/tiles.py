"""Tiles of a request's paged K and V, and online softmax over them: what the general attention kernel is made of."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
LN_2_HIGH = tl.constexpr(0.693359375)  # ln 2 in two parts; products of the first with integers are exact
LN_2_LOW = tl.constexpr(-2.12194440054690583e-4)


@triton.jit
def _locate(
    n,
    blocks,
    pages,
    limit,
    BLOCK_SIZE: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Where tile n of a row lies: its first token, and its page (or, for pages smaller than a tile, each token's)."""
    PER_BLOCK: tl.constexpr = BLOCK_SIZE // TILE
    start = tl.load(blocks + n // PER_BLOCK) * BLOCK_SIZE + n % PER_BLOCK * TILE
    if PAGE_SIZE >= TILE:
        page = tl.load(pages + start // PAGE_SIZE)
    else:
        position = start + tl.arange(0, TILE)
        if MASKED:
            page = tl.load(pages + position // PAGE_SIZE, mask=position < limit, other=0)
        else:
            page = tl.load(pages + position // PAGE_SIZE)
    return start, page


@triton.jit
def _within(position, floor, limit):
    """Positions that some row of the program sees: below `limit`, and from `floor` on where a window gives one."""
    return position < limit if floor is None else (position >= floor) & (position < limit)


@triton.jit
def _load_tile(
    cache,
    stride_page,
    stride_token,
    stride_head,
    start,
    page,
    limit,
    floor,
    kv_head,
    DTYPE: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    TILE: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Tokens start .. start + TILE of the request, DTYPE [TILE, DIM_PADDED]; with MASKED, only those that are seen."""
    token = tl.arange(0, TILE)
    if DESCRIPTOR:  # one page holds the whole tile
        tile = cache.load([page, start % PAGE_SIZE, kv_head, 0]).reshape(TILE, DIM_PADDED).to(DTYPE)
        if MASKED:  # slots that no query may see can hold anything, NaN included
            tile = tl.where(_within(start + token, floor, limit)[:, None], tile, 0.0)
    else:
        dim = tl.arange(0, DIM_PADDED)
        offset = page.to(tl.int64) * stride_page + ((start + token) % PAGE_SIZE).to(tl.int64) * stride_token
        pointers = cache + kv_head.to(tl.int64) * stride_head + offset[:, None] + dim[None, :]
        if MASKED:
            seen = _within(start + token, floor, limit)
            tile = tl.load(pointers, mask=seen[:, None] & (dim < DIM)[None, :], other=0.0).to(DTYPE)
        elif DIM == DIM_PADDED:
            tile = tl.load(pointers).to(DTYPE)
        else:
            tile = tl.load(pointers, mask=(dim < DIM)[None, :], other=0.0).to(DTYPE)
    return tile


@triton.jit
def _scores(queries, keys, PRECISE: tl.constexpr):
    """queries . keys [ROWS, TILE]; PRECISE sums the head dimension in parts of 16, which rounds less than one chain."""
    if PRECISE:
        PARTS: tl.constexpr = queries.shape[1] // 16
        q_parts = queries.reshape(queries.shape[0], PARTS, 16).permute(1, 0, 2)
        k_parts = keys.reshape(keys.shape[0], PARTS, 16).permute(1, 2, 0)
        s = tl.sum(tl.dot(q_parts, k_parts, input_precision="ieee"), axis=0)
    else:
        s = tl.dot(queries, tl.trans(keys))
    return s


@triton.jit
def _weighted(p, values):
    """p . values [ROWS, DIM] in parts of 16 keys, summed on their own.

    A plain product would be chained onto the result so far, and each term rounded to the size of the whole.
    """
    PARTS: tl.constexpr = p.shape[1] // 16
    p_parts = p.reshape(p.shape[0], PARTS, 16).permute(1, 0, 2)
    v_parts = values.reshape(PARTS, 16, values.shape[1])
    return tl.sum(tl.dot(p_parts, v_parts, input_precision="ieee"), axis=0)


@triton.jit
def precise_exp(x):
    """exp(x) for x <= 0 to the last bit or so; the hardware's exp2 alone is off by up to three.

    exp(x) = 2^n exp(r) with n = round(x / ln 2) and |r| <= ln(2) / 2, where a Taylor polynomial is exact enough.
    """
    n = tl.floor(tl.maximum(x, -87.0) * LOG2_E + 0.5)
    r = tl.fma(n, -LN_2_HIGH, tl.maximum(x, -87.0))
    r = tl.fma(n, -LN_2_LOW, r)
    p = tl.full(x.shape, 1.0 / 5040, tl.float32)
    p = tl.fma(p, r, 1.0 / 720)
    p = tl.fma(p, r, 1.0 / 120)
    p = tl.fma(p, r, 1.0 / 24)
    p = tl.fma(p, r, 1.0 / 6)
    p = tl.fma(p, r, 0.5)
    p = tl.fma(p, r, 1.0)
    p = tl.fma(p, r, 1.0)
    two_to_n = ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    return tl.where(x < -87.0, 0.0, p * two_to_n)


@triton.jit
def capped(s, cap, PRECISE: tl.constexpr):
    """cap * tanh(s / cap); PRECISE to the last bit or so, else to a few units of 2^-24 of the cap.

    Near 0 the quotient of exponentials cancels: there the continued fraction x / (1 + x² / (3 + x² / (5 + ...))) is
    exact enough, cut after five terms.
    """
    if PRECISE:
        x = tl.div_rn(s, tl.zeros_like(s) + cap)
        square = x * x
        small = tl.div_rn(x * (945.0 + square * (105.0 + square)), 945.0 + square * (420.0 + 15.0 * square))
        decay = precise_exp(-2.0 * tl.abs(x))
        large = tl.div_rn(1.0 - decay, 1.0 + decay)
        tanh = tl.where(tl.abs(x) < 0.5, small, tl.where(x < 0, -large, large))
    else:
        tanh = 1.0 - 2.0 / (1.0 + tl.exp2(s * (2.0 * LOG2_E / cap)))
    return cap * tanh


@triton.jit
def attend_tiles(
    acc,
    peak,
    total,
    queries,
    position,
    first_tile,
    stop_tile,
    blocks,
    pages,
    limit,
    floor,
    kv_head,
    scale,
    softcap,
    window,
    k,
    k_stride_page,
    k_stride_token,
    k_stride_head,
    v,
    v_stride_page,
    v_stride_token,
    v_stride_head,
    BLOCK_SIZE: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    TILE: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    POSITIVE_SCALE: tl.constexpr,
    PRECISE: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Online softmax over tiles [first_tile, stop_tile) of the row; MASKED where the causal edge may cut a tile.

    `scale` and `softcap` are in base 2 (times log2 e), and so is `peak`; in natural units where PRECISE (float32).
    """
    if first_tile < stop_tile:
        # two dependent loads lie between a table entry and its tile: they run one tile ahead
        start, page = _locate(first_tile, blocks, pages, limit, BLOCK_SIZE, PAGE_SIZE, TILE, MASKED)
        for n in range(first_tile, stop_tile):
            keys = _load_tile(
                k,
                k_stride_page,
                k_stride_token,
                k_stride_head,
                start,
                page,
                limit,
                floor,
                kv_head,
                queries.dtype,
                PAGE_SIZE,
                DIM,
                DIM_PADDED,
                TILE,
                DESCRIPTOR,
                MASKED,
            )
            s = _scores(queries, keys, PRECISE)
            if softcap is not None:
                s = capped(s * scale, softcap, PRECISE)
            if MASKED:
                s = tl.where((start + tl.arange(0, TILE))[None, :] <= position[:, None], s, float("-inf"))
                if window is not None:
                    seen = (start + tl.arange(0, TILE))[None, :] > position[:, None] - window
                    s = tl.where(seen, s, float("-inf"))
            if softcap is not None:
                new_peak = tl.maximum(peak, tl.max(s, axis=1))
            elif PRECISE or not POSITIVE_SCALE:
                s = tl.where(s == float("-inf"), s, s * scale)
                new_peak = tl.maximum(peak, tl.max(s, axis=1))
            else:
                new_peak = tl.maximum(peak, tl.max(s, axis=1) * scale)
                s = s * scale
            shift = tl.where(new_peak == float("-inf"), 0.0, new_peak) if MASKED else new_peak
            if PRECISE:
                p = precise_exp(s - shift[:, None])
                decay = precise_exp(peak - shift)
            else:
                p = tl.exp2(s - shift[:, None])
                decay = tl.exp2(peak - shift)
            total = total * decay + tl.sum(p, axis=1)
            acc = acc * decay[:, None]
            values = _load_tile(
                v,
                v_stride_page,
                v_stride_token,
                v_stride_head,
                start,
                page,
                limit,
                floor,
                kv_head,
                queries.dtype,
                PAGE_SIZE,
                DIM,
                DIM_PADDED,
                TILE,
                DESCRIPTOR,
                MASKED,
            )
            if PRECISE:
                acc += _weighted(p, values)
            else:
                acc = tl.dot(p.to(values.dtype), values, acc)
            peak = new_peak
            following = tl.minimum(n + 1, stop_tile - 1)
            start, page = _locate(following, blocks, pages, limit, BLOCK_SIZE, PAGE_SIZE, TILE, MASKED)
    return acc, peak, total


@triton.jit
def window_tiles(
    blocks, count, reach, first_position, limit, window, BLOCK_SIZE: tl.constexpr, PER_BLOCK: tl.constexpr
):
    """(first tile, first entry that no row's window cuts) of a row, for rows at first_position up to limit - 1.

    What lies before the first tile lies before every row's window. Entries ascend, so those from there on are few:
    at most `reach` beside those of one window.
    """
    floor = first_position - window + 1
    near = tl.minimum(count, reach + window // BLOCK_SIZE + 2)
    reached, whole = 0, 0
    for t0 in range(0, near, 32):
        t = t0 + tl.arange(0, 32)
        entry = tl.load(blocks + count - 1 - t, mask=t < near, other=-1)
        reached += tl.sum(((t < near) & ((entry + 1) * BLOCK_SIZE > floor)).to(tl.int32), axis=0)
        whole += tl.sum(((t < near) & (entry * BLOCK_SIZE >= limit - window)).to(tl.int32), axis=0)
    first = count - reached
    skipped = 0
    if reached > 0:
        skipped = tl.maximum(floor - tl.load(blocks + first) * BLOCK_SIZE, 0) // (BLOCK_SIZE // PER_BLOCK)
    return first * PER_BLOCK + skipped, count - whole
