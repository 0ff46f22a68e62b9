"""Minimal block tables: ordered compaction of the kept blocks, from a group mask or straight from scores."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from compactattn._triton import on_device
from compactattn._triton.launch import launch
from compactattn._triton.scores import MAX_PARTS
from compactattn._triton.union import KEEP_TILE, last_block, row_count, row_members, store_rows
from compactattn.data import BlockTable, GroupMask, PrefillBatch
from compactattn.selection import BlockScores, log_alpha
from compactattn.selectors import FlashPrefill


@triton.jit
def _append(indices_row, count, kept, j):
    """Write the kept block ids behind the `count` entries that the row already has; returns the new count."""
    place = count + tl.cumsum(kept, axis=0) - kept
    tl.store(indices_row + place, j, mask=kept != 0)
    return count + tl.sum(kept, axis=0)


@triton.jit(do_not_specialize=["kv_blocks"])
def _compact_kernel(keep, indices, counts, kv_blocks, TILE: tl.constexpr):
    """One program per row."""
    r = tl.program_id(0).to(tl.int64)
    count = 0
    for start in range(0, kv_blocks, TILE):
        j = start + tl.arange(0, TILE)
        kept = tl.load(keep + r * kv_blocks + j, mask=j < kv_blocks, other=0).to(tl.int32)
        count = _append(indices + r * kv_blocks, count, kept, j)
    tl.store(counts + r, count)


def build_table(groups: GroupMask) -> BlockTable:
    """Compact each row of the mask; the tail of a row is left unwritten."""
    num_rows, kv_blocks = groups.keep.shape
    keep = groups.keep.contiguous()
    indices = torch.empty((num_rows, kv_blocks), dtype=torch.int32, device=keep.device)
    counts = torch.zeros(num_rows, dtype=torch.int32, device=keep.device)
    if keep.numel():
        with on_device(keep):
            launch(
                _compact_kernel,
                (num_rows,),
                keep.view(torch.uint8),
                indices,
                counts,
                kv_blocks,
                constants={"TILE": KEEP_TILE},
                device=keep.device,
                num_warps=4,
            )
    return BlockTable(indices, counts, groups.rows.contiguous(), groups.block_size, groups.query_block)


@triton.jit(
    do_not_specialize=[
        "parts",
        "sink_blocks",
        "window_blocks",
        "dense_queries",
        "dense_keys",
        "dense_tail",
        "requests",
        "groups",
        "spans",
        "span",
        "q_blocks",
        "kv_blocks",
    ],
    do_not_specialize_on_alignment=["cu_seqlens_q", "seq_lens", "prompt_lens"],
)
def _table_from_scores_kernel(
    log_s,
    log_s_stride,
    part_max,
    parts,
    log_alpha,
    sink_blocks,
    window_blocks,
    dense_queries,
    dense_keys,
    indices,
    counts,
    rows,
    cu_seqlens_q,
    seq_lens,
    prompt_lens,
    dense_tail,
    requests,
    groups,
    spans,
    span,
    q_blocks,
    kv_blocks,
    HEADS_PER_GROUP: tl.constexpr,
    QUERY_BLOCK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    DENSE_END: tl.constexpr,
    MAX_PARTS: tl.constexpr,
    MEMBERS: tl.constexpr,
    TILE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One program per row: threshold, forced blocks, union and ordered compaction in one pass over the scores."""
    r = tl.program_id(0)
    b, group, first, stop, q_len, past_len = row_members(
        r,
        cu_seqlens_q,
        seq_lens,
        prompt_lens,
        dense_tail,
        requests,
        groups,
        spans,
        span,
        QUERY_BLOCK,
        DENSE_END,
    )
    past_blocks = past_len // BLOCK_SIZE
    last = tl.where(stop > first, last_block(stop, q_len, past_len, QUERY_BLOCK, BLOCK_SIZE), -1)
    # the first member's window reaches back furthest, and every past block is visible to every member
    window_from = last_block(first + 1, q_len, past_len, QUERY_BLOCK, BLOCK_SIZE) - window_blocks + 1
    dense = (q_len <= dense_queries) | (past_len + q_len <= dense_keys)
    if DENSE_END:
        dense = dense | (r >= requests * groups * spans)
    first_head = (b * groups + group) * HEADS_PER_GROUP
    members = HEADS_PER_GROUP * tl.maximum(stop - first, 0)
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    count = 0
    for start in range(0, last + 1, TILE):
        j = start + tl.arange(0, TILE)
        forced = (j >= past_blocks) | (j < sink_blocks) | (j >= window_from) | dense
        kept = (forced & (j <= last)).to(tl.int32)
        if (start < past_blocks) & (dense == 0):
            for m0 in range(0, members, MEMBERS):
                m = m0 + tl.arange(0, MEMBERS)
                known = m < members
                member = (first_head + m // (stop - first)).to(tl.int64) * q_blocks + first + m % (stop - first)
                part = tl.arange(0, MAX_PARTS)
                peaks = tl.load(
                    part_max + member[:, None] * parts + part[None, :],
                    mask=known[:, None] & (part < parts)[None, :],
                    other=float("-inf"),
                )
                threshold = tl.max(peaks, axis=1) + log_alpha
                s = tl.load(
                    log_s + member[:, None] * log_s_stride + j[None, :],
                    mask=known[:, None] & (j < past_blocks)[None, :],
                    other=float("-inf"),
                )
                wanted = (s >= threshold[:, None]) & (s > float("-inf"))
                kept = kept | tl.max(wanted.to(tl.int32), axis=0)
        count = _append(indices + r.to(tl.int64) * kv_blocks, count, kept, j)
    tl.store(counts + r, count)
    store_rows(
        rows,
        r,
        cu_seqlens_q,
        seq_lens,
        prompt_lens,
        dense_tail,
        requests,
        groups,
        spans,
        span,
        q_blocks,
        HEADS_PER_GROUP,
        QUERY_BLOCK,
        DENSE_END,
    )


def table_from_scores(
    scores: BlockScores, batch: PrefillBatch, selector: FlashPrefill, heads_per_group: int, span: int
) -> BlockTable:
    """What select, unite and build_table give one after the other, without a mask in memory."""
    assert scores.part_max is not None
    _, heads, q_blocks, kv_blocks = scores.log_s.shape
    device = scores.log_s.device
    groups, spans = heads // heads_per_group, -(-q_blocks // span)
    dense_end = selector.dense_last_blocks > 0 and batch.prompt_lens is not None
    num_rows = row_count(batch, groups, spans, dense_end)
    indices = torch.empty((num_rows, kv_blocks), dtype=torch.int32, device=device)
    counts = torch.empty(num_rows, dtype=torch.int32, device=device)
    rows = torch.empty((batch.size, heads, q_blocks), dtype=torch.int32, device=device)
    if num_rows:
        with on_device(indices):
            launch(
                _table_from_scores_kernel,
                (num_rows,),
                scores.log_s,
                scores.log_s.stride(2),
                scores.part_max,
                scores.part_max.shape[-1],
                log_alpha(selector),
                selector.sink_blocks,
                selector.window_blocks,
                selector.dense_queries,
                selector.dense_keys,
                indices,
                counts,
                rows,
                batch.cu_seqlens_q,
                batch.seq_lens,
                batch.prompt_lens if dense_end else batch.seq_lens,
                selector.dense_last_blocks * selector.query_block,
                batch.size,
                groups,
                spans,
                span,
                q_blocks,
                kv_blocks,
                constants={
                    "HEADS_PER_GROUP": heads_per_group,
                    "QUERY_BLOCK": selector.query_block,
                    "BLOCK_SIZE": selector.block_size,
                    "DENSE_END": dense_end,
                    "MAX_PARTS": MAX_PARTS,
                    "MEMBERS": min(16, 4 * triton.next_power_of_2(heads_per_group)),
                    "TILE": KEEP_TILE,
                },
                device=indices.device,
                overlap=True,
                num_warps=4,
            )
    return BlockTable(indices, counts, rows, selector.block_size, selector.query_block)
