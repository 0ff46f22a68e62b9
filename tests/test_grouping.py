"""Groups that choose themselves: the laws of SPEC 3.2 for whatever was picked, and the same pick everywhere."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import strategies as st

from compactattn import BlockTable, FlashPrefill, SelectionMask, grouping_of
from compactattn.grouping import DEFAULT_COSTS, candidates
from tests.backends import REFERENCE, Backend, compose_table, for_all
from tests.laws import (
    assert_canonical,
    assert_coverage,
    assert_minimality,
    entries,
    live,
    live_blocks,
    members,
    reaches_end,
    table_sets,
)
from tests.numerics import assert_attention
from tests.strategies import MASKS, Geometry, flash_prefill, make_mask, make_step

masks = st.sampled_from((*MASKS, "alike"))


@st.composite
def groupings(draw: st.DrawFn, g: Geometry) -> dict[str, int | str | None]:
    """Both of a grouping's numbers "auto", or one of them."""
    return draw(
        st.sampled_from(
            (
                {"heads_per_group": "auto", "query_blocks_per_span": "auto"},
                {"heads_per_group": "auto", "query_blocks_per_span": "auto"},
                {"heads_per_group": "auto", "query_blocks_per_span": g.span},
                {"heads_per_group": g.heads_per_group, "query_blocks_per_span": "auto"},
            )
        )
    )


def selection_of(g: Geometry, device: str, kind: str, dense_last_blocks: int = 0) -> SelectionMask:
    """A mask that knows its KV heads; "alike": every head and query block of a request wants the same."""
    selection = make_mask(g, device, "half" if kind == "alike" else kind)
    mask = selection.mask
    if kind == "alike" and g.q_blocks:
        mask = mask[:, :1, :1].expand_as(mask).contiguous()
    return replace(selection, mask=mask, kv_heads=g.kv_heads, dense_last_blocks=dense_last_blocks)


def table_of(backend: Backend, g: Geometry, selection: SelectionMask, grouping: dict) -> BlockTable:
    return backend.build_table(backend.unite(selection, g.batch(backend.device), **grouping))


@for_all(examples=2, kind=masks, grouping=groupings)
def test_laws_of_a_table(backend: Backend, g: Geometry, kind: str, grouping: dict) -> None:
    """Laws 1 to 3 for the grouping that was picked: coverage, minimality, canonical form, unused rows empty."""
    selection = selection_of(g, backend.device, kind)
    table = table_of(backend, g, selection, grouping)
    assert table.indices.shape == (len(g.q_lens) * g.heads * g.q_blocks, g.kv_blocks)
    assert_coverage(g, selection.mask, table)
    assert_minimality(g, selection.mask, table)
    assert_canonical(g, table)


@for_all(examples=2, kind=masks, grouping=groupings, dense_last_blocks=st.sampled_from((0, 0, 1, 2)))
def test_the_pick_of_the_reference(
    backend: Backend, g: Geometry, kind: str, grouping: dict, dense_last_blocks: int
) -> None:
    """Every backend picks what the reference picks, and lists the same blocks in the same rows."""
    selection = selection_of(g, backend.device, kind, dense_last_blocks)
    table = table_of(backend, g, selection, grouping)
    expected = table_of(REFERENCE, g, replace(selection, mask=selection.mask.cpu()), grouping)
    assert torch.equal(table.rows.cpu(), expected.rows)
    assert torch.equal(table.counts.cpu(), expected.counts)
    assert entries(table) == entries(expected)


