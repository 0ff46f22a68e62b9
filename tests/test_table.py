"""Stage 3: rows of kept blocks become ascending lists."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compactattn import GroupMask
from tests.backends import REFERENCE, Backend
from tests.laws import entries


def groups_of(rows: int, blocks: int, density: float, seed: int, device: str) -> GroupMask:
    generator = torch.Generator().manual_seed(seed)
    keep = torch.rand((rows, blocks), generator=generator) < density
    q_blocks = 4 if rows else 0  # without a query there is no row
    use = torch.randint(0, max(1, rows), (2, 3, q_blocks), generator=generator, dtype=torch.int32)
    return GroupMask(keep.to(device), use.to(device), 64, 128)


def assert_lists_the_kept_blocks(backend: Backend, groups: GroupMask) -> None:
    table = backend.build_table(groups)
    assert table.indices.shape == groups.keep.shape
    assert (table.indices.dtype, table.counts.dtype) == (torch.int32, torch.int32)
    assert torch.equal(table.rows, groups.rows)
    assert (table.block_size, table.query_block) == (groups.block_size, groups.query_block)
    kept = [[j for j, bit in enumerate(row) if bit] for row in groups.keep.tolist()]
    assert entries(table) == kept


# one tile of the kernel is 1024 blocks
@pytest.mark.parametrize("blocks", [0, 1, 31, 64, 1023, 1024, 1025, 3000])
@pytest.mark.parametrize("density", [0.0, 0.05, 0.9, 1.0])
def test_rows_list_the_kept_blocks(backend: Backend, blocks: int, density: float) -> None:
    """Exactly the kept blocks, strictly ascending, however many tiles a row takes."""
    assert_lists_the_kept_blocks(backend, groups_of(5, blocks, density, blocks, backend.device))


def test_random_rows(backend: Backend) -> None:
    """Any number of rows, none included."""

    @settings(max_examples=backend.sizes.examples)
    @given(st.integers(0, 70), st.integers(0, 200), st.sampled_from((0.0, 0.1, 0.5, 1.0)), st.integers(0, 10**6))
    def check(rows: int, blocks: int, density: float, seed: int) -> None:
        assert_lists_the_kept_blocks(backend, groups_of(rows, blocks, density, seed, backend.device))

    check()


def test_single_blocks_at_tile_edges(backend: Backend) -> None:
    """The first and the last block of each tile, alone in its row."""
    edges = [0, 31, 32, 127, 128, 1022, 1023, 1024, 2047, 2048, 2499]
    keep = torch.zeros((len(edges), 2500), dtype=torch.bool)
    keep[range(len(edges)), edges] = True
    rows = torch.zeros((1, 1, 1), dtype=torch.int32)
    table = backend.build_table(GroupMask(keep.to(backend.device), rows.to(backend.device), 64, 64))
    assert entries(table) == [[j] for j in edges]


def test_keep_of_any_strides(backend: Backend) -> None:
    """A transposed mask is read as what it says."""
    groups = groups_of(7, 90, 0.4, 1, backend.device)
    turned = GroupMask(groups.keep.T.contiguous().T, groups.rows, 64, 128)
    assert entries(backend.build_table(turned)) == entries(REFERENCE.build_table(groups))


def test_the_result_owns_its_rows(backend: Backend) -> None:
    """The table records which row each (head, query block) uses, contiguous as its class demands."""
    groups = groups_of(7, 90, 0.4, 1, backend.device)
    turned = GroupMask(groups.keep, groups.rows.permute(2, 1, 0), 64, 128)
    assert torch.equal(backend.build_table(turned).rows, groups.rows.permute(2, 1, 0))
