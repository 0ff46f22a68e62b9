"""Warp-specialised attention for Hopper, in Gluon: two producer warps feed two consumer warpgroups through TMA.

One program per SM draws items from the queue of `schedule`: tiles of 128 query rows against stages of 128 keys, or
parts of them. One producer copies queries and keys into shared memory, the other values, two stages deep; each
consumer owns 64 rows and overlaps the softmax of one stage with the products of its neighbours: S(n) = Q K(n) and
O += P(n-1) V(n-1) are in flight together, across the borders of items as well.

The stages at the causal edge come first in a tile and are masked; what lies before them needs no mask.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra import cuda

from compactattn._triton import multiprocessors, next_power_of_2, on_device, schedule
from compactattn._triton.launch import launch
from compactattn.data import BlockTable, PagedKV, PrefillBatch

STAGE: gl.constexpr = gl.constexpr(schedule.STAGE)
ROWS: gl.constexpr = gl.constexpr(schedule.ROWS)
COLUMNS: gl.constexpr = gl.constexpr(64)  # columns that one TMA copy brings: 128 bytes, the width of the swizzle
NOWHERE: gl.constexpr = gl.constexpr(1 << 30)  # the position of a block that a row does not have
LOG2_E: gl.constexpr = gl.constexpr(1.4426950408889634)
LN_2: gl.constexpr = gl.constexpr(0.6931471805599453)

# Names that Gluon changed, the newer first; the only place that knows of Triton versions. `barrier` came in 3.7,
# `async_load` and `reinterpret` after it. A name that has neither form fails here, at import.
_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
_async_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
_smem = gl.shared_memory_descriptor
_reinterpret = _smem.reinterpret if hasattr(_smem, "reinterpret") else _smem._reinterpret


@gluon.jit
def _table_stage(s, stages, edge):
    """Where stage s of a tile stands in its row: the masked ones come first in the tile, but last in the row."""
    return gl.where(s < edge, stages - edge + s, s - edge)


@gluon.jit
def _key_start(blocks, count, n, part: gl.constexpr, wanted, BLOCK_SIZE: gl.constexpr):
    """First token of the given part of stage n of a row; parts are blocks where these are smaller than a stage."""
    token = n * STAGE + part * BLOCK_SIZE
    entry = token // BLOCK_SIZE
    block = gl.load(blocks + entry, mask=wanted & (entry < count), other=NOWHERE // BLOCK_SIZE)
    return block * BLOCK_SIZE + token % BLOCK_SIZE


@gluon.jit
def _stage_pages(
    blocks, count, pages, width, no_page, n, UNIT: gl.constexpr, BLOCK_SIZE: gl.constexpr, PAGE: gl.constexpr
):
    """For each unit of stage n: its page, or a page that does not exist (read as zeros), and its slot in the page.

    A row's last block may end in pages that the request does not have, nor the page table of `width` columns.
    """
    found = ()
    for part in gl.static_range(STAGE // min(BLOCK_SIZE, STAGE)):
        token = n * STAGE + part * BLOCK_SIZE
        entry = token // BLOCK_SIZE
        known = entry < count
        start = gl.load(blocks + entry, mask=known, other=0) * BLOCK_SIZE + token % BLOCK_SIZE
        for u in gl.static_range(min(BLOCK_SIZE, STAGE) // UNIT):
            column = start // PAGE + u * UNIT // PAGE
            has_page = known & (column < width) if PAGE < BLOCK_SIZE else known
            page = gl.load(pages + column, mask=has_page, other=no_page)
            found = found + (page, (start + u * UNIT) % PAGE)  # type: ignore[assignment]  # noqa: RUF005
    return found


@gluon.constexpr_function
def _columns_layout():
    return gl.NVMMASharedLayout(128, 16, rank=2)


@gluon.jit
def _copy_stage(desc, found, kv_head, ready, stage, UNIT: gl.constexpr, HEAD_DIM: gl.constexpr):
    """Start the copies of one stage of K or V, in units of UNIT tokens by 64 columns."""
    mbarrier.expect(ready, STAGE * HEAD_DIM * 2)
    columns = _reinterpret(stage, stage.dtype, [HEAD_DIM // COLUMNS, STAGE, COLUMNS], _columns_layout())
    for u in gl.static_range(STAGE // UNIT):
        for c in gl.static_range(HEAD_DIM // COLUMNS):
            _async_load(
                desc,
                [found[2 * u], found[2 * u + 1], kv_head, c * COLUMNS],
                ready,
                columns.index(c).slice(u * UNIT, UNIT),
            )


@gluon.jit
def _copy_queries(q_desc, q_smem, q_slot, ready, token, head, packed, HEADS: gl.constexpr, QUERIES: gl.constexpr):
    """Start the copies of a tile's queries, QUERIES of one head at a time."""
    HEAD_DIM: gl.constexpr = q_smem.shape[2]
    mbarrier.expect(ready, ROWS * HEAD_DIM * 2)
    for u in gl.static_range(ROWS // QUERIES):
        half = q_smem.index(q_slot * 2 + u * QUERIES // 64)
        columns = _reinterpret(half, half.dtype, [HEAD_DIM // COLUMNS, 64, COLUMNS], _columns_layout())
        first = token + gl.where(packed != 0, 0, u * QUERIES)
        own = gl.minimum(head + gl.where(packed != 0, u, 0), HEADS - 1)
        for c in gl.static_range(HEAD_DIM // COLUMNS):
            _async_load(q_desc, [first, own, c * COLUMNS], ready, columns.index(c).slice(u * QUERIES % 64, QUERIES))


@gluon.jit
def _item_stages(stages, code):
    """(first, stop): the stages of a tile that an item covers."""
    parts = code // 65536
    part = code % 65536
    return part * stages // parts, (part + 1) * stages // parts


@gluon.jit
def _one_value(smem):
    return gl.max(smem.load(gl.BlockedLayout([1], [32], [gl.num_warps()], [0])), 0)


@gluon.jit
def _put_value(smem, value):
    smem.store(gl.full([1], value, gl.int32, gl.BlockedLayout([1], [32], [gl.num_warps()], [0])))


@gluon.jit
def _keys(
    q_desc,
    k_desc,
    smem,
    barriers,
    table,
    queued,
    num_pages,
    q_blocks,
    HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    QUERIES: gl.constexpr,
    UNIT: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    PAGE_SIZE: gl.constexpr,
    HEAD_DIM: gl.constexpr,
):
    """Draw items and make them known; copy the queries of each, and K(n) into slot n mod 2, n over all items."""
    q_smem, k_smem, item_smem = smem
    q_ready, q_free, k_ready, free = barriers
    plan, slots, page_table, page_table_stride, page_table_width, indices, kv_blocks = table
    queue, queue_tiles, queue_parts = queued
    items = gl.load(queue + 1)
    item = gl.program_id(0)
    use = 0
    number = 0
    while item < items:
        tile_slot = gl.load(queue_tiles + item)
        code = gl.load(queue_parts + item)
        at = plan + tile_slot
        stages = gl.load(at)
        edge = gl.load(at + slots)
        row = gl.load(at + 2 * slots)
        count = gl.load(at + 3 * slots)
        tile = gl.load(at + 4 * slots)
        token = gl.load(at + 5 * slots)
        blocks = indices + row.to(gl.int64) * kv_blocks
        head = tile // 2 // q_blocks % HEADS
        pages = page_table + (tile // 2 // q_blocks // HEADS).to(gl.int64) * page_table_stride
        first, stop = _item_stages(stages, code)
        q_slot = number % 2
        mbarrier.wait(q_free.index(q_slot), ((number // 2) & 1) ^ 1)
        _put_value(item_smem.index(q_slot * 2), tile_slot)
        _put_value(item_smem.index(q_slot * 2 + 1), code)
        _barrier()  # every lane wrote the same; one of them arrives, for all
        _copy_queries(q_desc, q_smem, q_slot, q_ready.index(q_slot), token, head, tile % 2, HEADS, QUERIES)
        for s in range(first, stop):
            n = _table_stage(s, stages, edge)
            found = _stage_pages(blocks, count, pages, page_table_width, num_pages, n, UNIT, BLOCK_SIZE, PAGE_SIZE)
            mbarrier.wait(free.index(use % 2), ((use // 2) & 1) ^ 1)
            _copy_stage(k_desc, found, head // GROUP, k_ready.index(use % 2), k_smem.index(use % 2), UNIT, HEAD_DIM)
            use += 1
        number += 1
        item = gl.num_programs(0) + gl.atomic_add(queue, 1, sem="relaxed")
    q_slot = number % 2
    mbarrier.wait(q_free.index(q_slot), ((number // 2) & 1) ^ 1)
    _put_value(item_smem.index(q_slot * 2), -1)
    _put_value(item_smem.index(q_slot * 2 + 1), 65536)
    _barrier()
    mbarrier.arrive(q_ready.index(q_slot), count=1)
    for _ in range(2):  # the stage of nothing, and the one that it would wait for
        mbarrier.wait(free.index(use % 2), ((use // 2) & 1) ^ 1)
        mbarrier.arrive(k_ready.index(use % 2), count=1)
        use += 1


@gluon.jit
def _values(
    v_desc,
    smem,
    barriers,
    table,
    num_pages,
    q_blocks,
    HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    UNIT: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    PAGE_SIZE: gl.constexpr,
    HEAD_DIM: gl.constexpr,
):
    """Copy V(n) into slot n + 1 mod 2: its product runs beside the scores of the next stage."""
    v_smem, item_smem = smem
    q_ready, q_free, v_ready, free = barriers
    plan, slots, page_table, page_table_stride, page_table_width, indices, kv_blocks = table
    mbarrier.arrive(v_ready.index(0), count=1)  # no values come before the first
    use = 1
    number = 0
    mbarrier.wait(q_ready.index(0), 0)
    tile_slot = _one_value(item_smem.index(0))
    while tile_slot >= 0:
        q_slot = number % 2
        code = _one_value(item_smem.index(q_slot * 2 + 1))
        mbarrier.arrive(q_free.index(q_slot), count=1)
        at = plan + tile_slot
        stages = gl.load(at)
        edge = gl.load(at + slots)
        row = gl.load(at + 2 * slots)
        count = gl.load(at + 3 * slots)
        tile = gl.load(at + 4 * slots)
        blocks = indices + row.to(gl.int64) * kv_blocks
        kv_head = tile // 2 // q_blocks % HEADS // GROUP
        pages = page_table + (tile // 2 // q_blocks // HEADS).to(gl.int64) * page_table_stride
        first, stop = _item_stages(stages, code)
        for s in range(first, stop):
            n = _table_stage(s, stages, edge)
            found = _stage_pages(blocks, count, pages, page_table_width, num_pages, n, UNIT, BLOCK_SIZE, PAGE_SIZE)
            mbarrier.wait(free.index(use % 2), ((use // 2) & 1) ^ 1)
            _copy_stage(v_desc, found, kv_head, v_ready.index(use % 2), v_smem.index(use % 2), UNIT, HEAD_DIM)
            use += 1
        number += 1
        mbarrier.wait(q_ready.index(number % 2), (number // 2) & 1)
        tile_slot = _one_value(item_smem.index(number % 2 * 2))


@gluon.jit
def _softmax(s, peak, total, scale_log2):
    """One online-softmax step: (p, decay, new peak, new total); a row that has seen nothing yet has peak -inf."""
    new_peak = gl.maximum(peak, gl.max(s, 1) * scale_log2)
    shift = gl.where(new_peak == float("-inf"), 0.0, new_peak)
    p = gl.exp2(s * scale_log2 - gl.expand_dims(shift, 1))
    decay = gl.exp2(peak - shift)
    return p, decay, new_peak, total * decay + gl.sum(p, 1)


@gluon.jit
def _clear_values(stage, valid, HEAD_DIM: gl.constexpr):
    """Zero the rows of a value stage that no query may see: they can hold anything, and 0 * NaN is NaN."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    PIECES: gl.constexpr = STAGE // 16
    pieces = _reinterpret(stage, stage.dtype, [HEAD_DIM // COLUMNS * PIECES, 16, COLUMNS], _columns_layout())
    token = gl.arange(0, 16, gl.SliceLayout(1, layout))
    for piece in range(HEAD_DIM // COLUMNS * PIECES):
        first = piece % PIECES * 16
        if first + 16 > valid:
            rows = pieces.index(piece)
            rows.store(gl.where(gl.expand_dims(first + token < valid, 1), rows.load(layout), 0.0))
    fence_async_shared()


@gluon.jit
def _mask(s, start, second, position, limit, BLOCK_SIZE: gl.constexpr):
    """(the scores that the causal edge leaves, how many of the stage's tokens some row sees)."""
    column = gl.arange(0, STAGE, gl.SliceLayout(0, s.type.layout))
    key = start + column
    valid = limit - start
    if BLOCK_SIZE < STAGE:
        key = gl.where(column < BLOCK_SIZE, key, second - BLOCK_SIZE + column)
        valid = gl.minimum(valid, BLOCK_SIZE) + gl.maximum(gl.minimum(limit - second, BLOCK_SIZE), 0)
    return gl.where(gl.expand_dims(key, 0) <= gl.expand_dims(position, 1), s, float("-inf")), valid


@gluon.jit
def _finish(
    half,
    o,
    peak,
    total,
    outputs,
    plan,
    slots,
    tile_slot,
    code,
    q_blocks,
    HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    PACKED: gl.constexpr,
    LSE: gl.constexpr,
):
    """Write a tile's rows; of a divided tile, leave this part in scratch, and let the last to come merge the parts."""
    out, out_stride_token, out_stride_head, lse, lse_stride_token, lse_stride_head, partial, stats, arrivals = outputs
    HEAD_DIM: gl.constexpr = o.shape[1]
    layout: gl.constexpr = o.type.layout
    row_layout: gl.constexpr = gl.SliceLayout(1, layout)
    at = plan + tile_slot
    lane = half * 64 + gl.arange(0, 64, row_layout)
    dim = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, layout))
    peak = gl.convert_layout(peak, row_layout)
    total = gl.convert_layout(total, row_layout)
    parts = code // 65536
    complete = parts == 1
    if parts > 1:
        first_scratch = gl.load(at + 8 * slots)
        scratch = first_scratch + code % 65536
        offset = gl.expand_dims(lane * HEAD_DIM, 1) + gl.expand_dims(dim, 0)
        gl.store(partial + scratch.to(gl.int64) * (ROWS * HEAD_DIM) + offset, o)
        gl.store(stats + scratch * (2 * ROWS) + lane, peak)
        gl.store(stats + scratch * (2 * ROWS) + ROWS + lane, total)
        _barrier()
        complete = gl.atomic_add(arrivals + 2 * first_scratch + half, 1, sem="acq_rel", scope="gpu") == parts - 1
        if complete:
            o = gl.zeros_like(o)
            peak = gl.full_like(peak, float("-inf"))
            total = gl.zeros_like(total)
            for part in range(parts):
                at_stats = stats + (first_scratch + part) * (2 * ROWS) + lane
                at_o = partial + (first_scratch + part).to(gl.int64) * (ROWS * HEAD_DIM) + offset
                other_peak = gl.load(at_stats, cache_modifier=".cg")
                new_peak = gl.maximum(peak, other_peak)
                shift = gl.where(new_peak == float("-inf"), 0.0, new_peak)
                decay = gl.exp2(peak - shift)
                weight = gl.exp2(other_peak - shift)
                total = total * decay + gl.load(at_stats + ROWS, cache_modifier=".cg") * weight
                other_o = gl.load(at_o, cache_modifier=".cg")
                o = o * gl.expand_dims(decay, 1) + other_o * gl.expand_dims(weight, 1)
                peak = new_peak
    if complete:
        tile = gl.load(at + 4 * slots)
        token = gl.load(at + 5 * slots)
        query_rows = gl.load(at + 7 * slots)
        packed = tile % 2 != 0
        head = tile // 2 // q_blocks % HEADS
        query = gl.where(packed, lane % PACKED, lane)
        own = head + gl.where(packed, lane // PACKED, 0)
        valid = (query < query_rows) & ((lane < PACKED * GROUP) | (packed == 0))
        empty = total == 0.0
        inverse = gl.where(empty, 0.0, 1.0 / gl.where(empty, 1.0, total))
        tokens = (token + query).to(gl.int64)
        out_offset = tokens * out_stride_token + own.to(gl.int64) * out_stride_head
        gl.store(
            out + gl.expand_dims(out_offset, 1) + gl.expand_dims(dim, 0),
            (o * gl.expand_dims(inverse, 1)).to(out.dtype.element_ty),
            mask=gl.expand_dims(valid, 1) & (gl.expand_dims(dim, 0) < HEAD_DIM),
        )
        if LSE:
            natural = gl.where(empty, float("-inf"), (peak + gl.log2(gl.where(empty, 1.0, total))) * LN_2)
            gl.store(lse + tokens * lse_stride_token + own * lse_stride_head, natural, mask=valid)


@gluon.jit
def _consumer(
    half,
    shared,
    HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    PACKED: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    LSE: gl.constexpr,
):
    """Softmax attention of 64 rows of every item."""
    smem, barriers, rows, outputs, scale_log2, q_blocks = shared
    q_smem, k_smem, v_smem, item_smem = smem
    q_ready, q_free, k_ready, v_ready, free = barriers
    plan, slots, indices, kv_blocks = rows
    dtype: gl.constexpr = q_smem.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, STAGE, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    row_layout: gl.constexpr = gl.SliceLayout(1, s_layout)
    lane = half * 64 + gl.arange(0, 64, row_layout)
    no_s = gl.zeros([64, STAGE], gl.float32, s_layout)
    peak = gl.full([64], 0.0, gl.float32, row_layout)
    total = gl.full([64], 1.0, gl.float32, row_layout)
    o = gl.zeros([64, HEAD_DIM], gl.float32, o_layout)
    weights = gl.zeros([64, STAGE], dtype, p_layout)
    valid = STAGE + 0  # of the values that wait for their product: how many tokens some row sees
    use = 0
    number = 0
    last_slot = 0
    last_code = 0
    accumulate = half < 0  # an item's first product replaces what the item before left
    running = 1
    while running != 0:
        q_slot = number % 2
        mbarrier.wait(q_ready.index(q_slot), (number // 2) & 1)
        tile_slot = _one_value(item_smem.index(q_slot * 2))
        code = _one_value(item_smem.index(q_slot * 2 + 1))
        running = (tile_slot >= 0).to(gl.int32)  # after the last item: one stage of nothing, which finishes it
        at = plan + gl.maximum(tile_slot, 0)
        stages = gl.load(at)
        edge = gl.load(at + slots) * running
        count = gl.load(at + 3 * slots)
        tile = gl.load(at + 4 * slots)
        first_position = gl.load(at + 6 * slots)
        limit = first_position + gl.load(at + 7 * slots)
        blocks = indices + gl.load(at + 2 * slots).to(gl.int64) * kv_blocks
        first, stop = _item_stages(stages, code)
        stop = gl.where(running != 0, stop, first + 1)
        position = first_position + gl.where(tile % 2 != 0, lane % PACKED, lane)
        q_rows = q_smem.index(q_slot * 2 + half)
        mbarrier.wait(k_ready.index(use % 2), (use // 2) & 1)
        # the item's beginning, up to the turn of the product of its first stage and of its last masked one
        plain = gl.minimum(gl.maximum(first + 1, edge) + 1, stop)
        for t in range(first, plain):
            slot = use % 2
            n = _table_stage(t, stages, edge)
            start = _key_start(blocks, count, n, 0, t < edge, BLOCK_SIZE)
            second = _key_start(blocks, count, n, 1, t < edge, BLOCK_SIZE) if BLOCK_SIZE < STAGE else start
            if valid < STAGE:
                mbarrier.wait(v_ready.index(slot), (use // 2) & 1)
                _clear_values(v_smem.index(slot), valid, HEAD_DIM)
            s_next = warpgroup_mma(q_rows, k_smem.index(slot).permute((1, 0)), no_s, use_acc=False, is_async=True)
            mbarrier.wait(v_ready.index(slot), (use // 2) & 1)
            o_next = warpgroup_mma(weights, v_smem.index(slot), o, use_acc=accumulate, is_async=True)
            s = warpgroup_mma_wait(num_outstanding=1, deps=[s_next])
            valid = STAGE + 0
            if t < edge:
                s, valid = _mask(s, start, second, position, limit, BLOCK_SIZE)
            fresh = t == first
            if fresh & (number > 0):  # the scores of the item before are done: its queries may go
                mbarrier.arrive(q_free.index(q_slot ^ 1), count=1)
            p, decay, new_peak, new_total = _softmax(
                s, gl.where(fresh, float("-inf"), peak), gl.where(fresh, 0.0, total), scale_log2
            )
            new_weights = gl.convert_layout(p.to(dtype), p_layout)
            # this wait keeps the one below it after the softmax, which overlaps with the product in flight
            mbarrier.wait(k_ready.index((use + 1) % 2), ((use + 1) // 2) & 1)
            o, weights = warpgroup_mma_wait(num_outstanding=0, deps=[o_next, new_weights])
            mbarrier.arrive(free.index(slot), count=1)
            if fresh & (number > 0):  # the product was the last one of the item before
                _finish(
                    half,
                    o,
                    peak,
                    total,
                    outputs,
                    plan,
                    slots,
                    last_slot,
                    last_code,
                    q_blocks,
                    HEADS,
                    GROUP,
                    PACKED,
                    LSE,
                )
            o = o * gl.expand_dims(gl.convert_layout(decay, gl.SliceLayout(1, o_layout)), 1)
            accumulate = t != first
            peak = new_peak
            total = new_total
            use += 1
        if plain < stop:
            valid = STAGE + 0
            accumulate = plain > first
        for _ in range(plain, stop):
            slot = use % 2
            s_next = warpgroup_mma(q_rows, k_smem.index(slot).permute((1, 0)), no_s, use_acc=False, is_async=True)
            mbarrier.wait(v_ready.index(slot), (use // 2) & 1)
            o_next = warpgroup_mma(weights, v_smem.index(slot), o, is_async=True)
            s = warpgroup_mma_wait(num_outstanding=1, deps=[s_next])
            p, decay, peak, total = _softmax(s, peak, total, scale_log2)
            new_weights = gl.convert_layout(p.to(dtype), p_layout)
            mbarrier.wait(k_ready.index((use + 1) % 2), ((use + 1) // 2) & 1)
            o, weights = warpgroup_mma_wait(num_outstanding=0, deps=[o_next, new_weights])
            mbarrier.arrive(free.index(slot), count=1)
            o = o * gl.expand_dims(gl.convert_layout(decay, gl.SliceLayout(1, o_layout)), 1)
            use += 1
        last_slot = tile_slot * 1
        last_code = code * 1
        number += 1


@gluon.jit(
    do_not_specialize=[
        "slots",
        "page_table_stride",
        "page_table_width",
        "q_blocks",
        "kv_blocks",
        "num_pages",
        "scratch",
    ],
    do_not_specialize_on_alignment=["queue", "queue_tiles", "queue_parts", "arrivals", "page_table"],
)
def _hopper_kernel(
    q_desc,
    k_desc,
    v_desc,
    out,
    out_stride_token,
    out_stride_head,
    lse,
    lse_stride_token,
    lse_stride_head,
    partial,
    scratch,
    plan,
    slots,
    queue,
    queue_tiles,
    queue_parts,
    arrivals,
    page_table,
    page_table_stride,
    page_table_width,
    indices,
    scale,
    q_blocks,
    kv_blocks,
    num_pages,
    HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    GROUP_PADDED: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    PAGE_SIZE: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    LSE: gl.constexpr,
):
    """One program per SM, which draws items until the queue is empty."""
    PACKED: gl.constexpr = ROWS // GROUP_PADDED
    QUERIES: gl.constexpr = q_desc.block_shape[0]
    UNIT: gl.constexpr = k_desc.block_shape[1]
    dtype: gl.constexpr = q_desc.dtype
    layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    q_smem = gl.allocate_shared_memory(dtype, [4, 64, HEAD_DIM], layout)
    k_smem = gl.allocate_shared_memory(dtype, [2, STAGE, HEAD_DIM], layout)
    v_smem = gl.allocate_shared_memory(dtype, [2, STAGE, HEAD_DIM], layout)
    item_smem = gl.allocate_shared_memory(gl.int32, [4, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    q_ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    q_free = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    v_ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(2):
        mbarrier.init(q_ready.index(slot), count=1)
        mbarrier.init(q_free.index(slot), count=3)  # both consumers and the producer of values
        mbarrier.init(k_ready.index(slot), count=1)
        mbarrier.init(v_ready.index(slot), count=1)
        mbarrier.init(free.index(slot), count=2)
    fence_async_shared()
    cuda.gdc_wait()  # for the schedule
    stats = partial + scratch.to(gl.int64) * (ROWS * HEAD_DIM)
    smem = (q_smem, k_smem, v_smem, item_smem)
    barriers = (q_ready, q_free, k_ready, v_ready, free)
    rows = (plan, slots, indices, kv_blocks)
    outputs = (out, out_stride_token, out_stride_head, lse, lse_stride_token, lse_stride_head, partial, stats, arrivals)
    table = (plan, slots, page_table, page_table_stride, page_table_width, indices, kv_blocks)
    queued = (queue, queue_tiles, queue_parts)
    consumer = (smem, barriers, rows, outputs, scale * LOG2_E, q_blocks)
    gl.warp_specialize(
        [
            (_consumer, (0, consumer, HEADS, GROUP, PACKED, BLOCK_SIZE, HEAD_DIM, LSE)),
            (_consumer, (1, consumer, HEADS, GROUP, PACKED, BLOCK_SIZE, HEAD_DIM, LSE)),
            (
                _keys,
                (
                    q_desc,
                    k_desc,
                    (q_smem, k_smem, item_smem),
                    (q_ready, q_free, k_ready, free),
                    table,
                    queued,
                    num_pages,
                    q_blocks,
                    HEADS,
                    GROUP,
                    QUERIES,
                    UNIT,
                    BLOCK_SIZE,
                    PAGE_SIZE,
                    HEAD_DIM,
                ),
            ),
            (
                _values,
                (
                    v_desc,
                    (v_smem, item_smem),
                    (q_ready, q_free, v_ready, free),
                    table,
                    num_pages,
                    q_blocks,
                    HEADS,
                    GROUP,
                    UNIT,
                    BLOCK_SIZE,
                    PAGE_SIZE,
                    HEAD_DIM,
                ),
            ),
        ],
        [4, 1, 1],
        [240, 24, 24],
    )


def attend(
    q: Tensor,
    kv: PagedKV,
    batch: PrefillBatch,
    table: BlockTable,
    scale: float,
    out: Tensor,
    lse: Tensor | None,
) -> None:
    """Launch the schedule and the kernel; writes out [T, Hq, D] and lse float32 [T, Hq]."""
    heads, dim = q.shape[1:]
    group = heads // kv.num_kv_heads
    padded = next_power_of_2(group)
    programs = multiprocessors(q.device)
    unit = min(schedule.STAGE, table.block_size, kv.page_size)
    q_layout = gl.NVMMASharedLayout(128, 16, rank=3)
    kv_layout = gl.NVMMASharedLayout(128, 16, rank=4)
    q_box, kv_box = [min(schedule.ROWS // padded, 64), 1, COLUMNS.value], [1, unit, 1, COLUMNS.value]
    with on_device(q):
        work = schedule.schedule_tiles(batch, table, group, programs)
        # parts of divided tiles: their numerators, then their row maxima and denominators
        partial = torch.empty(work.scratch * schedule.ROWS * (dim + 2), dtype=torch.float32, device=q.device)
        launch(
            _hopper_kernel,
            (programs,),
            TensorDescriptor.from_tensor(q, q_box, q_layout),
            TensorDescriptor.from_tensor(kv.k, kv_box, kv_layout),
            TensorDescriptor.from_tensor(kv.v, kv_box, kv_layout),
            out,
            *out.stride()[:2],
            out if lse is None else lse,
            *((0, 0) if lse is None else lse.stride()),
            partial,
            work.scratch,
            work.plan,
            work.slots,
            work.queue,
            work.queue_tiles,
            work.queue_parts,
            work.arrivals,
            kv.page_table,
            kv.page_table.stride(0),
            kv.page_table.shape[1],
            table.indices,
            scale,
            batch.query_blocks(table.query_block),
            table.indices.shape[1],
            kv.k.shape[0],
            constants={
                "HEADS": heads,
                "GROUP": group,
                "GROUP_PADDED": padded,
                "BLOCK_SIZE": table.block_size,
                "PAGE_SIZE": kv.page_size,
                "HEAD_DIM": dim,
                "LSE": lse is not None,
            },
            device=q.device,
            num_warps=4,
            launch_pdl=True,
        )
