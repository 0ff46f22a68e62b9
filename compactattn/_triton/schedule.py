"""How the persistent attention kernel shares its work: a plan of tiles and a queue of items that programs draw from.

A tile is 128 query rows (a query block of one head, or the packed heads of a short request) and the stages of 128
keys that it reads. Tiles queue in the order of the table, so that those that run together read the same part of the
cache, while the L2 still holds it. An item is a whole tile, or one of the parts of a tile that would otherwise end
after the others; parts are merged by their log-sum-exps. Where whole tiles share out evenly no tile is divided.

Two launches write the plan and the queue; no value is read on the host.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import cuda

from compactattn._triton import next_power_of_2, on_device
from compactattn._triton.launch import launch
from compactattn.data import BlockTable, PrefillBatch

STAGE = 128  # keys per stage
ROWS = 128  # query rows per tile
CHUNK = 128  # tiles that one program lays out
TILE_COST = 2  # stages that an item's beginning and end cost beside its own
DIVISION_COST = 8  # stages, beside a 16th of its work, that a program may lose to whole tiles before any is divided
SHORTEST_PART = 8  # stages of a part, or a 12th of a program's work where that is more
PARTS = 4  # parts of divided tiles per program, at most: what scratch is held for

#: fields of a tile: stages, masked stages (they come first), table row, entries of the row,
#: 2 * (request, head, query block) + packed, first token, its position, query rows, first scratch slot
FIELDS = 9

_STAGE = tl.constexpr(STAGE)
_ROWS = tl.constexpr(ROWS)
_CHUNK = tl.constexpr(CHUNK)
_TILE_COST = tl.constexpr(TILE_COST)
_DIVISION_COST = tl.constexpr(DIVISION_COST)
_SHORTEST_PART = tl.constexpr(SHORTEST_PART)
_QUEUED = tl.constexpr(1024)  # tiles that the queue takes at a time


@triton.jit
def _shares_table(rows, counts, group_head, q_blocks, full_count, short, GROUP: tl.constexpr):
    """May the heads of a KV group walk one table? Yes if they use one row, or if each of their rows is complete."""
    first = tl.load(rows + group_head, mask=short, other=0)
    one_row = short
    complete = short
    for g in tl.static_range(GROUP):
        own = tl.load(rows + group_head + g * q_blocks, mask=short, other=0)
        one_row = one_row & (own == first)
        complete = complete & (tl.load(counts + own, mask=short, other=0) == full_count)
    return one_row | complete


@triton.jit(
    do_not_specialize=["q_blocks", "kv_blocks", "tiles", "slots"],
    do_not_specialize_on_alignment=["cu_seqlens_q", "seq_lens", "sizes"],
)
def _plan_kernel(
    cu_seqlens_q,
    seq_lens,
    indices,
    counts,
    rows,
    plan,
    sizes,
    q_blocks,
    kv_blocks,
    tiles,
    slots,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Lay out one chunk of tiles: the fields of those that have queries, packed, and how many they are."""
    if OVERLAP:  # the next kernel may take its place at once; it waits for this one's results
        cuda.gdc_launch_dependents()
        cuda.gdc_wait()
    chunk = tl.program_id(0)
    lane = tl.arange(0, _CHUNK)
    tile = chunk * _CHUNK + lane
    exists = tile < tiles
    tile = tl.where(exists, tile, 0)
    i = q_blocks - 1 - tile // HEADS % q_blocks  # a request's last query block reads most: its heads go first
    head = tile % HEADS
    b = tile // HEADS // q_blocks
    q_start = tl.load(cu_seqlens_q + b)
    q_len = tl.load(cu_seqlens_q + b + 1) - q_start
    past_len = tl.load(seq_lens + b) - q_len
    first_query = i * _ROWS
    runs = exists & (first_query < q_len)
    packed = lane < 0
    PACKED: tl.constexpr = _ROWS // GROUP_PADDED
    if GROUP > 1:
        short = runs & (q_len <= PACKED)
        if tl.max(short.to(tl.int32), axis=0) > 0:
            group_head = (b.to(tl.int64) * HEADS + head // GROUP * GROUP) * q_blocks
            full_count = (past_len + q_len - 1) // BLOCK_SIZE + 1
            packed = _shares_table(rows, counts, group_head, q_blocks, full_count, short, GROUP)
            runs = runs & ((head % GROUP == 0) | (packed == 0))
    natural = (b * HEADS + head) * q_blocks + i
    row = tl.load(rows + natural, mask=runs, other=0)
    count = tl.load(counts + row, mask=runs, other=0)
    query_rows = tl.minimum(q_len - first_query, _ROWS)
    position = past_len + first_query
    limit = position + query_rows  # no row of the tile sees what lies there
    # entries at the row's end may be cut by the causal edge, or lie beyond this query block altogether
    blocks = indices + row.to(tl.int64) * kv_blocks
    full, visible = count, count
    last = tl.zeros_like(count)
    reach = (q_blocks * _ROWS + BLOCK_SIZE - 1) // BLOCK_SIZE + 1
    for t0 in range(0, reach, 16):
        t = t0 + tl.arange(0, 16)[None, :]
        near = t < tl.minimum(count, reach)[:, None]
        entry = tl.load(blocks[:, None] + count[:, None] - 1 - t, mask=near & runs[:, None], other=-1)
        hidden = entry * BLOCK_SIZE >= limit[:, None]
        full -= tl.sum(((entry + 1) * BLOCK_SIZE > position[:, None] + 1).to(tl.int32), axis=1)
        visible -= tl.sum(hidden.to(tl.int32), axis=1)
        last = tl.maximum(last, tl.max(tl.where(hidden, -1, entry), axis=1))
    cut = tl.where(visible > full, tl.maximum((last + 1) * BLOCK_SIZE - limit, 0), 0)
    stages = tl.maximum((visible * BLOCK_SIZE - cut + _STAGE - 1) // _STAGE, 1)  # an empty row has one masked stage
    edge = tl.maximum(stages - full * BLOCK_SIZE // _STAGE, 0)
    slot = tl.cumsum(runs.to(tl.int32), axis=0) - 1 + chunk * _CHUNK
    tl.store(plan + slot, stages, mask=runs)
    tl.store(plan + slots + slot, edge, mask=runs)
    tl.store(plan + 2 * slots + slot, row, mask=runs)
    tl.store(plan + 3 * slots + slot, count, mask=runs)
    tl.store(plan + 4 * slots + slot, natural * 2 + packed.to(tl.int32), mask=runs)
    tl.store(plan + 5 * slots + slot, q_start + first_query, mask=runs)
    tl.store(plan + 6 * slots + slot, position, mask=runs)
    tl.store(plan + 7 * slots + slot, query_rows, mask=runs)
    tl.store(sizes + chunk, tl.sum(runs.to(tl.int32), axis=0))


@triton.jit
def _tile_work(plan, sizes, slots, s0):
    """(slots, which of them hold a tile, their work) of the next tiles of the plan."""
    slot = s0 + tl.arange(0, _QUEUED)
    size = tl.load(sizes + slot // _CHUNK, mask=slot < slots, other=0)
    held = slot % _CHUNK < size
    return slot, held, tl.where(held, tl.load(plan + slot, mask=held, other=0) + _TILE_COST, 0)


@triton.jit(
    do_not_specialize=["slots", "programs", "scratch"],
    do_not_specialize_on_alignment=["sizes", "queue", "queue_tiles", "queue_parts", "arrivals"],
)
def _queue_kernel(
    plan, sizes, queue, queue_tiles, queue_parts, arrivals, slots, programs, scratch, OVERLAP: tl.constexpr
):
    """Number the items and divide the tiles that would end late. queue: items drawn so far, and items in all.

    A tile should take no longer than is left of a program's equal share when its turn comes; then half a tile, on
    average, still runs on each program. Work is counted in stages.
    """
    if OVERLAP:
        cuda.gdc_launch_dependents()
        cuda.gdc_wait()
    work = 0
    tiles = 0
    longest = 0
    for s0 in range(0, slots, _QUEUED):
        _, held, own = _tile_work(plan, sizes, slots, s0)
        work += tl.sum(own, axis=0)
        tiles += tl.sum(held.to(tl.int32), axis=0)
        longest = tl.maximum(longest, tl.max(own, axis=0))
    share = (work + programs - 1) // programs
    each = (tiles + programs - 1) // programs
    mean = work // tl.maximum(tiles, 1)
    undivided = (each - 1) * mean + longest <= share + share // 16 + _DIVISION_COST  # when the last whole tile ends
    shortest = tl.maximum(share // 12, _SHORTEST_PART)
    items = 0
    if undivided:
        for s0 in range(0, slots, _QUEUED):
            slot, held, _ = _tile_work(plan, sizes, slots, s0)
            item = items + tl.cumsum(held.to(tl.int32), axis=0) - 1
            tl.store(queue_tiles + item, slot, mask=held)
            tl.store(queue_parts + item, 65536, mask=held)
            items += tl.sum(held.to(tl.int32), axis=0)
    else:
        before = 0
        taken = 0
        for turn in tl.static_range(2):  # the long tiles first: what comes last should be short
            for s0 in range(0, slots, _QUEUED):
                slot, held, own = _tile_work(plan, sizes, slots, s0)
                held = held & ((own > mean + mean // 2) == (turn == 0))
                own = tl.where(held, own, 0)
                start = tl.maximum((before + tl.cumsum(own, axis=0) - own) // programs - mean // 2, 0)
                left = tl.maximum(share - start, shortest)
                late = held & (own > left + shortest)
                parts = tl.where(late, (own + left - 1) // left, held.to(tl.int32))
                needed = tl.where(late, parts, 0)
                first_scratch = taken + tl.cumsum(needed, axis=0) - needed
                parts = tl.where(late, tl.maximum(tl.minimum(parts, scratch - first_scratch), 1), parts)
                divided = parts > 1
                item = items + tl.cumsum(parts, axis=0) - parts
                tl.store(plan + 8 * slots + slot, first_scratch, mask=held)
                tl.store(arrivals + 2 * first_scratch, 0, mask=divided)
                tl.store(arrivals + 2 * first_scratch + 1, 0, mask=divided)
                for part in range(tl.max(parts, axis=0)):
                    tl.store(queue_tiles + item + part, slot, mask=part < parts)
                    tl.store(queue_parts + item + part, parts * 65536 + part, mask=part < parts)
                before += tl.sum(own, axis=0)
                items += tl.sum(parts, axis=0)
                taken += tl.sum(needed, axis=0)
    tl.store(queue, 0)
    tl.store(queue + 1, items)


class Schedule(NamedTuple):
    """What the attention kernel walks; all int32, on the device.

    Attributes:
        plan: [FIELDS, slots], the fields of each tile; a chunk's tiles fill its first slots.
        slots: tile slots, a multiple of CHUNK.
        queue: [2], items drawn so far and items in all.
        queue_tiles: slot of each item's tile.
        queue_parts: 65536 * parts of the tile + which of them the item is.
        arrivals: per first scratch slot of a divided tile and half of its rows, parts that are done.
        scratch: scratch slots that divided tiles may use.
    """

    plan: Tensor
    slots: int
    queue: Tensor
    queue_tiles: Tensor
    queue_parts: Tensor
    arrivals: Tensor
    scratch: int


def schedule_tiles(batch: PrefillBatch, table: BlockTable, group: int, programs: int) -> Schedule:
    """The schedule of one call of attention over `programs` programs; `group` query heads share a KV head."""
    requests, heads, q_blocks = table.rows.shape
    tiles = requests * heads * q_blocks
    chunks = -(-tiles // CHUNK)
    slots = chunks * CHUNK
    scratch = PARTS * programs
    sizes = (FIELDS * slots, chunks, 2, slots + scratch, slots + scratch, 2 * scratch)
    plan, filled, queue, queue_tiles, queue_parts, arrivals = torch.empty(
        sum(sizes), dtype=torch.int32, device=table.rows.device
    ).split(sizes)
    with on_device(plan):
        launch(
            _plan_kernel,
            (chunks,),
            batch.cu_seqlens_q,
            batch.seq_lens,
            table.indices,
            table.counts,
            table.rows,
            plan,
            filled,
            q_blocks,
            table.indices.shape[1],
            tiles,
            slots,
            constants={
                "HEADS": heads,
                "GROUP": group,
                "GROUP_PADDED": next_power_of_2(group),
                "BLOCK_SIZE": table.block_size,
            },
            device=plan.device,
            num_warps=4,
            overlap=True,
        )
        launch(
            _queue_kernel,
            (1,),
            plan,
            filled,
            queue,
            queue_tiles,
            queue_parts,
            arrivals,
            slots,
            programs,
            scratch,
            constants={},
            device=plan.device,
            num_warps=8,
            overlap=True,
        )
    return Schedule(plan, slots, queue, queue_tiles, queue_parts, arrivals, scratch)
