"""The minimal block table: the kept blocks of each row, in ascending order."""

from __future__ import annotations

import torch

from compactattn.data import BlockTable, GroupMask


def build_table(groups: GroupMask) -> BlockTable:
    """indices[r, : counts[r]] lists the blocks that row r keeps; the rest stays 0 and is never read."""
    indices = torch.zeros(groups.keep.shape, dtype=torch.int32, device=groups.keep.device)
    counts = torch.zeros(groups.keep.shape[0], dtype=torch.int32, device=groups.keep.device)
    for r, keep in enumerate(groups.keep):
        kept = keep.nonzero()[:, 0]
        counts[r] = len(kept)
        indices[r, : len(kept)] = kept
    return BlockTable(
        indices, counts, groups.rows.clone(memory_format=torch.contiguous_format), groups.block_size, groups.query_block
    )
