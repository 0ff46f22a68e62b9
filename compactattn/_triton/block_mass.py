"""Attention mass per KV block: exact, or by XAttention's antidiagonal strided scores."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from compactattn._triton import next_power_of_2, on_device, scale_and_stride
from compactattn._triton.union import request_lens
from compactattn.data import PagedKV, PrefillBatch
from compactattn.selectors import Oracle, XAttention


@triton.jit(
    do_not_specialize=["page_table_stride", "k_scale_stride", "row_tiles", "key_tiles", "parts", "strided_rows"],
    do_not_specialize_on_alignment=["page_table", "cu_seqlens_q", "seq_lens"],
)
def _strided_lse_kernel(
    q,
    q_stride_token,
    q_stride_head,
    k,
    k_stride_page,
    k_stride_token,
    k_stride_head,
    page_table,
    page_table_stride,
    cu_seqlens_q,
    seq_lens,
    part_lse,
    scale,
    k_scale,
    k_scale_stride,
    row_tiles,
    key_tiles,
    parts,
    strided_rows,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    STRIDE: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    PART: tl.constexpr,
):
    """Log-sum-exp of strided scores over each part of PART strided keys, [B, Hq, strided_rows, parts].

    One program per (tile of strided keys, tile of strided queries, head; request).
    """
    key_tile = tl.program_id(0) % key_tiles
    row_tile = tl.program_id(0) // key_tiles % row_tiles
    head = tl.program_id(0) // key_tiles // row_tiles
    b = tl.program_id(1)
    q_start, q_len, past_len = request_lens(cu_seqlens_q, seq_lens, b)
    m = row_tile * ROWS + tl.arange(0, ROWS)
    n = key_tile * KEYS + tl.arange(0, KEYS)
    dim = tl.arange(0, DIM_PADDED)
    last_position = past_len + tl.minimum((m + 1) * STRIDE, q_len) - 1
    known = m * STRIDE < q_len
    lse = tl.full([ROWS, KEYS // PART], float("-inf"), tl.float32)
    reach = past_len + tl.minimum((row_tile + 1) * ROWS * STRIDE, q_len)
    if (row_tile * ROWS * STRIDE < q_len) & (key_tile * KEYS * STRIDE < reach):
        s = tl.zeros([ROWS, KEYS], tl.float32)
        for slot in range(STRIDE):
            row = m * STRIDE + STRIDE - 1 - slot
            q_offset = (q_start + row).to(tl.int64)[:, None] * q_stride_token + head.to(tl.int64) * q_stride_head
            q_mask = (row < q_len)[:, None] & (dim < DIM)[None, :]
            queries = tl.load(q + q_offset + dim[None, :], mask=q_mask, other=0.0)
            key = n * STRIDE + slot
            exists = key < past_len + q_len
            page = tl.load(page_table + b.to(tl.int64) * page_table_stride + key // PAGE_SIZE, mask=exists, other=0).to(
                tl.int64
            )
            k_offset = page * k_stride_page + (key % PAGE_SIZE).to(tl.int64) * k_stride_token
            k_pointers = k + (head // GROUP).to(tl.int64) * k_stride_head + k_offset[:, None] + dim[None, :]
            keys = tl.load(k_pointers, mask=exists[:, None] & (dim < DIM)[None, :], other=0.0).to(queries.dtype)
            s += tl.dot(queries, tl.trans(keys), input_precision="ieee")
        if k_scale is not None:  # of an FP8 cache
            scale *= tl.load(k_scale + head // GROUP * k_scale_stride)
        seen = known[:, None] & ((n * STRIDE)[None, :] <= last_position[:, None])
        s = tl.where(seen, s * scale, float("-inf")).reshape(ROWS, KEYS // PART, PART)
        peak = tl.max(s, axis=2)
        safe = tl.where(peak == float("-inf"), 0.0, peak)
        total = tl.sum(tl.exp(s - safe[:, :, None]), axis=2)
        lse = tl.where(peak == float("-inf"), float("-inf"), peak + tl.log(total))
    part = key_tile * (KEYS // PART) + tl.arange(0, KEYS // PART)
    row = (b.to(tl.int64) * HEADS + head) * strided_rows + m
    in_range = (m < strided_rows)[:, None] & (part < parts)[None, :]
    tl.store(part_lse + row[:, None] * parts + part[None, :], lse, mask=in_range)


def block_mass(
    q: Tensor, kv: PagedKV, batch: PrefillBatch, selector: XAttention | Oracle, *, stride: int, scale: float
) -> Tensor:
    """Mass of each KV block summed over the (strided) rows of a query block, float32 [B, Hq, Qb, Kb].

    Stride 1 is exact attention. Scratch: B * Hq * max_q_len / stride * max_seq_len / part floats.
    """
    heads, dim = q.shape[1:]
    q_blocks, kv_blocks = batch.query_blocks(selector.query_block), batch.kv_blocks(selector.block_size)
    # strided queries and keys per program; without tensor cores small tiles keep the products in registers
    rows, keys = (16, 32) if q.dtype == torch.float32 else (64, 64)
    part = min(selector.block_size // stride, keys)
    parts = kv_blocks * (selector.block_size // stride // part)
    rows_per_block = selector.query_block // stride
    strided_rows = q_blocks * rows_per_block
    part_lse = torch.empty((batch.size, heads, strided_rows, parts), dtype=torch.float32, device=q.device)
    row_tiles, key_tiles = -(-strided_rows // rows), -(-parts * part // keys)
    if part_lse.numel():
        with on_device(q):
            _strided_lse_kernel[(key_tiles * row_tiles * heads, batch.size)](
                q,
                q.stride(0),
                q.stride(1),
                kv.k,
                *kv.k.stride()[:3],
                kv.page_table,
                kv.page_table.stride(0),
                batch.cu_seqlens_q,
                batch.seq_lens,
                part_lse,
                scale / stride,
                *scale_and_stride(kv.k_scale),
                row_tiles,
                key_tiles,
                parts,
                strided_rows,
                HEADS=heads,
                GROUP=heads // kv.num_kv_heads,
                DIM=dim,
                DIM_PADDED=next_power_of_2(dim),
                STRIDE=stride,
                PAGE_SIZE=kv.page_size,
                ROWS=rows,
                KEYS=keys,
                PART=part,
                num_warps=4,
                num_stages=1 if q.dtype == torch.float32 else 2,
            )
    row_lse = part_lse.logsumexp(-1, keepdim=True)
    share = torch.where(row_lse > float("-inf"), (part_lse - row_lse).exp(), 0.0)
    return share.view(batch.size, heads, q_blocks, rows_per_block, kv_blocks, -1).sum((3, 5))
