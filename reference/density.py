"""What attention reads of the past, counted list by list."""

from __future__ import annotations

import torch

from compactattn.data import BlockTable, PrefillBatch
from reference.requests import requests


def count_density(table: BlockTable, batch: PrefillBatch, counter: torch.Tensor, *, window: int | None = None) -> None:
    """Add to counter[0] the past blocks on the list that each (query head, query block) walks, to counter[1] those
    that it sees; with a window, blocks before that of its first row are neither."""
    block_size = table.block_size
    for request in requests(batch):
        for i, queries in enumerate(request.query_blocks(table.query_block)):
            first = 0 if window is None else request.past_len + queries.start - window + 1
            seen = {j for j in range(request.past_blocks(block_size)) if (j + 1) * block_size > first}
            for h in range(table.rows.shape[1]):
                row = int(table.rows[request.index, h, i])
                listed = table.indices[row, : int(table.counts[row])].tolist()
                counter[0] += len(seen & set(listed))
                counter[1] += len(seen)
