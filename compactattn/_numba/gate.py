"""What SeerGate needs of queries and keys: RoPE undone, then pooled."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from compactattn._numba.pages import Places, gather, in_units, locate_units
from compactattn._numba.threads import run_each
from compactattn.data import GateKeys, PagedKV, PrefillBatch
from compactattn.seer_gate import unrotate

_SLAB_ELEMENTS = 1 << 20  # of the cache gathered at a time: 4 MiB in float32


def update_gate(kv: PagedKV, batch: PrefillBatch, gate: GateKeys, unit: int, since: Tensor | int | None) -> None:
    """Pool again, in place, every unit that holds a position in [since, seq_lens), over slots below `seq_lens` only.

    Args:
        gate: float32 [num_pages, page_size // unit, Hkv, 3 * D].
        since: int32 [B], one int for all requests, or None for `past_lens`.
    """
    first = batch.past_lens if since is None else torch.as_tensor(since).expand(batch.size)
    per_slab = max(1, _SLAB_ELEMENTS // (unit * kv.num_kv_heads * kv.head_dim))
    tasks = []
    for request, (start, stop) in enumerate(zip(first.tolist(), batch.seq_lens.tolist(), strict=True)):
        if start >= stop:
            continue
        units = torch.arange(max(start, 0) // unit, -(-stop // unit))
        for some in units.split(per_slab):
            places = locate_units(kv, request, some, unit)
            tasks.append(functools.partial(_pool_slab, kv, gate, places, some, unit, stop))
    run_each(tasks)


def _pool_slab(kv: PagedKV, gate: GateKeys, places: Places, units: Tensor, unit: int, seq_len: int) -> None:
    position = units[:, None] * unit + torch.arange(unit)  # [n, unit]
    keys = gather(in_units(kv.k, unit), places, kv.k_scale).transpose(1, 2)  # [n, Hkv, unit, D]
    keys = unrotate(keys, position[:, None], gate.inv_freq, gate.rope_scale)
    beyond = (position >= seq_len)[:, None, :, None]
    count = (seq_len - units * unit).clamp(max=unit)[:, None, None]
    parts = (
        keys.masked_fill(beyond, -math.inf).amax(2),
        keys.masked_fill(beyond, math.inf).amin(2),
        keys.masked_fill(beyond, 0.0).sum(2) / count,
    )
    gate.pooled[places] = torch.cat(parts, dim=-1)


def pool_queries(q: Tensor, batch: PrefillBatch, query_block: int, inv_freq: Tensor, rope_scale: float) -> Tensor:
    """Mean query of each query block before RoPE, float32 [B, Qb, Hq, D]; 0 where a request has no queries."""
    shape = (batch.size, batch.query_blocks(query_block), *q.shape[1:])
    pooled = torch.zeros(shape, dtype=torch.float32)
    starts = batch.cu_seqlens_q.tolist()
    for b, past_len in enumerate(batch.past_lens.tolist()):
        for i, rows in enumerate(q[starts[b] : starts[b + 1]].split(query_block)):
            position = past_len + i * query_block + torch.arange(len(rows))
            if len(rows):
                pooled[b, i] = unrotate(rows.transpose(0, 1), position, inv_freq, rope_scale).mean(1)
    return pooled
