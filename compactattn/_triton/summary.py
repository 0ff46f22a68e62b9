"""Means of cached keys and values per unit of tokens, and block means for the selector."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from compactattn._triton import next_power_of_2, on_device, scale_and_stride
from compactattn._triton.launch import launch
from compactattn.data import KVSummary, PagedKV, PrefillBatch

SINCE_PAST, SINCE_INT, SINCE_TENSOR = 0, 1, 2


@triton.jit
def stale_unit(cu_seqlens_q, seq_lens, since, since_int, b, UNIT: tl.constexpr, SINCE: tl.constexpr):
    """(length of request b, this program's unit of it, its first token, whether it is there and to be made anew)."""
    seq_len = tl.load(seq_lens + b)
    if SINCE == 0:
        first = seq_len - (tl.load(cu_seqlens_q + b + 1) - tl.load(cu_seqlens_q + b))
    elif SINCE == 1:
        first = since_int
    else:
        first = tl.load(since + b)
    unit = first // UNIT + tl.program_id(0)
    start = unit * UNIT
    return seq_len, unit, start, (first < seq_len) & (start < seq_len)


@triton.jit(
    do_not_specialize=["page_table_stride", "since_int", "scale_stride", "units"],
    do_not_specialize_on_alignment=["page_table", "cu_seqlens_q", "seq_lens", "since", "scale"],
)
def _unit_means_kernel(
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
    means,
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
    """One program per (unit, head, request): the float32 mean of the unit's valid tokens.

    BY_PAGE: means are laid out [num_pages, PAGE_SIZE // UNIT, HEADS, DIM]; otherwise [B, units, HEADS, DIM].
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
        total = tl.sum(tl.load(pointers, mask=valid, other=0.0).to(tl.float32), axis=0)
        mean = total / tl.minimum(UNIT, seq_len - start).to(tl.float32)
        if scale is not None:  # of an FP8 cache
            mean *= tl.load(scale + head * scale_stride)
        index = page * (PAGE_SIZE // UNIT) + slot // UNIT if BY_PAGE else b.to(tl.int64) * units + unit
        tl.store(means + (index * HEADS + head) * DIM + dim, mean, mask=dim < DIM)


def stale_units(batch: PrefillBatch, unit: int, since: Tensor | int | None) -> tuple[int, int]:
    """(units of a request that may hold a position in [since, seq_lens), at most, and how a kernel reads `since`)."""
    if since is None:  # only units that this step touches
        return -(-batch.max_q_len // unit) + 1, SINCE_PAST
    return -(-batch.max_seq_len // unit), SINCE_TENSOR if isinstance(since, Tensor) else SINCE_INT


def launch_over_units(
    kernel: Any,
    cache: Tensor,
    scale: Tensor | None,
    kv: PagedKV,
    batch: PrefillBatch,
    since: Tensor | int | None,
    target: Tensor,
    unit: int,
    by_page: bool,
    num_warps: int = 4,
) -> None:
    """Run a kernel with the parameters of `_unit_means_kernel` over every stale unit; `target` is what it writes."""
    units, mode = stale_units(batch, unit, since)
    if units == 0:
        return
    with on_device(cache):
        launch(
            kernel,
            (units, kv.num_kv_heads, batch.size),
            cache,
            *cache.stride()[:3],
            kv.page_table,
            kv.page_table.stride(0),
            batch.cu_seqlens_q,
            batch.seq_lens,
            since if isinstance(since, Tensor) else batch.seq_lens,
            since if isinstance(since, int) else 0,
            *scale_and_stride(scale),
            target,
            units,
            constants={
                "PAGE_SIZE": kv.page_size,
                "UNIT": unit,
                "HEADS": kv.num_kv_heads,
                "DIM": kv.head_dim,
                "DIM_PADDED": next_power_of_2(kv.head_dim),
                "SINCE": mode,
                "BY_PAGE": by_page,
            },
            device=cache.device,
            overlap=True,
            num_warps=num_warps,
        )


def update_summary(kv: PagedKV, batch: PrefillBatch, summary: KVSummary, since: Tensor | int | None) -> None:
    """Recompute in place every unit that holds a position in [since, seq_lens); since None is past_lens."""
    launch_over_units(
        _unit_means_kernel, kv.k, kv.k_scale, kv, batch, since, summary.k_mean, summary.unit, by_page=True
    )
    if summary.v_mean is not None:
        launch_over_units(
            _unit_means_kernel, kv.v, kv.v_scale, kv, batch, since, summary.v_mean, summary.unit, by_page=True
        )


@triton.jit(
    do_not_specialize=["page_table_stride", "units", "kv_blocks"],
    do_not_specialize_on_alignment=["page_table", "seq_lens"],
)
def _block_means_kernel(
    means,
    page_table,
    page_table_stride,
    seq_lens,
    block_means,
    units,
    kv_blocks,
    UNITS_PER_PAGE: tl.constexpr,
    UNITS_PER_BLOCK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    BY_PAGE: tl.constexpr,
    BLOCKS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One program per (BLOCKS blocks, head, request): means of the blocks' unit means, rounded once to q's dtype."""
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    head = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    complete = (block + 1) * BLOCK_SIZE <= tl.load(seq_lens + b)
    unit = tl.program_id(0) * (BLOCKS * UNITS_PER_BLOCK) + tl.arange(0, BLOCKS * UNITS_PER_BLOCK)
    exists = (unit // UNITS_PER_BLOCK + 1) * BLOCK_SIZE <= tl.load(seq_lens + b)
    if BY_PAGE:
        page = tl.load(page_table + b * page_table_stride + unit // UNITS_PER_PAGE, mask=exists, other=0)
        index = page.to(tl.int64) * UNITS_PER_PAGE + unit % UNITS_PER_PAGE
    else:
        index = b * units + unit
    dim = tl.arange(0, DIM_PADDED)
    pointers = means + (index * HEADS + head)[:, None] * DIM + dim[None, :]
    mean = tl.load(pointers, mask=exists[:, None] & (dim < DIM)[None, :], other=0.0)
    if UNITS_PER_BLOCK > 1:
        mean = tl.sum(mean.reshape(BLOCKS, UNITS_PER_BLOCK, DIM_PADDED), axis=1) / UNITS_PER_BLOCK
    target = block_means + ((b * HEADS + head) * kv_blocks + block)[:, None] * DIM + dim[None, :]
    tl.store(target, mean.to(block_means.dtype.element_ty), mask=complete[:, None] & (dim < DIM)[None, :])


def block_means(
    kv: PagedKV, batch: PrefillBatch, block_size: int, dtype: torch.dtype, summary: KVSummary | None
) -> Tensor:
    """Key means of every complete block, [B, Hkv, Kb, D] of `dtype`; incomplete blocks are left unwritten.

    From the summary, or, without one, pooled from the keys with the same arithmetic.
    """
    unit = min(kv.page_size, block_size)
    blocks, heads, dim = batch.kv_blocks(block_size), kv.num_kv_heads, kv.head_dim
    result = torch.empty((batch.size, heads, blocks, dim), dtype=dtype, device=kv.k.device)
    units = -(-batch.max_seq_len // unit)
    blocks_per_program = max(1, 16 * unit // block_size)
    if summary is None:
        means = torch.empty((batch.size, units, heads, dim), dtype=torch.float32, device=kv.k.device)
        launch_over_units(_unit_means_kernel, kv.k, kv.k_scale, kv, batch, 0, means, unit, by_page=False)
    else:
        means = summary.k_mean
    with on_device(kv.k):
        launch(
            _block_means_kernel,
            (-(-blocks // blocks_per_program), heads, batch.size),
            means,
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
                "BY_PAGE": summary is not None,
                "BLOCKS": blocks_per_program,
            },
            device=kv.k.device,
            overlap=True,
            num_warps=4,
        )
    return result