def predicted_ps(g: Geometry, table: BlockTable, dense_last_blocks: int) -> dict[tuple[int, int], int]:
    """The cost model over sets: (request, KV head) to picoseconds, rows of a prompt's end left out."""
    listed, costs = entries(table), DEFAULT_COSTS
    rows: dict[tuple[int, int], int] = {}
    tile_blocks: dict[tuple[int, int], int] = {}
    read: dict[tuple[int, int], set[int]] = {}
    for r, users in members(g, table).items():
        b, h, i = users[0]
        if reaches_end(g, b, i, dense_last_blocks):
            continue
        where = (b, h // g.group)
        rows[where] = rows.get(where, 0) + 1
        tile_blocks[where] = tile_blocks.get(where, 0) + len(users) * len(listed[r])
        read.setdefault(where, set()).update(listed[r])
    return {
        where: max(tile_blocks[where] * costs.arithmetic_ps, len(read[where]) * costs.bytes_ps) + n * costs.row_ps
        for where, n in rows.items()
    }


@for_all(kind=masks, grouping=groupings, dense_last_blocks=st.sampled_from((0, 0, 1)))
def test_no_candidate_is_predicted_faster(
    backend: Backend, g: Geometry, kind: str, grouping: dict, dense_last_blocks: int
) -> None:
    """The picked table costs, per request and KV head, what the best of the fixed candidates costs."""
    if backend.device != "cpu":
        pytest.skip("a GPU may have constants of its own")
    selection = selection_of(g, backend.device, kind, dense_last_blocks)
    picked = predicted_ps(g, table_of(backend, g, selection, grouping), dense_last_blocks)
    fixed = [
        predicted_ps(
            g,
            table_of(backend, g, selection, {"heads_per_group": heads, "query_blocks_per_span": span}),
            dense_last_blocks,
        )
        for heads, span in candidates(g.group, g.q_blocks, *grouping.values())
    ]
    for where, time in picked.items():
        assert time == min(option[where] for option in fixed)


@for_all(examples=0.5, kind=masks, grouping=groupings)
def test_independence_of_the_other_requests(backend: Backend, g: Geometry, kind: str, grouping: dict) -> None:
    """Law 7: a request alone lists what it lists in the batch, and law 6: a table's own mask gives its blocks again."""
    selection = selection_of(g, backend.device, kind)
    together = dict(zip(live(g), table_sets(g, table_of(backend, g, selection, grouping)), strict=True))
    for b in g.requests:
        alone = replace(
            g, q_lens=g.q_lens[b : b + 1], seq_lens=g.seq_lens[b : b + 1], prompt_lens=None, shared_pages=0,
            slack=(g.max_q_len - g.q_lens[b], g.max_seq_len - g.seq_lens[b] - (g.max_q_len - g.q_lens[b])),
        )  # fmt: skip
        if alone.max_seq_len != g.max_seq_len:
            continue
        own = replace(selection, mask=selection.mask[b : b + 1].contiguous())
        sets = table_sets(alone, table_of(backend, alone, own, grouping))
        assert sets == [together[b, h, i] for _, h, i in live(alone)]


@for_all(examples=0.4, selector=flash_prefill, grouping=groupings)
def test_fused_equals_composed(backend: Backend, g: Geometry, selector: FlashPrefill, grouping: dict) -> None:
    """`select` says how many KV heads there are, so the stages compose; attention is exact under the table."""
    step = make_step(g, backend.device, coherent=True)
    composed = compose_table(backend, step.q, step.kv, step.batch, selector=selector, **grouping)
    fused = backend.select_table(step.q, step.kv, step.batch, selector=selector, **grouping)
    assert torch.equal(fused.rows, composed.rows)
    assert entries(fused) == entries(composed)
    out, lse = backend.prefill(step.q, step.kv, step.batch, selector=selector, return_lse=True, **grouping)
    assert_attention(step, fused, out, lse)


AUTO = {"heads_per_group": "auto", "query_blocks_per_span": "auto"}


def test_what_was_picked(backend: Backend) -> None:
    """`grouping_of` reads the pick off the rows, for fixed groupings too."""
    g = Geometry((250, 60), (1000, 700), kv_heads=2, group=4, query_block=64)
    selection = selection_of(g, backend.device, "half")
    batch = g.batch(backend.device)
    for heads, span in ((1, 1), (2, 4), (4, 2), (4, 4)):
        groups = backend.unite(selection, batch, heads_per_group=heads, query_blocks_per_span=span)
        found = grouping_of(groups, 2)
        assert found.heads.tolist() == [[heads] * 2] * 2
        assert found.query_blocks.tolist() == [[span] * 2] * 2
    found = grouping_of(backend.unite(selection, batch, **AUTO), 2)
    allowed = candidates(4, live_blocks(g, 0), "auto", "auto")
    for b, h in ((b, h) for b in range(2) for h in range(2)):
        assert (int(found.heads[b, h]), int(found.query_blocks[b, h])) in allowed


def test_alike_heads_unite_and_others_do_not(backend: Backend) -> None:
    """Heads that want the same blocks save rows in a union; heads that differ would only compute more."""
    g = Geometry((200,), (3000,), kv_heads=2, group=4, query_block=64)
    alike, batch = selection_of(g, backend.device, "alike"), g.batch(backend.device)
    assert grouping_of(backend.unite(alike, batch, **AUTO), 2).heads.tolist() == [[4, 4]]
    different = selection_of(g, backend.device, "half")
    found = grouping_of(backend.unite(different, batch, **AUTO), 2)
    assert (found.heads.tolist(), found.query_blocks.tolist()) == ([[1, 1]], [[1, 1]])


@pytest.mark.parametrize("argument", ["heads_per_group", "query_blocks_per_span"])
def test_what_auto_needs(library: Backend, argument: str) -> None:
    """A mask that does not say how many KV heads there are, and words other than "auto", are refused."""
    g = Geometry((70,), (300,), group=2)
    selection = make_mask(g, library.device, "half")
    grouping = {"heads_per_group": 1, argument: "auto"}
    with pytest.raises(ValueError, match=r"selection.kv_heads: expected the number of KV heads"):
        library.unite(selection, g.batch(library.device), **grouping)
    with pytest.raises(ValueError, match=f"{argument}: expected .*'auto'"):
        library.unite(selection, g.batch(library.device), **{**grouping, argument: "best"})
