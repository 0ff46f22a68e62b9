"""Minimal block tables: from united masks, or from scores in one pass."""

from __future__ import annotations

import numpy as np
import torch

from compactattn._numba.jit import kernel
from compactattn._numba.union import dense_tail
from compactattn.data import BlockTable, GroupMask, PrefillBatch
from compactattn.grouping import pick_groups
from compactattn.selection import BlockScores, log_threshold
from compactattn.selectors import Scored
from compactattn.union import span_blocks
from compactattn.validation import Auto


def build_table(groups: GroupMask) -> BlockTable:
    """indices int32 [R, Kb], ascending, and counts int32 [R]; entries past `counts` are 0."""
    keep = groups.keep.contiguous()
    indices = torch.zeros(keep.shape, dtype=torch.int32)
    counts = torch.zeros(len(keep), dtype=torch.int32)
    _compact(keep.numpy(), indices.numpy(), counts.numpy())
    return BlockTable(indices, counts, groups.rows.contiguous(), groups.block_size, groups.query_block)


def table_from_scores(
    scores: BlockScores,
    batch: PrefillBatch,
    selector: Scored,
    kv_heads: int,
    heads_per_group: int | Auto,
    query_blocks_per_span: int | Auto | None,
) -> BlockTable:
    """What `select`, `unite` and `build_table` give for these scores, bit for bit, without a mask in memory."""
    size, heads, q_blocks, kv_blocks = scores.log_s.shape
    if heads_per_group == "auto" or query_blocks_per_span == "auto":
        finest = table_from_scores(scores, batch, selector, kv_heads, 1, 1)
        keep = torch.zeros(finest.indices.shape, dtype=torch.bool)
        row, entry = torch.nonzero(torch.arange(kv_blocks) < finest.counts[:, None], as_tuple=True)
        keep[row, finest.indices[row, entry].long()] = True
        groups = GroupMask(keep, finest.rows, selector.block_size, selector.query_block)
        return build_table(pick_groups(groups, kv_heads, heads_per_group, query_blocks_per_span))
    span = span_blocks(q_blocks, query_blocks_per_span)
    fixed_rows = size * (heads // heads_per_group) * -(-q_blocks // span)
    prompt_lens, tail = dense_tail(batch, selector.dense_last_blocks, selector.query_block)
    indices = torch.zeros((fixed_rows + (size if tail else 0), kv_blocks), dtype=torch.int32)
    counts = torch.zeros(len(indices), dtype=torch.int32)
    rows = torch.zeros((size, heads, q_blocks), dtype=torch.int32)
    _list_scored(
        scores.log_s.numpy(),
        (scores.part_max.amax(-1) + log_threshold(selector)).numpy(),
        batch.cu_seqlens_q.numpy(),
        batch.seq_lens.numpy(),
        prompt_lens,
        tail,
        selector.dense_queries,
        selector.dense_keys,
        selector.sink_blocks,
        selector.window_blocks,
        selector.query_block,
        selector.block_size,
        heads_per_group,
        span,
        indices.numpy(),
        counts.numpy(),
        rows.numpy(),
    )
    return BlockTable(indices, counts, rows, selector.block_size, selector.query_block)


@kernel
def _list_kept(keep: np.ndarray, indices: np.ndarray) -> int:
    """Write the ids of the kept blocks to the front of `indices`; their number."""
    count = 0
    for j in range(len(keep)):
        if keep[j]:
            indices[count] = j
            count += 1
    return count


@kernel
def _compact(keep: np.ndarray, indices: np.ndarray, counts: np.ndarray) -> None:
    for row in range(len(keep)):
        counts[row] = _list_kept(keep[row], indices[row])


@kernel
def _list_scored(
    log_s: np.ndarray,
    thresholds: np.ndarray,
    starts: np.ndarray,
    seq_lens: np.ndarray,
    prompt_lens: np.ndarray,
    tail: int,
    dense_queries: int,
    dense_keys: int,
    sink_blocks: int,
    window_blocks: int,
    query_block: int,
    block_size: int,
    heads_per_group: int,
    span: int,
    indices: np.ndarray,
    counts: np.ndarray,
    rows: np.ndarray,
) -> None:
    size, heads, q_blocks, kv_blocks = log_s.shape
    groups, spans = heads // heads_per_group, -(-q_blocks // span)
    fixed_rows = size * groups * spans
    keep, keep_at_end = np.zeros(kv_blocks, np.bool_), np.zeros(kv_blocks, np.bool_)
    for b in range(size):
        q_len = starts[b + 1] - starts[b]
        past_len = seq_lens[b] - q_len
        dense = q_len <= dense_queries or seq_lens[b] <= dense_keys
        keep_at_end[:] = False
        for row in range(b * groups * spans, (b + 1) * groups * spans):
            keep[:] = False
            first_head, first_block = row // spans % groups * heads_per_group, row % spans * span
            for h in range(first_head, first_head + heads_per_group):
                for i in range(first_block, min(first_block + span, q_blocks)):
                    rows[b, h, i] = row
                    if i * query_block >= q_len:
                        continue
                    last = past_len + min((i + 1) * query_block, q_len) - 1
                    visible = min(last // block_size + 1, kv_blocks)
                    if tail > 0 and last >= prompt_lens[b] - tail:
                        rows[b, h, i] = fixed_rows + b
                        keep_at_end[:visible] = True
                        continue
                    past = 0 if dense else min(past_len // block_size, visible)
                    keep[past:visible] = True
                    threshold = thresholds[b, h, i]
                    for j in range(past):
                        score = log_s[b, h, i, j]
                        wanted = score >= threshold and score > -np.inf
                        keep[j] |= wanted or j < sink_blocks or j > last // block_size - window_blocks
            counts[row] = _list_kept(keep, indices[row])
        if tail > 0:
            counts[fixed_rows + b] = _list_kept(keep_at_end, indices[fixed_rows + b])
