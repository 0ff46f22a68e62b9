"""Means of the cached keys and values, and bounds on the keys, kept beside the cache and extended chunk by chunk."""

from __future__ import annotations

import torch
from torch import Tensor

from compactattn import operators
from compactattn.data import GateKeys, KVSummary, PagedKV, PrefillBatch
from compactattn.dispatch import Backend, check_cache_dtype, resolve_backend
from compactattn.selectors import SeerGate
from compactattn.validation import (
    check_blocks,
    check_cache,
    check_flag,
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
    gate: SeerGate | None = None,
    bounds: bool = False,
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
        gate: pool the keys for this selector too (a new summary only; a given one decides by its own `gate`).
        bounds: keep the largest and the smallest key of each dimension too, for `KeyBounds` (a new summary only; a
            given one decides by its own `k_bounds`).
        backend: None, "triton" or "numba".

    Returns:
        The summary that was given, or a new one: float32 [num_pages, page_size // unit, Hkv, D].

    Raises:
        ValueError: wrong shape, dtype, device or contradictory lengths, before anything runs.
    """
    if torch.compiler.is_compiling():
        if summary is None:
            summary = _empty_summary(kv, block_size, values, gate, bounds)
            since = 0 if since is None else since
        how = {"block_size": block_size, "values": values, "since": since, "backend": backend}
        return operators.call("summarize", kv=kv, batch=batch, summary=summary, **how)
    check_readable(kv)
    if gate is not None:
        if not isinstance(gate, SeerGate):
            raise fail("gate", "a SeerGate or None", type(gate).__name__)
        check_shape("gate.inv_freq", gate.inv_freq, (kv.head_dim // 2,), "half the head dimension")
        check_same_device("gate.inv_freq", gate.inv_freq, kv.k.device)
    check_cache(kv, batch, kv.k.device)
    check_blocks(kv, block_size)
    check_flag("values", values)
    check_flag("bounds", bounds)
    chosen = resolve_backend(backend, kv.k.device)
    check_cache_dtype(kv, chosen)
    if isinstance(since, Tensor):
        check_tensor("since", since, ndim=1, dtype=torch.int32)
        check_shape("since", since, (batch.size,), "one per request")
        check_same_device("since", since, kv.k.device)
        if not since.is_contiguous():
            raise fail("since", "a contiguous tensor", f"strides {since.stride()}")
    elif since is not None:
        check_int("since", since, 0)
    if summary is None:
        summary = _empty_summary(kv, block_size, values, gate, bounds)
        since = 0 if since is None else since
    else:
        check_summary(summary, kv, block_size, values=values)
        if gate is not None and summary.gate is None:
            raise fail("summary", "a summary with gate keys (summarize(..., gate=selector))", "gate=None")
        if bounds and summary.k_bounds is None:
            raise fail("summary", "a summary with bounds (summarize(..., bounds=True))", "k_bounds=None")
    refresh(kv, batch, summary, since, chosen)
    return summary


def refresh(kv: PagedKV, batch: PrefillBatch, summary: KVSummary, since: Tensor | int | None, backend: Backend) -> None:
    """Bring a summary up to date in place: `summarize` after its checks."""
    if backend == "triton":
        from compactattn._triton.summary import update_summary
    else:
        from compactattn._numba.summary import update_summary
    update_summary(kv, batch, summary, since)
    if summary.gate is not None:
        if backend == "triton":
            from compactattn._triton.gate import update_gate
        else:
            from compactattn._numba.gate import update_gate
        update_gate(kv, batch, summary.gate, summary.unit, since)
    if summary.k_bounds is not None:
        if backend == "triton":
            from compactattn._triton.bounds import update_bounds
        else:
            from compactattn._numba.bounds import update_bounds
        update_bounds(kv, batch, summary.k_bounds, summary.unit, since)


def _empty_summary(kv: PagedKV, block_size: int, values: bool, gate: SeerGate | None, bounds: bool) -> KVSummary:
    unit = min(kv.page_size, block_size)
    shape = (kv.k.shape[0], kv.page_size // unit, kv.num_kv_heads, kv.head_dim)
    k_mean = torch.zeros(shape, dtype=torch.float32, device=kv.k.device)
    keys = None if gate is None else empty_gate_keys(kv, unit, gate)
    k_bounds = torch.zeros((*shape[:3], 2 * kv.head_dim), dtype=torch.float32, device=kv.k.device) if bounds else None
    return KVSummary(k_mean, torch.zeros_like(k_mean) if values else None, unit, keys, k_bounds)


def empty_gate_keys(kv: PagedKV, unit: int, gate: SeerGate) -> GateKeys:
    """Zeros for every unit of the cache, and the rotation that is to be undone."""
    shape = (kv.k.shape[0], kv.page_size // unit, kv.num_kv_heads, 3 * kv.head_dim)
    pooled = torch.zeros(shape, dtype=torch.float32, device=kv.k.device)
    return GateKeys(pooled, gate.inv_freq.float().contiguous(), float(gate.rope_scale))
