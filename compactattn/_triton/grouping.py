"""The pick of `compactattn.grouping` in two steps: the sizes of all unions, then, per row, the cheapest grouping."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from compactattn._triton import next_power_of_2, on_device
from compactattn._triton.launch import launch
from compactattn._triton.scores import MAX_PARTS, wanted_blocks
from compactattn._triton.union import first_dense_block, forced_blocks, request_lens
from compactattn.data import PrefillBatch
from compactattn.selection import BlockScores, log_threshold
from compactattn.selectors import Scored
from compactattn.validation import Auto

TILE = 32  # KV blocks of one program
MEMBERS = 32  # pairs of a head and a query block that a program looks at together
SIZES = 8  # numbers per program: up to six candidates, and last the blocks that anyone reads


@triton.jit
def _union_size(kept, HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_PADDED: tl.constexpr):
    """Blocks that the groups of HEADS heads keep, summed; kept: int32 [spans, GROUP_PADDED, TILE], 0 or 1."""
    if HEADS == 1:
        size = tl.sum(kept)
    else:
        g = tl.arange(0, GROUP_PADDED)
        size = 0
        for first in tl.static_range(0, GROUP, HEADS):
            own = (g >= first) & (g < first + HEADS)
            size += tl.sum(tl.max(tl.where(own[None, :, None], kept, 0), axis=1))
    return size


@triton.jit
def _add_unions(sizes, kept, blocks, first, OPTIONS: tl.constexpr, GROUP: tl.constexpr, GROUP_PADDED: tl.constexpr):
    """Add members * |union| of spans of `blocks` query blocks to sizes [SIZES], a number per option, from `first`."""
    place = tl.arange(0, sizes.shape[0])
    for option in tl.static_range(len(OPTIONS)):
        size = _union_size(kept, OPTIONS[option], GROUP, GROUP_PADDED)
        sizes += tl.where(place == first + option, size * blocks * OPTIONS[option], 0)
    return sizes


@triton.jit(
    do_not_specialize=[
        "parts",
        "sink_blocks",
        "window_blocks",
        "dense_queries",
        "dense_keys",
        "dense_tail",
        "span",
        "q_blocks",
        "tiles",
    ],
    do_not_specialize_on_alignment=["cu_seqlens_q", "seq_lens", "prompt_lens"],
)
def _union_sizes_kernel(
    log_s,
    log_s_stride,
    part_max,
    parts,
    log_threshold,
    sink_blocks,
    window_blocks,
    dense_queries,
    dense_keys,
    cu_seqlens_q,
    seq_lens,
    prompt_lens,
    dense_tail,
    sizes,
    span,
    q_blocks,
    tiles,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PADDED: tl.constexpr,
    OPTIONS: tl.constexpr,
    TWO_SPANS: tl.constexpr,
    QUERY_BLOCK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    DENSE_END: tl.constexpr,
    MAX_PARTS: tl.constexpr,
    BLOCKS: tl.constexpr,
    TILE: tl.constexpr,
    SIZES: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One program per (tile of KV blocks, KV head, request): what the rows of each candidate keep, times members.

    Candidates are OPTIONS (heads) of spans of one query block, if TWO_SPANS, then OPTIONS of spans of `span`. BLOCKS
    query blocks are looked at together: one, unless `span` is the whole chunk.
    """
    tile, kv_head, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    _, q_len, past_len = request_lens(cu_seqlens_q, seq_lens, b)
    live = (q_len + QUERY_BLOCK - 1) // QUERY_BLOCK
    if DENSE_END:
        live = tl.minimum(live, first_dense_block(prompt_lens, b, q_len, past_len, dense_tail, QUERY_BLOCK))
    dense = (q_len <= dense_queries) | (past_len + q_len <= dense_keys)
    scored_blocks = tl.where(dense, 0, past_len // BLOCK_SIZE)
    j = tile * TILE + tl.arange(0, TILE)
    m = tl.arange(0, BLOCKS * GROUP_PADDED)  # members: query blocks times heads
    head = (b * KV_HEADS + kv_head).to(tl.int64) * GROUP + m % GROUP_PADDED
    found = tl.zeros([SIZES], tl.int32)
    united = tl.zeros([GROUP_PADDED, TILE], tl.int32)
    read = tl.zeros([TILE], tl.int32)
    OF_SPAN: tl.constexpr = len(OPTIONS) if TWO_SPANS else 0
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    for first in range(0, live, BLOCKS):
        i = first + m // GROUP_PADDED
        known = (i < live) & (m % GROUP_PADDED < GROUP)
        forced = forced_blocks(
            j[None, :],
            i[:, None],
            i[:, None] + 1,
            q_len,
            past_len,
            sink_blocks,
            window_blocks,
            dense,
            QUERY_BLOCK,
            BLOCK_SIZE,
        )
        wanted = wanted_blocks(
            log_s, log_s_stride, part_max, parts, log_threshold, head * q_blocks + i, known, j, scored_blocks, MAX_PARTS
        )
        kept = ((forced & known[:, None]) | wanted).to(tl.int32).reshape(BLOCKS, GROUP_PADDED, TILE)
        if TWO_SPANS:
            found = _add_unions(found, kept, 1, 0, OPTIONS, GROUP, GROUP_PADDED)
        united = united | tl.max(kept, axis=0)
        stop = tl.minimum(first + BLOCKS, live)
        if stop % span == 0 or stop == live:
            blocks = stop - first // span * span
            found = _add_unions(found, united[None, :, :], blocks, OF_SPAN, OPTIONS, GROUP, GROUP_PADDED)
            read = read | tl.max(united, axis=0)
            united = tl.zeros([GROUP_PADDED, TILE], tl.int32)
    place = tl.arange(0, SIZES)
    found += tl.where(place == SIZES - 1, tl.sum(read, axis=0), 0)
    tl.store(sizes + ((b * KV_HEADS + kv_head).to(tl.int64) * tiles + tile) * SIZES + place, found)


@triton.jit
def pick_grouping(
    sizes,
    tiles,
    live,
    span,
    arithmetic_ps,
    bytes_ps,
    row_ps,
    GROUP: tl.constexpr,
    OPTIONS: tl.constexpr,
    TWO_SPANS: tl.constexpr,
    SIZES: tl.constexpr,
):
    """(heads, query blocks) of the candidate of least predicted time, the finer where equal.

    sizes: where those of the request and KV head begin; live: its query blocks that may share rows.
    """
    place = tl.arange(0, SIZES)
    total = tl.zeros([SIZES], tl.int64)
    for t0 in range(0, tiles, 64):
        t = t0 + tl.arange(0, 64)
        found = tl.load(sizes + t[:, None] * SIZES + place[None, :], mask=(t < tiles)[:, None], other=0)
        total += tl.sum(found.to(tl.int64), axis=0)
    read_ps = tl.sum(tl.where(place == SIZES - 1, total, 0), axis=0) * bytes_ps
    heads, blocks = 1, span
    best = tl.full([], 0x7FFFFFFFFFFFFFFF, tl.int64)
    for several in tl.static_range(0 if TWO_SPANS else 1, 2):
        own_span = span if several else 1
        for option in tl.static_range(len(OPTIONS)):
            candidate = option + (len(OPTIONS) if several and TWO_SPANS else 0)
            rows = (GROUP // OPTIONS[option]) * ((live + own_span - 1) // own_span)
            size = tl.sum(tl.where(place == candidate, total, 0), axis=0)
            time = tl.maximum(size * arithmetic_ps, read_ps) + rows.to(tl.int64) * row_ps
            better = time < best
            heads = tl.where(better, OPTIONS[option], heads)
            blocks = tl.where(better, own_span, blocks)
            best = tl.minimum(best, time)
    return heads, blocks


def union_sizes(
    scores: BlockScores,
    batch: PrefillBatch,
    selector: Scored,
    kv_heads: int,
    options: tuple[int, ...],
    span: int,
    query_blocks_per_span: int | Auto | None,
) -> Tensor:
    """int32 [B, Hkv, tiles, SIZES]: per tile of KV blocks, members * |union| summed over each candidate's rows.

    span: the coarser candidates' query blocks, those of the setting within the chunk.
    """
    requests, heads, q_blocks, kv_blocks = scores.log_s.shape
    tiles, padded = -(-kv_blocks // TILE), next_power_of_2(heads // kv_heads)
    dense_end = selector.dense_last_blocks > 0 and batch.prompt_lens is not None
    sizes = torch.empty((requests, kv_heads, tiles, SIZES), dtype=torch.int32, device=scores.log_s.device)
    with on_device(sizes):
        launch(
            _union_sizes_kernel,
            (tiles, kv_heads, requests),
            scores.log_s,
            scores.log_s.stride(2),
            scores.part_max,
            scores.part_max.shape[-1],
            log_threshold(selector),
            selector.sink_blocks,
            selector.window_blocks,
            selector.dense_queries,
            selector.dense_keys,
            batch.cu_seqlens_q,
            batch.seq_lens,
            batch.prompt_lens if dense_end else batch.seq_lens,
            selector.dense_last_blocks * selector.query_block,
            sizes,
            span,
            q_blocks,
            tiles,
            constants={
                "KV_HEADS": kv_heads,
                "GROUP": heads // kv_heads,
                "GROUP_PADDED": padded,
                "OPTIONS": options,
                "TWO_SPANS": query_blocks_per_span == "auto",
                "QUERY_BLOCK": selector.query_block,
                "BLOCK_SIZE": selector.block_size,
                "DENSE_END": dense_end,
                "MAX_PARTS": MAX_PARTS,
                "BLOCKS": max(1, MEMBERS // padded) if query_blocks_per_span in (None, "auto") else 1,
                "TILE": TILE,
                "SIZES": SIZES,
            },
            device=sizes.device,
            overlap=True,
            num_warps=4,
        )
    return sizes
