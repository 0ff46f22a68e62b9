"""KeyBounds' scores: the largest share of a block in the softmax of any row of a query block, by bounds on its keys."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from compactattn._numba.pages import locate_units
from compactattn._numba.scores import score_query_blocks
from compactattn._numba.summary import unit_bounds
from compactattn.data import KVSummary, PagedKV, PrefillBatch
from compactattn.selection import BlockScores
from compactattn.selectors import KeyBounds


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
