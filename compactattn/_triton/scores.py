"""FlashPrefill scores: log S(i, j) of every query block against every complete KV block.

The kernel here is the general one; `hopper_scores` runs what `hopper_rule` allows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from compactattn._triton import capability, multiprocessors, next_power_of_2, on_device
from compactattn._triton.hopper_rule import tma_strides, why_not_hopper
from compactattn._triton.launch import launch
from compactattn._triton.summary import block_means
from compactattn._triton.union import request_lens
from compactattn.data import KVSummary, PagedKV, PrefillBatch
from compactattn.selection import BlockScores
from compactattn.selectors import FlashPrefill

MAX_PARTS = 8
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _load_queries(
    q,
    q_stride_token,
    q_stride_head,
    q_start,
    q_len,
    i,
    head,
    dim,
    DIM: tl.constexpr,
    QUERY_BLOCK: tl.constexpr,
):
    """Components `dim` of query block i of a head; zeros beyond the chunk."""
    row = i * QUERY_BLOCK + tl.arange(0, QUERY_BLOCK)
    offset = (q_start + row).to(tl.int64) * q_stride_token + head.to(tl.int64) * q_stride_head
    return tl.load(q + offset[:, None] + dim[None, :], mask=(row < q_len)[:, None] & (dim < DIM)[None, :], other=0.0)


@triton.jit
def _score_tiles(
    best,
    first_tile,
    stop_tile,
    queries,
    q,
    q_stride_token,
    q_stride_head,
    q_start,
    q_len,
    past_len,
    i,
    head,
    means,
    reach,
    log_s,
    log_s_stride,
    scale,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    QUERY_BLOCK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    POSITIVE_SCALE: tl.constexpr,
    PRECISE: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Score and store tiles [first_tile, stop_tile); MASKED where a row may not score a block. `scale` is in base 2.

    KV blocks are the rows of the product and queries its columns, so that a sum over queries stays within a warp.
    PRECISE (float32, without tensor cores) adds the product up in parts that fit the registers.
    """
    for tile in range(first_tile, stop_tile):
        j = tile * TILE + tl.arange(0, TILE)
        row_of_means = means + j.to(tl.int64)[:, None] * DIM
        if PRECISE:
            s = tl.zeros([TILE, QUERY_BLOCK], tl.float32)
            for start in range(0, DIM, 16):
                dim = start + tl.arange(0, 16)
                keys = tl.load(row_of_means + dim[None, :], mask=(j < reach)[:, None], other=0.0)
                part = _load_queries(q, q_stride_token, q_stride_head, q_start, q_len, i, head, dim, DIM, QUERY_BLOCK)
                s = tl.dot(keys, tl.trans(part), s, input_precision="ieee")
        else:
            dim = tl.arange(0, DIM_PADDED)
            if MASKED:
                keys = tl.load(row_of_means + dim[None, :], mask=(j < reach)[:, None] & (dim < DIM)[None, :], other=0.0)
            elif DIM == DIM_PADDED:
                keys = tl.load(row_of_means + dim[None, :])
            else:
                keys = tl.load(row_of_means + dim[None, :], mask=(dim < DIM)[None, :], other=0.0)
            s = tl.dot(keys, tl.trans(queries))
        if not POSITIVE_SCALE:
            s = s * scale
        if MASKED:
            row = i * QUERY_BLOCK + tl.arange(0, QUERY_BLOCK)
            position = tl.where(row < q_len, past_len + row, -1)
            ends = tl.where(j < reach, (j + 1) * BLOCK_SIZE - 1, 0x7FFFFFFF)
            s = tl.where(position[None, :] >= ends[:, None], s, float("-inf"))
        peak = tl.max(s, axis=1)
        if POSITIVE_SCALE:
            peak = peak * scale
            s = s * scale
        shift = tl.where(peak == float("-inf"), 0.0, peak) if MASKED else peak
        total = tl.sum(tl.exp2(s - shift[:, None]), axis=1)
        if MASKED:
            total = tl.where(peak == float("-inf"), 1.0, total)
        score = (peak + tl.log2(total)) * LN_2
        tl.store(log_s + j, score, mask=j < log_s_stride)
        best = tl.maximum(best, score)
    return best


