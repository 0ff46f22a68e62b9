"""FlashPrefill's scores: log-sum-exp of q · mean key over the rows of each query block."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from compactattn._numba.pages import locate_units
from compactattn._numba.summary import block_means, unit_means
from compactattn._numba.threads import run_each
from compactattn.data import KVSummary, PagedKV, PrefillBatch
from compactattn.selection import BlockScores
from compactattn.selectors import FlashPrefill, Scored


def flash_prefill_scores(
    q: Tensor,
    kv: PagedKV,
    batch: PrefillBatch,
    selector: FlashPrefill,
    *,
    scale: float,
    summary: KVSummary | None,
) -> BlockScores:
    """log S(i, j) = log of the sum over rows r of query block i of exp(scale * q_r · kmean_j).

    Only complete blocks j are scored, and only by rows that stand at or after the block's last token. Mean keys are
    rounded once to q's dtype; products accumulate in float32.

    Args:
        q: [T, Hq, D].
        summary: means to trust; None pools the complete blocks of each request, with the same arithmetic.
    """

    def means(b: int, complete: int) -> Tensor:
        return _complete_block_means(kv, b, complete, selector.block_size, summary)

    log_s = score_query_blocks(q, kv, batch, selector, means, _score_tile, scale)
    blocks = log_s.shape[-1]
    return BlockScores(log_s, log_s.amax(-1, keepdim=True) if blocks else log_s.new_zeros((*log_s.shape[:3], 1)))


def score_query_blocks(
    q: Tensor,
    kv: PagedKV,
    batch: PrefillBatch,
    selector: Scored,
    keys_of: Callable[[int, int], Tensor],
    score_tile: Callable[[Tensor, Tensor, int, int, float, Tensor], None],
    scale: float,
) -> Tensor:
    """Scores of every query block over the complete blocks that its last row stands behind, the others -inf.

    Args:
        keys_of: what stands for the keys of a request's first so many blocks: [blocks, Hkv, n], rounded to q's dtype.
        score_tile: writes the scores of one query block, see `_score_tile`.

    Returns:
        float32 [B, Hq, Qb, Kb].
    """
    block_size, query_block = selector.block_size, selector.query_block
    heads, kv_heads = q.shape[1], kv.num_kv_heads
    shape = (batch.size, heads, batch.query_blocks(query_block), batch.kv_blocks(block_size))
    log_s = torch.full(shape, -math.inf, dtype=torch.float32)
    by_kv_head = log_s.unflatten(1, (kv_heads, -1))
    starts = batch.cu_seqlens_q.tolist()
    tasks = []
    for b, seq_len in enumerate(batch.seq_lens.tolist()):
        q_len = starts[b + 1] - starts[b]
        complete = seq_len // block_size
        if q_len == 0 or complete == 0:
            continue
        keys = keys_of(b, complete).to(q.dtype).float().transpose(0, 1).contiguous()  # [Hkv, complete, n]
        for i, first in enumerate(range(0, q_len, query_block)):
            rows = q[starts[b] + first : starts[b] + min(first + query_block, q_len)].unflatten(1, (kv_heads, -1))
            position = seq_len - q_len + first
            scored = (position + len(rows)) // block_size
            scores = by_kv_head[b, :, :, i, :scored]
            tasks.append(functools.partial(score_tile, rows, keys[:, :scored], position, block_size, scale, scores))
    run_each(tasks)
    return log_s


def _score_tile(rows: Tensor, keys: Tensor, position: int, block_size: int, scale: float, log_s: Tensor) -> None:
    """Write log S [Hkv, G, n] of one query block over the n blocks that its last row scores.

    Args:
        rows: [rows, Hkv, G, D], the first of them at `position`.
        keys: float32 [Hkv, n, D].
    """
    count, _, group, _ = rows.shape
    by_all = (position + 1) // block_size  # blocks that even the first row scores
    ends = torch.arange(by_all + 1, keys.shape[1] + 1)[:, None] * block_size
    hidden = ends > position + 1 + torch.arange(count)
    for h in range(len(keys)):
        queries = rows[:, h].transpose(0, 1).float().flatten(0, 1)
        products = torch.mm(keys[h], queries.T).mul_(scale / math.log(2)).unflatten(1, (group, count))
        products[by_all:].masked_fill_(hidden[:, None], -math.inf)
        log_s[h] = _log2_sum_exp2(products).T.mul(math.log(2))


def _log2_sum_exp2(x: Tensor) -> Tensor:
    """Log-sum-exp over the last dimension in base 2; overwrites x.

    torch's `logsumexp` calls an `exp` that is ten times slower where it underflows; `exp2` is not.
    """
    top = x.amax(-1, keepdim=True).clamp_(min=torch.finfo(x.dtype).min)
    return x.sub_(top).exp2_().sum(-1).log2_().add_(top.squeeze(-1))


def _complete_block_means(
    kv: PagedKV, request: int, complete: int, block_size: int, summary: KVSummary | None
) -> Tensor:
    """Float32 mean keys [complete, Hkv, D] of the request's complete blocks."""
    unit = min(kv.page_size, block_size)
    per_block = block_size // unit
    places = locate_units(kv, request, torch.arange(complete * per_block), unit)
    means = unit_means(kv.k, places, unit, unit, kv.k_scale) if summary is None else summary.k_mean[places]
    return block_means(means, per_block)
