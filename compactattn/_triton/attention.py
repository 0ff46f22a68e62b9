"""Attention over block tables, K and V read in place through page table and block table."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from compactattn._triton import capability, next_power_of_2, on_device, scale_and_stride
from compactattn._triton.hopper_rule import tma_strides, why_not_hopper
from compactattn._triton.launch import launch
from compactattn._triton.tiles import LN_2, LOG2_E, attend_tiles, window_tiles
from compactattn._triton.union import request_lens
from compactattn.data import BlockTable, PagedKV, PrefillBatch
from compactattn.features import PLAIN, Features, named


@triton.jit
def _shared_table(rows, counts, member, group_head, full_count, GROUP: tl.constexpr, GROUP_PADDED: tl.constexpr):
    """May the heads of a KV group walk one table? Yes if they use one row, or if each of their rows is complete."""
    g = tl.arange(0, GROUP_PADDED)
    own = tl.load(rows + group_head + g * member, mask=g < GROUP, other=0)
    one_row = tl.max(tl.where(g < GROUP, own, -1), axis=0) == tl.min(tl.where(g < GROUP, own, 0x7FFFFFFF), axis=0)
    count = tl.load(counts + own, mask=g < GROUP, other=0)
    complete = tl.min(tl.where(g < GROUP, count, 0x7FFFFFFF), axis=0) == full_count
    complete = complete & (tl.max(tl.where(g < GROUP, count, -1), axis=0) == full_count)
    return one_row | complete


@triton.jit(
    do_not_specialize=["page_table_stride", "q_blocks", "kv_blocks", "window", "k_scale_stride", "v_scale_stride"],
    do_not_specialize_on_alignment=["sinks", "k_scale", "v_scale"],
)
def _attend_kernel(
    q,
    q_stride_token,
    q_stride_head,
    k,
    k_stride_page,
    k_stride_token,
    k_stride_head,
    v,
    v_stride_page,
    v_stride_token,
    v_stride_head,
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
    softcap,
    window,
    sinks,
    k_scale,
    k_scale_stride,
    v_scale,
    v_scale_stride,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PADDED: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    QUERY_BLOCK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    POSITIVE_SCALE: tl.constexpr,
    PRECISE: tl.constexpr,
    LSE: tl.constexpr,
):
    """One program per (ROWS queries of a query block, head; request), against the blocks of their table row.

    Short requests pack the heads of a KV group into the rows of one program where they can walk one table. What a call
    does not have (softcap, window, sinks, scales of an FP8 cache) is None, and compiled away.
    """
    row_tiles = q_blocks * (QUERY_BLOCK // ROWS)
    first_query = tl.program_id(0) % row_tiles * ROWS
    i = first_query // QUERY_BLOCK
    head = tl.program_id(0) // row_tiles
    b = tl.program_id(1)
    q_start, q_len, past_len = request_lens(cu_seqlens_q, seq_lens, b)
    if first_query < q_len:
        kv_head = head // GROUP
        lane = tl.arange(0, ROWS)
        row_head = lane * 0 + head
        query = first_query + lane
        valid = query < q_len
        runs = True
        if GROUP > 1:
            PACKED: tl.constexpr = ROWS // GROUP_PADDED
            if q_len <= PACKED:
                group_head = (b.to(tl.int64) * HEADS + kv_head * GROUP) * q_blocks + i
                full_count = (past_len + q_len - 1) // BLOCK_SIZE + 1
                if _shared_table(rows, counts, q_blocks, group_head, full_count, GROUP, GROUP_PADDED):
                    runs = head % GROUP == 0
                    row_head = head + lane // PACKED
                    query = lane % PACKED
                    valid = (query < q_len) & (lane // PACKED < GROUP)
        if runs:
            position = past_len + query
            limit = past_len + tl.minimum(first_query + ROWS, q_len)  # no row of this program sees what lies there
            dim = tl.arange(0, DIM_PADDED)
            token = (q_start + query).to(tl.int64)
            q_pointers = (
                q + token[:, None] * q_stride_token + row_head.to(tl.int64)[:, None] * q_stride_head + dim[None, :]
            )
            queries = tl.load(q_pointers, mask=valid[:, None] & (dim < DIM)[None, :], other=0.0)
            row = tl.load(rows + (b.to(tl.int64) * HEADS + head) * q_blocks + i)
            blocks = indices + row.to(tl.int64) * kv_blocks
            pages = page_table + b.to(tl.int64) * page_table_stride
            # entries at the row's end may be cut by the causal edge, or lie beyond this query block altogether
            count = tl.load(counts + row)
            first_position = past_len + first_query
            full, visible = count, count
            reach = (q_blocks * QUERY_BLOCK + BLOCK_SIZE - 1) // BLOCK_SIZE + 1
            for t0 in range(0, tl.minimum(count, reach), 32):
                t = t0 + tl.arange(0, 32)
                entry = tl.load(blocks + count - 1 - t, mask=t < tl.minimum(count, reach), other=-1)
                full -= tl.sum(((entry + 1) * BLOCK_SIZE > first_position + 1).to(tl.int32), axis=0)
                visible -= tl.sum((entry * BLOCK_SIZE >= limit).to(tl.int32), axis=0)
            PER_BLOCK: tl.constexpr = BLOCK_SIZE // TILE
            stop_tile = visible * PER_BLOCK
            if visible > full:  # the last block's tiles beyond the last row are not touched
                last = tl.load(blocks + visible - 1)
                stop_tile -= PER_BLOCK - tl.minimum((limit - last * BLOCK_SIZE + TILE - 1) // TILE, PER_BLOCK)
            if k_scale is not None:
                scale *= tl.load(k_scale + kv_head * k_scale_stride)
            acc = tl.zeros([ROWS, DIM_PADDED], tl.float32)
            if sinks is None:
                peak = tl.full([ROWS], float("-inf"), tl.float32)
                total = tl.zeros([ROWS], tl.float32)
            else:  # the first key: its value is 0
                peak = tl.load(sinks + row_head, mask=valid, other=0.0) * (1.0 if PRECISE else LOG2_E)
                total = tl.full([ROWS], 1.0, tl.float32)
            first_tile = 0
            if window is not None:
                first_tile, uncut = window_tiles(
                    blocks, count, reach, first_position, limit, window, BLOCK_SIZE, PER_BLOCK
                )
            begin = first_tile
            # the causal edge comes last, and the lower edge of a window first; what lies between needs no mask
            for part in tl.static_range(2 if window is None else 3):
                end = stop_tile
                if part == 0 and window is not None:
                    end = tl.minimum(uncut, full) * PER_BLOCK
                elif part != (1 if window is None else 2):
                    end = full * PER_BLOCK
                acc, peak, total = attend_tiles(
                    acc,
                    peak,
                    total,
                    queries,
                    position,
                    begin,
                    end,
                    blocks,
                    pages,
                    limit,
                    None if window is None else first_position - window + 1,
                    kv_head,
                    scale if PRECISE else scale * LOG2_E,
                    None if softcap is None else (softcap if PRECISE else softcap * LOG2_E),
                    window,
                    k,
                    k_stride_page,
                    k_stride_token,
                    k_stride_head,
                    v,
                    v_stride_page,
                    v_stride_token,
                    v_stride_head,
                    BLOCK_SIZE,
                    PAGE_SIZE,
                    DIM,
                    DIM_PADDED,
                    TILE,
                    DESCRIPTOR,
                    POSITIVE_SCALE,
                    PRECISE,
                    part != (0 if window is None else 1),
                )
                begin = end if window is None else tl.maximum(end, first_tile)
            if v_scale is not None:
                acc *= tl.load(v_scale + kv_head * v_scale_stride)
            empty = total == 0.0
            total = tl.where(empty, 1.0, total)
            result = tl.where(empty[:, None], 0.0, tl.div_rn(acc, total[:, None]) if PRECISE else acc / total[:, None])
            out_pointers = (
                out
                + token[:, None] * out_stride_token
                + row_head.to(tl.int64)[:, None] * out_stride_head
                + dim[None, :]
            )
            out_mask = valid[:, None] & (dim < DIM)[None, :]
            tl.store(out_pointers, result.to(out.dtype.element_ty), mask=out_mask)
            if LSE:
                if PRECISE:
                    natural = (peak.to(tl.float64) + tl.log(total.to(tl.float64))).to(tl.float32)
                else:
                    natural = (peak + tl.log2(total)) * LN_2
                natural = tl.where(empty, float("-inf"), natural)
                tl.store(lse + token * lse_stride_token + row_head * lse_stride_head, natural, mask=valid)


@dataclass(frozen=True)
class AttendTuning:
    """How one call of the kernel is shaped.

    Attributes:
        rows: query rows per program; divides the query block.
        tile: KV tokens per step of the inner loop.
        descriptor: K and V through TMA tensor descriptors instead of pointers.
        num_warps, num_stages: Triton's launch options.
    """

    rows: int
    tile: int
    descriptor: bool
    num_warps: int
    num_stages: int


def attend_tuning(
    head_dim: int, dtype: torch.dtype, page_size: int, query_block: int, capability: tuple[int, int], tma: bool
) -> AttendTuning:
    """The kernel's shape, a pure function of the problem's constants and the device; never of a length.

    TMA (Hopper and newer) needs 16-bit elements, strides that are multiples of 16 bytes, and a page that holds a
    whole tile.
    """
    if dtype == torch.float32:  # no tensor cores: small tiles keep the products in registers
        return AttendTuning(16 if head_dim > 128 else 32, tile=32, descriptor=False, num_warps=8, num_stages=1)
    tile = 64 if head_dim <= 128 else 32
    warpgroups = (9, 0) <= capability < (12, 0)  # products there read K and V from shared memory, not from registers
    if not warpgroups or not tma or page_size < tile:  # pointers cost registers: a smaller tile
        if head_dim > 128 and capability not in ((8, 0), (9, 0), (10, 0), (10, 3)):  # 99 KiB of shared memory
            return AttendTuning(64, 32, descriptor=False, num_warps=8, num_stages=2)
        return AttendTuning(query_block, 32, descriptor=False, num_warps=4 if head_dim <= 128 else 8, num_stages=3)
    num_warps = 4 if query_block == 64 or head_dim <= 128 else 8
    return AttendTuning(query_block, tile, descriptor=True, num_warps=num_warps, num_stages=2)


def attend(
    q: Tensor,
    kv: PagedKV,
    batch: PrefillBatch,
    table: BlockTable,
    scale: float,
    out: Tensor,
    lse: Tensor | None,
    features: Features = PLAIN,
) -> None:
    """Launch the kernel; writes out [T, Hq, D] and lse float32 [T, Hq]."""
    heads, dim = q.shape[1:]
    group = heads // kv.num_kv_heads
    q_blocks = batch.query_blocks(table.query_block)
    if q_blocks == 0 or q.shape[0] == 0:
        return
    refusal = why_not_hopper(capability(q.device), q.dtype, dim, table.query_block, named(features, kv))
    if refusal is None and scale > 0 and tma_strides(q, kv.k, kv.v):
        from compactattn._triton import hopper

        hopper.attend(q, kv, batch, table, scale, out, lse)
        return
    tuning = attend_tuning(dim, q.dtype, kv.page_size, table.query_block, capability(q.device), tma_strides(kv.k, kv.v))
    padded = next_power_of_2(dim)
    k, v = kv.k, kv.v
    if tuning.descriptor:
        box = [1, tuning.tile, 1, padded]
        k, v = TensorDescriptor.from_tensor(k, box), TensorDescriptor.from_tensor(v, box)
    with on_device(q):
        launch(
            _attend_kernel,
            (q_blocks * (table.query_block // tuning.rows) * heads, batch.size),
            q,
            *q.stride()[:2],
            k,
            *kv.k.stride()[:3],
            v,
            *kv.v.stride()[:3],
            out,
            *out.stride()[:2],
            out if lse is None else lse,
            *((0, 0) if lse is None else lse.stride()),
            kv.page_table,
            kv.page_table.stride(0),
            batch.cu_seqlens_q,
            batch.seq_lens,
            table.indices,
            table.counts,
            table.rows,
            scale,
            q_blocks,
            table.indices.shape[1],
            features.softcap,
            features.window,
            features.sinks,
            *scale_and_stride(kv.k_scale),
            *scale_and_stride(kv.v_scale),
            constants={
                "HEADS": heads,
                "GROUP": group,
                "GROUP_PADDED": next_power_of_2(group),
                "DIM": dim,
                "DIM_PADDED": padded,
                "QUERY_BLOCK": table.query_block,
                "BLOCK_SIZE": table.block_size,
                "PAGE_SIZE": kv.page_size,
                "ROWS": tuning.rows,
                "TILE": tuning.tile,
                "DESCRIPTOR": tuning.descriptor,
                "POSITIVE_SCALE": scale > 0,
                "PRECISE": q.dtype == torch.float32,
                "LSE": lse is not None,
            },
            device=q.device,
            num_warps=tuning.num_warps,
            num_stages=tuning.num_stages,
        )
