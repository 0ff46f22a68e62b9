"""The mean correction: past blocks that a table row leaves out enter the softmax through their means.

A second, small pass after attention: each query meets the means of the left-out blocks, and the two parts are merged
by their log-sum-exps.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from compactattn._triton import next_power_of_2, on_device
from compactattn._triton.attention import attend
from compactattn._triton.summary import block_means
from compactattn._triton.tiles import capped
from compactattn.data import BlockTable, KVSummary, PagedKV, PrefillBatch
from compactattn.features import PLAIN, Features


@triton.jit(do_not_specialize=["q_blocks", "kv_blocks", "log_tokens"])
def _correction_kernel(
    q,
    q_stride_token,
    q_stride_head,
    k_means,
    v_means,
    out,
    out_stride_token,
    out_stride_head,
    lse,
    cu_seqlens_q,
    seq_lens,
    listed,
    listed_stride,
    rows,
    scale,
    softcap,
    log_tokens,
    q_blocks,
    kv_blocks,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    QUERY_BLOCK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program per (ROWS queries of a query block, head, request); out and lse hold attention over the table.

    Each left-out block weighs exp(scale * q . k_mean + log_tokens).
    """
    first = tl.program_id(0) * ROWS
    head = tl.program_id(1)
    b = tl.program_id(2)
    q_start = tl.load(cu_seqlens_q + b)
    q_len = tl.load(cu_seqlens_q + b + 1) - q_start
    past_blocks = (tl.load(seq_lens + b) - q_len) // BLOCK_SIZE
    if (first < q_len) & (past_blocks > 0):
        dim = tl.arange(0, DIM_PADDED)
        query = first + tl.arange(0, ROWS)
        token = (q_start + query).to(tl.int64)
        valid = query < q_len
        inside = valid[:, None] & (dim < DIM)[None, :]
        q_pointers = q + token[:, None] * q_stride_token + head.to(tl.int64) * q_stride_head + dim[None, :]
        queries = tl.load(q_pointers, mask=inside, other=0.0)
        row = tl.load(rows + (b * HEADS + head).to(tl.int64) * q_blocks + first // QUERY_BLOCK).to(tl.int64)
        means = ((b * (HEADS // GROUP) + head // GROUP).to(tl.int64) * kv_blocks) * DIM
        peak = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        values = tl.zeros([ROWS, DIM_PADDED], tl.float32)
        for start in range(0, past_blocks, TILE):
            block = start + tl.arange(0, TILE)
            left_out = block < past_blocks
            left_out &= tl.load(listed + row * listed_stride + block, mask=left_out, other=1) == 0
            offset = means + block.to(tl.int64)[:, None] * DIM + dim[None, :]
            there = left_out[:, None] & (dim < DIM)[None, :]
            keys = tl.load(k_means + offset, mask=there, other=0.0)
            scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
            if softcap is not None:
                scores = capped(scores, softcap, queries.dtype == tl.float32)
            scores = tl.where(left_out[None, :], scores + log_tokens, float("-inf"))
            new_peak = tl.maximum(peak, tl.max(scores, axis=1))
            base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
            weights = tl.exp(scores - base[:, None])
            decay = tl.exp(peak - base)
            total = total * decay + tl.sum(weights, axis=1)
            mean_values = tl.load(v_means + offset, mask=there, other=0.0)
            part = tl.dot(weights.to(mean_values.dtype), mean_values, input_precision="ieee")
            values = values * decay[:, None] + part
            peak = new_peak
        lse_pointers = lse + token * HEADS + head
        listed_lse = tl.load(lse_pointers, mask=valid, other=float("-inf"))
        top = tl.maximum(peak, listed_lse)
        base = tl.where(top == float("-inf"), 0.0, top)
        listed_weight = tl.exp(listed_lse - base)
        decay = tl.exp(peak - base)
        total = total * decay + listed_weight
        out_pointers = out + token[:, None] * out_stride_token + head.to(tl.int64) * out_stride_head + dim[None, :]
        listed_out = tl.load(out_pointers, mask=inside, other=0.0).to(tl.float32)
        result = values * decay[:, None] + listed_out * listed_weight[:, None]
        result = result / tl.where(total == 0.0, 1.0, total)[:, None]
        changed = valid & (peak > float("-inf"))  # where nothing is left out, not a bit changes
        tl.store(out_pointers, result.to(out.dtype.element_ty), mask=inside & changed[:, None])
        tl.store(lse_pointers, top + tl.log(tl.where(total == 0.0, 1.0, total)), mask=changed)


def attend_corrected(
    q: Tensor,
    kv: PagedKV,
    batch: PrefillBatch,
    table: BlockTable,
    scale: float,
    summary: KVSummary,
    out: Tensor,
    lse: Tensor | None,
    features: Features = PLAIN,
) -> None:
    """`attend`, where every complete past block that a row leaves out is one more key and value: its means.

    Means are averaged in float32 and rounded once to the queries' dtype. Sinks are part of what attention over the
    table leaves in lse, and so of the merged result.
    """
    heads, dim = q.shape[1:]
    blocks, kv_blocks = batch.query_blocks(table.query_block), batch.kv_blocks(table.block_size)
    if lse is None:
        lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    attend(q, kv, batch, table, scale, out, lse, features)
    if blocks == 0 or kv_blocks == 0:
        return
    assert summary.v_mean is not None
    k_means = block_means(kv, batch, table.block_size, q.dtype, summary)
    v_means = block_means(kv, batch, table.block_size, q.dtype, KVSummary(summary.v_mean, None, summary.unit))
    column = torch.arange(kv_blocks, device=q.device)
    entries = torch.where(column < table.counts[:, None], table.indices, kv_blocks).long()
    listed = torch.zeros((len(entries), kv_blocks + 1), dtype=torch.int8, device=q.device).scatter_(1, entries, 1)
    precise = q.dtype == torch.float32  # no tensor cores: small tiles, and one stage, keep the products in registers
    rows = 32 if precise else 64
    with on_device(q):
        _correction_kernel[(blocks * (table.query_block // rows), heads, batch.size)](
            q,
            q.stride(0),
            q.stride(1),
            k_means,
            v_means,
            out,
            out.stride(0),
            out.stride(1),
            lse,
            batch.cu_seqlens_q,
            batch.seq_lens,
            listed,
            listed.stride(0),
            table.rows,
            scale,
            features.softcap,
            math.log(table.block_size),
            blocks,
            kv_blocks,
            HEADS=heads,
            GROUP=heads // kv.num_kv_heads,
            DIM=dim,
            DIM_PADDED=next_power_of_2(dim),
            QUERY_BLOCK=table.query_block,
            BLOCK_SIZE=table.block_size,
            ROWS=rows,
            TILE=32 if precise or dim > 128 else 64,
            num_warps=4,
            num_stages=1 if precise else 3,
        )
