"""KeyBounds' scores: the largest share of a block in the softmax of any row of a query block, by bounds on its keys."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from compactattn._numba.pages import Places, gather, in_units, locate_units
from compactattn._numba.scores import score_query_blocks
from compactattn._numba.summary import slabs, stale_units
from compactattn._numba.threads import run_each
from compactattn.data import KVSummary, PagedKV, PrefillBatch
from compactattn.selection import BlockScores
from compactattn.selectors import KeyBounds


def update_bounds(kv: PagedKV, batch: PrefillBatch, bounds: Tensor, unit: int, since: Tensor | int | None) -> None:
    """Bound again, in place, every unit that holds a position in [since, seq_lens), over slots below `seq_lens` only.

    bounds: float32 [num_pages, page_size // unit, Hkv, 2 * D].
    """
    for places, tokens_in_last in stale_units(kv, batch, unit, since):
        bounds[places] = unit_bounds(kv, places, unit, tokens_in_last)


def unit_bounds(kv: PagedKV, places: Places, unit: int, tokens_in_last: int) -> Tensor:
    """Float32 [n, Hkv, 2 D]: each dimension's largest key in n units, then its smallest."""
    count, (kv_heads, dim) = len(places.pages), kv.k.shape[2:]
    bounds = torch.empty((count, kv_heads, 2 * dim), dtype=torch.float32)
    tasks = []
    for slab, here in slabs(places, unit * kv_heads * dim):
        last = tokens_in_last if here.stop == count else unit
        tasks.append(functools.partial(_bound_slab, kv, slab, unit, last, bounds[here]))
    run_each(tasks)
    return bounds


def _bound_slab(kv: PagedKV, slab: Places, unit: int, tokens_in_last: int, bounds: Tensor) -> None:
    keys = gather(in_units(kv.k, unit), slab, kv.k_scale)  # [n, unit, Hkv, D]
    keys[-1, tokens_in_last:] = keys[-1, :1]
    torch.cat((keys.amax(1), keys.amin(1)), dim=-1, out=bounds)


def key_bounds_scores(
    q: Tensor,
    kv: PagedKV,
    batch: PrefillBatch,
    selector: KeyBounds,
    *,
    scale: float,
    summary: KVSummary | None,
) -> BlockScores:
    """log of the largest p(r, j) over the rows r of query block i, see `KeyBounds`.

    Bounds are rounded once to q's dtype, which changes none but those of an FP8 cache; products accumulate in float32.

    Args:
        q: [T, Hq, D].
        summary: bounds to trust; None, or one without them, bounds the complete blocks of each request.
    """

    def bounds(b: int, complete: int) -> Tensor:
        """Met by a query's positive components first, then by its negative ones."""
        largest, smallest = _complete_block_bounds(kv, b, complete, selector.block_size, summary).chunk(2, dim=-1)
        return torch.cat((largest, smallest) if scale > 0 else (smallest, largest), dim=-1)

    log_p = score_query_blocks(q, kv, batch, selector, bounds, _score_tile, scale)
    return BlockScores(log_p, log_p.new_zeros((*log_p.shape[:3], 1)))


def _score_tile(rows: Tensor, keys: Tensor, position: int, block_size: int, scale: float, log_p: Tensor) -> None:
    """Write log p [Hkv, G, n] of one query block over the n blocks that its last row scores.

    Args:
        rows: [rows, Hkv, G, D], the first of them at `position`.
        keys: float32 [Hkv, n, 2 D].
    """
    if keys.shape[1] == 0:
        return
    ends = torch.arange(1, keys.shape[1] + 1) * block_size
    hidden = ends > position + 1 + torch.arange(len(rows))[:, None]  # [rows, n]
    for h in range(len(keys)):
        queries = rows[:, h].transpose(0, 1).float()  # [G, rows, D]
        queries = torch.cat((queries.clamp(min=0), queries.clamp(max=0)), dim=-1)
        bound = torch.matmul(queries, keys[h].T).mul_(scale / math.log(2)).masked_fill_(hidden, -math.inf)
        top = bound.amax(-1, keepdim=True).clamp_(min=torch.finfo(bound.dtype).min)
        total = bound.sub_(top).exp2().sum(-1, keepdim=True).log2_()
        seen = total > -math.inf  # rows before the end of the first block score nothing
        log_p[h] = bound.sub_(torch.where(seen, total, 0.0)).amax(1).mul(math.log(2))


def _complete_block_bounds(
    kv: PagedKV, request: int, complete: int, block_size: int, summary: KVSummary | None
) -> Tensor:
    """Float32 [complete, Hkv, 2 D]: the largest, then the smallest key of each dimension in complete blocks."""
    unit = min(kv.page_size, block_size)
    per_block = block_size // unit
    places = locate_units(kv, request, torch.arange(complete * per_block), unit)
    held = None if summary is None else summary.k_bounds
    units = unit_bounds(kv, places, unit, unit) if held is None else held[places]
    largest, smallest = units.unflatten(0, (-1, per_block)).chunk(2, dim=-1)
    return torch.cat((largest.amax(1), smallest.amin(1)), dim=-1)
