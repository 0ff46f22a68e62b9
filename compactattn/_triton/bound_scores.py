"""KeyBounds' scores: the largest share of a block in the softmax of any row of a query block, by bounds on its keys."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from compactattn._triton import capability, next_power_of_2, on_device
from compactattn._triton.bounds import block_bounds
from compactattn._triton.launch import launch
from compactattn._triton.scores import LN_2, LOG2_E
from compactattn._triton.union import request_lens
from compactattn.data import KVSummary, PagedKV, PrefillBatch
from compactattn.selection import BlockScores
from compactattn.selectors import KeyBounds


@triton.jit
def _load_queries(q, row_offset, valid, component, DIM: tl.constexpr, DIM_PADDED: tl.constexpr, POSITIVE: tl.constexpr):
    """What meets the bounds laid side by side, [rows, components]; zeros beyond the chunk.

    Component c < DIM_PADDED meets the largest key of dimension c: it is the query's where that has the scale's sign,
    or else 0. Component DIM_PADDED + c meets the smallest key, and is what the other left out.
    """
    dim = (component % DIM_PADDED)[None, :]
    queries = tl.load(q + row_offset[:, None] + dim, mask=valid[:, None] & (dim < DIM), other=0.0)
    zero = tl.zeros_like(queries)
    return tl.where((queries > zero) == ((component < DIM_PADDED) == POSITIVE)[None, :], queries, zero)


@triton.jit
def _bound_tile(
    tile,
    bounds,
    reach,
    queries,
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
    POSITIVE: tl.constexpr,
    PRECISE: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCKS_FIRST: tl.constexpr,
):
    """u of a tile of blocks against ROWS queries, [rows, blocks] or, if BLOCKS_FIRST, [blocks, rows].

    Still to be multiplied by the scale if that is POSITIVE. MASKED: -inf where a query does not score a block.
    PRECISE (float32, without tensor cores) adds the product up in parts that fit the registers.
    """
    j = tile * TILE + tl.arange(0, TILE)
    keys = bounds + j.to(tl.int64)[:, None] * (2 * DIM)
    if PRECISE:
        s = tl.zeros([TILE, ROWS] if BLOCKS_FIRST else [ROWS, TILE], tl.float32)
        for start in range(0, 2 * DIM_PADDED, 16):
            component = start + tl.arange(0, 16)
            column = component // DIM_PADDED * DIM + component % DIM_PADDED
            exists = (j < reach)[:, None] & (component % DIM_PADDED < DIM)[None, :]
            part = tl.load(keys + column[None, :], mask=exists, other=0.0)
            rows = _load_queries(q, row_offset, valid, component, DIM, DIM_PADDED, POSITIVE)
            if BLOCKS_FIRST:
                s = tl.dot(part, tl.trans(rows), s, input_precision="ieee")
            else:
                s = tl.dot(rows, tl.trans(part), s, input_precision="ieee")
    else:
        component = tl.arange(0, 2 * DIM_PADDED)
        if DIM == DIM_PADDED:
            if MASKED:
                tile_bounds = tl.load(keys + component[None, :], mask=(j < reach)[:, None], other=0.0)
            else:
                tile_bounds = tl.load(keys + component[None, :])
        else:
            column = component // DIM_PADDED * DIM + component % DIM_PADDED
            exists = (j < reach)[:, None] & (component % DIM_PADDED < DIM)[None, :]
            tile_bounds = tl.load(keys + column[None, :], mask=exists, other=0.0)
        s = tl.dot(tile_bounds, tl.trans(queries)) if BLOCKS_FIRST else tl.dot(queries, tl.trans(tile_bounds))
    if not POSITIVE:
        s = s * scale
    if MASKED:
        ends = tl.where(j < reach, (j + 1) * BLOCK_SIZE - 1, 0x7FFFFFFF)
        if BLOCKS_FIRST:
            s = tl.where(position[None, :] >= ends[:, None], s, float("-inf"))
        else:
            s = tl.where(position[:, None] >= ends[None, :], s, float("-inf"))
    return s


@triton.jit
def _add_tile(top, total, s, factor, MASKED: tl.constexpr):
    """Each row's largest factor * s so far, and its sum of exp2 of the differences from it, with a tile more."""
    higher = tl.maximum(top, tl.max(s, axis=1) * factor)
    shift = tl.where(higher == float("-inf"), 0.0, higher) if MASKED else higher
    total = total * tl.exp2(top - shift) + tl.sum(tl.exp2(s * factor - shift[:, None]), axis=1)
    return higher, total


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
    POSITIVE: tl.constexpr,
    BLOCKS_FIRST: tl.constexpr,
    PRECISE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One program per (query block, head; request): each row's log-sum-exp first, then each block's largest share.

    ROWS queries at a time; what further ones give is compared with what was stored. The first pass's products have
    queries for rows, so that sums over blocks stay within a few threads; the second pass's, if BLOCKS_FIRST, blocks,
    so that maxima over queries do. Only the last tiles, with blocks that some query does not score, are masked.
    """
    i = tl.program_id(0) % q_blocks
    head = tl.program_id(0) // q_blocks
    b = tl.program_id(1)
    q_start, q_len, past_len = request_lens(cu_seqlens_q, seq_lens, b)
    out_row = (b.to(tl.int64) * HEADS + head) * q_blocks + i
    log_p += out_row * log_p_stride
    bounds = block_bounds + (b.to(tl.int64) * (HEADS // GROUP) + head // GROUP) * kv_blocks * (2 * DIM)
    # complete blocks that end at or before the query block's last row, and those that even its first row scores
    reach = tl.where(i * QUERY_BLOCK < q_len, (past_len + tl.minimum((i + 1) * QUERY_BLOCK, q_len)) // BLOCK_SIZE, 0)
    full = tl.minimum(reach, (past_len + i * QUERY_BLOCK + 1) // BLOCK_SIZE)
    scored_tiles = (reach + TILE - 1) // TILE
    full_tiles = full // TILE
    factor = scale * LOG2_E if POSITIVE else 1.0
    for part in tl.static_range(QUERY_BLOCK // ROWS):
        if part > 0:
            tl.debug_barrier()  # what was stored for the part before is read by other threads than stored it
        row = i * QUERY_BLOCK + part * ROWS + tl.arange(0, ROWS)
        valid = row < q_len
        position = tl.where(valid, past_len + row, -1)
        row_offset = (q_start + row).to(tl.int64) * q_stride_token + head.to(tl.int64) * q_stride_head
        queries = 0.0
        if not PRECISE:
            component = tl.arange(0, 2 * DIM_PADDED)
            queries = _load_queries(q, row_offset, valid, component, DIM, DIM_PADDED, POSITIVE)
            # A load that reads nothing. Triton gives a warpgroup's product its first factor from shared memory only
            # if a load made it, and otherwise copies it to registers for every tile.
            anywhere = tl.broadcast_to(q + component[None, :], [ROWS, 2 * DIM_PADDED])
            queries = tl.load(anywhere, mask=(row < 0)[:, None], other=queries)
        if OVERLAP and part == 0:
            gdc_wait()
            gdc_launch_dependents()
        top = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        share = tl.zeros([ROWS], tl.float32)
        for second in tl.static_range(2):
            for masked in tl.static_range(2):
                for tile in range(full_tiles if masked else 0, scored_tiles if masked else full_tiles):
                    s = _bound_tile(
                        tile,
                        bounds,
                        reach,
                        queries,
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
                        POSITIVE,
                        PRECISE,
                        masked,
                        second and BLOCKS_FIRST,
                    )
                    if second:
                        if BLOCKS_FIRST:
                            largest = tl.max(s * factor - share[None, :], axis=1) * LN_2
                        else:
                            largest = tl.max(s * factor - share[:, None], axis=0) * LN_2
                        j = tile * TILE + tl.arange(0, TILE)
                        if part > 0:
                            largest = tl.maximum(largest, tl.load(log_p + j, mask=j < log_p_stride, other=0.0))
                        tl.store(log_p + j, largest, mask=j < log_p_stride)
                    else:
                        top, total = _add_tile(top, total, s, factor, masked)
            if not second:  # rows without any block, whose bounds are all -inf, and those beyond the chunk share none
                none = (total == 0.0) | ~valid
                share = tl.where(none, float("inf"), top + tl.log2(tl.where(none, 1.0, total)))
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


def bounds_tuning(head_dim: int, dtype: torch.dtype, capability: tuple[int, int]) -> BoundsTuning:
    """A function of the problem's constants and the device, never of a length.

    Compute capability 9.0 multiplies from shared memory, where the queries of a whole query block lie beside several
    tiles. Elsewhere what lies in shared memory fits 99 KiB.
    """
    if dtype == torch.float32:  # no tensor cores: small products stay in registers
        return BoundsTuning(32, 64, 8, 1)
    if capability == (9, 0):
        return BoundsTuning(64, 128, 8, 3) if head_dim <= 128 else BoundsTuning(32, 128, 8, 2)
    return BoundsTuning(64, 64, 8, 2) if head_dim <= 128 else BoundsTuning(32, 64, 8, 1)


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
    tuning = bounds_tuning(dim, q.dtype, capability(q.device))
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
                    "POSITIVE": scale > 0,
                    "BLOCKS_FIRST": tuning.tile >= 64,  # a warpgroup's product has 64 rows at least
                    "PRECISE": q.dtype == torch.float32,
                },
                device=q.device,
                overlap=True,
                num_warps=tuning.num_warps,
                num_stages=tuning.num_stages,
            )
    return BlockScores(log_p[..., :kv_blocks], peak)
