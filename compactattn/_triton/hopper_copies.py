"""The two producer warps of the Hopper attention kernel: what they copy into shared memory, and when.

An item of `stages` stages takes its consumers `stages + 1` steps: step n computes S(n) = Q K(n) and O += P(n-1) V(n-1),
so that the first step has no values and the last one no keys. Each step owns slot `step mod 2` of keys and of values.
Where a step has no copy to wait for, the producer arrives in its place, so that phases stay regular.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from compactattn._triton import schedule
from compactattn._triton.gluon_names import async_load, barrier, reinterpret

STAGE: gl.constexpr = gl.constexpr(schedule.STAGE)
ROWS: gl.constexpr = gl.constexpr(schedule.ROWS)
COLUMNS: gl.constexpr = gl.constexpr(64)  # columns that one TMA copy brings: 128 bytes, the width of the swizzle
NOWHERE: gl.constexpr = gl.constexpr(1 << 30)  # the position of a block that a row does not have
FIELDS: gl.constexpr = gl.constexpr(schedule.FIELDS)
PARTS_AT: gl.constexpr = FIELDS  # what an item's record holds behind the fields of its tile
RECORD: gl.constexpr = gl.constexpr(16)
CLEARED: gl.constexpr = gl.constexpr(8)  # rows that a warp clears at a time: the height of the swizzle


@gluon.jit
def table_stage(s, stages, edge):
    """Where stage s of a tile stands in its row: the masked ones come first in the tile, but last in the row."""
    return gl.where(s < edge, stages - edge + s, s - edge)


@gluon.jit
def item_stages(stages, code):
    """(first, stop): the stages of a tile that an item covers."""
    parts = code // 65536
    part = code % 65536
    return part * stages // parts, (part + 1) * stages // parts


@gluon.jit
def key_start(blocks, count, n, part: gl.constexpr, BLOCK_SIZE: gl.constexpr):
    """First token of the given part of stage n of a row; parts are blocks where these are smaller than a stage."""
    token = n * STAGE + part * BLOCK_SIZE
    entry = token // BLOCK_SIZE
    block = gl.load(blocks + entry, mask=entry < count, other=NOWHERE // BLOCK_SIZE)
    return block * BLOCK_SIZE + token % BLOCK_SIZE


@gluon.jit
def item_value(item, n: gl.constexpr):
    """Number n of what an item's record in shared memory holds."""
    return gl.max(item.slice(n, 1).load(gl.BlockedLayout([1], [32], [gl.num_warps()], [0])), 0)


@gluon.jit
def put_item(item, fields, parts):
    """Write an item's record: the fields of its tile, and which of its parts the item is (-1: there is no item)."""
    layout: gl.constexpr = fields.type.layout
    item.store(gl.where(gl.arange(0, RECORD, layout) == PARTS_AT, parts, fields))


@gluon.constexpr_function
def _columns_layout():
    return gl.NVMMASharedLayout(128, 16, rank=2)


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


