"""Stage 2: unite the masks of the heads and query blocks that must share one list of KV blocks."""

from __future__ import annotations

import torch

from compactattn import operators
from compactattn.data import GroupMask, PrefillBatch, SelectionMask
from compactattn.dispatch import resolve_backend
from compactattn.grouping import pick_groups
from compactattn.validation import Auto, check_grouping


def unite(
    selection: SelectionMask,
    batch: PrefillBatch,
    *,
    heads_per_group: int | Auto,
    query_blocks_per_span: int | Auto | None = None,
    backend: str | None = None,
) -> GroupMask:
    """Unite a selection over execution groups and add the current region.

    A row keeps each past block that a member selected and every current-region block that some query of a member
    sees; nothing else. Padded and invisible bits of the mask are ignored.

    Args:
        selection: bool [B, Hq, Qb, Kb].
        batch: the step that the selection was made for.
        heads_per_group: adjacent query heads that share a row. Divides Hq / Hkv, so that they lie in one KV group,
            where the mask knows its `kv_heads` (those of `select` do); of other masks it need only divide Hq. "auto"
            picks per request and KV head, on the device, what `compactattn.grouping` predicts to be fastest (it says
            what that costs).
        query_blocks_per_span: adjacent query blocks that share a row; None is the whole chunk, "auto" picks one block
            or the whole chunk.
        backend: None (by device), "triton" or "numba".

    Returns:
        GroupMask with R = B * (Hq / heads_per_group) * ceil(Qb / span) rows, plus one row per request for the query
        blocks at the end of the prompt if the selector has `dense_last_blocks` and the batch `prompt_lens`. The row
        of (b, h, i) is (b * Hq/heads_per_group + h // heads_per_group) * ceil(Qb / span) + i // span. With "auto", R
        is that of one head and one query block, a group uses the row of its first head and query block, and the rows
        of its others are empty; `grouping_of` tells what was picked.

    Raises:
        ValueError: a mask that does not fit the batch, a group size that does not divide the heads (of a KV group,
            as above), or "auto" for a mask that does not know its `kv_heads`.
    """
    if torch.compiler.is_compiling():
        shared = {"heads_per_group": heads_per_group, "query_blocks_per_span": query_blocks_per_span}
        return operators.call("unite", selection=selection, batch=batch, **shared, backend=backend)
    check_grouping(selection, batch, heads_per_group, query_blocks_per_span)
    chosen = resolve_backend(backend, selection.mask.device)
    if chosen == "triton":
        from compactattn._triton.union import unite as run
    else:
        from compactattn._numba.union import unite as run
    if heads_per_group == "auto" or query_blocks_per_span == "auto":
        assert selection.kv_heads is not None
        return pick_groups(run(selection, batch, 1, 1), selection.kv_heads, heads_per_group, query_blocks_per_span)
    span = span_blocks(batch.query_blocks(selection.query_block), query_blocks_per_span)
    return run(selection, batch, heads_per_group, span)


def span_blocks(query_blocks: int, query_blocks_per_span: int | None) -> int:
    """Query blocks that share a row: the whole chunk unless given, at least 1."""
    return max(1, query_blocks if query_blocks_per_span is None else min(query_blocks_per_span, query_blocks))
