"""The union over execution groups, from a selection mask to rows of kept blocks."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from compactattn._triton import next_power_of_2, on_device
from compactattn._triton.launch import launch
from compactattn.data import GroupMask, PrefillBatch, SelectionMask

KEEP_TILE = 1024


@triton.jit
def request_lens(cu_seqlens_q, seq_lens, b):
    """(q_start, q_len, past_len) of request b."""
    q_start = tl.load(cu_seqlens_q + b)
    q_len = tl.load(cu_seqlens_q + b + 1) - q_start
    return q_start, q_len, tl.load(seq_lens + b) - q_len


@triton.jit
def first_dense_block(prompt_lens, b, q_len, past_len, dense_tail, QUERY_BLOCK: tl.constexpr):
    """The first query block that reaches into the last `dense_tail` positions of the prompt, or ceil(q_len / block)."""
    needed = tl.load(prompt_lens + b) - dense_tail - past_len + 1  # queries up to and including the first such row
    first = (tl.maximum(needed, 1) + QUERY_BLOCK - 1) // QUERY_BLOCK - 1
    return tl.where(needed <= q_len, first, (q_len + QUERY_BLOCK - 1) // QUERY_BLOCK)


@triton.jit
def row_members(
    r,
    cu_seqlens_q,
    seq_lens,
    prompt_lens,
    dense_tail,
    requests,
    groups,
    spans,
    span,
    QUERY_BLOCK: tl.constexpr,
    DENSE_END: tl.constexpr,
):
    """Which request, group and query blocks [first, stop) share row r; stop <= first for a row nobody uses.

    Rows from requests * groups * spans on belong to the query blocks at the end of a prompt, one row per request.
    """
    fixed = requests * groups * spans
    b = r // (groups * spans)
    group = r // spans % groups
    if DENSE_END:
        b = tl.where(r < fixed, b, r - fixed)
        group = tl.where(r < fixed, group, 0)
    _, q_len, past_len = request_lens(cu_seqlens_q, seq_lens, b)
    blocks = (q_len + QUERY_BLOCK - 1) // QUERY_BLOCK
    first = r % spans * span
    stop = tl.minimum(first + span, blocks)
    if DENSE_END:
        dense_from = first_dense_block(prompt_lens, b, q_len, past_len, dense_tail, QUERY_BLOCK)
        first = tl.where(r < fixed, first, dense_from)
        stop = tl.where(r < fixed, tl.minimum(stop, dense_from), blocks)
    return b, group, first, stop, q_len, past_len


@triton.jit
def last_block(i_stop, q_len, past_len, QUERY_BLOCK: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """The KV block of the last row before query block `i_stop`: the last one visible to it."""
    return (past_len + tl.minimum(i_stop * QUERY_BLOCK, q_len) - 1) // BLOCK_SIZE


@triton.jit
def forced_blocks(
    j,
    first,
    stop,
    q_len,
    past_len,
    sink_blocks,
    window_blocks,
    dense,
    QUERY_BLOCK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """Blocks j that query blocks [first, stop) keep without any score: sink, window, current region; all if `dense`.

    The first query block's window reaches back furthest, and every past block is visible to every query block.
    """
    last = tl.where(stop > first, last_block(stop, q_len, past_len, QUERY_BLOCK, BLOCK_SIZE), -1)
    window_from = last_block(first + 1, q_len, past_len, QUERY_BLOCK, BLOCK_SIZE) - window_blocks + 1
    forced = (j >= past_len // BLOCK_SIZE) | (j < sink_blocks) | (j >= window_from) | dense
    return forced & (j <= last)


@triton.jit
def store_rows(
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
    HEADS_PER_GROUP: tl.constexpr,
    QUERY_BLOCK: tl.constexpr,
    DENSE_END: tl.constexpr,
):
    """Write rows[b, h, i] for every (head, query block) whose fixed row is r, padded query blocks included."""
    if r < requests * groups * spans:
        b = r // (groups * spans)
        group = r // spans % groups
        dense_from = q_blocks
        if DENSE_END:
            _, q_len, past_len = request_lens(cu_seqlens_q, seq_lens, b)
            blocks = (q_len + QUERY_BLOCK - 1) // QUERY_BLOCK
            dense_from = first_dense_block(prompt_lens, b, q_len, past_len, dense_tail, QUERY_BLOCK)
        first = r % spans * span
        for start in range(first, tl.minimum(first + span, q_blocks), 64):
            i = start + tl.arange(0, 64)
            row = i * 0 + r
            if DENSE_END:
                row = tl.where((i >= dense_from) & (i < blocks), requests * groups * spans + b, row)
            valid = i < tl.minimum(first + span, q_blocks)
            for h in tl.static_range(HEADS_PER_GROUP):
                head = (b * groups + group).to(tl.int64) * HEADS_PER_GROUP + h
                tl.store(rows + head * q_blocks + i, row, mask=valid)


@triton.jit(
    do_not_specialize=["dense_tail", "requests", "groups", "spans", "span", "q_blocks", "kv_blocks"],
    do_not_specialize_on_alignment=["cu_seqlens_q", "seq_lens", "prompt_lens"],
)
def _unite_kernel(
    mask,
    keep,
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
    HEADS_PADDED: tl.constexpr,
    QUERY_BLOCK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    DENSE_END: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program per (row, tile of KV blocks)."""
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
    j = tl.program_id(1) * TILE + tl.arange(0, TILE)
    kept = ((j >= past_blocks) & (j <= last)).to(tl.int32)
    group_heads = HEADS_PER_GROUP
    if DENSE_END:  # every head of the request shares the row of the prompt's end
        group_heads = tl.where(r < requests * groups * spans, HEADS_PER_GROUP, groups * HEADS_PER_GROUP)
    if tl.program_id(1) * TILE < past_blocks:
        for h0 in range(0, group_heads, HEADS_PADDED):
            h = h0 + tl.arange(0, HEADS_PADDED)
            head = (b * groups + group).to(tl.int64) * HEADS_PER_GROUP + h
            for i in range(first, stop):
                pointers = mask + (head * q_blocks + i)[:, None] * kv_blocks + j[None, :]
                wanted = tl.load(pointers, mask=(h < group_heads)[:, None] & (j < past_blocks)[None, :], other=0)
                kept = kept | tl.max(wanted.to(tl.int32), axis=0)
    tl.store(keep + r.to(tl.int64) * kv_blocks + j, kept.to(tl.uint8), mask=j < kv_blocks)
    if tl.program_id(1) == 0:
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


