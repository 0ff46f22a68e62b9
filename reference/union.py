"""The union of the masks that must share one list of KV blocks."""

from __future__ import annotations

import torch

from compactattn.data import GroupMask, PrefillBatch, SelectionMask
from reference.requests import requests


def unite(
    selection: SelectionMask,
    batch: PrefillBatch,
    *,
    heads_per_group: int,
    query_blocks_per_span: int | None = None,
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
