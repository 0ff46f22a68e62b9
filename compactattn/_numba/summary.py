"""Means of the cached keys and values over units of `min(page_size, block_size)` tokens."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from compactattn._numba.jit import kernel
from compactattn._numba.pages import Places, gather, in_units, locate_units
from compactattn._numba.threads import run_each
from compactattn.data import KVSummary, PagedKV, PrefillBatch

_SLAB_ELEMENTS = 1 << 20  # of the cache gathered at a time: 4 MiB in float32


def update_summary(kv: PagedKV, batch: PrefillBatch, summary: KVSummary, since: Tensor | int | None) -> None:
    """Recompute, in place, every unit that holds a position in [since, seq_lens), over slots below `seq_lens` only.

    Args:
        kv: the paged cache.
        batch: the step; only its lengths are read.
        summary: float32 [num_pages, page_size // unit, Hkv, D], keys and perhaps values.
        since: int32 [B], one int for all requests, or None for `past_lens`.
    """
    for places, tokens_in_last in stale_units(kv, batch, summary.unit, since):
        summary.k_mean[places] = unit_means(kv.k, places, summary.unit, tokens_in_last, kv.k_scale)
        if summary.v_mean is not None:
            summary.v_mean[places] = unit_means(kv.v, places, summary.unit, tokens_in_last, kv.v_scale)


def stale_units(
    kv: PagedKV, batch: PrefillBatch, unit: int, since: Tensor | int | None
) -> Iterator[tuple[Places, int]]:
    """(where a request's stale units lie, tokens in the last of them), for requests that have any."""
    first = batch.past_lens if since is None else torch.as_tensor(since).expand(batch.size)
    for request, (start, stop) in enumerate(zip(first.tolist(), batch.seq_lens.tolist(), strict=True)):
        if start < stop:
            units = torch.arange(max(start, 0) // unit, -(-stop // unit))
            yield locate_units(kv, request, units, unit), stop - int(units[-1]) * unit


def unit_means(cache: Tensor, places: Places, unit: int, tokens_in_last: int, scale: Tensor | None = None) -> Tensor:
    """Float32 means [n, Hkv, D] of n units of `cache` (kv.k or kv.v); the last holds `tokens_in_last` tokens.

    `scale` is that of an FP8 cache, float32 [Hkv].

    A unit's mean depends on its own tokens alone, bit for bit, whichever units are asked for beside it.
    """
    count, (kv_heads, dim) = len(places.pages), cache.shape[2:]
    means = torch.empty((count, kv_heads, dim), dtype=torch.float32)
    units = in_units(cache, unit)
    tasks = []
    for slab, here in slabs(places, unit * kv_heads * dim):
        last = tokens_in_last if here.stop == count else unit
        tasks.append(functools.partial(_mean_slab, units, slab, last, means[here]))
    run_each(tasks)
    return means if scale is None else means.mul_(scale[:, None])


def slabs(places: Places, elements: int) -> Iterator[tuple[Places, slice]]:
    """Units of so many elements each, as many at a time as one task gathers, and which of the n they are."""
    per_slab, count = max(1, _SLAB_ELEMENTS // elements), len(places.pages)
    for start in range(0, count, per_slab):
        here = slice(start, min(start + per_slab, count))
        yield Places(places.pages[here], places.slots[here]), here


def _mean_slab(units: Tensor, slab: Places, tokens_in_last: int, means: Tensor) -> None:
    rows = gather(units, slab).flatten(2).contiguous()  # one memory layout, so that one kernel is compiled
    _mean_rows(rows.numpy(), tokens_in_last, means.flatten(1).numpy())


def block_means(units: Tensor, units_per_block: int) -> Tensor:
    """Float32 means [blocks, Hkv, D] of complete KV blocks, from their units' [blocks * units_per_block, ...]."""
    blocks = torch.empty((len(units) // units_per_block, *units.shape[1:]), dtype=torch.float32)
    grouped = units.unflatten(0, (-1, units_per_block)).flatten(2)
    _mean_rows(grouped.contiguous().numpy(), units_per_block, blocks.flatten(1).numpy())
    return blocks


@kernel
def _mean_rows(values: np.ndarray, rows_in_last: int, means: np.ndarray) -> None:
    """means[u] = values[u].mean(0); float32 [n, rows, width] to [n, width], added up row by row."""
    count, rows, width = values.shape
    for u in range(count):
        used = rows_in_last if u == count - 1 else rows
        for w in range(width):
            means[u, w] = values[u, 0, w]
        for t in range(1, used):
            for w in range(width):
                means[u, w] += values[u, t, w]
        for w in range(width):
            means[u, w] /= np.float32(used)
