"""Controlled block tables, so that `attend` can be timed alone: every length is decided, every place is random."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from benchmarks.cases import Grouping
from compactattn import BlockTable, PrefillBatch

BLOCK = 128


@dataclass(frozen=True)
class Lengths:
    """How many past blocks the rows of a table hold.

    Attributes:
        name: for a reader.
        density: mean share of the past blocks.
        spread: "equal"; "uneven" (quadratic in the row's rank: the longest is 3 × the mean, the median 0.75 ×); or
            "one dense" (equal, but one row holds the whole past).
    """

    name: str
    density: float
    spread: str = "equal"


LENGTHS = (
    *(Lengths(f"equal {density:g}", density) for density in (0.0225, 0.045, 0.10, 0.25, 1.0)),
    Lengths("uneven 0.1", 0.10, "uneven"),
    Lengths("one dense row, others 0.1", 0.10, "one dense"),
)
CORRECTED = LENGTHS[1:3]  # on these the mean correction is measured too


def row_counts(lengths: Lengths, rows: int, past: int, generator: torch.Generator) -> torch.Tensor:
    """Past blocks of each row, int64 [rows], at most `past`, in random order."""
    if lengths.spread == "uneven":
        rank = (torch.arange(rows) + 0.5) / rows
        share = 3 * lengths.density * rank.square()
        counts = (share[torch.randperm(rows, generator=generator)] * past).round().long()
    else:
        counts = torch.full((rows,), round(lengths.density * past))
    if lengths.spread == "one dense":
        counts[rows // 2] = past
    return counts.clamp(min(1, past), past)


def controlled_table(
    batch: PrefillBatch, heads: int, grouping: Grouping, lengths: Lengths, *, seed: int = 0
) -> BlockTable:
    """A canonical table in the library's row order: random past blocks, and the whole current region.

    Args:
        batch: lengths may be ragged; each request's rows get `lengths` of its own past.
        heads: query heads.
        grouping: heads and query blocks that share a row.
    """
    generator = torch.Generator().manual_seed(seed)
    q_lens, past_lens = batch.q_lens.tolist(), batch.past_lens.tolist()
    q_blocks, kv_blocks = batch.query_blocks(BLOCK), batch.kv_blocks(BLOCK)
    span = q_blocks if grouping.span is None else grouping.span
    groups, spans = heads // grouping.heads, -(-q_blocks // span)
    keep = torch.zeros(batch.size, groups, spans, kv_blocks, dtype=torch.bool)
    for b, (q_len, past_len) in enumerate(zip(q_lens, past_lens, strict=True)):
        past = past_len // BLOCK
        counts = row_counts(lengths, groups * spans, past, generator)
        order = torch.rand(groups * spans, past, generator=generator).argsort(-1)
        chosen = torch.zeros(groups * spans, past, dtype=torch.bool)
        chosen.scatter_(1, order, torch.arange(past) < counts[:, None])
        keep[b, ..., :past] = chosen.view(groups, spans, past)
        for s in range(math.ceil(q_len / (span * BLOCK))):
            last = (past_len + min((s + 1) * span * BLOCK, q_len) - 1) // BLOCK
            keep[b, :, s, past : last + 1] = True
        keep[b, :, math.ceil(q_len / (span * BLOCK)) :] = False
    flat = keep.flatten(0, 2)
    counts = flat.sum(-1).int()
    indices = (~flat).to(torch.int8).argsort(dim=-1, stable=True).int()
    b, h, i = (torch.arange(n) for n in (batch.size, heads, q_blocks))
    rows = ((b[:, None, None] * groups + h[:, None] // grouping.heads) * spans + i // span).int()
    device = batch.seq_lens.device
    return BlockTable(indices.to(device), counts.to(device), rows.contiguous().to(device), BLOCK, BLOCK)
