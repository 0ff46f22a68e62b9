"""Warp-specialised attention for Hopper, in Gluon: two producer warps feed two consumer warpgroups through TMA.

One program per SM draws items from the queue of `schedule`: tiles of 128 query rows against stages of 128 keys, or
parts of them. One producer copies queries and keys into shared memory, the other values, two stages deep
(`hopper_copies`); each consumer owns 64 rows and overlaps the softmax of one stage with the products of its neighbours
(`hopper_softmax`). While consumers finish an item, the queries and the first keys of the next one arrive.

The stages at the causal edge come first in a tile and are masked; what lies before them needs no mask.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra import cuda

from compactattn._triton import multiprocessors, next_power_of_2, on_device, schedule
from compactattn._triton.hopper_copies import COLUMNS, RECORD, ROWS, STAGE, produce_keys, produce_values
from compactattn._triton.hopper_softmax import HALF, consume
from compactattn._triton.launch import launch
from compactattn.data import BlockTable, PagedKV, PrefillBatch

LOG2_E: gl.constexpr = gl.constexpr(1.4426950408889634)
Q_LAYOUT, KV_LAYOUT = (gl.NVMMASharedLayout(128, 16, rank=rank) for rank in (3, 4))  # costly to make in every call


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
    q_smem = gl.allocate_shared_memory(dtype, [4, HALF, HEAD_DIM], layout)
    k_smem = gl.allocate_shared_memory(dtype, [2, STAGE, HEAD_DIM], layout)
    v_smem = gl.allocate_shared_memory(dtype, [2, STAGE, HEAD_DIM], layout)
    item_smem = gl.allocate_shared_memory(gl.int32, [2, RECORD], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    q_ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    q_free = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    v_ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    v_copied = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    mbarrier.init(v_copied, count=1)
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
    outputs = (out, out_stride_token, out_stride_head, lse, lse_stride_token, lse_stride_head, partial, stats, arrivals)
    table = (page_table, page_table_stride, page_table_width, indices, kv_blocks)
    queued = (plan, slots, queue, queue_tiles, queue_parts)
    consumer = (smem, barriers, indices, kv_blocks, outputs, scale * LOG2_E, q_blocks)
    gl.warp_specialize(
        [
            (consume, (0, consumer, HEADS, GROUP, PACKED, BLOCK_SIZE, HEAD_DIM, LSE)),
            (consume, (1, consumer, HEADS, GROUP, PACKED, BLOCK_SIZE, HEAD_DIM, LSE)),
            (
                produce_keys,
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
                produce_values,
                (
                    v_desc,
                    (v_smem, item_smem),
                    (q_ready, q_free, v_ready, v_copied, free),
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
    q_box, kv_box = [min(schedule.ROWS // padded, 64), 1, COLUMNS.value], [1, unit, 1, COLUMNS.value]
    with on_device(q):
        work = schedule.schedule_tiles(batch, table, group, programs)
        # parts of divided tiles: their numerators, then their row maxima and denominators
        partial = torch.empty(work.scratch * schedule.ROWS * (dim + 2), dtype=torch.float32, device=q.device)
        launch(
            _hopper_kernel,
            (programs,),
            TensorDescriptor.from_tensor(q, q_box, Q_LAYOUT),
            TensorDescriptor.from_tensor(kv.k, kv_box, KV_LAYOUT),
            TensorDescriptor.from_tensor(kv.v, kv_box, KV_LAYOUT),
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
