"""Minimal block tables: ordered compaction of the kept blocks, from a group mask or straight from scores."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from compactattn._triton import next_power_of_2, on_device
from compactattn._triton.grouping import SIZES, pick_grouping, union_sizes
from compactattn._triton.launch import launch
from compactattn._triton.scores import MAX_PARTS, wanted_blocks
from compactattn._triton.union import (
    KEEP_TILE,
    first_dense_block,
    forced_blocks,
    last_block,
    row_count,
    row_members,
    store_rows,
)
from compactattn.data import BlockTable, GroupMask, PrefillBatch
from compactattn.grouping import DEFAULT_COSTS, candidates, costs_of
from compactattn.selection import BlockScores, log_threshold
from compactattn.selectors import Scored
from compactattn.union import span_blocks
from compactattn.validation import Auto

# Members of a row that a program reads at once. Measured on an H200 at 128K: 16 halve the time of a row of 32 against
# 8; a row of one member wants no more, and where the grouping is picked most rows have one.
MOST_MEMBERS, AUTO_MEMBERS = 16, 2


def members_at_once(heads_per_group: int | Auto, query_blocks_per_span: int | Auto | None) -> int:
    """A function of the settings alone: the length of a chunk must not decide what is compiled."""
    if heads_per_group == "auto" or query_blocks_per_span == "auto":
        return AUTO_MEMBERS
    if query_blocks_per_span is None:
        return MOST_MEMBERS
    return min(MOST_MEMBERS, next_power_of_2(heads_per_group * query_blocks_per_span))


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
        "tiles",
        "whole_span",
        "arithmetic_ps",
        "bytes_ps",
        "row_ps",
    ],
    do_not_specialize_on_alignment=["cu_seqlens_q", "seq_lens", "prompt_lens"],
)
def _table_from_scores_kernel(
    log_s,
    log_s_stride,
    part_max,
    parts,
    log_threshold,
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
    sizes,
    tiles,
    whole_span,
    arithmetic_ps,
    bytes_ps,
    row_ps,
    HEADS_PER_GROUP: tl.constexpr,
    GROUP: tl.constexpr,
    OPTIONS: tl.constexpr,
    TWO_SPANS: tl.constexpr,
    SIZES: tl.constexpr,
    QUERY_BLOCK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    DENSE_END: tl.constexpr,
    MAX_PARTS: tl.constexpr,
    MEMBERS: tl.constexpr,
    TILE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One program per row: threshold, forced blocks, union and ordered compaction in one pass over the scores.

    With OPTIONS, numbers of heads that may share a row, rows are numbered as those of one head and one query block, and
    `pick_grouping` says which of them are used, and by whom.
    """
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
    dense = (q_len <= dense_queries) | (past_len + q_len <= dense_keys)
    if DENSE_END:
        dense = dense | (r >= requests * groups * spans)
    first_head = (b * groups + group) * HEADS_PER_GROUP
    heads = HEADS_PER_GROUP
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    if len(OPTIONS) > 0:
        fixed = r < requests * groups * spans
        i = r % spans
        live = (q_len + QUERY_BLOCK - 1) // QUERY_BLOCK
        if DENSE_END:
            live = tl.minimum(live, first_dense_block(prompt_lens, b, q_len, past_len, dense_tail, QUERY_BLOCK))
        own_sizes = sizes + (b * groups + group).to(tl.int64) // GROUP * tiles * SIZES
        heads, picked_span = pick_grouping(
            own_sizes, tiles, live, whole_span, arithmetic_ps, bytes_ps, row_ps, GROUP, OPTIONS, TWO_SPANS, SIZES
        )
        leads = (group % heads == 0) & (i % picked_span == 0) & (first < stop)
        heads = tl.where(fixed, heads, 1)
        stop = tl.where(fixed, tl.where(leads, tl.minimum(i + picked_span, live), first), stop)
        row = r - group % heads * spans - i % picked_span
        if DENSE_END:
            row = tl.where((i >= live) & (i * QUERY_BLOCK < q_len), requests * groups * spans + b, row)
        tl.store(rows + r, row, mask=fixed)
    members = heads * tl.maximum(stop - first, 0)
    last = tl.where(stop > first, last_block(stop, q_len, past_len, QUERY_BLOCK, BLOCK_SIZE), -1)
    count = 0
    for start in range(0, last + 1, TILE):
        j = start + tl.arange(0, TILE)
        forced = forced_blocks(
            j, first, stop, q_len, past_len, sink_blocks, window_blocks, dense, QUERY_BLOCK, BLOCK_SIZE
        )
        kept = forced.to(tl.int32)
        if (start < past_blocks) & (dense == 0):
            for m0 in range(0, members, MEMBERS):
                m = m0 + tl.arange(0, MEMBERS)
                known = m < members
                member = (first_head + m // (stop - first)).to(tl.int64) * q_blocks + first + m % (stop - first)
                wanted = wanted_blocks(
                    log_s, log_s_stride, part_max, parts, log_threshold, member, known, j, past_blocks, MAX_PARTS
                )
                kept = kept | tl.max(wanted.to(tl.int32), axis=0)
        count = _append(indices + r.to(tl.int64) * kv_blocks, count, kept, j)
    tl.store(counts + r, count)
    if len(OPTIONS) == 0:
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
    scores: BlockScores,
    batch: PrefillBatch,
    selector: Scored,
    kv_heads: int,
    heads_per_group: int | Auto,
    query_blocks_per_span: int | Auto | None,
) -> BlockTable:
    """What select, unite and build_table give one after the other, without a mask in memory."""
    _, heads, q_blocks, kv_blocks = scores.log_s.shape
    device = scores.log_s.device
    group, whole = heads // kv_heads, span_blocks(q_blocks, None)
    options: tuple[int, ...] = ()
    groups, span = heads, 1  # of "auto": rows are numbered as those of one head and query block
    two_spans = query_blocks_per_span == "auto"
    sizes, tiles, costs = scores.part_max, 0, DEFAULT_COSTS
    if heads_per_group == "auto" or query_blocks_per_span == "auto":
        several = candidates(group, q_blocks, heads_per_group, query_blocks_per_span)
        options = tuple(sorted({n for n, _ in several}))
        whole = several[-1][1]
        sizes = union_sizes(scores, batch, selector, kv_heads, options, whole, query_blocks_per_span)
        tiles, costs = sizes.shape[2], costs_of(device)
    else:
        groups, span = heads // heads_per_group, span_blocks(q_blocks, query_blocks_per_span)
    spans = -(-q_blocks // span)
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
                log_threshold(selector),
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
                sizes,
                tiles,
                whole,
                costs.arithmetic_ps,
                costs.bytes_ps,
                costs.row_ps,
                constants={
                    "HEADS_PER_GROUP": heads // groups,
                    "GROUP": group,
                    "OPTIONS": options,
                    "TWO_SPANS": two_spans,
                    "SIZES": SIZES,
                    "QUERY_BLOCK": selector.query_block,
                    "BLOCK_SIZE": selector.block_size,
                    "DENSE_END": dense_end,
                    "MAX_PARTS": MAX_PARTS,
                    "MEMBERS": members_at_once(heads_per_group, query_blocks_per_span),
                    "TILE": KEEP_TILE,
                },
                device=indices.device,
                overlap=True,
                num_warps=4,
            )
    return BlockTable(indices, counts, rows, selector.block_size, selector.query_block)
