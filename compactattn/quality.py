"""What a selection is worth: density, coverage and output error, and the QUOKA baseline to compare with.

Plain PyTorch on any device, in bounded memory. Unlike the stages, everything here may read lengths on the host (and
so synchronise): it judges a step, it is not part of one.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from compactattn.attention import attend
from compactattn.baselines import (
    QuokaSelection,
    causal_attention,
    check_kind,
    exact_lse,
    quoka_attention,
    quoka_ranking,
    quoka_select,
)
from compactattn.data import BlockTable, PagedKV, PrefillBatch, SelectionMask
from compactattn.union import unite
from compactattn.validation import (
    check_grouping,
    check_heads_per_group,
    check_int,
    check_same_device,
    check_shape,
    check_tensor,
    fail,
)

__all__ = [
    "CoverageSummary",
    "DensityCascade",
    "QuokaSelection",
    "causal_attention",
    "coverage",
    "density_cascade",
    "exact_lse",
    "output_error",
    "past_tokens",
    "quoka_attention",
    "quoka_ranking",
    "quoka_select",
    "summarize_coverage",
]


@dataclass(frozen=True)
class DensityCascade:
    """How many past KV blocks are read at each step of the cascade, as sums that can be added over chunks.

    Every (query head, query block) pair counts the past blocks of the list that it walks, so that all four steps
    share one denominator and the ratio of two of them is the growth that a union causes.

    Attributes:
        mask: blocks that the pair's own mask selected.
        query_block_union: after the union over the span's query blocks, each head for itself.
        sub_group_union: after the union over `heads_per_group` heads as well: what the block table lists.
        group_union: after the union over all heads of the KV group.
        visible: past blocks that the pairs see: what dense attention reads.
    """

    mask: int = 0
    query_block_union: int = 0
    sub_group_union: int = 0
    group_union: int = 0
    visible: int = 0

    def __add__(self, other: DensityCascade) -> DensityCascade:
        mine, theirs = asdict(self), asdict(other)
        return DensityCascade(**{name: mine[name] + theirs[name] for name in mine})

    def densities(self) -> dict[str, float]:
        """Each step's entries ÷ visible blocks, from 0 to 1; NaN where there was no past block to see."""
        entries = asdict(self)
        visible = entries.pop("visible")
        return {name: count / visible if visible else math.nan for name, count in entries.items()}


