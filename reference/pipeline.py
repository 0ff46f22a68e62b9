"""One chunked-prefill step: select, unite, build the table, attend."""

from __future__ import annotations

import torch

from compactattn.data import KVSummary, PagedKV, PrefillBatch
from compactattn.selectors import Selector
from compactattn.validation import Auto
from reference.attention import attend
from reference.density import count_density
from reference.selection import select
from reference.summary import summarize
from reference.table import build_table
from reference.union import unite


def prefill(
    q: torch.Tensor,
    kv: PagedKV,
    batch: PrefillBatch,
    *,
    selector: Selector,
    heads_per_group: int | Auto,
    query_blocks_per_span: int | Auto | None = None,
    scale: float | None = None,
    summary: KVSummary | None = None,
    correction: bool | KVSummary = False,
    softcap: float | None = None,
    window: int | None = None,
    sinks: torch.Tensor | None = None,
    density: torch.Tensor | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """attend(q, kv, batch, build_table(unite(select(q, ...)))); a given summary is brought up to date first.

    The selection judges plain scores of every visible block: softcap, window and sinks belong to attention alone.

    correction=True corrects with the summary; the summary itself means the same. What the step reads of its past is
    added to `density`, int64 [2].
    """
    if isinstance(correction, KVSummary):
        summary, correction = correction, True
    if summary is not None:
        summarize(kv, batch, block_size=selector.block_size, summary=summary)
    selection = select(q, kv, batch, selector, scale=scale, summary=summary)
    groups = unite(selection, batch, heads_per_group=heads_per_group, query_blocks_per_span=query_blocks_per_span)
    means = summary if correction else None
    table = build_table(groups)
    if density is not None:
        count_density(table, batch, density, window=window)
    return attend(
        q,
        kv,
        batch,
        table,
        scale=scale,
        correction=means,
        softcap=softcap,
        window=window,
        sinks=sinks,
        return_lse=return_lse,
    )