def row_count(batch: PrefillBatch, groups: int, spans: int, dense_end: bool) -> int:
    return batch.size * groups * spans + (batch.size if dense_end else 0)


def unite(selection: SelectionMask, batch: PrefillBatch, heads_per_group: int, span: int) -> GroupMask:
    """Union of the members of each row, plus its current region; rows of padded query blocks included."""
    mask = selection.mask.contiguous()
    _, heads, q_blocks, kv_blocks = mask.shape
    groups, spans = heads // heads_per_group, -(-q_blocks // span)
    dense_end = selection.dense_last_blocks > 0 and batch.prompt_lens is not None
    num_rows = row_count(batch, groups, spans, dense_end)
    keep = torch.empty((num_rows, kv_blocks), dtype=torch.uint8, device=mask.device)
    rows = torch.empty((batch.size, heads, q_blocks), dtype=torch.int32, device=mask.device)
    if keep.numel():
        with on_device(mask):
            launch(
                _unite_kernel,
                (num_rows, -(-kv_blocks // KEEP_TILE)),
                mask.view(torch.uint8),
                keep,
                rows,
                batch.cu_seqlens_q,
                batch.seq_lens,
                batch.prompt_lens if dense_end else batch.seq_lens,
                selection.dense_last_blocks * selection.query_block,
                batch.size,
                groups,
                spans,
                span,
                q_blocks,
                kv_blocks,
                constants={
                    "HEADS_PER_GROUP": heads_per_group,
                    "HEADS_PADDED": next_power_of_2(heads_per_group),
                    "QUERY_BLOCK": selection.query_block,
                    "BLOCK_SIZE": selection.block_size,
                    "DENSE_END": dense_end,
                    "TILE": KEEP_TILE,
                },
                device=mask.device,
                num_warps=4,
            )
    return GroupMask(keep.view(torch.bool), rows, selection.block_size, selection.query_block)
