"""The two consumer warpgroups of the Hopper attention kernel: 64 query rows each, their softmax and both products.

Step n of an item computes S(n) = Q K(n) and O += P(n-1) V(n-1) side by side, under the softmax of S(n). The first step
has scores alone and the last one its product alone.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from compactattn._triton.gluon_names import barrier
from compactattn._triton.hopper_copies import PARTS_AT, ROWS, STAGE, item_stages, item_value, key_start, table_stage

HALF: gl.constexpr = gl.constexpr(64)  # query rows of a consumer
LN_2: gl.constexpr = gl.constexpr(0.6931471805599453)


@gluon.jit
def _softmax(s, peak, total, scale_log2):
    """One online-softmax step: (p, decay, new peak, new total); a row that has seen nothing yet has peak -inf."""
    new_peak = gl.maximum(peak, gl.max(s, 1) * scale_log2)
    shift = gl.where(new_peak == float("-inf"), 0.0, new_peak)
    p = gl.exp2(s * scale_log2 - gl.expand_dims(shift, 1))
    decay = gl.exp2(peak - shift)
    return p, decay, new_peak, total * decay + gl.sum(p, 1)


@gluon.jit
def _key_starts(blocks, count, n, BLOCK_SIZE: gl.constexpr):
    """First tokens of the two halves of stage n, of which only blocks smaller than a stage make use."""
    start = key_start(blocks, count, n, 0, BLOCK_SIZE)
    return start, key_start(blocks, count, n, 1, BLOCK_SIZE) if BLOCK_SIZE < STAGE else start


@gluon.jit
def _mask(s, starts, position, BLOCK_SIZE: gl.constexpr):
    """The scores of a stage that the causal edge leaves."""
    start, second = starts
    column = gl.arange(0, STAGE, gl.SliceLayout(0, s.type.layout))
    key = start + column
    if BLOCK_SIZE < STAGE:
        key = gl.where(column < BLOCK_SIZE, key, second - BLOCK_SIZE + column)
    return gl.where(gl.expand_dims(key, 0) <= gl.expand_dims(position, 1), s, float("-inf"))


@gluon.jit
def _scores(q_rows, keys):
    """Start Q Kᵀ of one stage: float32 [64, STAGE]."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, STAGE, 16])
    nothing = gl.zeros([HALF, STAGE], gl.float32, layout)
    return warpgroup_mma(q_rows, keys.permute((1, 0)), nothing, use_acc=False, is_async=True)


@gluon.jit
def _merge_parts(o, peak, total, partial, stats, first_scratch, parts, lane, offset):
    """Add up the parts of a divided tile by their log-sum-exps, whoever wrote them."""
    o = gl.zeros_like(o)
    peak = gl.full_like(peak, float("-inf"))
    total = gl.zeros_like(total)
    for part in range(parts):
        at_stats = stats + (first_scratch + part) * (2 * ROWS) + lane
        at_o = partial + (first_scratch + part).to(gl.int64) * (ROWS * o.shape[1]) + offset
        other_peak = gl.load(at_stats, cache_modifier=".cg")
        new_peak = gl.maximum(peak, other_peak)
        shift = gl.where(new_peak == float("-inf"), 0.0, new_peak)
        decay = gl.exp2(peak - shift)
        weight = gl.exp2(other_peak - shift)
        total = total * decay + gl.load(at_stats + ROWS, cache_modifier=".cg") * weight
        other_o = gl.load(at_o, cache_modifier=".cg")
        o = o * gl.expand_dims(decay, 1) + other_o * gl.expand_dims(weight, 1)
        peak = new_peak
    return o, peak, total


