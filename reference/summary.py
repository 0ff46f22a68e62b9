"""Means of the cached keys and values."""

from __future__ import annotations

import torch

from compactattn.data import KVSummary, PagedKV, PrefillBatch
from reference.requests import requests, tokens


def summarize(
    kv: PagedKV,
    batch: PrefillBatch,
    *,
    block_size: int,
    values: bool = False,
    since: torch.Tensor | int | None = None,
    summary: KVSummary | None = None,
) -> KVSummary:
    """Recompute whole every unit that holds a position in [since, seq_len), over slots below seq_len only.

    `since` defaults to 0 for a new summary and to past_len for one that is brought up to date in place.
    """
    num_pages, page_size, kv_heads, dim = kv.k.shape
    unit = min(page_size, block_size)
    if summary is None:
        since = 0 if since is None else since
        shape = (num_pages, page_size // unit, kv_heads, dim)
        k_mean = torch.zeros(shape, dtype=torch.float32, device=kv.k.device)
        summary = KVSummary(k_mean, torch.zeros_like(k_mean) if values else None, unit)
    for request in requests(batch):
        first = request.past_len if since is None else int(since if isinstance(since, int) else since[request.index])
        if first >= request.seq_len:
            continue
        for start in range(first // unit * unit, request.seq_len, unit):
            positions = torch.arange(start, min(start + unit, request.seq_len), device=kv.k.device)
            page = kv.page_table[request.index, start // page_size].long()
            slot = start % page_size // unit
            summary.k_mean[page, slot] = tokens(kv.k, kv, request, positions).float().mean(0)
            if summary.v_mean is not None:
                summary.v_mean[page, slot] = tokens(kv.v, kv, request, positions).float().mean(0)
    return summary
