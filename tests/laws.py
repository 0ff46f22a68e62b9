"""SPEC 3.2 over Python sets and integers: what a table must hold, derived from lengths and mask bits alone."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from compactattn import BlockTable, Selector
from tests.strategies import Geometry, ceil_div

Members = dict[int, list[tuple[int, int, int]]]


def live_blocks(g: Geometry, b: int) -> int:
    """Query blocks of request b that hold a query."""
    return ceil_div(g.q_lens[b], g.query_block)


def last_position(g: Geometry, b: int, i: int) -> int:
    """Position of the last row of query block i."""
    return g.past_lens[b] + min((i + 1) * g.query_block, g.q_lens[b]) - 1


def visible(g: Geometry, b: int, i: int) -> set[int]:
    """KV blocks of which some row of query block i sees a token."""
    return set(range(last_position(g, b, i) // g.block_size + 1))


def past(g: Geometry, b: int) -> set[int]:
    return set(range(g.past_lens[b] // g.block_size))


def reaches_end(g: Geometry, b: int, i: int, dense_last_blocks: int) -> bool:
    """Does query block i hold a row among the last dense_last_blocks * query_block positions of the prompt?"""
    if dense_last_blocks == 0 or g.prompt_lens is None:
        return False
    return last_position(g, b, i) >= g.prompt_lens[b] - dense_last_blocks * g.query_block


def fixed_row(g: Geometry, b: int, h: int, i: int) -> int:
    """The row formula of SPEC section 2."""
    span = max(1, g.q_blocks) if g.span is None else g.span
    spans = ceil_div(g.q_blocks, span)
    return (b * (g.heads // g.heads_per_group) + h // g.heads_per_group) * spans + i // span


def oracle(g: Geometry, mask: Tensor, dense_last_blocks: int = 0) -> list[frozenset[int]]:
    """For every live (b, h, i) in order, the blocks that its row must list."""
    bits = mask.cpu()
    groups: dict[object, set[int]] = {}
    keys = []
    for b, h, i in live(g):
        key = ("end", b) if reaches_end(g, b, i, dense_last_blocks) else ("row", fixed_row(g, b, h, i))
        selected = set(bits[b, h, i].nonzero()[:, 0].tolist())
        current = visible(g, b, i) - past(g, b)
        groups.setdefault(key, set()).update((selected & past(g, b)) | current)
        keys.append(key)
    return [frozenset(groups[key]) for key in keys]


def live(g: Geometry) -> list[tuple[int, int, int]]:
    """Every (request, head, query block) that holds a query."""
    return [(b, h, i) for b in g.requests for h in range(g.heads) for i in range(live_blocks(g, b))]


def entries(table: BlockTable) -> list[list[int]]:
    """The valid entries of each row."""
    return [row[:count] for row, count in zip(table.indices.tolist(), table.counts.tolist(), strict=True)]


def members(g: Geometry, table: BlockTable) -> Members:
    """Row -> the live (b, h, i) that use it."""
    rows = table.rows.tolist()
    found: Members = {}
    for b, h, i in live(g):
        found.setdefault(rows[b][h][i], []).append((b, h, i))
    return found


def table_sets(g: Geometry, table: BlockTable) -> list[frozenset[int]]:
    """For every live (b, h, i) in order, the blocks that its row lists."""
    listed, rows = entries(table), table.rows.tolist()
    return [frozenset(listed[rows[b][h][i]]) for b, h, i in live(g)]


def forced_and_visible(g: Geometry, selector: Selector) -> tuple[Tensor, Tensor]:
    """Bits kept without any score and bits visible at all, bool [B, Qb, Kb], by the rules common to all selectors."""
    forced = torch.zeros(len(g.q_lens), g.q_blocks, g.kv_blocks, dtype=torch.bool)
    seen = torch.zeros_like(forced)
    for b in g.requests:
        for i in range(live_blocks(g, b)):
            blocks = visible(g, b, i)
            w = max(blocks)
            everything = (
                g.q_lens[b] <= selector.dense_queries
                or g.seq_lens[b] <= selector.dense_keys
                or reaches_end(g, b, i, selector.dense_last_blocks)
            )
            for j in blocks:
                seen[b, i, j] = True
                forced[b, i, j] = everything or j < selector.sink_blocks or w - j < selector.window_blocks
    return forced, seen


# ---- the laws, each an assertion about a table ----


def assert_coverage(g: Geometry, mask: Tensor, table: BlockTable) -> None:
    """Law 1: every selected visible block of a member is in its row, and so is all of its current region."""
    bits = mask.cpu()
    for (b, h, i), listed in zip(live(g), table_sets(g, table), strict=True):
        selected = set(bits[b, h, i].nonzero()[:, 0].tolist()) & visible(g, b, i)
        assert selected <= listed, f"request {b} head {h} query block {i}: {sorted(selected - listed)} is missing"
        current = visible(g, b, i) - past(g, b)
        assert current <= listed, f"request {b} query block {i}: current region lacks {sorted(current - listed)}"


def assert_minimality(g: Geometry, mask: Tensor, table: BlockTable) -> None:
    """Law 2: each past entry was selected by a member; each other entry is current region of a member."""
    bits = mask.cpu()
    listed = entries(table)
    for r, users in members(g, table).items():
        for j in listed[r]:
            wanted = any(
                bool(bits[b, h, i, j]) if j in past(g, b) else j in visible(g, b, i) for b, h, i in users if j >= 0
            )
            assert wanted, f"row {r} lists block {j}, which no member needs"


def assert_canonical(g: Geometry, table: BlockTable) -> None:
    """Law 3: strictly ascending, no id beyond the last block visible to a member; rows nobody uses are empty."""
    users = members(g, table)
    for r, listed in enumerate(entries(table)):
        assert 0 <= int(table.counts[r]) <= g.kv_blocks, f"row {r} counts {int(table.counts[r])} blocks"
        assert all(a < b for a, b in pairwise(listed)), f"row {r} is not ascending: {listed}"
        if r not in users:
            assert not listed, f"nobody uses row {r}, which lists {listed}"
            continue
        last = max(max(visible(g, b, i)) for b, _, i in users[r])
        assert not listed or (listed[0] >= 0 and listed[-1] <= last), f"row {r} leaves 0 to {last}: {listed}"
