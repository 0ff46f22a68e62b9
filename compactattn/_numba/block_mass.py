"""Attention mass per KV block: exact for `Oracle`, over antidiagonals for `XAttention`."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

from compactattn._numba.pages import gather, in_units, locate_units, of_head
from compactattn._numba.threads import run_each
from compactattn.data import PagedKV, PrefillBatch
from compactattn.selectors import Oracle, XAttention

_SCORE_ELEMENTS = 1 << 22  # of the heads that are multiplied at once, if more than one: 16 MiB in float32


def block_mass(
    q: Tensor, kv: PagedKV, batch: PrefillBatch, selector: XAttention | Oracle, *, stride: int, scale: float
) -> Tensor:
    """Softmax mass of each KV block, summed over the rows of a query block, float32 [B, Hq, Qb, Kb].

    `stride` neighbouring keys are laid side by side (counted from position 0, the last group padded with zeros) and as
    many queries in reverse order (counted from the chunk's first), so one product sums an antidiagonal of a
    stride x stride tile; a strided query sees a strided key if the group's last row sees its first token. Scores are
    scaled by scale / stride. Stride 1 is exact attention.
    """
    block_size, query_block = selector.block_size, selector.query_block
    shape = (batch.size, q.shape[1], batch.query_blocks(query_block), batch.kv_blocks(block_size))
    mass = torch.zeros(shape, dtype=torch.float32)
    by_kv_head = mass.unflatten(1, (kv.num_kv_heads, -1))
    starts = batch.cu_seqlens_q.tolist()
    tasks = []
    for b, seq_len in enumerate(batch.seq_lens.tolist()):
        rows = q[starts[b] : starts[b + 1]].unflatten(1, (kv.num_kv_heads, -1))
        for h in range(kv.num_kv_heads if len(rows) else 0):
            read_keys = functools.partial(_keys, kv, b, seq_len, h)
            tasks.append(
                functools.partial(
                    _add_mass, rows[:, h], read_keys, seq_len - len(rows), selector, stride, scale, by_kv_head[b, h]
                )
            )
    run_each(tasks)
    return mass


def _add_mass(
    rows: Tensor,
    read_keys: Callable[[], Tensor],
    past_len: int,
    selector: XAttention | Oracle,
    stride: int,
    scale: float,
    mass: Tensor,
) -> None:
    """Write the mass [G, Qb, Kb] of one KV head's query heads; rows: [q_len, G, D]."""
    keys = _strided(read_keys(), stride)
    kv_blocks, keys_per_block = mass.shape[2], selector.block_size // stride
    for i, tile in enumerate(rows.split(selector.query_block)):
        position = past_len + i * selector.query_block
        visible = keys[: (position + len(tile) - 1) // stride + 1]
        per_pass = max(1, _SCORE_ELEMENTS // (len(visible) * -(-len(tile) // stride)))
        for g, heads in enumerate(tile.split(per_pass, dim=1)):
            share = _tile_mass(heads.transpose(0, 1).float(), visible, position, stride, scale)
            share = pad(share, (0, kv_blocks * keys_per_block - len(visible))).unflatten(1, (kv_blocks, -1))
            mass[g * per_pass : g * per_pass + len(share), i] = share.sum(-1)


def _tile_mass(queries: Tensor, keys: Tensor, position: int, stride: int, scale: float) -> Tensor:
    """Softmax mass of each strided key, summed over the rows: [heads, n].

    Args:
        queries: float32 [heads, rows, D], the first row at `position`.
        keys: float32 [n, stride * D], all those that some row sees.
    """
    count = queries.shape[1]
    reversed_groups = _strided(queries, stride, reverse=True)
    scores = torch.matmul(reversed_groups, keys.T).mul_(scale / stride)
    last_row = (torch.arange(reversed_groups.shape[1]) * stride + stride - 1).clamp(max=count - 1)
    by_all = int(position + last_row[0]) // stride + 1  # strided keys that even the first group sees
    hidden = torch.arange(by_all, len(keys)) * stride > position + last_row[:, None]
    scores[..., by_all:].masked_fill_(hidden, -math.inf)
    return scores.softmax(-1).sum(1)


def _strided(rows: Tensor, stride: int, reverse: bool = False) -> Tensor:
    """Lay `stride` neighbouring rows side by side: [..., n, D] to [..., ceil(n / stride), stride * D], zero padded."""
    rows = pad(rows, (0, 0, 0, -rows.shape[-2] % stride)).unflatten(-2, (-1, stride))
    return (rows.flip(-2) if reverse else rows).flatten(-2)


def _keys(kv: PagedKV, request: int, seq_len: int, kv_head: int) -> Tensor:
    """The request's keys of one KV head, float32 [seq_len, D]."""
    pages = torch.arange(-(-seq_len // kv.page_size))
    places = locate_units(kv, request, pages, kv.page_size)
    keys = gather(in_units(kv.k[:, :, kv_head], kv.page_size), places, of_head(kv.k_scale, kv_head))
    return keys.flatten(0, 1)[:seq_len]
