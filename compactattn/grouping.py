"""Groups that choose themselves: per request and KV head, the execution grouping of the least predicted time.

The candidates go from one head × one query block to the whole KV group × the whole chunk. A coarser group reads a
longer list, its union, once for several tiles; a finer one reads its own, shorter list for itself. For one KV head of
one request, with `tiles` the entries that its (head, query block) pairs see in their rows, `blocks` the entries of the
rows themselves and `rows` their number,

    time = max(tile * tiles, block * blocks) + row * rows        (arithmetic, bytes; in picoseconds)

The least time wins, the finer grouping where two are equal. The union sizes are counted on the device, in integers, so
that every backend picks the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from compactattn.data import BlockTable, GroupMask, PrefillBatch, SelectionMask
from compactattn.validation import check_int, fail

Auto = Literal["auto"]


@dataclass(frozen=True)
class GroupingCosts:
    """What a GPU as a whole needs, in picoseconds, at D = 128 in 16 bits, for query and KV blocks of 128.

    Attributes:
        tile: one KV block for one (head, query block): its products.
        block: one KV block of one table row: reading its keys and values.
        row: one table row: building it.
    """

    tile: int
    block: int
    row: int


#: by name of the GPU, measured by `python -m benchmarks.grouping_costs`
COSTS = {"NVIDIA H200": GroupingCosts(tile=13_100, block=15_300, row=30_000)}
#: for every other device: the balance of arithmetic and bytes is alike on recent GPUs
DEFAULT_COSTS = COSTS["NVIDIA H200"]


def grouping_costs(device: torch.device, block_size: int, query_block: int) -> GroupingCosts:
    """The costs of a device for blocks of these sizes; reads no length."""
    costs = COSTS.get(torch.cuda.get_device_name(device), DEFAULT_COSTS) if device.type == "cuda" else DEFAULT_COSTS
    return GroupingCosts(
        costs.tile * block_size * query_block // (128 * 128), costs.block * block_size // 128, costs.row
    )


def candidate_groupings(
    heads_per_group: int | Auto, query_blocks_per_span: int | Auto | None, per_kv_head: int, query_blocks: int
) -> list[tuple[int, int]]:
    """(heads, query blocks) of each grouping to choose from, the finest first; one where nothing is "auto"."""
    whole = max(1, query_blocks)
    heads = [1, per_kv_head] if heads_per_group == "auto" else [heads_per_group]
    if query_blocks_per_span == "auto":
        spans = [1, whole]
    else:
        spans = [whole if query_blocks_per_span is None else min(query_blocks_per_span, whole)]
    return list(dict.fromkeys((h, s) for s in spans for h in heads))


def unite_auto(
    selection: SelectionMask,
    batch: PrefillBatch,
    candidates: list[tuple[int, int]],
    unite: Callable[[SelectionMask, PrefillBatch, int, int], GroupMask],
) -> GroupMask:
    """The rows of all candidates, one grouping after the other; those that lose are empty and nobody uses them.

    Nothing is read on the host.
    """
    assert selection.kv_heads is not None
    united = [unite(selection, batch, heads, span) for heads, span in candidates]
    keep = torch.cat([groups.keep for groups in united])
    bases = [0]
    for groups in united:
        bases.append(bases[-1] + len(groups.keep))
    all_rows = torch.stack([groups.rows.long() + base for groups, base in zip(united, bases, strict=False)])
    live, at_end, last = _query_blocks(selection, batch)
    counts = keep.sum(1)
    kv_heads, device = selection.kv_heads, keep.device
    requests, heads, q_blocks = united[0].rows.shape
    head, block = torch.arange(heads, device=device), torch.arange(q_blocks, device=device)
    costs = grouping_costs(device, selection.block_size, selection.query_block)
    grouped = live & ~at_end
    live_blocks = grouped.sum(1, keepdim=True)
    times = []
    for (heads_per_group, span), rows in zip(candidates, all_rows, strict=True):
        entries = counts[rows]
        last_member = (torch.minimum((block // span + 1) * span, live_blocks) - 1).clamp(min=0)
        seen = entries - (last.gather(1, last_member) - last)[:, None]
        leads = (head % heads_per_group == 0)[:, None] & (block % span == 0) & grouped[:, None]

        def per_kv_head(values: Tensor) -> Tensor:
            return values.view(requests, kv_heads, -1).sum(2)

        tiles = per_kv_head(torch.where(grouped[:, None], seen, 0))
        blocks = per_kv_head(torch.where(leads, entries, 0))
        times.append(torch.maximum(tiles * costs.tile, blocks * costs.block) + per_kv_head(leads.long()) * costs.row)
    order = torch.arange(len(candidates), device=device)[:, None, None]
    picked = (torch.stack(times) * len(candidates) + order).argmin(0)  # the finer where two are equal
    picked = picked.repeat_interleave(heads // kv_heads, 1)[None, :, :, None].expand(1, -1, -1, q_blocks)
    rows = torch.where(at_end[:, None], all_rows[0], all_rows.gather(0, picked)[0])
    used = torch.zeros(len(keep), dtype=torch.int32, device=device)
    used.index_add_(0, rows.flatten(), live[:, None].expand(-1, heads, -1).flatten().to(torch.int32))
    return GroupMask(keep & (used > 0)[:, None], rows.to(torch.int32), selection.block_size, selection.query_block)


def _query_blocks(selection: SelectionMask, batch: PrefillBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Per request and query block [B, Qb]: does it hold a query, does it end the prompt, its last visible KV block."""
    starts, seq_lens = batch.cu_seqlens_q.long(), batch.seq_lens.long()
    q_lens = (starts[1:] - starts[:-1])[:, None]
    first = torch.arange(selection.mask.shape[2], device=starts.device) * selection.query_block
    position = seq_lens[:, None] - q_lens + torch.minimum(first + selection.query_block, q_lens) - 1
    live = first < q_lens
    at_end = torch.zeros_like(live)
    if selection.dense_last_blocks > 0 and batch.prompt_lens is not None:
        tail = selection.dense_last_blocks * selection.query_block
        at_end = live & (position >= batch.prompt_lens.long()[:, None] - tail)
    return live, at_end, position // selection.block_size


def groupings(table: BlockTable | GroupMask, num_kv_heads: int) -> Tensor:
    """What each request and KV head was grouped by: int32 [B, Hkv, 2], heads per group and query blocks per span.

    Read from `rows` on the device; the query blocks that share the row of the prompt's end are not counted unless the
    first one does.
    """
    check_int("num_kv_heads", num_kv_heads, 1)
    requests, heads, query_blocks = table.rows.shape
    if heads % num_kv_heads:
        raise fail("num_kv_heads", f"a divisor of the {heads} query heads", num_kv_heads)
    rows = table.rows.view(requests, num_kv_heads, heads // num_kv_heads, query_blocks)
    if query_blocks == 0:
        return torch.zeros((requests, num_kv_heads, 2), dtype=torch.int32, device=rows.device)
    first = rows[:, :, :1, :1]
    same_heads = (rows[:, :, :, :1] == first).sum((2, 3))
    same_blocks = (rows[:, :, :1, :] == first).sum((2, 3))
    return torch.stack((same_heads, same_blocks), -1).to(torch.int32)
