"""Unite the masks of each execution group, and add the current region."""

from __future__ import annotations

import numpy as np
import torch

from compactattn._numba.jit import kernel
from compactattn.data import GroupMask, PrefillBatch, SelectionMask


def unite(selection: SelectionMask, batch: PrefillBatch, heads_per_group: int, span: int) -> GroupMask:
    """keep bool [R, Kb] and rows int32 [B, Hq, Qb] for groups of `heads_per_group` heads and `span` query blocks.

    R = B * (Hq / heads_per_group) * ceil(Qb / span), plus B rows for the query blocks at the end of the prompt when
    the selector kept them dense.
    """
    size, heads, q_blocks, kv_blocks = selection.mask.shape
    fixed_rows = size * (heads // heads_per_group) * -(-q_blocks // span)
    prompt_lens, tail = dense_tail(batch, selection.dense_last_blocks, selection.query_block)
    keep = torch.zeros((fixed_rows + (size if tail else 0), kv_blocks), dtype=torch.bool)
    rows = torch.zeros((size, heads, q_blocks), dtype=torch.int32)
    _unite(
        selection.mask.contiguous().numpy(),
        batch.cu_seqlens_q.numpy(),
        batch.seq_lens.numpy(),
        prompt_lens,
        tail,
        selection.query_block,
        selection.block_size,
        heads_per_group,
        span,
        keep.numpy(),
        rows.numpy(),
    )
    return GroupMask(keep, rows, selection.block_size, selection.query_block)


def dense_tail(batch: PrefillBatch, dense_last_blocks: int, query_block: int) -> tuple[np.ndarray, int]:
    """Prompt lengths, int32 [B], and how many of a prompt's last positions are dense: 0 without prompt lengths."""
    if batch.prompt_lens is None:
        return batch.seq_lens.numpy(), 0
    return batch.prompt_lens.numpy(), dense_last_blocks * query_block


@kernel
def _unite(
    mask: np.ndarray,
    starts: np.ndarray,
    seq_lens: np.ndarray,
    prompt_lens: np.ndarray,
    tail: int,
    query_block: int,
    block_size: int,
    heads_per_group: int,
    span: int,
    keep: np.ndarray,
    rows: np.ndarray,
) -> None:
    size, heads, q_blocks, kv_blocks = mask.shape
    groups, spans = heads // heads_per_group, -(-q_blocks // span)
    for b in range(size):
        q_len = starts[b + 1] - starts[b]
        past_len = seq_lens[b] - q_len
        for h in range(heads):
            for i in range(q_blocks):
                row = (b * groups + h // heads_per_group) * spans + i // span
                if i * query_block < q_len:
                    last = past_len + min((i + 1) * query_block, q_len) - 1
                    if tail > 0 and last >= prompt_lens[b] - tail:
                        row = size * groups * spans + b
                    visible = min(last // block_size + 1, kv_blocks)
                    past = min(past_len // block_size, visible)
                    for j in range(past):
                        keep[row, j] |= mask[b, h, i, j]
                    keep[row, past:visible] = True
                rows[b, h, i] = row