@triton.jit(
    do_not_specialize=["q_blocks", "kv_blocks", "tiles", "parts", "tiles_per_part"],
    do_not_specialize_on_alignment=["cu_seqlens_q", "seq_lens"],
)
def _scores_kernel(
    q,
    q_stride_token,
    q_stride_head,
    block_means,
    cu_seqlens_q,
    seq_lens,
    log_s,
    log_s_stride,
    part_max,
    scale,
    q_blocks,
    kv_blocks,
    tiles,
    parts,
    tiles_per_part,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    QUERY_BLOCK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    POSITIVE_SCALE: tl.constexpr,
    PRECISE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One program per (part of the KV blocks, query block, head; request)."""
    part = tl.program_id(0) % parts
    i = tl.program_id(0) // parts % q_blocks
    head = tl.program_id(0) // parts // q_blocks
    b = tl.program_id(1)
    q_start, q_len, past_len = request_lens(cu_seqlens_q, seq_lens, b)
    out_row = (b.to(tl.int64) * HEADS + head) * q_blocks + i
    log_s += out_row * log_s_stride
    # complete blocks that end at or before the query block's last row, and those that even its first row scores
    present = i * QUERY_BLOCK < q_len
    reach = tl.where(present, (past_len + tl.minimum((i + 1) * QUERY_BLOCK, q_len)) // BLOCK_SIZE, 0)
    full = tl.where((i + 1) * QUERY_BLOCK <= q_len, (past_len + i * QUERY_BLOCK + 1) // BLOCK_SIZE, 0)
    first_tile = part * tiles_per_part
    stop_tile = tl.minimum(first_tile + tiles_per_part, tiles)
    scored_tile = tl.minimum(stop_tile, tl.maximum(first_tile, (reach + TILE - 1) // TILE))
    full_tile = tl.minimum(scored_tile, tl.maximum(first_tile, full // TILE))
    means = block_means + (b.to(tl.int64) * (HEADS // GROUP) + head // GROUP) * kv_blocks * DIM
    queries = 0.0
    if not PRECISE:
        dim = tl.arange(0, DIM_PADDED)
        queries = _load_queries(q, q_stride_token, q_stride_head, q_start, q_len, i, head, dim, DIM, QUERY_BLOCK)
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    best = tl.full([TILE], float("-inf"), tl.float32)
    for masked in tl.static_range(2):
        best = _score_tiles(
            best,
            full_tile if masked else first_tile,
            scored_tile if masked else full_tile,
            queries,
            q,
            q_stride_token,
            q_stride_head,
            q_start,
            q_len,
            past_len,
            i,
            head,
            means,
            reach,
            log_s,
            log_s_stride,
            scale * LOG2_E,
            DIM,
            DIM_PADDED,
            QUERY_BLOCK,
            BLOCK_SIZE,
            TILE,
            POSITIVE_SCALE,
            PRECISE,
            masked,
        )
    tl.store(part_max + out_row * parts + part, tl.max(best, axis=0))
    for tile in range(scored_tile, stop_tile):
        j = tile * TILE + tl.arange(0, TILE)
        tl.store(log_s + j, tl.full([TILE], float("-inf"), tl.float32), mask=j < log_s_stride)


@triton.jit
def wanted_blocks(
    log_s, log_s_stride, part_max, parts, log_threshold, member, known, j, past_blocks, MAX_PARTS: tl.constexpr
):
    """Past blocks j that members' scores keep, bool [members, j]: at least alpha times the member's largest score."""
    part = tl.arange(0, MAX_PARTS)
    peaks = tl.load(
        part_max + member[:, None] * parts + part[None, :],
        mask=known[:, None] & (part < parts)[None, :],
        other=float("-inf"),
    )
    threshold = tl.max(peaks, axis=1) + log_threshold
    s = tl.load(
        log_s + member[:, None] * log_s_stride + j[None, :],
        mask=known[:, None] & (j < past_blocks)[None, :],
        other=float("-inf"),
    )
    return (s >= threshold[:, None]) & (s > float("-inf"))


@dataclass(frozen=True)
class ScoresTuning:
    """How one call of the kernel is shaped.

    Attributes:
        tile: KV blocks per product.
        num_warps, num_stages: Triton's launch options.
    """

    tile: int
    num_warps: int
    num_stages: int


def scores_tuning(head_dim: int, dtype: torch.dtype) -> ScoresTuning:
    """A function of the problem's constants, never of a length."""
    if dtype == torch.float32:  # no tensor cores: small products stay in registers
        return ScoresTuning(32, 8, 1)
    return ScoresTuning(64, 4, 2 if head_dim > 128 else 3)


def parts_of_a_row(tiles: int, rows: int, multiprocessors: int) -> int:
    """Into how many parts, at most MAX_PARTS, to cut the tiles of each of `rows` rows of programs.

    The fewest rounds of programs, two to a multiprocessor, where loading its queries costs a program what 1.5 tiles do.
    """
    return min(
        range(1, min(MAX_PARTS, max(1, tiles)) + 1),
        key=lambda parts: -(-rows * parts // (2 * multiprocessors)) * (tiles / parts + 1.5),
    )


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
    group = heads // kv.num_kv_heads
    q_blocks, kv_blocks = batch.query_blocks(selector.query_block), batch.kv_blocks(selector.block_size)
    means = block_means(kv, batch, selector.block_size, q.dtype, summary)
    stride = -(-kv_blocks // 16) * 16  # aligned rows
    refusal = why_not_hopper(capability(q.device), q.dtype, dim, selector.query_block)
    if refusal is None and scale > 0 and q.shape[0] and tma_strides(q):  # TMA has no descriptor of nothing
        from compactattn._triton.hopper_scores import score_blocks

        log_s, part_max = score_blocks(q, means, batch, selector.block_size, scale, stride, MAX_PARTS)
        return BlockScores(log_s[..., :kv_blocks], part_max)
    tuning = scores_tuning(dim, q.dtype)
    tiles, programs = -(-kv_blocks // tuning.tile), q_blocks * heads
    parts = parts_of_a_row(tiles, programs * batch.size, multiprocessors(q.device))
    log_s = torch.empty((batch.size, heads, q_blocks, stride), dtype=torch.float32, device=q.device)
    part_max = torch.empty((batch.size, heads, q_blocks, parts), dtype=torch.float32, device=q.device)
    if log_s.numel():
        with on_device(q):
            launch(
                _scores_kernel,
                (parts * programs, batch.size),
                q,
                q.stride(0),
                q.stride(1),
                means,
                batch.cu_seqlens_q,
                batch.seq_lens,
                log_s,
                stride,
                part_max,
                scale,
                q_blocks,
                kv_blocks,
                tiles,
                parts,
                -(-tiles // parts),
                constants={
                    "HEADS": heads,
                    "GROUP": group,
                    "DIM": dim,
                    "DIM_PADDED": next_power_of_2(dim),
                    "QUERY_BLOCK": selector.query_block,
                    "BLOCK_SIZE": selector.block_size,
                    "TILE": tuning.tile,
                    "POSITIVE_SCALE": scale > 0,
                    "PRECISE": q.dtype == torch.float32,
                },
                device=q.device,
                overlap=True,
                num_warps=tuning.num_warps,
                num_stages=tuning.num_stages,
            )
    return BlockScores(log_s[..., :kv_blocks], part_max)
