"""The union of the masks that must share one list of KV blocks."""

from __future__ import annotations

import torch

from compactattn.data import GroupMask, PrefillBatch, SelectionMask
from compactattn.grouping import grouping_costs
from reference.requests import Request, requests


def unite(
    selection: SelectionMask,
    batch: PrefillBatch,
    *,
    heads_per_group: int | str,
    query_blocks_per_span: int | str | None = None,
) -> GroupMask:
    """The union of each execution group; "auto" chooses a grouping per request and KV head."""
    if "auto" in (heads_per_group, query_blocks_per_span):
        return _unite_auto(selection, batch, heads_per_group, query_blocks_per_span)
    return _unite_fixed(selection, batch, heads_per_group, query_blocks_per_span)


def _unite_fixed(
    selection: SelectionMask, batch: PrefillBatch, heads_per_group: int, query_blocks_per_span: int | None
) -> GroupMask:
    """table(r) = union of the members' past bits, and every current-region block that some query of a member sees.

    The row of (b, h, i) is (b * Hq/heads_per_group + h // heads_per_group) * ceil(Qb / span) + i // span. Query blocks
    that the selector kept dense at the end of the prompt share one extra row per request, after those.
    """
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


def _unite_auto(
    selection: SelectionMask, batch: PrefillBatch, heads_per_group: int | str, query_blocks_per_span: int | str | None
) -> GroupMask:
    """Lay the rows of all candidate groupings one after the other; use, and fill, those of the fastest.

    Candidates are one head or the whole KV group, times one query block or the whole chunk, the finest first.
    """
    heads, q_blocks = selection.mask.shape[1:3]
    per_kv_head = heads // selection.kv_heads
    head_choices = [1, per_kv_head] if heads_per_group == "auto" else [heads_per_group]
    span_choices = [1, None] if query_blocks_per_span == "auto" else [query_blocks_per_span]
    candidates = []
    for span in span_choices:
        for group in head_choices:
            grouping = (group, max(1, q_blocks) if span is None else min(span, max(1, q_blocks)))
            if grouping not in candidates:
                candidates.append(grouping)
    united = [_unite_fixed(selection, batch, group, span) for group, span in candidates]
    if len(united) == 1 or q_blocks == 0:
        return united[0]
    bases = [sum(len(groups.keep) for groups in united[:n]) for n in range(len(united))]
    rows = united[0].rows.clone()
    used = set()
    for request in requests(batch):
        b = request.index
        blocks = request.query_blocks(selection.query_block)
        positions = selection.dense_last_blocks * selection.query_block
        grouped = [i for i, queries in enumerate(blocks) if not request.ends_prompt(queries, positions)]
        for kv_head in range(selection.kv_heads):
            own = range(kv_head * per_kv_head, (kv_head + 1) * per_kv_head)
            times = [_time(selection, request, groups, own, grouped) for groups in united]
            best = times.index(min(times))
            for h in own:
                for i in range(q_blocks):
                    if i in grouped or i >= len(blocks):
                        rows[b, h, i] = united[best].rows[b, h, i] + bases[best]
                    if i < len(blocks):
                        used.add(int(rows[b, h, i]))
    keep = torch.cat([groups.keep for groups in united])
    keep[[r for r in range(len(keep)) if r not in used]] = False
    return GroupMask(keep, rows, selection.block_size, selection.query_block)


def _time(selection: SelectionMask, request: Request, groups: GroupMask, heads: range, grouped: list[int]) -> int:
    """Predicted picoseconds of one KV head: the larger of arithmetic and bytes, and what its rows cost."""
    costs = grouping_costs(groups.keep.device, selection.block_size, selection.query_block)
    blocks = request.query_blocks(selection.query_block)
    members = [(int(groups.rows[request.index, h, i]), i) for h in heads for i in grouped]
    tiles = sum(
        int(groups.keep[r, : request.last_visible_block(blocks[i], selection.block_size) + 1].sum()) for r, i in members
    )
    rows = {r for r, _ in members}
    entries = sum(int(groups.keep[r].sum()) for r in rows)
    return max(tiles * costs.tile, entries * costs.block) + len(rows) * costs.row
