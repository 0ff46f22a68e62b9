"""The persistent kernel's plan and queue: every stage of every tile once, and no tile ends late."""

from __future__ import annotations

import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from compactattn import BlockTable
from tests.backends import REFERENCE
from tests.strategies import Geometry, Sizes, ceil_div, geometries, make_mask
from tests.test_attention import loose_tables

STAGE = ROWS = 128

Tile = tuple[int, int, int, bool]  # request, head, query block, packed


def expected_tiles(g: Geometry, table: BlockTable) -> dict[Tile, tuple[int, int]]:
    """(stages, masked stages) of each tile that must run, from Python lists alone."""
    indices, counts, rows = table.indices.tolist(), table.counts.tolist(), table.rows.tolist()
    lanes = ROWS // (1 << (g.group - 1).bit_length())
    tiles = {}
    for b, (q_len, seq_len) in enumerate(zip(g.q_lens, g.seq_lens, strict=True)):
        for h in range(g.heads):
            packed = False
            if g.group > 1 and 0 < q_len <= lanes:
                used = [rows[b][h // g.group * g.group + m][0] for m in range(g.group)]
                whole = all(counts[r] == ceil_div(seq_len, g.block_size) for r in used)
                packed = len(set(used)) == 1 or whole
            if packed and h % g.group:
                continue
            for i in range(ceil_div(q_len, ROWS)):
                first = seq_len - q_len + i * ROWS
                limit = min(first + ROWS, seq_len)
                row = rows[b][h][i]
                blocks = [j for j in indices[row][: counts[row]] if j * g.block_size < limit]
                keys = [t for j in blocks for t in range(j * g.block_size, min((j + 1) * g.block_size, limit))]
                full = [j for j in blocks if (j + 1) * g.block_size <= first + 1]
                stages = max(ceil_div(len(keys), STAGE), 1)
                tiles[b, h, i, packed] = stages, stages - len(full) * g.block_size // STAGE
    return tiles


def parts_of_tiles(g: Geometry, table: BlockTable, programs: int) -> dict[Tile, int]:
    """In how many parts each tile is computed; the schedule is compared with the oracle on the way."""
    from compactattn._triton.schedule import DIVISION_COST, FIELDS, SHORTEST_PART, TILE_COST, schedule_tiles

    work = schedule_tiles(g.batch("cpu"), table, g.group, programs)
    plan = work.plan.view(FIELDS, work.slots).tolist()
    drawn, items = work.queue.tolist()
    assert drawn == 0
    expected = expected_tiles(g, table)
    covered: dict[Tile, int] = {}
    parts: dict[Tile, int] = {}
    scratch: list[int] = []
    longest_item = 0
    for slot, code in zip(work.queue_tiles.tolist()[:items], work.queue_parts.tolist()[:items], strict=True):
        stages, edge, row, count, tile, token, position, query_rows, first_scratch = (field[slot] for field in plan)
        natural, packed = tile // 2, bool(tile % 2)
        b, h, i = natural // g.q_blocks // g.heads, natural // g.q_blocks % g.heads, natural % g.q_blocks
        key = (b, h, i, packed)
        assert expected[key] == (stages, edge)
        assert row == table.rows[b, h, i]
        assert count == table.counts[row]
        assert token == sum(g.q_lens[:b]) + i * ROWS
        assert position == g.seq_lens[b] - g.q_lens[b] + i * ROWS
        assert query_rows == min(ROWS, g.q_lens[b] - i * ROWS)
        parts[key], part = divmod(code, 65536)
        first, stop = part * stages // parts[key], (part + 1) * stages // parts[key]
        assert first == covered.get(key, 0)
        assert stop > first
        covered[key] = stop
        longest_item = max(longest_item, stop - first + TILE_COST)
        if parts[key] > 1:
            assert work.arrivals[2 * first_scratch] == work.arrivals[2 * first_scratch + 1] == 0
            scratch.append(first_scratch + part)
    assert covered == {key: stages for key, (stages, _) in expected.items()}
    assert len(set(scratch)) == len(scratch)
    assert all(0 <= s < work.scratch for s in scratch)
    share = ceil_div(sum(stages + TILE_COST for stages in covered.values()), programs)
    if len(scratch) < work.scratch:  # otherwise there is no room for more parts
        shortest = max(share // 12, SHORTEST_PART)
        assert longest_item <= max(share + share // 16 + DIVISION_COST, max(share, shortest) + shortest) + TILE_COST
    return parts


SIZES = Sizes(0, q_len=900, seq_len=9000, requests=5, heads=16)


@settings(max_examples=40, phases=[Phase.generate])
@given(st.data())
def test_every_stage_of_every_tile_once(data: st.DataObject) -> None:
    g = data.draw(geometries(SIZES, query_block=128))
    table = data.draw(loose_tables(g))
    parts_of_tiles(g, table, data.draw(st.sampled_from((1, 3, 132))))


def make_table(g: Geometry, blocks: torch.Tensor) -> BlockTable:
    """One row per (head, query block) with the given number of past blocks, the first ones, and the current region."""
    mask = make_mask(g, "cpu", "empty")
    mask.mask[:] = torch.arange(g.kv_blocks) < blocks.view(1, g.heads, g.q_blocks, 1)
    return REFERENCE.build_table(REFERENCE.unite(mask, g.batch("cpu"), heads_per_group=1, query_blocks_per_span=1))


def test_equal_tiles_stay_whole() -> None:
    g = Geometry((1024,), (60000,), kv_heads=8, group=4, block_size=128, query_block=128, page_size=128)
    parts = parts_of_tiles(g, make_table(g, torch.full((32, 8), 46)), 132)
    assert len(parts) == 256
    assert set(parts.values()) == {1}


def test_a_long_tile_is_divided() -> None:
    """One complete row among short ones would take several times a program's share."""
    g = Geometry((1024,), (60000,), kv_heads=8, group=4, block_size=128, query_block=128, page_size=128)
    blocks = torch.full((32, 8), 20)
    blocks[5, 3] = 450
    parts = parts_of_tiles(g, make_table(g, blocks), 132)
    assert parts[0, 5, 3, False] >= 8
    assert sum(n > 1 for n in parts.values()) < 200


def test_few_tiles_fill_the_programs() -> None:
    """Decode rows over a long context: fewer tiles than programs."""
    g = Geometry((1, 1), (60000, 30000), kv_heads=2, group=4, block_size=128, query_block=128, page_size=128)
    table = make_table(g, torch.full((8, 1), 500))
    parts = parts_of_tiles(g, table, 132)
    assert set(parts) == {(b, h, 0, True) for b in (0, 1) for h in (0, 4)}
    assert sum(parts.values()) > 60
