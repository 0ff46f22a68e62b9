"""Means of the cached keys and values, kept beside the cache and extended chunk by chunk."""

from __future__ import annotations

import torch
from torch import Tensor

from compactattn.data import KVSummary, PagedKV, PrefillBatch
from compactattn.dispatch import resolve_backend
from compactattn.validation import (
    check_blocks,
    check_cache,
    check_int,
    check_readable,
    check_same_device,
    check_shape,
    check_summary,
    check_tensor,
    fail,
)


def summarize(
    kv: PagedKV,
    batch: PrefillBatch,
    *,
    block_size: int,
    values: bool = False,
    since: Tensor | int | None = None,
    summary: KVSummary | None = None,
    backend: str | None = None,
) -> KVSummary:
    """Average the cached keys (and values), or bring a summary up to date in place.

    Every unit of `min(page_size, block_size)` tokens that holds a position in [`since`, `seq_lens`) is recomputed
    whole, in float32, over slots below `seq_lens` only. A page that several requests share must lie within all of
    them, as shared prefixes do: its means are those of the page, not of one request.

    Args:
        kv: the paged cache.
        batch: the step; only `seq_lens` and `cu_seqlens_q` are read.
        block_size: the selector's block size (64, 128 or 256).
        values: average the values too (a new summary only; a given one decides by its own `v_mean`).
        since: int32 [B], or one int for all requests. Default: `past_lens` for a given summary, 0 (everything)
            for a new one.
        summary: the summary to extend; None allocates one, zero where no request has a token.
        backend: None, "triton" or "numba".

    Returns:
        The summary that was given, or a new one: float32 [num_pages, page_size // unit, Hkv, D].

    Raises:
        ValueError: wrong shape, dtype, device or contradictory lengths, before anything runs.
    """
    check_readable(kv)
    check_cache(kv, batch, kv.k.device)
    check_blocks(kv, block_size)
    chosen = resolve_backend(backend, kv.k.device)
    if isinstance(since, Tensor):
        check_tensor("since", since, ndim=1, dtype=torch.int32)
        check_shape("since", since, (batch.size,), "one per request")
        check_same_device("since", since, kv.k.device)
        if not since.is_contiguous():
            raise fail("since", "a contiguous tensor", f"strides {since.stride()}")
    elif since is not None:
        check_int("since", since, 0)
    if summary is None:
        summary = _empty_summary(kv, block_size, values)
        since = 0 if since is None else since
    else:
        check_summary(summary, kv, block_size, values=values)
    if chosen == "triton":
        from compactattn._triton.summary import update_summary
    else:
        from compactattn._numba.summary import update_summary
    update_summary(kv, batch, summary, since)
    return summary


def _empty_summary(kv: PagedKV, block_size: int, values: bool) -> KVSummary:
    unit = min(kv.page_size, block_size)
    shape = (kv.k.shape[0], kv.page_size // unit, kv.num_kv_heads, kv.head_dim)
    k_mean = torch.zeros(shape, dtype=torch.float32, device=kv.k.device)
    return KVSummary(k_mean, torch.zeros_like(k_mean) if values else None, unit)
