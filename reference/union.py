"""The union of the masks that must share one list of KV blocks."""

from __future__ import annotations

import torch

from compactattn.data import GroupMask, PrefillBatch, SelectionMask
from compactattn.grouping import costs_of
from compactattn.validation import Auto
from reference.requests import requests


def unite(
    selection: SelectionMask,
    batch: PrefillBatch,
    *,
    heads_per_group: int | Auto,
    query_blocks_per_span: int | Auto | None = None,
) -> GroupMask:
    """table(r) = union of the members' past bits, and every current-region block that some query of a member sees.

    The row of (b, h, i) is (b * Hq/heads_per_group + h // heads_per_group) * ceil(Qb / span) + i // span. Query blocks
    that the selector kept dense at the end of the prompt share one extra row per request, after those.

    With "auto", each request and KV head picks its own grouping; a group then uses the row that its first head and
    query block would have alone.
    """
    if "auto" in (heads_per_group, query_blocks_per_span):
        return _unite_as_picked(selection, batch, heads_per_group, query_blocks_per_span)
    block_size, query_block = selection.block_size, selection.query_block
    size, heads, q_blocks, kv_blocks = selection.mask.shape
    span = max(1, q_blocks) if query_blocks_per_span is None else query_blocks_per_span
    spans = -(-q_blocks // span)
    groups = heads // heads_per_group
    fixed_rows = size * groups * spans
    dense_end = selection.dense_last_blocks > 0 and batch.prompt_lens is not None
    keep = torch.zeros((fixed_rows + (size if dense_end else 0), kv_blocks), dtype=torch.bool)
    rows = torch.zeros((size, heads, q_blocks), dtype=torch.int32)
    for request in requests(batch):
        b, past = request.index, request.past_blocks(block_size)
        blocks = request.query_blocks(query_block)
        for h in range(heads):
            for i in range(q_blocks):
                r = (b * groups + h // heads_per_group) * spans + i // span
                if i < len(blocks):
                    if dense_end and request.ends_prompt(blocks[i], selection.dense_last_blocks * query_block):
                        r = fixed_rows + b
                    last = request.last_visible_block(blocks[i], block_size)
                    keep[r, :past] |= selection.mask[b, h, i, :past].cpu()
                    keep[r, past : last + 1] = True
                rows[b, h, i] = r
    device = selection.mask.device
    return GroupMask(keep.to(device), rows.to(device), block_size, query_block)


def _unite_as_picked(
    selection: SelectionMask,
    batch: PrefillBatch,
    heads_per_group: int | Auto,
    query_blocks_per_span: int | Auto | None,
) -> GroupMask:
    """From the groups of one head and one query block, unite those that the least predicted time puts together."""
    finest = unite(selection, batch, heads_per_group=1, query_blocks_per_span=1)
    size, heads, q_blocks = finest.rows.shape
    group, fixed_rows = heads // selection.kv_heads, size * heads * q_blocks
    keep, rows = finest.keep.clone(), finest.rows.clone()
    keep[:fixed_rows] = False
    for request in requests(batch):
        b = request.index
        for first in range(0, heads, group):
            own = finest.rows[b, first : first + group]  # [G, Qb]
            options = _options(group, q_blocks, heads_per_group, query_blocks_per_span)
            n_heads, span = min(options, key=lambda option: _predicted_ps(finest, own, fixed_rows, *option))
            for h in range(group):
                for i in range(q_blocks):
                    if own[h, i] < fixed_rows:
                        row = (b * heads + first + h // n_heads * n_heads) * q_blocks + i // span * span
                        keep[row] |= finest.keep[own[h, i]]
                        rows[b, first + h, i] = row
    return GroupMask(keep, rows, selection.block_size, selection.query_block)


def _options(
    group: int, q_blocks: int, heads_per_group: int | Auto, query_blocks_per_span: int | Auto | None
) -> list[tuple[int, int]]:
    """(heads, query blocks) from fine to coarse: 1, a few (at most 4) or all heads, times one query block or all."""
    few = [n for n in (1, 2, 3, 4) if group % n == 0 and n < group][-1:]
    heads = sorted({1, *few, group}) if heads_per_group == "auto" else [heads_per_group]
    if query_blocks_per_span == "auto":
        spans = [1, q_blocks] if q_blocks > 1 else [1]
    else:
        spans = [max(1, q_blocks) if query_blocks_per_span is None else min(query_blocks_per_span, max(1, q_blocks))]
    return [(n_heads, span) for span in spans for n_heads in heads]


def _predicted_ps(finest: GroupMask, own: torch.Tensor, fixed_rows: int, n_heads: int, span: int) -> int:
    """max(sum over rows of members * blocks * arithmetic, blocks that any member reads * bytes) + rows * row."""
    costs, rows, tile_blocks = costs_of(finest.keep.device), 0, 0
    for h in range(0, own.shape[0], n_heads):
        for i in range(0, own.shape[1], span):
            kept = [finest.keep[r] for r in own[h : h + n_heads, i : i + span].flatten() if r < fixed_rows]
            members = sum(int(keep.any()) for keep in kept)
            if members:
                rows += 1
                tile_blocks += members * int(torch.stack(kept).any(0).sum())
    read = finest.keep[[int(r) for r in own.flatten() if r < fixed_rows]].any(0).sum()
    return max(tile_blocks * costs.arithmetic_ps, int(read) * costs.bytes_ps) + rows * costs.row_ps
