"""Stage 2: rows of the union and the row that each (head, query block) uses, against Python sets."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import strategies as st

from compactattn import SelectionMask
from tests.backends import Backend, for_all
from tests.laws import fixed_row, live, oracle, past, reaches_end, visible
from tests.strategies import MASKS, Geometry, Sizes, ceil_div, geometries, make_mask

masks = st.sampled_from(MASKS)


@for_all(kind=masks, dense_last_blocks=st.sampled_from((0, 0, 1, 2)))
def test_rows_match_the_set_oracle(backend: Backend, g: Geometry, kind: str, dense_last_blocks: int) -> None:
    """keep[r] is the union of the members' past bits and every current-region block that a member sees."""
    selection = replace(make_mask(g, backend.device, kind), dense_last_blocks=dense_last_blocks)
    groups = backend.unite(selection, g.batch(backend.device), **g.grouping)
    rows, keep = groups.rows.tolist(), groups.keep.cpu()
    used = set()
    for (b, h, i), blocks in zip(live(g), oracle(g, selection.mask, dense_last_blocks), strict=True):
        used.add(rows[b][h][i])
        assert set(keep[rows[b][h][i]].nonzero()[:, 0].tolist()) == blocks, f"request {b}, head {h}, query block {i}"
    unused = [r for r in range(len(keep)) if r not in used]
    assert not bool(keep[unused].any()), "a row that nobody uses keeps blocks"


@for_all(kind=masks)
def test_row_formula(backend: Backend, g: Geometry, kind: str) -> None:
    """A fixed grouping has B * Hq / heads_per_group * ceil(Qb / span) rows, numbered as SPEC section 2 says."""
    selection = make_mask(g, backend.device, kind)
    groups = backend.unite(selection, g.batch(backend.device), **g.grouping)
    span = max(1, g.q_blocks) if g.span is None else g.span
    expected_rows = len(g.q_lens) * (g.heads // g.heads_per_group) * ceil_div(g.q_blocks, span)
    assert groups.keep.shape == (expected_rows, g.kv_blocks)
    assert groups.rows.shape == (len(g.q_lens), g.heads, g.q_blocks)
    assert (groups.block_size, groups.query_block) == (g.block_size, g.query_block)
    rows = groups.rows.tolist()
    for b in g.requests:
        for h in range(g.heads):
            assert rows[b][h] == [fixed_row(g, b, h, i) for i in range(g.q_blocks)]


@for_all(kind=masks)
def test_padded_and_invisible_bits_are_ignored(backend: Backend, g: Geometry, kind: str) -> None:
    """Only past bits of query blocks that hold a query matter: all others set or cleared give the same groups."""
    selection = make_mask(g, backend.device, kind)
    meaningful = torch.zeros(selection.mask.shape, dtype=torch.bool)
    for b, h, i in live(g):
        meaningful[b, h, i, : len(past(g, b))] = True
    meaningful = meaningful.to(backend.device)
    batch = g.batch(backend.device)
    first = backend.unite(replace(selection, mask=selection.mask | ~meaningful), batch, **g.grouping)
    second = backend.unite(replace(selection, mask=selection.mask & meaningful), batch, **g.grouping)
    assert torch.equal(first.keep, second.keep)
    assert torch.equal(first.rows, second.rows)


def with_prompts(sizes: Sizes) -> st.SearchStrategy[Geometry]:
    """Steps that know their prompts, most of them at or near the end."""
    return geometries(sizes).flatmap(
        lambda g: st.builds(
            lambda left: replace(g, prompt_lens=tuple(s + n for s, n in zip(g.seq_lens, left, strict=True))),
            st.lists(
                st.sampled_from((0, 0, 1, 40, g.query_block, g.query_block + 1, 900)),
                min_size=len(g.q_lens),
                max_size=len(g.q_lens),
            ),
        )
    )


@for_all(geometry=with_prompts, kind=masks, last_blocks=st.integers(1, 3))
def test_the_end_of_a_prompt_has_rows_of_its_own(backend: Backend, g: Geometry, kind: str, last_blocks: int) -> None:
    """Query blocks that reach into the prompt's end share no row with the others, so a union does not turn dense."""
    selection = replace(make_mask(g, backend.device, kind), dense_last_blocks=last_blocks)
    groups = backend.unite(selection, g.batch(backend.device), **g.grouping)
    rows = groups.rows.tolist()
    ends: dict[bool, set[int]] = {True: set(), False: set()}
    for b, h, i in live(g):
        end = reaches_end(g, b, i, last_blocks)
        ends[end].add(rows[b][h][i])
        if not end:
            assert rows[b][h][i] == fixed_row(g, b, h, i)
    assert not ends[True] & ends[False]


@pytest.mark.parametrize("span", [None, 1, 3, 99])
def test_many_blocks(backend: Backend, span: int | None) -> None:
    """More KV blocks than one tile of the kernels holds (the lengths alone matter here, no cache is needed)."""
    g = Geometry((130, 1), (200_000, 70_001), kv_heads=1, group=2, heads_per_group=2, span=span)
    selection = make_mask(g, backend.device, "sparse")
    groups = backend.unite(selection, g.batch(backend.device), **g.grouping)
    rows, keep = groups.rows.tolist(), groups.keep.cpu()
    for (b, h, i), blocks in zip(live(g), oracle(g, selection.mask), strict=True):
        assert set(keep[rows[b][h][i]].nonzero()[:, 0].tolist()) == blocks


def test_a_mask_of_any_strides(backend: Backend) -> None:
    """A mask that is a view with other strides is read as what it says."""
    g = Geometry((70,), (400,), group=4, heads_per_group=2)
    selection = make_mask(g, backend.device, "half")
    turned = selection.mask.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    wide = torch.ones((*selection.mask.shape[:3], 99), dtype=torch.bool, device=backend.device)
    wide[..., : g.kv_blocks] = selection.mask
    batch = g.batch(backend.device)
    expected = backend.unite(selection, batch, **g.grouping)
    for mask in (turned, wide[..., : g.kv_blocks]):
        groups = backend.unite(SelectionMask(mask, 64, 64), batch, **g.grouping)
        assert torch.equal(groups.keep, expected.keep)


def test_a_whole_chunk_is_one_span(backend: Backend) -> None:
    """query_blocks_per_span=None, Qb and anything above Qb are the same grouping."""
    g = Geometry((300, 20), (700, 400), group=2)
    selection = make_mask(g, backend.device, "half")
    batch = g.batch(backend.device)
    whole = backend.unite(selection, batch, heads_per_group=1)
    for span in (g.q_blocks, g.q_blocks + 7):
        same = backend.unite(selection, batch, heads_per_group=1, query_blocks_per_span=span)
        assert torch.equal(same.keep, whole.keep)
        assert torch.equal(same.rows, whole.rows)


def test_the_current_region_is_always_there(backend: Backend) -> None:
    """With an empty mask a row holds the blocks from past_len to its members' last row, and nothing else."""
    g = Geometry((150,), (500,), group=1, span=1)  # past_len 350: block 5 is cut by it
    selection = make_mask(g, backend.device, "empty")
    groups = backend.unite(selection, g.batch(backend.device), **g.grouping)
    for i in range(3):
        kept = set(groups.keep[i].nonzero()[:, 0].tolist())
        assert kept == visible(g, 0, i) - past(g, 0)
    assert set(groups.keep[0].nonzero()[:, 0].tolist()) == {5, 6}
