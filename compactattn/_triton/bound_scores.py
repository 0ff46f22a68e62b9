"""KeyBounds' scores: the largest share of a block in the softmax of any row of a query block, by bounds on its keys."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from compactattn._triton import next_power_of_2, on_device
from compactattn._triton.bounds import block_bounds
from compactattn._triton.launch import launch
from compactattn._triton.scores import LN_2, LOG2_E
from compactattn._triton.union import request_lens
from compactattn.data import KVSummary, PagedKV, PrefillBatch
from compactattn.selection import BlockScores
from compactattn.selectors import KeyBounds


@triton.jit
def _load_rows(q, row_offset, valid, dim, DIM: tl.constexpr):
    """Components `dim` of queries [rows, dim]; zeros beyond the chunk."""
    return tl.load(q + row_offset[:, None] + dim[None, :], mask=valid[:, None] & (dim < DIM)[None, :], other=0.0)


@triton.jit
def _add_products(s, keys, exists, dim, above, below, DIM: tl.constexpr, NEGATIVE_SCALE: tl.constexpr):
    """s [blocks, rows] plus what the positive components `above` and the negative ones `below` of queries reach."""
    largest = tl.load(keys + dim[None, :], mask=exists & (dim < DIM)[None, :], other=0.0)
    smallest = tl.load(keys + DIM + dim[None, :], mask=exists & (dim < DIM)[None, :], other=0.0)
    if NEGATIVE_SCALE:
        s = tl.dot(smallest, tl.trans(above), s, input_precision="ieee")
        return tl.dot(largest, tl.trans(below), s, input_precision="ieee")
    s = tl.dot(largest, tl.trans(above), s, input_precision="ieee")
    return tl.dot(smallest, tl.trans(below), s, input_precision="ieee")


@triton.jit
def _bound_tile(
    tile,
    bounds,
    reach,
    above,
    below,
    q,
    row_offset,
    valid,
    position,
    scale,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    NEGATIVE_SCALE: tl.constexpr,
    PRECISE: tl.constexpr,
):
    """u of a tile of blocks (rows) against ROWS queries (columns), times `scale`; -inf where a query scores none.

    PRECISE (float32, without tensor cores) adds the product up in parts that fit the registers.
    """
    j = tile * TILE + tl.arange(0, TILE)
    keys = bounds + j.to(tl.int64)[:, None] * (2 * DIM)
    exists = (j < reach)[:, None]
    s = tl.zeros([TILE, ROWS], tl.float32)
    if PRECISE:
        for start in range(0, DIM, 16):
            dim = start + tl.arange(0, 16)
            part = _load_rows(q, row_offset, valid, dim, DIM)
            s = _add_products(s, keys, exists, dim, tl.maximum(part, 0.0), tl.minimum(part, 0.0), DIM, NEGATIVE_SCALE)
    else:
        s = _add_products(s, keys, exists, tl.arange(0, DIM_PADDED), above, below, DIM, NEGATIVE_SCALE)
    ends = tl.where(j < reach, (j + 1) * BLOCK_SIZE - 1, 0x7FFFFFFF)
    return tl.where(position[None, :] >= ends[:, None], s * scale, float("-inf"))


@triton.jit(
    do_not_specialize=["q_blocks", "kv_blocks", "tiles"],
    do_not_specialize_on_alignment=["cu_seqlens_q", "seq_lens"],
)
def _key_bounds_kernel(
    q,
    q_stride_token,
    q_stride_head,
    block_bounds,
    cu_seqlens_q,
    seq_lens,
    log_p,
    log_p_stride,
    peak,
    scale,
    q_blocks,
    kv_blocks,
    tiles,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    QUERY_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    NEGATIVE_SCALE: tl.constexpr,
    PRECISE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One program per (query block, head; request): each row's log-sum-exp first, then each block's largest share.

    ROWS queries at a time; what further ones give is compared with what was stored.
    """
    i = tl.program_id(0) % q_blocks
    head = tl.program_id(0) // q_blocks
    b = tl.program_id(1)
    q_start, q_len, past_len = request_lens(cu_seqlens_q, seq_lens, b)
    out_row = (b.to(tl.int64) * HEADS + head) * q_blocks + i
    log_p += out_row * log_p_stride
    bounds = block_bounds + (b.to(tl.int64) * (HEADS // GROUP) + head // GROUP) * kv_blocks * (2 * DIM)
    # complete blocks that end at or before the query block's last row
    reach = tl.where(i * QUERY_BLOCK < q_len, (past_len + tl.minimum((i + 1) * QUERY_BLOCK, q_len)) // BLOCK_SIZE, 0)
    scored_tiles = (reach + TILE - 1) // TILE
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    for part in tl.static_range(QUERY_BLOCK // ROWS):
        row = i * QUERY_BLOCK + part * ROWS + tl.arange(0, ROWS)
        valid = row < q_len
        position = tl.where(valid, past_len + row, -1)
        row_offset = (q_start + row).to(tl.int64) * q_stride_token + head.to(tl.int64) * q_stride_head
        above, below = 0.0, 0.0
        if not PRECISE:
            queries = _load_rows(q, row_offset, valid, tl.arange(0, DIM_PADDED), DIM)
            zero = tl.zeros_like(queries)
            above = tl.where(queries > zero, queries, zero)  # `tl.maximum` of bfloat16 is float32 in Triton 3.6
            below = tl.where(queries > zero, zero, queries)
        top = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        share = tl.zeros([ROWS], tl.float32)
        for second in tl.static_range(2):
            for tile in range(scored_tiles):
                s = _bound_tile(
                    tile,
                    bounds,
                    reach,
                    above,
                    below,
                    q,
                    row_offset,
                    valid,
                    position,
                    scale * LOG2_E,
                    DIM,
                    DIM_PADDED,
                    ROWS,
                    BLOCK_SIZE,
                    TILE,
                    NEGATIVE_SCALE,
                    PRECISE,
                )
                if second:
                    largest = tl.max(s - share[None, :], axis=1) * LN_2
                    j = tile * TILE + tl.arange(0, TILE)
                    if part > 0:
                        largest = tl.maximum(largest, tl.load(log_p + j, mask=j < log_p_stride, other=0.0))
                    tl.store(log_p + j, largest, mask=j < log_p_stride)
                else:
                    higher = tl.maximum(top, tl.max(s, axis=0))
                    shift = tl.where(higher == float("-inf"), 0.0, higher)
                    total = total * tl.exp2(top - shift) + tl.sum(tl.exp2(s - shift[None, :]), axis=0)
                    top = higher
            none = total == 0.0  # of a row without any block, whose bounds are all -inf
            share = tl.where(none, 0.0, top + tl.log2(tl.where(none, 1.0, total)))
    for tile in range(scored_tiles, tiles):
        j = tile * TILE + tl.arange(0, TILE)
        tl.store(log_p + j, tl.full([TILE], float("-inf"), tl.float32), mask=j < log_p_stride)
    tl.store(peak + out_row, 0.0)


@dataclass(frozen=True)
class BoundsTuning:
    """How one call of the kernel is shaped.

    Attributes:
        tile: KV blocks per product.
        rows: queries per product, at most.
        num_warps, num_stages: Triton's launch options.
    """

    tile: int
    rows: int
    num_warps: int
    num_stages: int


def bounds_tuning(head_dim: int, dtype: torch.dtype) -> BoundsTuning:
    """A function of the problem's constants, never of a length. What lies in shared memory fits 99 KiB."""
    if dtype == torch.float32:  # no tensor cores: small products stay in registers
        return BoundsTuning(32, 64, 8, 1)
    return BoundsTuning(32, 64, 4, 1) if head_dim > 128 else BoundsTuning(64, 64, 8, 2)


def key_bounds_scores(
    q: Tensor,
    kv: PagedKV,
    batch: PrefillBatch,
    selector: KeyBounds,
    *,
    scale: float,
    summary: KVSummary | None,
) -> BlockScores:
    """log of the largest p(r, j) over the rows r of query block i, see `KeyBounds`; nothing is read back."""
    heads, dim = q.shape[1:]
    q_blocks, kv_blocks = batch.query_blocks(selector.query_block), batch.kv_blocks(selector.block_size)
    bounds = block_bounds(kv, batch, selector.block_size, q.dtype, summary)
    stride = -(-kv_blocks // 16) * 16  # aligned rows
    tuning = bounds_tuning(dim, q.dtype)
    log_p = torch.empty((batch.size, heads, q_blocks, stride), dtype=torch.float32, device=q.device)
    peak = torch.empty((batch.size, heads, q_blocks, 1), dtype=torch.float32, device=q.device)
    if log_p.numel():
        with on_device(q):
            launch(
                _key_bounds_kernel,
                (q_blocks * heads, batch.size),
                q,
                q.stride(0),
                q.stride(1),
                bounds,
                batch.cu_seqlens_q,
                batch.seq_lens,
                log_p,
                stride,
                peak,
                scale,
                q_blocks,
                kv_blocks,
                -(-kv_blocks // tuning.tile),
                constants={
                    "HEADS": heads,
                    "GROUP": heads // kv.num_kv_heads,
                    "DIM": dim,
                    "DIM_PADDED": next_power_of_2(dim),
                    "QUERY_BLOCK": selector.query_block,
                    "ROWS": min(tuning.rows, selector.query_block),
                    "BLOCK_SIZE": selector.block_size,
                    "TILE": tuning.tile,
                    "NEGATIVE_SCALE": scale < 0,
                    "PRECISE": q.dtype == torch.float32,
                },
                device=q.device,
                overlap=True,
                num_warps=tuning.num_warps,
                num_stages=tuning.num_stages,
            )
    return BlockScores(log_p[..., :kv_blocks], peak)
