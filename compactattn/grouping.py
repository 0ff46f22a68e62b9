"""Groups that choose themselves: per request and KV head, the grouping of least predicted time.

A union makes every member of a row compute with what any of them selected, and saves the rows of the others. Whether
that pays depends on how alike the members' masks are, which the masks know and the host does not; so the choice is
made where the masks are, from the sizes of the unions.

The predicted time of a grouping, for one request and KV head, is in integer picoseconds

    max(sum over its rows of m * c * arithmetic_ps, u * bytes_ps) + rows in use * row_ps

for rows of m members (head, query block) with c KV blocks, where u counts the blocks that any member reads: they come
from memory once, under any grouping, because the tiles of a KV head run side by side and the cache serves the second
reader. So a union can save rows alone, about one block's arithmetic each: it is picked where masks are (almost) the
same, or where memory is the bound. Ties go to the finer grouping, so every backend picks alike.

`prefill` with `FlashPrefill` or `KeyBounds` counts and picks in its own kernels on a GPU, between scores and tables;
`unite` does it in some thirty small tensor operations. Neither reads a value on the host.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from compactattn.data import BlockTable, GroupMask
from compactattn.validation import Auto, check_kv_heads, fail


@dataclass(frozen=True)
class GroupingCosts:
    """What the cost model knows of a GPU, per KV block of 128 tokens at head dimension 128 in 16 bits.

    Attributes:
        arithmetic_ps: picoseconds that a tile of 128 queries adds to a whole GPU's work for each block of its row.
        bytes_ps: picoseconds to read one block's keys and values from memory, at full bandwidth.
        row_ps: picoseconds that a row costs besides.
    """

    arithmetic_ps: int
    bytes_ps: int
    row_ps: int


#: By `torch.cuda.get_device_name`, from `python -m benchmarks.grouping_costs`.
COSTS = {"NVIDIA H200": GroupingCosts(arithmetic_ps=11_838, bytes_ps=16_260, row_ps=13_161)}
#: For every other device, the CPU included: the H200's, of which only ratios matter.
DEFAULT_COSTS = COSTS["NVIDIA H200"]


def costs_of(device: torch.device) -> GroupingCosts:
    """The constants for tensors on a device."""
    if device.type != "cuda":
        return DEFAULT_COSTS
    return COSTS.get(torch.cuda.get_device_name(device), DEFAULT_COSTS)


def candidates(
    group: int, q_blocks: int, heads_per_group: int | Auto, query_blocks_per_span: int | Auto | None
) -> list[tuple[int, int]]:
    """(heads, query blocks) of every grouping that may be picked, finer ones first.

    "auto" heads: 1, the largest divisor of the G heads of a KV group that is at most 4 and below G, and G. "auto"
    spans: one query block and the whole chunk.
    """
    few = max((n for n in range(1, min(4, group - 1) + 1) if group % n == 0), default=1)
    heads = sorted({1, few, group}) if heads_per_group == "auto" else [heads_per_group]
    whole = max(1, q_blocks)
    if query_blocks_per_span == "auto":
        spans = sorted({1, whole})
    else:
        spans = [whole if query_blocks_per_span is None else min(query_blocks_per_span, whole)]
    return [(h, s) for s in spans for h in heads]


def pick_groups(
    finest: GroupMask,
    kv_heads: int,
    heads_per_group: int | Auto,
    query_blocks_per_span: int | Auto | None,
) -> GroupMask:
    """From the groups of one head and one query block to those of least predicted time, without a host value.

    Rows keep their numbers: a group uses the row of its first head and query block, and the rows of its others stay
    empty. Rows of the query blocks at the end of a prompt are left alone.
    """
    size, heads, q_blocks = finest.rows.shape
    fixed, kv_blocks = size * heads * q_blocks, finest.keep.shape[1]
    if fixed == 0:
        return finest
    group = heads // kv_heads
    keep = finest.keep[:fixed].view(size, kv_heads, group, q_blocks, kv_blocks)
    own = torch.arange(fixed, dtype=torch.int32, device=keep.device).view(size, kv_heads, group, q_blocks)
    live = keep.any(-1)  # a query block that holds a query sees its own current region
    costs = costs_of(keep.device)
    read = keep.flatten(2, 3).any(2).sum(-1) * costs.bytes_ps
    best, picked_keep, picked_rows = None, keep, own
    for n_heads, span in candidates(group, q_blocks, heads_per_group, query_blocks_per_span):
        padding = -q_blocks % span
        shape = (size, kv_heads, group // n_heads, n_heads, (q_blocks + padding) // span, span)
        members = torch.nn.functional.pad(live, (0, padding)).view(shape).sum((3, 5))
        united = torch.nn.functional.pad(keep, (0, 0, 0, padding)).view(*shape, kv_blocks).any(5).any(3)
        arithmetic = (members * united.sum(-1)).sum((2, 3)) * costs.arithmetic_ps
        total = torch.maximum(arithmetic, read) + (members > 0).sum((2, 3)) * costs.row_ps
        place = torch.zeros_like(keep)
        place[:, :, ::n_heads, ::span] = united
        rows = own[:, :, ::n_heads, ::span].repeat_interleave(n_heads, 2).repeat_interleave(span, 3)[..., :q_blocks]
        better = torch.ones_like(total, dtype=torch.bool) if best is None else total < best
        best = total if best is None else torch.minimum(best, total)
        picked_keep = torch.where(better[..., None, None, None], place, picked_keep)
        picked_rows = torch.where(better[..., None, None], rows, picked_rows)
    rows = torch.where(finest.rows >= fixed, finest.rows, picked_rows.flatten(1, 2))
    keep = torch.cat((picked_keep.view(fixed, kv_blocks), finest.keep[fixed:]))
    return GroupMask(keep, rows, finest.block_size, finest.query_block)


class Grouping(NamedTuple):
    """How the heads and query blocks of a table share rows, int64 [B, Hkv] each.

    heads: heads that share the row of the KV head's first one, at the chunk's first query block.
    query_blocks: query blocks that share the row of the chunk's first one, at the KV head's first head.
    """

    heads: Tensor
    query_blocks: Tensor


def grouping_of(table: BlockTable | GroupMask, kv_heads: int) -> Grouping:
    """Which grouping each request and KV head uses: what "auto" picked, read off `rows` without a synchronisation.

    Query blocks at the end of a prompt that `dense_last_blocks` gave a row of their own count as another group.

    Raises:
        ValueError: another record than these two, or a number of KV heads that does not divide the query heads.
    """
    if not isinstance(table, (BlockTable, GroupMask)):
        raise fail("table", "a BlockTable or a GroupMask", type(table).__name__)
    check_kv_heads(kv_heads, table.rows.shape[1])
    rows = table.rows.unflatten(1, (kv_heads, -1))
    if rows.shape[-1] == 0:
        nothing = torch.zeros(rows.shape[:2], dtype=torch.int64, device=rows.device)
        return Grouping(nothing, nothing)
    same = rows == rows[:, :, :1, :1]
    return Grouping(same[..., 0].sum(-1), same[:, :, 0].sum(-1))