@gluon.jit
def _finish(
    half,
    o,
    peak,
    total,
    staging,
    outputs,
    item,
    code,
    q_blocks,
    HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    PACKED: gl.constexpr,
    LSE: gl.constexpr,
):
    """Write a tile's rows; of a divided tile, leave this part in scratch, and let the last to come merge the parts.

    staging: shared memory for the 64 rows, so that they leave in whole lines.
    """
    out, out_stride_token, out_stride_head, lse, lse_stride_token, lse_stride_head, partial, stats, arrivals = outputs
    HEAD_DIM: gl.constexpr = o.shape[1]
    layout: gl.constexpr = o.type.layout
    row_layout: gl.constexpr = gl.SliceLayout(1, layout)
    LANES: gl.constexpr = HEAD_DIM // 8  # of 16 bytes to a row
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [32 // LANES, LANES], [4, 1], [1, 0])
    lane = half * HALF + gl.arange(0, HALF, row_layout)
    peak = gl.convert_layout(peak, row_layout)
    total = gl.convert_layout(total, row_layout)
    parts = code // 65536
    complete = parts == 1
    if parts > 1:
        first_scratch = item_value(item, 8)
        scratch = first_scratch + code % 65536
        dim = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, layout))
        offset = gl.expand_dims(lane * HEAD_DIM, 1) + gl.expand_dims(dim, 0)
        gl.store(partial + scratch.to(gl.int64) * (ROWS * HEAD_DIM) + offset, o)
        gl.store(stats + scratch * (2 * ROWS) + lane, peak)
        gl.store(stats + scratch * (2 * ROWS) + ROWS + lane, total)
        barrier()
        complete = gl.atomic_add(arrivals + 2 * first_scratch + half, 1, sem="acq_rel", scope="gpu") == parts - 1
        if complete:
            o, peak, total = _merge_parts(o, peak, total, partial, stats, first_scratch, parts, lane, offset)
    if complete:
        tile = item_value(item, 4)
        token = item_value(item, 5)
        query_rows = item_value(item, 7)
        packed = tile % 2 != 0
        head = tile // 2 // q_blocks % HEADS
        empty = total == 0.0
        inverse = gl.where(empty, 0.0, 1.0 / gl.where(empty, 1.0, total))
        staging.store((o * gl.expand_dims(inverse, 1)).to(staging.dtype))
        row = half * HALF + gl.arange(0, HALF, gl.SliceLayout(1, wide))
        tokens, own, valid = _places(row, token, head, query_rows, packed, GROUP, PACKED)
        offset = tokens * out_stride_token + own.to(gl.int64) * out_stride_head
        column = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, wide))
        gl.store(
            out + gl.expand_dims(offset, 1) + gl.expand_dims(column, 0),
            staging.load(wide),
            mask=gl.expand_dims(valid, 1) & (gl.expand_dims(column, 0) < HEAD_DIM),
        )
        fence_async_shared()  # the next queries come into the same memory
        if LSE:
            tokens, own, valid = _places(lane, token, head, query_rows, packed, GROUP, PACKED)
            natural = gl.where(empty, float("-inf"), (peak + gl.log2(gl.where(empty, 1.0, total))) * LN_2)
            gl.store(lse + tokens * lse_stride_token + own * lse_stride_head, natural, mask=valid)


