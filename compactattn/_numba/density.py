"""What attention reads of the past, counted."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from compactattn._numba.jit import kernel
from compactattn.data import BlockTable, PrefillBatch


def count_density(table: BlockTable, batch: PrefillBatch, counter: Tensor, window: int | None) -> None:
    """Add past blocks read and past blocks visible to int64 [2]."""
    _count(
        batch.cu_seqlens_q.numpy(),
        batch.seq_lens.numpy(),
        table.indices.numpy(),
        table.counts.numpy(),
        table.rows.numpy(),
        counter.numpy(),
        2**62 if window is None else window,
        table.query_block,
        table.block_size,
    )


@kernel
def _count(
    starts: np.ndarray,
    seq_lens: np.ndarray,
    indices: np.ndarray,
    counts: np.ndarray,
    rows: np.ndarray,
    counter: np.ndarray,
    window: int,
    query_block: int,
    block_size: int,
) -> None:
    size, heads, q_blocks = rows.shape
    for b in range(size):
        q_len = starts[b + 1] - starts[b]
        past_len = seq_lens[b] - q_len
        past_blocks = past_len // block_size
        for i in range(min(q_blocks, -(-q_len // query_block))):
            first = min(max(0, past_len + i * query_block - window + 1) // block_size, past_blocks)
            counter[1] += heads * (past_blocks - first)
            for h in range(heads):
                row = rows[b, h, i]
                entries = indices[row, : counts[row]]
                counter[0] += np.searchsorted(entries, past_blocks) - np.searchsorted(entries, first)
