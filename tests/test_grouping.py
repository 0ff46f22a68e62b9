"""Groups that choose themselves: the grouping of the least predicted time, and every law for what it picked."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import strategies as st

from compactattn import PrefillBatch, SelectionMask, groupings, unite
from tests.backends import REFERENCE, Backend, compose_table, for_all
from tests.laws import assert_canonical, assert_coverage, assert_minimality, live
from tests.strategies import MASKS, Geometry, flash_prefill, make_mask, make_step

AUTO = st.sampled_from((("auto", "auto"), ("auto", None), ("auto", 1), (1, "auto")))


def make_selection(g: Geometry, device: str, kind: str, alike: bool, dense_last_blocks: int) -> SelectionMask:
    """A mask of the given kind; `alike`: the heads of a KV group want the same blocks."""
    selection = make_mask(g, device, kind)
    mask = selection.mask
    if alike:
        first = mask.view(len(g.q_lens), g.kv_heads, g.group, *mask.shape[2:])[:, :, :1]
        mask = first.expand(-1, -1, g.group, -1, -1).reshape(mask.shape).contiguous()
    return replace(selection, mask=mask, kv_heads=g.kv_heads, dense_last_blocks=dense_last_blocks)


@for_all(
    kind=st.sampled_from(MASKS),
    alike=st.booleans(),
    dense_last_blocks=st.sampled_from((0, 0, 1)),
    sizes=AUTO,
)
def test_auto(
    backend: Backend,
    g: Geometry,
    kind: str,
    alike: bool,
    dense_last_blocks: int,
    sizes: tuple[int | str, int | str | None],
) -> None:
    """Each request and KV head has the rows that its grouping would have alone, as the reference picks it."""
    selection = make_selection(g, backend.device, kind, alike, dense_last_blocks)
    batch = g.batch(backend.device)
    groups = backend.unite(selection, batch, heads_per_group=sizes[0], query_blocks_per_span=sizes[1])
    expected = REFERENCE.unite(
        replace(selection, mask=selection.mask.cpu()),
        g.batch("cpu"),
        heads_per_group=sizes[0],
        query_blocks_per_span=sizes[1],
    )
    assert torch.equal(groups.rows.cpu(), expected.rows)
    assert torch.equal(groups.keep.cpu(), expected.keep)
    picked = groupings(groups, g.kv_heads).tolist()
    table = backend.build_table(groups)
    assert_canonical(g, table)
    if dense_last_blocks == 0:
        assert_coverage(g, selection.mask, table)
        assert_minimality(g, selection.mask, table)
        for heads, span in {tuple(own) for request in picked for own in request if own[0] > 0}:
            fixed = backend.unite(selection, batch, heads_per_group=heads, query_blocks_per_span=span)
            for b, h, i in live(g):
                if tuple(picked[b][h // g.group]) == (heads, span):
                    own = groups.keep[int(groups.rows[b, h, i])]
                    assert torch.equal(own, fixed.keep[int(fixed.rows[b, h, i])])


@for_all(examples=0.5, selector=flash_prefill)
def test_prefill_composes_with_auto(backend: Backend, g: Geometry, selector: object) -> None:
    step = make_step(g, backend.device, coherent=True)
    options = {"selector": selector, "heads_per_group": "auto", "query_blocks_per_span": "auto"}
    fused = backend.select_table(step.q, step.kv, step.batch, **options)
    composed = compose_table(backend, step.q, step.kv, step.batch, **options)
    assert torch.equal(fused.counts, composed.counts)
    assert torch.equal(fused.rows, composed.rows)


def chunk(mask: torch.Tensor, kv_heads: int) -> tuple[SelectionMask, PrefillBatch]:
    """A chunk of 8 query blocks behind a past of 256 KV blocks, one request."""
    return SelectionMask(mask, 128, 128, kv_heads=kv_heads), PrefillBatch.from_lens([1024], [264 * 128], "cpu")


def test_equal_masks_share_and_different_masks_do_not() -> None:
    generator = torch.Generator().manual_seed(0)
    alike = torch.zeros(1, 8, 8, 264, dtype=torch.bool)
    alike[:] = torch.rand(264, generator=generator) < 0.1
    apart = torch.rand(1, 8, 8, 264, generator=generator) < 0.1
    mask = torch.cat((alike[:, :4], apart[:, 4:]), 1)  # the first KV head's queries agree, the second's do not
    groups = unite(*chunk(mask, 2), heads_per_group="auto", query_blocks_per_span="auto")
    shared, alone = groupings(groups, 2)[0].tolist()
    assert shared != [1, 1]
    assert alone == [1, 1]


def test_the_finest_wins_a_tie_and_unused_rows_are_empty() -> None:
    mask = torch.zeros(1, 8, 8, 264, dtype=torch.bool)
    groups = unite(*chunk(mask, 8), heads_per_group="auto", query_blocks_per_span=1)
    assert groupings(groups, 8).flatten(0, 1).tolist() == [[1, 1]] * 8
    used = set(groups.rows.flatten().tolist())
    assert not bool(groups.keep[[r for r in range(len(groups.keep)) if r not in used]].any())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads_per_group": "most"}, "heads_per_group: expected an int of at least 1 or 'auto', got 'most'"),
        (
            {"heads_per_group": 1, "query_blocks_per_span": "all"},
            "query_blocks_per_span: expected an int of at least 1 or 'auto', got 'all'",
        ),
    ],
)
def test_bad_sizes(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match="^" + message.replace("(", r"\(") + "$"):
        unite(*chunk(torch.zeros(1, 8, 8, 264, dtype=torch.bool), 2), **options)


def test_auto_needs_to_know_the_kv_heads() -> None:
    selection, batch = chunk(torch.zeros(1, 8, 8, 264, dtype=torch.bool), 2)
    with pytest.raises(
        ValueError, match=r"^selection\.kv_heads: expected Hkv, for groups that choose themselves, got None"
    ):
        unite(replace(selection, kv_heads=None), batch, heads_per_group="auto")
