"""Means of the cached keys and values, and bounds on the keys."""

from __future__ import annotations

import torch

from compactattn.data import GateKeys, KVSummary, PagedKV, PrefillBatch
from compactattn.selectors import SeerGate
from reference.requests import requests, tokens


def summarize(
    kv: PagedKV,
    batch: PrefillBatch,
    *,
    block_size: int,
    values: bool = False,
    since: torch.Tensor | int | None = None,
    summary: KVSummary | None = None,
    gate: SeerGate | None = None,
    bounds: bool = False,
) -> KVSummary:
    """Recompute whole every unit that holds a position in [since, seq_len), over slots below seq_len only.

    `since` defaults to 0 for a new summary and to past_len for one that is brought up to date in place. With `gate`
    or `bounds`, a new summary also holds what SeerGate or KeyBounds needs; a given one is extended by what it holds.
    """
    num_pages, page_size, kv_heads, dim = kv.k.shape
    unit = min(page_size, block_size)
    if summary is None:
        since = 0 if since is None else since
        shape = (num_pages, page_size // unit, kv_heads, dim)
        k_mean = torch.zeros(shape, dtype=torch.float32, device=kv.k.device)
        keys = None
        if gate is not None:
            pooled = torch.zeros((*shape[:3], 3 * dim), dtype=torch.float32, device=kv.k.device)
            keys = GateKeys(pooled, gate.inv_freq.float(), gate.rope_scale)
        k_bounds = torch.zeros((*shape[:3], 2 * dim), dtype=torch.float32, device=kv.k.device) if bounds else None
        summary = KVSummary(k_mean, torch.zeros_like(k_mean) if values else None, unit, keys, k_bounds)
    for request in requests(batch):
        first = request.past_len if since is None else int(since if isinstance(since, int) else since[request.index])
        if first >= request.seq_len:
            continue
        for start in range(first // unit * unit, request.seq_len, unit):
            positions = torch.arange(start, min(start + unit, request.seq_len), device=kv.k.device)
            page = kv.page_table[request.index, start // page_size].long()
            slot = start % page_size // unit
            summary.k_mean[page, slot] = tokens("k", kv, request, positions).float().mean(0)
            if summary.v_mean is not None:
                summary.v_mean[page, slot] = tokens("v", kv, request, positions).float().mean(0)
            if summary.k_bounds is not None:
                keys = tokens("k", kv, request, positions).float()
                summary.k_bounds[page, slot] = torch.cat((keys.amax(0), keys.amin(0)), dim=-1)
            if summary.gate is not None:
                keys = tokens("k", kv, request, positions).transpose(0, 1)
                summary.gate.pooled[page, slot] = pooled_keys(keys, positions, summary.gate)
    return summary


def pooled_keys(keys: torch.Tensor, positions: torch.Tensor, gate: GateKeys) -> torch.Tensor:
    """[max | min | mean] over tokens of keys [Hkv, n, D] before RoPE: [Hkv, 3 D]."""
    before = unrotate(
        keys.to(torch.promote_types(keys.dtype, torch.float32)), positions, gate.inv_freq, gate.rope_scale
    )
    return torch.cat((before.amax(1), before.amin(1), before.mean(1)), dim=-1)


def unrotate(x: torch.Tensor, positions: torch.Tensor, inv_freq: torch.Tensor, scale: float) -> torch.Tensor:
    """x [..., n, D] before RoPE, which turned dimensions d and d + D/2 by the float32 angle position · inv_freq[d]."""
    angle = (positions.float()[:, None] * inv_freq).to(x.dtype)
    low, high = x.chunk(2, dim=-1)
    turned = low * angle.cos() + high * angle.sin(), high * angle.cos() - low * angle.sin()
    return torch.cat(turned, dim=-1) / scale