def density_cascade(
    selection: SelectionMask,
    batch: PrefillBatch,
    *,
    kv_heads: int,
    heads_per_group: int,
    query_blocks_per_span: int | None = None,
    backend: str | None = None,
) -> DensityCascade:
    """Count what one step reads of its past, before and after each union.

    Args:
        selection: bool [B, Hq, Qb, Kb], as `select` made it for this batch.
        batch: the lengths of the step.
        kv_heads: Hkv; the last union is over Hq / Hkv heads.
        heads_per_group, query_blocks_per_span: the grouping, as for `unite`.
        backend: for `unite`.

    Returns:
        Sums over the step's requests, heads and query blocks. For the average over a prompt add its chunks.

    Raises:
        ValueError: a mask that does not fit the batch, or a group size that does not divide Hq / Hkv.
    """
    check_kind("selection", selection, SelectionMask)
    check_kind("batch", batch, PrefillBatch)
    heads = selection.mask.shape[1]
    check_int("kv_heads", kv_heads, 1)
    if heads % kv_heads:
        raise fail("kv_heads", f"a divisor of the {heads} query heads", kv_heads)
    check_heads_per_group(heads_per_group, heads, heads // kv_heads)
    check_grouping(selection, batch, heads_per_group, query_blocks_per_span)
    device = selection.mask.device
    past = torch.arange(selection.mask.shape[3], device=device) < (batch.past_lens // selection.block_size)[:, None]
    starts = torch.arange(selection.mask.shape[2], device=device) * selection.query_block
    seen = (starts < batch.q_lens[:, None])[:, None, :, None] & past[:, None, None]

    def entries_after_union(group: int) -> int:
        united = unite(
            selection,
            batch,
            heads_per_group=group,
            query_blocks_per_span=query_blocks_per_span,
            backend=backend,
        )
        return sum(int((united.keep[rows] & seen[b]).sum()) for b, rows in enumerate(united.rows.long()))

    return DensityCascade(
        mask=int((selection.mask & seen).sum()),
        query_block_union=entries_after_union(1),
        sub_group_union=entries_after_union(heads_per_group),
        group_union=entries_after_union(heads // kv_heads),
        visible=int(seen.sum()) * heads,
    )


def past_tokens(table: BlockTable, batch: PrefillBatch, *, kv_heads: int) -> Tensor:
    """Past tokens that a table gives to a query, averaged over the queries of each KV head: float64 [B, Hkv].

    Rounded, this is the budget at which a token selection reads as much of the past. 0 for a request without queries.
    """
    check_kind("table", table, BlockTable)
    check_kind("batch", batch, PrefillBatch)
    check_int("kv_heads", kv_heads, 1)
    if table.rows.shape[1] % kv_heads:
        raise fail("kv_heads", f"a divisor of the {table.rows.shape[1]} query heads", kv_heads)
    device, rows = table.rows.device, table.rows.long()
    owner = torch.zeros(len(table.counts), dtype=torch.long, device=device)
    owner[rows.flatten()] = torch.arange(batch.size, device=device).repeat_interleave(rows[0].numel())
    valid = torch.arange(table.indices.shape[1], device=device) < table.counts[:, None]
    tokens = (batch.past_lens[owner][:, None] - table.indices * table.block_size).clamp(0, table.block_size)
    per_row = tokens.where(valid, 0).sum(1).double()
    starts = torch.arange(rows.shape[2], device=device) * table.query_block
    queries = (batch.q_lens[:, None] - starts).clamp(0, table.query_block).double()
    sums = (per_row[rows] * queries[:, None]).unflatten(1, (kv_heads, -1)).sum((2, 3))
    return sums / (queries.sum(1, keepdim=True) * (rows.shape[1] // kv_heads)).clamp(min=1)


def coverage(
    q: Tensor,
    kv: PagedKV,
    batch: PrefillBatch,
    given: BlockTable | QuokaSelection,
    *,
    scale: float | None = None,
    dense_lse: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """The share of each query's exact softmax mass that falls on the tokens it is given (its recall).

    exp(lse over the given tokens - lse over all visible tokens).

    Args:
        q: [T, Hq, D], packed queries after RoPE.
        given: the block table that a step attends over, or the tokens that QUOKA keeps.
        scale: softmax scale, default D^-0.5.
        dense_lse: `exact_lse(q, kv, batch, scale=scale)` where it is known already; else it is computed here.
        backend: for `attend`, which computes the table's share.

    Returns:
        float32 [T, Hq], from 0 to 1; rows at or beyond `cu_seqlens_q[B]` are NaN.

    Raises:
        ValueError: whatever `attend` refuses; `given` or `dense_lse` of another type or shape.
    """
    check_kind("given", given, BlockTable, QuokaSelection)
    check_tensor("q", q, ndim=3)
    if dense_lse is not None:
        check_tensor("dense_lse", dense_lse, ndim=2)
        check_shape("dense_lse", dense_lse, tuple(q.shape[:2]), "T, Hq of q")
        check_same_device("dense_lse", dense_lse, q.device)
    if isinstance(given, BlockTable):
        _, lse = attend(q, kv, batch, given, scale=scale, return_lse=True, backend=backend)
    else:
        lse = exact_lse(q, kv, batch, given, scale=scale)
    if dense_lse is None:
        dense_lse = exact_lse(q, kv, batch, scale=scale)
    share = (lse - dense_lse).exp().clamp(max=1.0)
    share[int(batch.cu_seqlens_q[-1]) :] = math.nan
    return share


@dataclass(frozen=True, eq=False)
class CoverageSummary:
    """Coverage per query head: `mean` and `worst` float32 [Hq], `below` int64 [Hq] of `queries` under `threshold`."""

    mean: Tensor
    worst: Tensor
    below: Tensor
    queries: int
    threshold: float


def summarize_coverage(shares: Tensor, *, threshold: float = 0.9) -> CoverageSummary:
    """Mean, worst and the count of queries under `threshold`, per head.

    Args:
        shares: [n, Hq] with n >= 1, from `coverage`, padding cut off; concatenate the chunks of a prompt.
    """
    check_tensor("shares", shares, ndim=2)
    if len(shares) == 0:
        raise fail("shares", "at least one query", "none")
    below = (shares < threshold).sum(0)
    return CoverageSummary(shares.mean(0), shares.amin(0), below, len(shares), threshold)


def output_error(out: Tensor, dense: Tensor) -> Tensor:
    """‖out - dense‖ / ‖dense‖ per query head, over all rows given: float64 [Hq].

    Args:
        out, dense: [n, Hq, D], padding cut off. Where dense is 0, the error is 0 for equal outputs, else inf.

    Raises:
        ValueError: shapes that differ.
    """
    check_tensor("out", out, ndim=3)
    check_tensor("dense", dense, ndim=3)
    check_shape("out", out, tuple(dense.shape), "that of dense")
    difference = (out.double() - dense.double()).pow(2).sum((0, 2)).sqrt()
    norm = dense.double().pow(2).sum((0, 2)).sqrt()
    return torch.where(difference == 0, 0.0, difference / norm)
