"""What SeerGate needs of queries and keys: RoPE undone, then pooled."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from compactattn._triton import next_power_of_2, on_device, scale_and_stride
from compactattn._triton.summary import stale_unit, stale_units
from compactattn.data import GateKeys, PagedKV, PrefillBatch


@triton.jit
def _unrotated(pointers, valid, position, frequency, rope_scale, HALF: tl.constexpr):
    """Rows [n, HALF_PADDED] of dimensions d and d + HALF before RoPE, float32; pointers are those of dimension d."""
    low = tl.load(pointers, mask=valid, other=0.0).to(tl.float32)
    high = tl.load(pointers + HALF, mask=valid, other=0.0).to(tl.float32)
    angle = position.to(tl.float32)[:, None] * frequency[None, :]
    cos = tl.cos(angle) / rope_scale
    sin = tl.sin(angle) / rope_scale
    return low * cos + high * sin, high * cos - low * sin


@triton.jit
def _store_pooled(target, x, valid, count, dim, DIM: tl.constexpr, HALF: tl.constexpr):
    """Largest, smallest and mean of the valid rows of x, to dimensions `dim` of the three parts of a pooled key."""
    tl.store(target + dim, tl.max(tl.where(valid, x, float("-inf")), axis=0), mask=dim < HALF)
    tl.store(target + DIM + dim, tl.min(tl.where(valid, x, float("inf")), axis=0), mask=dim < HALF)
    tl.store(target + 2 * DIM + dim, tl.sum(tl.where(valid, x, 0.0), axis=0) / count, mask=dim < HALF)


@triton.jit(do_not_specialize=["page_table_stride", "since_int", "scale_stride"])
def _gate_keys_kernel(
    cache,
    cache_stride_page,
    cache_stride_token,
    cache_stride_head,
    page_table,
    page_table_stride,
    cu_seqlens_q,
    seq_lens,
    since,
    since_int,
    inv_freq,
    rope_scale,
    scale,
    scale_stride,
    pooled,
    PAGE_SIZE: tl.constexpr,
    UNIT: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    HALF_PADDED: tl.constexpr,
    SINCE: tl.constexpr,
):
    """One program per (unit, head, request): [max | min | mean] of the unit's valid tokens before RoPE."""
    b = tl.program_id(2)
    head = tl.program_id(1)
    seq_len, _, start, stale = stale_unit(cu_seqlens_q, seq_lens, since, since_int, b, UNIT, SINCE)
    if stale:
        page = tl.load(page_table + b.to(tl.int64) * page_table_stride + start // PAGE_SIZE).to(tl.int64)
        slot = start % PAGE_SIZE
        token = tl.arange(0, UNIT)
        dim = tl.arange(0, HALF_PADDED)
        base = cache + page * cache_stride_page + head.to(tl.int64) * cache_stride_head
        pointers = base + (slot + token).to(tl.int64)[:, None] * cache_stride_token + dim[None, :]
        valid = (start + token < seq_len)[:, None] & (dim < HALF)[None, :]
        frequency = tl.load(inv_freq + dim, mask=dim < HALF, other=0.0)
        low, high = _unrotated(pointers, valid, start + token, frequency, rope_scale, HALF)
        if scale is not None:  # of an FP8 cache
            low, high = low * tl.load(scale + head * scale_stride), high * tl.load(scale + head * scale_stride)
        count = tl.minimum(UNIT, seq_len - start).to(tl.float32)
        index = page * (PAGE_SIZE // UNIT) + slot // UNIT
        target = pooled + (index * HEADS + head) * (6 * HALF)
        _store_pooled(target, low, valid, count, dim, 2 * HALF, HALF)
        _store_pooled(target + HALF, high, valid, count, dim, 2 * HALF, HALF)


def update_gate(kv: PagedKV, batch: PrefillBatch, gate: GateKeys, unit: int, since: Tensor | int | None) -> None:
    """Pool again, in place, every unit that holds a position in [since, seq_lens); since None is past_lens."""
    units, mode = stale_units(batch, unit, since)
    if units == 0:
        return
    half = kv.head_dim // 2
    with on_device(kv.k):
        _gate_keys_kernel[(units, kv.num_kv_heads, batch.size)](
            kv.k,
            *kv.k.stride()[:3],
            kv.page_table,
            kv.page_table.stride(0),
            batch.cu_seqlens_q,
            batch.seq_lens,
            since if isinstance(since, Tensor) else batch.seq_lens,
            since if isinstance(since, int) else 0,
            gate.inv_freq,
            gate.rope_scale,
            *scale_and_stride(kv.k_scale),
            gate.pooled,
            PAGE_SIZE=kv.page_size,
            UNIT=unit,
            HEADS=kv.num_kv_heads,
            HALF=half,
            HALF_PADDED=next_power_of_2(half),
            SINCE=mode,
            num_warps=4,
        )


@triton.jit(do_not_specialize=["query_blocks"])
def _mean_queries_kernel(
    q,
    q_stride_row,
    q_stride_head,
    cu_seqlens_q,
    seq_lens,
    inv_freq,
    rope_scale,
    pooled,
    query_blocks,
    QUERY_BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    HALF_PADDED: tl.constexpr,
):
    """One program per (query block, head, request): the mean of its rows before RoPE, 0 where it has none."""
    i = tl.program_id(0)
    head = tl.program_id(1)
    b = tl.program_id(2)
    start = tl.load(cu_seqlens_q + b)
    q_len = tl.load(cu_seqlens_q + b + 1) - start
    row = i * QUERY_BLOCK + tl.arange(0, QUERY_BLOCK)
    dim = tl.arange(0, HALF_PADDED)
    valid = (row < q_len)[:, None] & (dim < HALF)[None, :]
    base = q + head.to(tl.int64) * q_stride_head
    pointers = base + (start + row).to(tl.int64)[:, None] * q_stride_row + dim[None, :]
    frequency = tl.load(inv_freq + dim, mask=dim < HALF, other=0.0)
    position = tl.load(seq_lens + b) - q_len + row
    low, high = _unrotated(pointers, valid, position, frequency, rope_scale, HALF)
    count = tl.maximum(tl.minimum(QUERY_BLOCK, q_len - i * QUERY_BLOCK), 1).to(tl.float32)
    target = pooled + ((b.to(tl.int64) * query_blocks + i) * HEADS + head) * (2 * HALF)
    tl.store(target + dim, tl.sum(tl.where(valid, low, 0.0), axis=0) / count, mask=dim < HALF)
    tl.store(target + HALF + dim, tl.sum(tl.where(valid, high, 0.0), axis=0) / count, mask=dim < HALF)


def pool_queries(q: Tensor, batch: PrefillBatch, query_block: int, inv_freq: Tensor, rope_scale: float) -> Tensor:
    """Mean query of each query block before RoPE, float32 [B, Qb, Hq, D]; 0 where a request has no queries."""
    blocks, heads, half = batch.query_blocks(query_block), q.shape[1], q.shape[2] // 2
    pooled = torch.empty((batch.size, blocks, heads, 2 * half), dtype=torch.float32, device=q.device)
    with on_device(q):
        _mean_queries_kernel[(blocks, heads, batch.size)](
            q,
            *q.stride()[:2],
            batch.cu_seqlens_q,
            batch.seq_lens,
            inv_freq,
            rope_scale,
            pooled,
            blocks,
            QUERY_BLOCK=query_block,
            HEADS=heads,
            HALF=half,
            HALF_PADDED=next_power_of_2(half),
            num_warps=4,
        )
    return pooled
