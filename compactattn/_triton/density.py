"""What attention reads of the past, counted by one small kernel."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from compactattn._triton import on_device
from compactattn._triton.launch import launch
from compactattn._triton.union import request_lens
from compactattn.data import BlockTable, PrefillBatch

PAIRS = 256  # (query head, query block) pairs per program


@triton.jit
def _entries_below(row, count, block, steps, live):
    """How many of the `count` ascending entries of each row are below `block`: `steps` halvings."""
    low = tl.zeros_like(count)
    high = tl.where(live, count, 0)
    for _ in range(steps):
        middle = (low + high) // 2
        open_ = low < high
        below = tl.load(row + middle, mask=open_, other=0) < block
        low = tl.where(open_ & below, middle + 1, low)
        high = tl.where(open_ & (below == 0), middle, high)
    return low


@triton.jit(
    do_not_specialize=["q_blocks", "kv_blocks", "pairs", "steps", "window"],
    do_not_specialize_on_alignment=["cu_seqlens_q", "seq_lens", "indices", "counts", "rows", "counter"],
)
def _density_kernel(
    cu_seqlens_q,
    seq_lens,
    indices,
    counts,
    rows,
    counter,
    q_blocks,
    kv_blocks,
    pairs,
    steps,
    window,
    HEADS: tl.constexpr,
    QUERY_BLOCK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """One program per PAIRS (request, head, query block); two additions to memory each."""
    pair = tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)
    exists = pair < pairs
    pair = tl.where(exists, pair, 0)
    first_query = pair % q_blocks * QUERY_BLOCK
    _, q_len, past_len = request_lens(cu_seqlens_q, seq_lens, pair // q_blocks // HEADS)
    live = exists & (first_query < q_len)
    past_blocks = past_len // BLOCK_SIZE
    row = tl.load(rows + pair, mask=live, other=0)
    count = tl.load(counts + row, mask=live, other=0)
    entries = indices + row.to(tl.int64) * kv_blocks
    read = _entries_below(entries, count, past_blocks, steps, live)
    visible = past_blocks
    if window is not None:
        first_block = tl.maximum(past_len + first_query - window + 1, 0) // BLOCK_SIZE
        before = _entries_below(entries, count, tl.minimum(first_block, past_blocks), steps, live)
        read -= before
        visible -= tl.minimum(first_block, past_blocks)
    tl.atomic_add(counter, tl.sum(tl.where(live, read, 0).to(tl.int64), axis=0), sem="relaxed")
    tl.atomic_add(counter + 1, tl.sum(tl.where(live, visible, 0).to(tl.int64), axis=0), sem="relaxed")


def count_density(table: BlockTable, batch: PrefillBatch, counter: Tensor, window: int | None) -> None:
    """Add past blocks read and past blocks visible to int64 [2]."""
    requests, heads, q_blocks = table.rows.shape
    pairs, kv_blocks = requests * heads * q_blocks, table.indices.shape[1]
    if pairs == 0:
        return
    with on_device(counter):
        launch(
            _density_kernel,
            (-(-pairs // PAIRS),),
            batch.cu_seqlens_q,
            batch.seq_lens,
            table.indices,
            table.counts,
            table.rows,
            counter,
            q_blocks,
            kv_blocks,
            pairs,
            kv_blocks.bit_length(),
            window,
            constants={
                "HEADS": heads,
                "QUERY_BLOCK": table.query_block,
                "BLOCK_SIZE": table.block_size,
                "PAIRS": PAIRS,
            },
            device=counter.device,
            num_warps=4,
        )
