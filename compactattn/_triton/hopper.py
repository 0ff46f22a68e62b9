"""Warp-specialised attention for Hopper, in Gluon: one producer warp feeds two consumer warpgroups through TMA.

A program owns 128 query rows. Its producer warp walks the block table and copies stages of 128 keys and values into
shared memory, two deep; each consumer warpgroup owns 64 rows and overlaps the softmax of one stage with the products
of its neighbours: S(n) = Q K(n) and O += P(n-1) V(n-1) are in flight together.

The stages at the causal edge come first and are masked, one after the other; what lies before them needs no mask.
"""

from __future__ import annotations

import triton
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

from compactattn._triton import on_device
from compactattn.data import BlockTable, PagedKV, PrefillBatch

STAGE: gl.constexpr = gl.constexpr(128)  # keys per stage
ROWS: gl.constexpr = gl.constexpr(128)  # query rows per program, 64 per consumer
LOG2_E: gl.constexpr = gl.constexpr(1.4426950408889634)
LN_2: gl.constexpr = gl.constexpr(0.6931471805599453)


@gluon.jit
def _key_starts(blocks, n, BLOCK_SIZE: gl.constexpr):
    """First token of stage n of a row."""
    PER_BLOCK: gl.constexpr = BLOCK_SIZE // STAGE
    return gl.load(blocks + n // PER_BLOCK) * BLOCK_SIZE + n % PER_BLOCK * STAGE


@gluon.jit
def _producer(
    k_desc,
    v_desc,
    k_smem,
    v_smem,
    k_ready,
    v_ready,
    free,
    blocks,
    pages,
    kv_head,
    full,
    edge,
    BLOCK_SIZE: gl.constexpr,
    PAGE_SIZE: gl.constexpr,
    HEAD_DIM: gl.constexpr,
):
    """Fill slot after slot: first (K, V) of each edge stage, then K(n) and V(n - 1) for n = 0 .. full."""
    BYTES: gl.constexpr = STAGE * HEAD_DIM * 2
    for e in range(edge):
        slot = e % 2
        start = _key_starts(blocks, full + e, BLOCK_SIZE)
        page = gl.load(pages + start // PAGE_SIZE)
        mbarrier.wait(free.index(slot), ((e // 2) & 1) ^ 1)
        mbarrier.expect(k_ready.index(slot), BYTES)
        tma.async_copy_global_to_shared(
            k_desc, [page, start % PAGE_SIZE, kv_head, 0], k_ready.index(slot), k_smem.index(slot)
        )
        mbarrier.expect(v_ready.index(slot), BYTES)
        tma.async_copy_global_to_shared(
            v_desc, [page, start % PAGE_SIZE, kv_head, 0], v_ready.index(slot), v_smem.index(slot)
        )
    if full > 0:
        start = _key_starts(blocks, 0, BLOCK_SIZE)
        page = gl.load(pages + start // PAGE_SIZE)
        v_start = start * 1
        v_page = page * 1
        for n in range(full + 1):
            use = edge + n
            slot = use % 2
            mbarrier.wait(free.index(slot), ((use // 2) & 1) ^ 1)
            if n < full:
                mbarrier.expect(k_ready.index(slot), BYTES)
                tma.async_copy_global_to_shared(
                    k_desc, [page, start % PAGE_SIZE, kv_head, 0], k_ready.index(slot), k_smem.index(slot)
                )
            else:  # the last use of a slot holds no keys; phases stay regular
                mbarrier.arrive(k_ready.index(slot), count=1)
            if n > 0:
                mbarrier.expect(v_ready.index(slot), BYTES)
                tma.async_copy_global_to_shared(
                    v_desc, [v_page, v_start % PAGE_SIZE, kv_head, 0], v_ready.index(slot), v_smem.index(slot)
                )
            else:
                mbarrier.arrive(v_ready.index(slot), count=1)
            v_start = start * 1
            v_page = page * 1
            start = _key_starts(blocks, gl.minimum(n + 1, full - 1), BLOCK_SIZE)
            page = gl.load(pages + start // PAGE_SIZE)


@gluon.jit
def _softmax(s, peak, total, scale_log2, GUARD: gl.constexpr):
    """One online-softmax step: (p, decay, new peak, new total). GUARD where a row may have seen nothing yet."""
    new_peak = gl.maximum(peak, gl.max(s, 1) * scale_log2)
    shift = gl.where(new_peak == float("-inf"), 0.0, new_peak) if GUARD else new_peak
    p = gl.exp2(s * scale_log2 - gl.expand_dims(shift, 1))
    decay = gl.exp2(peak - shift)
    return p, decay, new_peak, total * decay + gl.sum(p, 1)


@gluon.jit
def _clear_values(v_smem, valid, HEAD_DIM: gl.constexpr):
    """Zero the rows of a value stage that no query may see: they can hold anything, and 0 * NaN is NaN."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HEAD_DIM, HEAD_DIM // 8], [4, 1], [1, 0])
    for part in gl.static_range(4):
        rows = v_smem.slice(part * 32, 32)
        token = part * 32 + gl.arange(0, 32, gl.SliceLayout(1, layout))
        kept = gl.where(gl.expand_dims(token < valid, 1), rows.load(layout), 0.0)
        rows.store(kept)
    fence_async_shared()


@gluon.jit
def _consumer(
    half,
    q,
    q_stride_token,
    q_stride_head,
    out,
    out_stride_token,
    out_stride_head,
    lse,
    lse_stride_token,
    lse_stride_head,
    q_smem,
    k_smem,
    v_smem,
    k_ready,
    v_ready,
    free,
    blocks,
    q_start,
    q_len,
    past_len,
    first_query,
    head,
    packed,
    limit,
    full,
    edge,
    scale_log2,
    GROUP: gl.constexpr,
    PACKED: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    LSE: gl.constexpr,
):
    """Softmax attention of 64 rows over the program's stages."""
    dtype: gl.constexpr = q.dtype.element_ty
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, STAGE, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    io_layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HEAD_DIM, HEAD_DIM // 8], [4, 1], [1, 0])
    row_layout: gl.constexpr = gl.SliceLayout(1, s_layout)

    io_lane = half * 64 + gl.arange(0, 64, gl.SliceLayout(1, io_layout))
    io_head = (head + gl.where(packed != 0, io_lane // PACKED, 0)).to(gl.int64)
    io_query = gl.where(packed != 0, io_lane % PACKED, first_query + io_lane)
    io_valid = (io_query < q_len) & ((io_lane < PACKED * GROUP) | (packed == 0))
    dim = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, io_layout))
    token = (q_start + io_query).to(gl.int64)
    q_offset = gl.expand_dims(token * q_stride_token + io_head * q_stride_head, 1) + gl.expand_dims(dim, 0)
    io_mask = gl.expand_dims(io_valid, 1) & (gl.expand_dims(dim, 0) < HEAD_DIM)
    q_rows = q_smem.index(half)
    q_rows.store(gl.load(q + q_offset, mask=io_mask, other=0.0))
    fence_async_shared()

    lane = half * 64 + gl.arange(0, 64, row_layout)
    position = past_len + gl.where(packed != 0, lane % PACKED, first_query + lane)
    peak = gl.full([64], float("-inf"), gl.float32, row_layout)
    total = gl.zeros([64], gl.float32, row_layout)
    o = gl.zeros([64, HEAD_DIM], gl.float32, o_layout)
    no_s = gl.zeros([64, STAGE], gl.float32, s_layout)

    for e in range(edge):
        slot = e % 2
        phase = (e // 2) & 1
        start = _key_starts(blocks, full + e, BLOCK_SIZE)
        mbarrier.wait(k_ready.index(slot), phase)
        s = warpgroup_mma(q_rows, k_smem.index(slot).permute((1, 0)), no_s, use_acc=False)
        key = start + gl.arange(0, STAGE, gl.SliceLayout(0, s_layout))
        s = gl.where(gl.expand_dims(key, 0) <= gl.expand_dims(position, 1), s, float("-inf"))
        p, decay, peak, total = _softmax(s, peak, total, scale_log2, True)
        o = o * gl.expand_dims(gl.convert_layout(decay, gl.SliceLayout(1, o_layout)), 1)
        mbarrier.wait(v_ready.index(slot), phase)
        if start + STAGE > limit:
            _clear_values(v_smem.index(slot), limit - start, HEAD_DIM)
        o = warpgroup_mma(gl.convert_layout(p.to(dtype), p_layout), v_smem.index(slot), o)
        mbarrier.arrive(free.index(slot), count=1)

    if full > 0:
        slot = edge % 2
        mbarrier.wait(k_ready.index(slot), (edge // 2) & 1)
        s = warpgroup_mma(q_rows, k_smem.index(slot).permute((1, 0)), no_s, use_acc=False)
        p, decay, peak, total = _softmax(s, peak, total, scale_log2, False)
        o = o * gl.expand_dims(gl.convert_layout(decay, gl.SliceLayout(1, o_layout)), 1)
        weights = gl.convert_layout(p.to(dtype), p_layout)
        mbarrier.wait(v_ready.index(slot), (edge // 2) & 1)
        mbarrier.arrive(free.index(slot), count=1)
        mbarrier.wait(k_ready.index((edge + 1) % 2), ((edge + 1) // 2) & 1)
        for n in range(1, full):
            use = edge + n
            slot = use % 2
            s_next = warpgroup_mma(q_rows, k_smem.index(slot).permute((1, 0)), no_s, use_acc=False, is_async=True)
            mbarrier.wait(v_ready.index(slot), (use // 2) & 1)
            o_next = warpgroup_mma(weights, v_smem.index(slot), o, is_async=True)
            s = warpgroup_mma_wait(num_outstanding=1, deps=[s_next])
            p, decay, peak, total = _softmax(s, peak, total, scale_log2, False)
            new_weights = gl.convert_layout(p.to(dtype), p_layout)
            # this wait keeps the one below it after the softmax, which overlaps with the product in flight
            mbarrier.wait(k_ready.index((use + 1) % 2), ((use + 1) // 2) & 1)
            o, weights = warpgroup_mma_wait(num_outstanding=0, deps=[o_next, new_weights])
            mbarrier.arrive(free.index(slot), count=1)
            o = o * gl.expand_dims(gl.convert_layout(decay, gl.SliceLayout(1, o_layout)), 1)
        slot = (edge + full) % 2
        mbarrier.wait(v_ready.index(slot), ((edge + full) // 2) & 1)
        o = warpgroup_mma(weights, v_smem.index(slot), o)

    empty = total == 0.0
    inverse = gl.where(empty, 0.0, 1.0 / gl.where(empty, 1.0, total))
    o = o * gl.expand_dims(gl.convert_layout(inverse, gl.SliceLayout(1, o_layout)), 1)
    result = gl.convert_layout(o.to(dtype), io_layout)
    out_offset = gl.expand_dims(token * out_stride_token + io_head * out_stride_head, 1) + gl.expand_dims(dim, 0)
    gl.store(out + out_offset, result, mask=io_mask)
    if LSE:
        natural = gl.where(empty, float("-inf"), (peak + gl.log2(gl.where(empty, 1.0, total))) * LN_2)
        lse_head = head + gl.where(packed != 0, lane // PACKED, 0)
        query = gl.where(packed != 0, lane % PACKED, first_query + lane)
        valid = (query < q_len) & ((lane < PACKED * GROUP) | (packed == 0))
        lse_offset = (q_start + query).to(gl.int64) * lse_stride_token + lse_head * lse_stride_head
        gl.store(lse + lse_offset, natural, mask=valid)


@gluon.jit
def _stages(blocks, count, first_position, limit, most_current, BLOCK_SIZE: gl.constexpr):
    """(stages before the causal edge, stages at it); only the last `most_current` entries can be current blocks."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    PER_BLOCK: gl.constexpr = BLOCK_SIZE // STAGE
    full = count
    visible = count
    for t0 in range(0, gl.minimum(count, most_current), 128):
        t = t0 + gl.arange(0, 128, layout)
        entry = gl.load(blocks + count - 1 - t, mask=t < gl.minimum(count, most_current), other=-1)
        full -= gl.sum(((entry + 1) * BLOCK_SIZE > first_position + 1).to(gl.int32), 0)
        visible -= gl.sum((entry * BLOCK_SIZE >= limit).to(gl.int32), 0)
    stop = visible * PER_BLOCK
    if visible > full:  # stages of the last block beyond the last row are not touched
        last = gl.load(blocks + visible - 1)
        stop -= PER_BLOCK - gl.minimum((limit - last * BLOCK_SIZE + STAGE - 1) // STAGE, PER_BLOCK)
    return full * PER_BLOCK, stop - full * PER_BLOCK


@gluon.jit
def _shared_table(rows, counts, q_blocks, group_head, full_count, GROUP: gl.constexpr):
    """May the heads of a KV group walk one table? Yes if they use one row, or if each of their rows is complete."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    g = gl.arange(0, 16, layout)
    own = gl.load(rows + group_head + g * q_blocks, mask=g < GROUP, other=0)
    count = gl.load(counts + own, mask=g < GROUP, other=0)
    one_row = gl.max(gl.where(g < GROUP, own, -1), 0) == gl.min(gl.where(g < GROUP, own, 0x7FFFFFFF), 0)
    complete = gl.sum(((g < GROUP) & (count != full_count)).to(gl.int32), 0) == 0
    return one_row | complete


@gluon.jit(do_not_specialize=["page_table_stride", "q_blocks", "kv_blocks"])
def _hopper_kernel(
    q,
    q_stride_token,
    q_stride_head,
    k_desc,
    v_desc,
    out,
    out_stride_token,
    out_stride_head,
    lse,
    lse_stride_token,
    lse_stride_head,
    page_table,
    page_table_stride,
    cu_seqlens_q,
    seq_lens,
    indices,
    counts,
    rows,
    scale,
    q_blocks,
    kv_blocks,
    HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    GROUP_PADDED: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    PAGE_SIZE: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    LSE: gl.constexpr,
    num_warps: gl.constexpr,
):
    """One program per (query block, head; request); heads of short requests packed as in the general kernel."""
    PACKED: gl.constexpr = ROWS // GROUP_PADDED
    i = gl.program_id(0) % q_blocks
    head = gl.program_id(0) // q_blocks
    b = gl.program_id(1)
    q_start = gl.load(cu_seqlens_q + b)
    q_len = gl.load(cu_seqlens_q + b + 1) - q_start
    past_len = gl.load(seq_lens + b) - q_len
    first_query = i * ROWS
    kv_head = head // GROUP
    if first_query < q_len:
        row = gl.load(rows + (b.to(gl.int64) * HEADS + head) * q_blocks + i)
        blocks = indices + row.to(gl.int64) * kv_blocks
        count = gl.load(counts + row)
        packed = 0
        if (GROUP > 1) & (q_len <= PACKED):
            group_head = (b.to(gl.int64) * HEADS + kv_head * GROUP) * q_blocks + i
            full_count = (past_len + q_len - 1) // BLOCK_SIZE + 1
            packed = _shared_table(rows, counts, q_blocks, group_head, full_count, GROUP).to(gl.int32)
        if (packed == 0) | (head % GROUP == 0):
            limit = past_len + gl.minimum(first_query + ROWS, q_len)
            most_current = (q_blocks * ROWS + BLOCK_SIZE - 1) // BLOCK_SIZE + 1
            full, edge = _stages(blocks, count, past_len + first_query, limit, most_current, BLOCK_SIZE)
            dtype: gl.constexpr = q.dtype.element_ty
            layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
            q_smem = gl.allocate_shared_memory(dtype, [2, 64, HEAD_DIM], layout)
            k_smem = gl.allocate_shared_memory(dtype, [2, STAGE, HEAD_DIM], layout)
            v_smem = gl.allocate_shared_memory(dtype, [2, STAGE, HEAD_DIM], layout)
            k_ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
            v_ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
            free = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
            for slot in gl.static_range(2):
                mbarrier.init(k_ready.index(slot), count=1)
                mbarrier.init(v_ready.index(slot), count=1)
                mbarrier.init(free.index(slot), count=2)
            fence_async_shared()
            pages = page_table + b.to(gl.int64) * page_table_stride
            gl.warp_specialize(
                [
                    (
                        _consumer,
                        (
                            0,
                            q,
                            q_stride_token,
                            q_stride_head,
                            out,
                            out_stride_token,
                            out_stride_head,
                            lse,
                            lse_stride_token,
                            lse_stride_head,
                            q_smem,
                            k_smem,
                            v_smem,
                            k_ready,
                            v_ready,
                            free,
                            blocks,
                            q_start,
                            q_len,
                            past_len,
                            first_query,
                            head,
                            packed,
                            limit,
                            full,
                            edge,
                            scale * LOG2_E,
                            GROUP,
                            PACKED,
                            BLOCK_SIZE,
                            HEAD_DIM,
                            LSE,
                        ),
                    ),
                    (
                        _consumer,
                        (
                            1,
                            q,
                            q_stride_token,
                            q_stride_head,
                            out,
                            out_stride_token,
                            out_stride_head,
                            lse,
                            lse_stride_token,
                            lse_stride_head,
                            q_smem,
                            k_smem,
                            v_smem,
                            k_ready,
                            v_ready,
                            free,
                            blocks,
                            q_start,
                            q_len,
                            past_len,
                            first_query,
                            head,
                            packed,
                            limit,
                            full,
                            edge,
                            scale * LOG2_E,
                            GROUP,
                            PACKED,
                            BLOCK_SIZE,
                            HEAD_DIM,
                            LSE,
                        ),
                    ),
                    (
                        _producer,
                        (
                            k_desc,
                            v_desc,
                            k_smem,
                            v_smem,
                            k_ready,
                            v_ready,
                            free,
                            blocks,
                            pages,
                            kv_head,
                            full,
                            edge,
                            BLOCK_SIZE,
                            PAGE_SIZE,
                            HEAD_DIM,
                        ),
                    ),
                ],
                [4, 1],
                [240, 24],
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
    """Launch the kernel; writes out [T, Hq, D] and lse float32 [T, Hq]."""
    heads, dim = q.shape[1:]
    group = heads // kv.num_kv_heads
    layout = gl.NVMMASharedLayout(128, 16, rank=4)
    box = [1, STAGE.value, 1, dim]
    with on_device(q):
        _hopper_kernel[(batch.query_blocks(table.query_block) * heads, batch.size)](
            q,
            q.stride(0),
            q.stride(1),
            TensorDescriptor.from_tensor(kv.k, box, layout),
            TensorDescriptor.from_tensor(kv.v, box, layout),
            out,
            out.stride(0),
            out.stride(1),
            out if lse is None else lse,
            0 if lse is None else lse.stride(0),
            0 if lse is None else lse.stride(1),
            kv.page_table,
            kv.page_table.stride(0),
            batch.cu_seqlens_q,
            batch.seq_lens,
            table.indices,
            table.counts,
            table.rows,
            scale,
            batch.query_blocks(table.query_block),
            table.indices.shape[1],
            HEADS=heads,
            GROUP=group,
            GROUP_PADDED=triton.next_power_of_2(group),
            BLOCK_SIZE=table.block_size,
            PAGE_SIZE=kv.page_size,
            HEAD_DIM=dim,
            LSE=lse is not None,
            num_warps=4,
        )
