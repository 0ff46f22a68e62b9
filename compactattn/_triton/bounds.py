"""Bounds on cached keys, the largest and the smallest of each dimension, per unit of tokens and per KV block."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from compactattn._triton import next_power_of_2, on_device
from compactattn._triton.launch import launch
from compactattn._triton.summary import launch_over_units, stale_unit
from compactattn.data import KVSummary, PagedKV, PrefillBatch


@triton.jit(
    do_not_specialize=["page_table_stride", "since_int", "scale_stride", "units"],
    do_not_specialize_on_alignment=["page_table", "cu_seqlens_q", "seq_lens", "since", "scale"],
)
def _unit_bounds_kernel(
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
    scale,
    scale_stride,
    bounds,
    units,
    PAGE_SIZE: tl.constexpr,
    UNIT: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    SINCE: tl.constexpr,
    BY_PAGE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One program per (unit, head, request): the largest and the smallest of each dimension over valid tokens, float32.

    BY_PAGE: bounds are laid out [num_pages, PAGE_SIZE // UNIT, HEADS, 2 * DIM]; otherwise [B, units, HEADS, 2 * DIM].
    """
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    b = tl.program_id(2)
    head = tl.program_id(1)
    seq_len, unit, start, stale = stale_unit(cu_seqlens_q, seq_lens, since, since_int, b, UNIT, SINCE)
    if stale:
        page = tl.load(page_table + b.to(tl.int64) * page_table_stride + start // PAGE_SIZE).to(tl.int64)
        slot = start % PAGE_SIZE
        token = tl.arange(0, UNIT)
        dim = tl.arange(0, DIM_PADDED)
        base = cache + page * cache_stride_page + head.to(tl.int64) * cache_stride_head
        pointers = base + (slot + token).to(tl.int64)[:, None] * cache_stride_token + dim[None, :]
        valid = (start + token < seq_len)[:, None] & (dim < DIM)[None, :]
        rows = tl.load(pointers, mask=valid, other=0.0).to(tl.float32)
        largest = tl.max(tl.where(valid, rows, float("-inf")), axis=0)
        smallest = tl.min(tl.where(valid, rows, float("inf")), axis=0)
        if scale is not None:  # of an FP8 cache
            largest *= tl.load(scale + head * scale_stride)
            smallest *= tl.load(scale + head * scale_stride)
        index = page * (PAGE_SIZE // UNIT) + slot // UNIT if BY_PAGE else b.to(tl.int64) * units + unit
        target = bounds + (index * HEADS + head) * (2 * DIM) + dim
        tl.store(target, largest, mask=dim < DIM)
        tl.store(target + DIM, smallest, mask=dim < DIM)


def update_bounds(kv: PagedKV, batch: PrefillBatch, bounds: Tensor, unit: int, since: Tensor | int | None) -> None:
    """Bound again, in place, every unit that holds a position in [since, seq_lens); since None is past_lens.

    bounds: float32 [num_pages, page_size // unit, Hkv, 2 * D].
    """
    _launch_unit_bounds(kv, batch, bounds, unit, since, by_page=True)


def _launch_unit_bounds(
    kv: PagedKV, batch: PrefillBatch, bounds: Tensor, unit: int, since: Tensor | int | None, by_page: bool
) -> None:
    warps = 4 if kv.head_dim * kv.k.element_size() <= 256 else 8
    launch_over_units(_unit_bounds_kernel, kv.k, kv.k_scale, kv, batch, since, bounds, unit, by_page, warps)


@triton.jit(
    do_not_specialize=["page_table_stride", "units", "kv_blocks"],
    do_not_specialize_on_alignment=["page_table", "seq_lens"],
)
def _block_bounds_kernel(
    bounds,
    page_table,
    page_table_stride,
    seq_lens,
    block_bounds,
    units,
    kv_blocks,
    UNITS_PER_PAGE: tl.constexpr,
    UNITS_PER_BLOCK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    BY_PAGE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One program per (block, head, request): the block's bounds from its units', rounded once to q's dtype."""
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    block = tl.program_id(0)
    head = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    if (block + 1) * BLOCK_SIZE <= tl.load(seq_lens + b):
        unit = block * UNITS_PER_BLOCK + tl.arange(0, UNITS_PER_BLOCK)
        if BY_PAGE:
            page = tl.load(page_table + b * page_table_stride + unit // UNITS_PER_PAGE)
            index = page.to(tl.int64) * UNITS_PER_PAGE + unit % UNITS_PER_PAGE
        else:
            index = b * units + unit
        dim = tl.arange(0, DIM_PADDED)
        pointers = bounds + (index * HEADS + head)[:, None] * (2 * DIM) + dim[None, :]
        exists = (dim < DIM)[None, :]
        largest = tl.max(tl.load(pointers, mask=exists, other=0.0), axis=0)
        smallest = tl.min(tl.load(pointers + DIM, mask=exists, other=0.0), axis=0)
        target = block_bounds + ((b * HEADS + head) * kv_blocks + block) * (2 * DIM) + dim
        tl.store(target, largest.to(block_bounds.dtype.element_ty), mask=dim < DIM)
        tl.store(target + DIM, smallest.to(block_bounds.dtype.element_ty), mask=dim < DIM)


def block_bounds(
    kv: PagedKV, batch: PrefillBatch, block_size: int, dtype: torch.dtype, summary: KVSummary | None
) -> Tensor:
    """Largest, then smallest key of each dimension of complete blocks, [B, Hkv, Kb, 2 D]; others are left unwritten.

    From the summary's bounds, or, without any, from the keys.
    """
    unit = min(kv.page_size, block_size)
    blocks, heads, dim = batch.kv_blocks(block_size), kv.num_kv_heads, kv.head_dim
    result = torch.empty((batch.size, heads, blocks, 2 * dim), dtype=dtype, device=kv.k.device)
    units = -(-batch.max_seq_len // unit)
    bounds = None if summary is None else summary.k_bounds
    by_page = bounds is not None
    if bounds is None:
        bounds = torch.empty((batch.size, units, heads, 2 * dim), dtype=torch.float32, device=kv.k.device)
        _launch_unit_bounds(kv, batch, bounds, unit, 0, by_page=False)
    if result.numel():
        with on_device(kv.k):
            launch(
                _block_bounds_kernel,
                (blocks, heads, batch.size),
                bounds,
                kv.page_table,
                kv.page_table.stride(0),
                batch.seq_lens,
                result,
                units,
                blocks,
                constants={
                    "UNITS_PER_PAGE": kv.page_size // unit,
                    "UNITS_PER_BLOCK": block_size // unit,
                    "BLOCK_SIZE": block_size,
                    "HEADS": heads,
                    "DIM": dim,
                    "DIM_PADDED": next_power_of_2(dim),
                    "BY_PAGE": by_page,
                },
                device=kv.k.device,
                overlap=True,
                num_warps=2,
            )
    return result
