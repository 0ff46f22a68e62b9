"""FlashPrefill scores on Hopper, in Gluon: four warpgroups, so that products run beside the exponentials of others.

A product of 64 block means by the queries of a head takes as long as its 64 x 128 exponentials, and a warp that waits
for either does nothing else: it takes several warps on each of an SM's four schedulers to keep both units busy. Each
warpgroup owns one head and every other tile of means, or of four with one head at a time; a warp of its own brings
queries and means by TMA.

One program per SM walks over items: HEADS_TOGETHER heads of a query block against one part of the KV blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra import cuda

from compactattn._triton import multiprocessors, on_device
from compactattn._triton.gluon_names import async_load, reinterpret
from compactattn._triton.launch import launch
from compactattn.data import PrefillBatch

TILE: gl.constexpr = gl.constexpr(64)  # KV blocks of one product
QUERY_BLOCK: gl.constexpr = gl.constexpr(128)
COLUMNS: gl.constexpr = gl.constexpr(64)  # columns that one TMA copy brings: 128 bytes, the width of the swizzle
# Tiles of means on their way: a multiple of the turns, so that a stage always has the same readers, who see each phase.
STAGES: gl.constexpr = gl.constexpr(4)
LOG2_E: gl.constexpr = gl.constexpr(1.4426950408889634)
LN_2: gl.constexpr = gl.constexpr(0.6931471805599453)
Q_LAYOUT, MEANS_LAYOUT = (gl.NVMMASharedLayout(128, 16, rank=rank) for rank in (3, 2))  # costly to make in every call

WARPGROUPS: gl.constexpr = gl.constexpr(4)


@gluon.constexpr_function
def _columns_layout():
    return gl.NVMMASharedLayout(128, 16, rank=2)


@gluon.jit
def _place(item, sizes, HEADS: gl.constexpr, HEADS_TOGETHER: gl.constexpr):
    """(request, query block, first head, part) of an item."""
    q_blocks, _, _, parts, _, _ = sizes
    row = item // parts
    return (
        row // (q_blocks * (HEADS // HEADS_TOGETHER)),
        row % q_blocks,
        row // q_blocks % (HEADS // HEADS_TOGETHER) * HEADS_TOGETHER,
        item % parts,
    )


@gluon.jit
def _bounds(b, i, part, lens, sizes, BLOCK_SIZE: gl.constexpr):
    """The lengths of an item's query block, and its tiles.

    (first token, query rows of the request, past tokens; blocks that even its last row scores; first tile, first one
    with a block that some row may not score, first one without any score, tile behind the last).
    """
    cu_seqlens_q, seq_lens = lens
    _, _, tiles, _, tiles_per_part, _ = sizes
    q_start = gl.load(cu_seqlens_q + b)
    q_len = gl.load(cu_seqlens_q + b + 1) - q_start
    past_len = gl.load(seq_lens + b) - q_len
    present = i * QUERY_BLOCK < q_len
    reach = gl.where(present, (past_len + gl.minimum((i + 1) * QUERY_BLOCK, q_len)) // BLOCK_SIZE, 0)
    full = gl.where((i + 1) * QUERY_BLOCK <= q_len, (past_len + i * QUERY_BLOCK + 1) // BLOCK_SIZE, 0)
    first = part * tiles_per_part
    stop = gl.minimum(first + tiles_per_part, tiles)
    scored = gl.minimum(stop, gl.maximum(first, (reach + TILE - 1) // TILE))
    masked = gl.minimum(scored, gl.maximum(first, full // TILE))
    return q_start + i * QUERY_BLOCK, q_len, past_len, reach, first, masked, scored, stop


@gluon.jit
def _copy_queries(q_desc, token, first_head, ready, queries, HEADS_TOGETHER: gl.constexpr):
    """Start the copies of a query block of each of an item's heads, one below the other."""
    HEAD_DIM: gl.constexpr = queries.shape[1]
    mbarrier.expect(ready, HEADS_TOGETHER * QUERY_BLOCK * HEAD_DIM * 2)
    shape: gl.constexpr = [HEAD_DIM // COLUMNS, HEADS_TOGETHER * QUERY_BLOCK, COLUMNS]
    columns = reinterpret(queries, queries.dtype, shape, _columns_layout())
    for h in gl.static_range(HEADS_TOGETHER):
        for c in gl.static_range(HEAD_DIM // COLUMNS):
            part = columns.index(c).slice(h * QUERY_BLOCK, QUERY_BLOCK)
            async_load(q_desc, [token, first_head + h, c * COLUMNS], ready, part)


@gluon.jit
def _copy_means(means_desc, row, ready, means):
    """Start the copies of one tile of means."""
    HEAD_DIM: gl.constexpr = means.shape[1]
    mbarrier.expect(ready, TILE * HEAD_DIM * 2)
    columns = reinterpret(means, means.dtype, [HEAD_DIM // COLUMNS, TILE, COLUMNS], _columns_layout())
    for c in gl.static_range(HEAD_DIM // COLUMNS):
        async_load(means_desc, [row, c * COLUMNS], ready, columns.index(c))


@gluon.jit
def _produce(
    q_desc,
    means_desc,
    smem,
    barriers,
    lens,
    sizes,
    HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    HEADS_TOGETHER: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
):
    """Copy the queries of each item, one item ahead, and the means of its tiles."""
    q_smem, means_smem = smem
    q_ready, q_free, ready, free = barriers
    _, kv_blocks, _, _, _, items = sizes
    use = 0
    number = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        b, i, first_head, part = _place(item, sizes, HEADS, HEADS_TOGETHER)
        token, _, _, _, first, _, scored, _ = _bounds(b, i, part, lens, sizes, BLOCK_SIZE)
        if scored > first:
            q_slot = number % 2
            mbarrier.wait(q_free.index(q_slot), ((number // 2) & 1) ^ 1)
            _copy_queries(q_desc, token, first_head, q_ready.index(q_slot), q_smem.index(q_slot), HEADS_TOGETHER)
            if number == 0:
                cuda.gdc_wait()  # for the means; queries and lengths were there before
            row = (b * (HEADS // GROUP) + first_head // GROUP) * kv_blocks
            for tile in range(first, scored):
                stage = use % STAGES
                mbarrier.wait(free.index(stage), ((use // STAGES) & 1) ^ 1)
                _copy_means(means_desc, row + tile * TILE, ready.index(stage), means_smem.index(stage))
                use += 1
            number += 1


@gluon.jit
def _log_sums(s, scale_log2):
    """log Σ exp(scale · s) over the queries: float32 [blocks] of s [blocks, queries]."""
    peak = gl.max(s, 1) * scale_log2
    shift = gl.where(peak == float("-inf"), 0.0, peak)
    total = gl.sum(gl.exp2(s * scale_log2 - gl.expand_dims(shift, 1)), 1)
    return (peak + gl.log2(gl.where(peak == float("-inf"), 1.0, total))) * LN_2


@gluon.jit
def _consume(
    which: gl.constexpr,
    smem,
    barriers,
    lens,
    sizes,
    outputs,
    scale_log2,
    HEADS: gl.constexpr,
    HEADS_TOGETHER: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
):
    """The tiles of one head that are this warpgroup's: every TURNS-th of all items."""
    q_smem, means_smem = smem
    q_ready, q_free, ready, free = barriers
    log_s, stride, part_max = outputs
    q_blocks, _, _, parts, _, items = sizes
    MEMBER: gl.constexpr = which % HEADS_TOGETHER
    TURN: gl.constexpr = which // HEADS_TOGETHER
    TURNS: gl.constexpr = WARPGROUPS // HEADS_TOGETHER
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, QUERY_BLOCK, 16])
    row_layout: gl.constexpr = gl.SliceLayout(1, layout)
    nothing = gl.zeros([TILE, QUERY_BLOCK], gl.float32, layout)
    none = gl.full([TILE], float("-inf"), gl.float32, row_layout)
    column = gl.arange(0, QUERY_BLOCK, gl.SliceLayout(0, layout))
    line = gl.arange(0, TILE, row_layout)
    done = 0  # tiles of the program's earlier items
    number = 0
    cuda.gdc_wait()  # whatever used this memory before
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        b, i, first_head, part = _place(item, sizes, HEADS, HEADS_TOGETHER)
        _, q_len, past_len, reach, first, masked, scored, stop = _bounds(b, i, part, lens, sizes, BLOCK_SIZE)
        out_row = (b.to(gl.int64) * HEADS + first_head + MEMBER) * q_blocks + i
        own_log_s = log_s + out_row * stride
        best = none
        if scored > first:
            q_slot = number % 2
            mbarrier.wait(q_ready.index(q_slot), (number // 2) & 1)
            queries = q_smem.index(q_slot).slice(MEMBER * QUERY_BLOCK, QUERY_BLOCK).permute((1, 0))
            ahead = (TURN + TURNS - done % TURNS) % TURNS  # no remainder of a negative number: C's is negative
            for tile in range(first + ahead, scored, TURNS):
                use = done + tile - first
                stage = use % STAGES
                mbarrier.wait(ready.index(stage), (use // STAGES) & 1)
                s = warpgroup_mma(means_smem.index(stage), queries, nothing, use_acc=False, is_async=True)
                s = warpgroup_mma_wait(num_outstanding=0, deps=[s])
                mbarrier.arrive(free.index(stage), count=1)
                j = tile * TILE + line
                if tile >= masked:
                    query = i * QUERY_BLOCK + column
                    position = gl.where(query < q_len, past_len + query, -1)
                    ends = gl.where(j < reach, (j + 1) * BLOCK_SIZE - 1, 0x7FFFFFFF)
                    s = gl.where(gl.expand_dims(position, 0) >= gl.expand_dims(ends, 1), s, float("-inf"))
                score = _log_sums(s, scale_log2)
                gl.store(own_log_s + j, score, mask=j < stride)  # rows are padded to whole lines of memory
                best = gl.maximum(best, score)
            mbarrier.arrive(q_free.index(q_slot), count=1)
            done += scored - first
            number += 1
        for tile in range(scored + TURN, stop, TURNS):
            j = tile * TILE + line
            gl.store(own_log_s + j, none, mask=j < stride)
        gl.store(part_max + out_row * (TURNS * parts) + TURNS * part + TURN, gl.max(best, 0))


@gluon.jit(
    do_not_specialize=["q_blocks", "kv_blocks", "tiles", "parts", "tiles_per_part", "items"],
    do_not_specialize_on_alignment=["cu_seqlens_q", "seq_lens"],
)
def _hopper_scores_kernel(
    q_desc,
    means_desc,
    cu_seqlens_q,
    seq_lens,
    log_s,
    log_s_stride,
    part_max,
    scale,
    q_blocks,
    kv_blocks,
    tiles,
    parts,
    tiles_per_part,
    items,
    HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    HEADS_TOGETHER: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    HEAD_DIM: gl.constexpr,
):
    """One program per SM."""
    dtype: gl.constexpr = q_desc.dtype
    layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    q_smem = gl.allocate_shared_memory(dtype, [2, HEADS_TOGETHER * QUERY_BLOCK, HEAD_DIM], layout)
    means_smem = gl.allocate_shared_memory(dtype, [STAGES, TILE, HEAD_DIM], layout)
    q_ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    q_free = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(2):
        mbarrier.init(q_ready.index(slot), count=1)
        mbarrier.init(q_free.index(slot), count=WARPGROUPS)
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
        mbarrier.init(free.index(stage), count=HEADS_TOGETHER)
    fence_async_shared()
    cuda.gdc_launch_dependents()
    smem = (q_smem, means_smem)
    barriers = (q_ready, q_free, ready, free)
    lens = (cu_seqlens_q, seq_lens)
    sizes = (q_blocks, kv_blocks, tiles, parts, tiles_per_part, items)
    outputs = (log_s, log_s_stride, part_max)
    scale_log2 = scale * LOG2_E
    gl.warp_specialize(
        [
            (_consume, (0, smem, barriers, lens, sizes, outputs, scale_log2, HEADS, HEADS_TOGETHER, BLOCK_SIZE)),
            (_consume, (1, smem, barriers, lens, sizes, outputs, scale_log2, HEADS, HEADS_TOGETHER, BLOCK_SIZE)),
            (_consume, (2, smem, barriers, lens, sizes, outputs, scale_log2, HEADS, HEADS_TOGETHER, BLOCK_SIZE)),
            (_consume, (3, smem, barriers, lens, sizes, outputs, scale_log2, HEADS, HEADS_TOGETHER, BLOCK_SIZE)),
            (_produce, (q_desc, means_desc, smem, barriers, lens, sizes, HEADS, GROUP, HEADS_TOGETHER, BLOCK_SIZE)),
        ],
        [4, 4, 4, 1],
        [112, 112, 112, 24],
    )


def parts_of_a_row(tiles: int, rows: int, programs: int, most: int) -> int:
    """Into how many parts, at most `most`, to cut the tiles of each of `rows` rows: the fewest rounds of programs.

    Half a tile is what an item costs beside its own.
    """
    return min(
        range(1, min(most, max(1, tiles)) + 1), key=lambda parts: -(-rows * parts // programs) * (tiles / parts + 0.5)
    )


def score_blocks(
    q: Tensor, means: Tensor, batch: PrefillBatch, block_size: int, scale: float, stride: int, most_parts: int
) -> tuple[Tensor, Tensor]:
    """(log S float32 [B, Hq, Qb, stride], largest of each part float32 [B, Hq, Qb, parts]).

    means: [B, Hkv, Kb, D] of q's dtype; stride: at least Kb; most_parts: parts of a row, at most.
    """
    heads, dim = q.shape[1:]
    requests, kv_heads, kv_blocks, _ = means.shape
    group, q_blocks = heads // kv_heads, batch.query_blocks(QUERY_BLOCK.value)
    together = 2 if group % 2 == 0 else 1
    tiles, rows = -(-kv_blocks // TILE.value), requests * q_blocks * (heads // together)
    programs, turns = multiprocessors(q.device), WARPGROUPS.value // together
    parts = parts_of_a_row(tiles, rows, programs, most_parts // turns)
    log_s = torch.empty((requests, heads, q_blocks, stride), dtype=torch.float32, device=q.device)
    part_max = torch.empty((requests, heads, q_blocks, turns * parts), dtype=torch.float32, device=q.device)
    if log_s.numel():
        q_box, means_box = [QUERY_BLOCK.value, 1, COLUMNS.value], [TILE.value, COLUMNS.value]
        with on_device(q):
            launch(
                _hopper_scores_kernel,
                (programs,),
                TensorDescriptor.from_tensor(q, q_box, Q_LAYOUT),
                TensorDescriptor.from_tensor(means.view(-1, dim), means_box, MEANS_LAYOUT),
                batch.cu_seqlens_q,
                batch.seq_lens,
                log_s,
                stride,
                part_max,
                scale,
                q_blocks,
                kv_blocks,
                tiles,
                parts,
                -(-tiles // parts),
                rows * parts,
                constants={
                    "HEADS": heads,
                    "GROUP": group,
                    "HEADS_TOGETHER": together,
                    "BLOCK_SIZE": block_size,
                    "HEAD_DIM": dim,
                },
                device=q.device,
                num_warps=4,
                launch_pdl=True,
            )
    return log_s, part_max
