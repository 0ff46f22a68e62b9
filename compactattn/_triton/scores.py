"""FlashPrefill scores: log S(i, j) of every query block against every complete KV block."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from compactattn._triton import on_device
from compactattn._triton.summary import block_means
from compactattn._triton.union import request_lens
from compactattn.data import KVSummary, PagedKV, PrefillBatch
from compactattn.selection import BlockScores
from compactattn.selectors import FlashPrefill

TILES_PER_PROGRAM = 4
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit(do_not_specialize=["q_blocks", "kv_blocks", "tiles", "parts"])
def _scores_kernel(
    q,
    q_stride_token,
    q_stride_head,
    block_means,
    cu_seqlens_q,
    seq_lens,
    log_s,
    tile_max,
    scale,
    q_blocks,
    kv_blocks,
    tiles,
    parts,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    QUERY_BLOCK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    TILES_PER_PROGRAM: tl.constexpr,
):
    """One program per (TILES_PER_PROGRAM tiles of KV blocks, query block, head; request).

    KV blocks are the rows of the product and queries its columns: the sum over queries stays within a warp.
    """
    part = tl.program_id(0) % parts
    i = tl.program_id(0) // parts % q_blocks
    head = tl.program_id(0) // parts // q_blocks
    b = tl.program_id(1)
    q_start, q_len, past_len = request_lens(cu_seqlens_q, seq_lens, b)
    out_row = (b.to(tl.int64) * HEADS + head) * q_blocks + i
    # complete blocks that end at or before the query block's last row; an absent query block scores nothing
    reach = (past_len + tl.minimum((i + 1) * QUERY_BLOCK, q_len)) // BLOCK_SIZE
    reach = tl.where(i * QUERY_BLOCK < q_len, reach, 0)
    first_tile = part * TILES_PER_PROGRAM
    stop_tile = tl.minimum(first_tile + TILES_PER_PROGRAM, tiles)
    scored_tile = tl.minimum(stop_tile, tl.maximum(first_tile, (reach + TILE - 1) // TILE))
    dim = tl.arange(0, DIM_PADDED)
    means = block_means + (b.to(tl.int64) * (HEADS // GROUP) + head // GROUP) * kv_blocks * DIM
    q_base = q + q_start.to(tl.int64) * q_stride_token + head.to(tl.int64) * q_stride_head
    lane = i * QUERY_BLOCK + tl.arange(0, ROWS)
    q_mask = (lane < q_len)[:, None] & (dim < DIM)[None, :]
    q_lanes = tl.load(q_base + lane.to(tl.int64)[:, None] * q_stride_token + dim[None, :], mask=q_mask, other=0.0)
    for tile in range(first_tile, scored_tile):
        j = tile * TILE + tl.arange(0, TILE)
        k_mask = (j < reach)[:, None] & (dim < DIM)[None, :]
        keys = tl.load(means + j.to(tl.int64)[:, None] * DIM + dim[None, :], mask=k_mask, other=0.0)
        ends = tl.where(j < reach, (j + 1) * BLOCK_SIZE - 1, 0x7FFFFFFF)
        peak = tl.full([TILE], float("-inf"), tl.float32)
        total = tl.zeros([TILE], tl.float32)
        for start in tl.static_range(0, QUERY_BLOCK, ROWS):
            row = i * QUERY_BLOCK + start + tl.arange(0, ROWS)
            if start == 0:
                queries = q_lanes
            else:
                q_mask = (row < q_len)[:, None] & (dim < DIM)[None, :]
                q_pointers = q_base + row.to(tl.int64)[:, None] * q_stride_token + dim[None, :]
                queries = tl.load(q_pointers, mask=q_mask, other=0.0)
            s = tl.dot(keys, tl.trans(queries), input_precision="ieee") * (scale * LOG2_E)
            position = tl.where(row < q_len, past_len + row, -1)
            s = tl.where(position[None, :] >= ends[:, None], s, float("-inf"))
            new_peak = tl.maximum(peak, tl.max(s, axis=1))
            shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
            total = total * tl.exp2(peak - shift) + tl.sum(tl.exp2(s - shift[:, None]), axis=1)
            peak = new_peak
        scored = peak > float("-inf")
        score = tl.where(scored, (peak + tl.log2(tl.where(scored, total, 1.0))) * LN_2, float("-inf"))
        tl.store(log_s + out_row * kv_blocks + j, score, mask=j < kv_blocks)
        tl.store(tile_max + out_row * tiles + tile, tl.max(score, axis=0))
    for tile in range(scored_tile, stop_tile):
        j = tile * TILE + tl.arange(0, TILE)
        nothing = tl.full([TILE], float("-inf"), tl.float32)
        tl.store(log_s + out_row * kv_blocks + j, nothing, mask=j < kv_blocks)
        tl.store(tile_max + out_row * tiles + tile, float("-inf"))


def flash_prefill_scores(
    q: Tensor,
    kv: PagedKV,
    batch: PrefillBatch,
    selector: FlashPrefill,
    *,
    scale: float,
    summary: KVSummary | None,
) -> BlockScores:
    """Score every block on the device; nothing is read back and nothing depends on a length but the grid."""
    heads, dim = q.shape[1:]
    q_blocks, kv_blocks = batch.query_blocks(selector.query_block), batch.kv_blocks(selector.block_size)
    means = block_means(kv, batch, selector.block_size, q.dtype, summary)
    rows, tile, num_warps = _scores_tuning(dim, q.dtype, selector.query_block)
    tiles = triton.cdiv(kv_blocks, tile)
    parts = triton.cdiv(tiles, TILES_PER_PROGRAM)
    log_s = torch.empty((batch.size, heads, q_blocks, kv_blocks), dtype=torch.float32, device=q.device)
    tile_max = torch.empty((batch.size, heads, q_blocks, tiles), dtype=torch.float32, device=q.device)
    if log_s.numel():
        with on_device(q):
            _scores_kernel[(parts * q_blocks * heads, batch.size)](
                q,
                q.stride(0),
                q.stride(1),
                means,
                batch.cu_seqlens_q,
                batch.seq_lens,
                log_s,
                tile_max,
                scale,
                q_blocks,
                kv_blocks,
                tiles,
                parts,
                HEADS=heads,
                GROUP=heads // kv.num_kv_heads,
                DIM=dim,
                DIM_PADDED=triton.next_power_of_2(dim),
                QUERY_BLOCK=selector.query_block,
                BLOCK_SIZE=selector.block_size,
                ROWS=rows,
                TILE=tile,
                TILES_PER_PROGRAM=TILES_PER_PROGRAM,
                num_warps=num_warps,
            )
    return BlockScores(log_s, tile_max)


def _scores_tuning(head_dim: int, dtype: torch.dtype, query_block: int) -> tuple[int, int, int]:
    """(rows per product, KV blocks per program, warps): a function of the problem's constants, never of a length."""
    if dtype == torch.float32:  # no tensor cores: small tiles keep the products in registers
        return (32 if head_dim <= 128 else 16), 32, 8
    return query_block, (128 if head_dim <= 128 else 64), 8