@gluon.jit
def _copy_stage(desc, found, kv_head, ready, stage, UNIT: gl.constexpr, HEAD_DIM: gl.constexpr):
    """Start the copies of one stage of K or V, in units of UNIT tokens by 64 columns."""
    mbarrier.expect(ready, STAGE * HEAD_DIM * 2)
    columns = reinterpret(stage, stage.dtype, [HEAD_DIM // COLUMNS, STAGE, COLUMNS], _columns_layout())
    for u in gl.static_range(STAGE // UNIT):
        for c in gl.static_range(HEAD_DIM // COLUMNS):
            async_load(
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
        columns = reinterpret(half, half.dtype, [HEAD_DIM // COLUMNS, 64, COLUMNS], _columns_layout())
        first = token + gl.where(packed != 0, 0, u * QUERIES)
        own = gl.minimum(head + gl.where(packed != 0, u, 0), HEADS - 1)
        for c in gl.static_range(HEAD_DIM // COLUMNS):
            async_load(q_desc, [first, own, c * COLUMNS], ready, columns.index(c).slice(u * QUERIES % 64, QUERIES))


@gluon.jit
def _clear_values(stage, valid, HEAD_DIM: gl.constexpr):
    """Zero the rows of a value stage that no query may see: they can hold anything, and 0 * NaN is NaN."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [gl.num_warps(), 1], [1, 0])
    PIECES: gl.constexpr = STAGE // CLEARED
    pieces = reinterpret(stage, stage.dtype, [HEAD_DIM // COLUMNS * PIECES, CLEARED, COLUMNS], _columns_layout())
    token = gl.arange(0, CLEARED, gl.SliceLayout(1, layout))
    for piece in range(HEAD_DIM // COLUMNS * PIECES):
        first = piece % PIECES * CLEARED
        if first + CLEARED > valid:
            rows = pieces.index(piece)
            rows.store(gl.where(gl.expand_dims(first + token < valid, 1), rows.load(layout), 0.0))
    fence_async_shared()


@gluon.jit
def produce_keys(
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
    """Draw items and make them known; copy the queries of each, and its keys stage by stage."""
    q_smem, k_smem, item_smem = smem
    q_ready, q_free, k_ready, free = barriers
    page_table, page_table_stride, page_table_width, indices, kv_blocks = table
    plan, slots, queue, queue_tiles, queue_parts = queued
    field = gl.arange(0, RECORD, gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
    items = gl.load(queue + 1)
    item = gl.program_id(0)
    step = 0
    number = 0
    while item < items:
        at = plan + gl.load(queue_tiles + item)
        code = gl.load(queue_parts + item)
        fields = gl.load(at + field * slots, mask=field < FIELDS, other=0)
        stages = gl.load(at)
        edge = gl.load(at + slots)
        row = gl.load(at + 2 * slots)
        count = gl.load(at + 3 * slots)
        tile = gl.load(at + 4 * slots)
        token = gl.load(at + 5 * slots)
        blocks = indices + row.to(gl.int64) * kv_blocks
        head = tile // 2 // q_blocks % HEADS
        pages = page_table + (tile // 2 // q_blocks // HEADS).to(gl.int64) * page_table_stride
        first, stop = item_stages(stages, code)
        q_slot = number % 2
        mbarrier.wait(q_free.index(q_slot), ((number // 2) & 1) ^ 1)
        put_item(item_smem.index(q_slot), fields, code)
        barrier()  # every lane wrote; one of them arrives, for all
        _copy_queries(q_desc, q_smem, q_slot, q_ready.index(q_slot), token, head, tile % 2, HEADS, QUERIES)
        for s in range(first, stop):
            n = table_stage(s, stages, edge)
            found = _stage_pages(blocks, count, pages, page_table_width, num_pages, n, UNIT, BLOCK_SIZE, PAGE_SIZE)
            mbarrier.wait(free.index(step % 2), ((step // 2) & 1) ^ 1)
            _copy_stage(k_desc, found, head // GROUP, k_ready.index(step % 2), k_smem.index(step % 2), UNIT, HEAD_DIM)
            step += 1
        mbarrier.wait(free.index(step % 2), ((step // 2) & 1) ^ 1)
        mbarrier.arrive(k_ready.index(step % 2), count=1)
        step += 1
        number += 1
        item = gl.num_programs(0) + gl.atomic_add(queue, 1, sem="relaxed")
    q_slot = number % 2
    mbarrier.wait(q_free.index(q_slot), ((number // 2) & 1) ^ 1)
    put_item(item_smem.index(q_slot), field, -1)
    barrier()
    mbarrier.arrive(q_ready.index(q_slot), count=1)


@gluon.jit
def produce_values(
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
    """Copy the values of each item, stage by stage; clear what no query of a masked stage may see."""
    v_smem, item_smem = smem
    q_ready, q_free, v_ready, v_copied, free = barriers
    page_table, page_table_stride, page_table_width, indices, kv_blocks = table
    step = 0
    number = 0
    cut_stages = 0
    mbarrier.wait(q_ready.index(0), 0)
    code = item_value(item_smem.index(0), PARTS_AT)
    while code >= 0:
        item = item_smem.index(number % 2)
        stages = item_value(item, 0)
        edge = item_value(item, 1)
        row = item_value(item, 2)
        count = item_value(item, 3)
        tile = item_value(item, 4)
        limit = item_value(item, 6) + item_value(item, 7)
        mbarrier.arrive(q_free.index(number % 2), count=1)
        blocks = indices + row.to(gl.int64) * kv_blocks
        kv_head = tile // 2 // q_blocks % HEADS // GROUP
        pages = page_table + (tile // 2 // q_blocks // HEADS).to(gl.int64) * page_table_stride
        first, stop = item_stages(stages, code)
        mbarrier.wait(free.index(step % 2), ((step // 2) & 1) ^ 1)
        mbarrier.arrive(v_ready.index(step % 2), count=1)
        step += 1
        for s in range(first, stop):
            n = table_stage(s, stages, edge)
            found = _stage_pages(blocks, count, pages, page_table_width, num_pages, n, UNIT, BLOCK_SIZE, PAGE_SIZE)
            valid = STAGE + 0
            if s < edge:
                valid = gl.minimum(limit - key_start(blocks, count, n, 0, BLOCK_SIZE), min(BLOCK_SIZE, STAGE))
                if BLOCK_SIZE < STAGE:
                    second = limit - key_start(blocks, count, n, 1, BLOCK_SIZE)
                    valid += gl.maximum(gl.minimum(second, BLOCK_SIZE), 0)
            slot = v_smem.index(step % 2)
            mbarrier.wait(free.index(step % 2), ((step // 2) & 1) ^ 1)
            if valid < STAGE:
                _copy_stage(v_desc, found, kv_head, v_copied, slot, UNIT, HEAD_DIM)
                mbarrier.wait(v_copied, cut_stages & 1)
                _clear_values(slot, valid, HEAD_DIM)
                barrier()  # one lane arrives for all
                mbarrier.arrive(v_ready.index(step % 2), count=1)
                cut_stages += 1
            else:
                _copy_stage(v_desc, found, kv_head, v_ready.index(step % 2), slot, UNIT, HEAD_DIM)
            step += 1
        number += 1
        mbarrier.wait(q_ready.index(number % 2), (number // 2) & 1)
        code = item_value(item_smem.index(number % 2), PARTS_AT)