@gluon.jit
def _places(row, token, head, query_rows, packed, GROUP: gl.constexpr, PACKED: gl.constexpr):
    """Of the rows of a tile: (token, int64; query head; whether there is such a query)."""
    query = gl.where(packed, row % PACKED, row)
    own = head + gl.where(packed, row // PACKED, 0)
    valid = (query < query_rows) & ((row < PACKED * GROUP) | (packed == 0))
    return (token + query).to(gl.int64), own, valid


@gluon.jit
def consume(
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
    smem, barriers, indices, kv_blocks, outputs, scale_log2, q_blocks = shared
    q_smem, k_smem, v_smem, item_smem = smem
    q_ready, q_free, k_ready, v_ready, free = barriers
    dtype: gl.constexpr = q_smem.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, STAGE, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    o_row_layout: gl.constexpr = gl.SliceLayout(1, o_layout)
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    row_layout: gl.constexpr = gl.SliceLayout(1, s_layout)
    lane = half * HALF + gl.arange(0, HALF, row_layout)
    nothing_yet = gl.full([HALF], float("-inf"), gl.float32, row_layout)
    step = 0
    number = 0
    mbarrier.wait(q_ready.index(0), 0)
    code = item_value(item_smem.index(0), PARTS_AT)
    while code >= 0:
        q_slot = number % 2
        item = item_smem.index(q_slot)
        stages = item_value(item, 0)
        edge = item_value(item, 1)
        count = item_value(item, 3)
        first, stop = item_stages(stages, code)
        blocks = indices + item_value(item, 2).to(gl.int64) * kv_blocks
        starts = _key_starts(blocks, count, table_stage(first, stages, edge), BLOCK_SIZE)
        position = item_value(item, 6) + gl.where(item_value(item, 4) % 2 != 0, lane % PACKED, lane)
        plain = gl.maximum(gl.minimum(edge, stop), first + 1)
        q_rows = q_smem.index(q_slot * 2 + half)
        mbarrier.wait(k_ready.index(step % 2), (step // 2) & 1)
        s = warpgroup_mma_wait(num_outstanding=0, deps=[_scores(q_rows, k_smem.index(step % 2))])
        if first < edge:
            s = _mask(s, starts, position, BLOCK_SIZE)
        p, decay, peak, total = _softmax(s, nothing_yet, gl.zeros_like(nothing_yet), scale_log2)
        weights = gl.convert_layout(p.to(dtype), p_layout)
        o = gl.zeros([HALF, HEAD_DIM], gl.float32, o_layout)
        mbarrier.wait(v_ready.index(step % 2), (step // 2) & 1)  # of no values: neither producer is two steps behind
        mbarrier.arrive(free.index(step % 2), count=1)
        step += 1
        mbarrier.wait(k_ready.index(step % 2), (step // 2) & 1)
        # the same step twice: with the test for the causal edge in it, the loop of the plain stages would be slower
        for t in range(first + 1, plain):
            slot = step % 2
            starts = _key_starts(blocks, count, table_stage(t, stages, edge), BLOCK_SIZE)
            s_next = _scores(q_rows, k_smem.index(slot))
            mbarrier.wait(v_ready.index(slot), (step // 2) & 1)
            o_next = warpgroup_mma(weights, v_smem.index(slot), o, is_async=True)
            s = warpgroup_mma_wait(num_outstanding=1, deps=[s_next])
            s = _mask(s, starts, position, BLOCK_SIZE)
            p, decay, peak, total = _softmax(s, peak, total, scale_log2)
            new_weights = gl.convert_layout(p.to(dtype), p_layout)
            mbarrier.wait(k_ready.index((step + 1) % 2), ((step + 1) // 2) & 1)
            o, weights = warpgroup_mma_wait(num_outstanding=0, deps=[o_next, new_weights])
            mbarrier.arrive(free.index(slot), count=1)
            o = o * gl.expand_dims(gl.convert_layout(decay, o_row_layout), 1)
            step += 1
        for _ in range(plain, stop):
            slot = step % 2
            s_next = _scores(q_rows, k_smem.index(slot))
            mbarrier.wait(v_ready.index(slot), (step // 2) & 1)
            o_next = warpgroup_mma(weights, v_smem.index(slot), o, is_async=True)
            s = warpgroup_mma_wait(num_outstanding=1, deps=[s_next])
            p, decay, peak, total = _softmax(s, peak, total, scale_log2)
            new_weights = gl.convert_layout(p.to(dtype), p_layout)
            # this wait keeps the one below it after the softmax, which overlaps with the product in flight
            mbarrier.wait(k_ready.index((step + 1) % 2), ((step + 1) // 2) & 1)
            o, weights = warpgroup_mma_wait(num_outstanding=0, deps=[o_next, new_weights])
            mbarrier.arrive(free.index(slot), count=1)
            o = o * gl.expand_dims(gl.convert_layout(decay, o_row_layout), 1)
            step += 1
        mbarrier.wait(v_ready.index(step % 2), (step // 2) & 1)
        o_next = warpgroup_mma(weights, v_smem.index(step % 2), o, is_async=True)
        o = warpgroup_mma_wait(num_outstanding=0, deps=[o_next])
        mbarrier.arrive(free.index(step % 2), count=1)
        step += 1
        _finish(half, o, peak, total, q_rows, outputs, item, code, q_blocks, HEADS, GROUP, PACKED, LSE)
        mbarrier.arrive(q_free.index(q_slot), count=1)
        number += 1
        mbarrier.wait(q_ready.index(number % 2), (number // 2) & 1)
        code = item_value(item_smem.index(number % 2), PARTS_AT)
