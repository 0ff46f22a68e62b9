"""The strategies reach the hard places: counted over what each backend really draws."""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from compactattn import FlashPrefill, Selector
from tests.backends import GPU, INTERPRETER, NUMBA, REFERENCE, Backend, for_all
from tests.laws import fixed_row, forced_and_visible, live, past
from tests.numerics import softmax_attention
from tests.strategies import (
    LAYOUTS,
    PAGE_SIZES,
    Geometry,
    ceil_div,
    flash_prefill,
    geometries,
    make_step,
    selectors,
)
from tests.test_laws import everything

DRAWS = 300


def unforced_past(g: Geometry, selector: Selector) -> int:
    """The most past blocks that some query block may take or leave."""
    forced, _ = forced_and_visible(g, selector)
    return max((len(past(g, b)) - int(forced[b, i, : len(past(g, b))].sum()) for b, _, i in live(g)), default=0)


def places(g: Geometry, selector: Selector) -> dict[str, bool]:
    """The hard places, and whether one drawn case stands on them."""
    rows = {fixed_row(g, b, h, i) for b, h, i in live(g) if b == 0}
    spans = ceil_div(max(1, g.q_blocks), max(1, g.q_blocks) if g.span is None else g.span)
    lens = list(zip(g.q_lens, g.seq_lens, strict=True))
    most_tiles = max(ceil_div(n, 64) for n in g.seq_lens)
    return {
        "three or more unforced past blocks": unforced_past(g, selector) >= 3,
        "several spans": spans > 1 and len({i for _, _, i in live(g)}) > 1,
        "several groups": g.heads > g.heads_per_group,
        "several spans and groups in use": spans > 1 and g.heads > g.heads_per_group and len(rows) > 2,
        "groups of several heads": g.heads_per_group > 1,
        "several KV heads": g.kv_heads > 1,
        "several query blocks": len({i for _, _, i in live(g)}) > 1,
        "loops of several KV tiles": most_tiles >= 4 and any(q for q in g.q_lens),
        "ragged": len(set(lens)) > 1,
        "a decode row": any(q == 1 < s for q, s in lens),
        "a few speculated tokens": any(2 <= q <= 5 and q < s for q, s in lens),
        "a request without queries": any(q == 0 < s for q, s in lens),
        "a request without keys": any(s == 0 for _, s in lens),
        "no query at all": not any(g.q_lens),
        "a first chunk": any(q == s > 1 for q, s in lens),
        "past_len off the block grid": any(q and p % g.block_size for q, p in zip(g.q_lens, g.past_lens, strict=True)),
        "past_len on the block grid": any(
            q and p and not p % g.block_size for q, p in zip(g.q_lens, g.past_lens, strict=True)
        ),
        "a short last query block": any(q % g.query_block for q in g.q_lens),
        "a full last query block": any(q and not q % g.query_block for q in g.q_lens),
        "a sequence that ends within a page": any(s % g.page_size for s in g.seq_lens),
        "a page of several blocks": g.page_size > g.block_size,
        "a block of several pages": g.page_size < g.block_size,
        "bounds above the lengths": g.slack != (0, 0),
        "prompts": g.prompt_lens is not None,
        "a dense end of a prompt": selector.dense_last_blocks > 0,
        "shared pages": g.shared_pages > 0,
        **{f"layout {layout}": g.layout == layout for layout in LAYOUTS},
        **{f"page size {size}": g.page_size == size for size in PAGE_SIZES},
    }


# how many of DRAWS draws must stand on a place, 6 unless named here
OFTEN = {
    "three or more unforced past blocks": 50,
    "several spans and groups in use": 15,
    "loops of several KV tiles": 100,
    "several query blocks": 60,
    "ragged": 50,
    "past_len off the block grid": 100,
    "a request without queries": 25,
    "a decode row": 25,
}


@pytest.mark.parametrize("backend", [REFERENCE, NUMBA, INTERPRETER, GPU], ids=lambda b: b.name)
def test_hard_places_are_reached(backend: Backend) -> None:
    """Of 300 drawn steps many stand on each hard place, and each group size from 1 to 16 occurs."""
    counts: Counter[str] = Counter()
    groups: Counter[int] = Counter()

    @settings(max_examples=DRAWS, suppress_health_check=list(HealthCheck), derandomize=True, database=None)
    @given(st.data())
    def draw(data: st.DataObject) -> None:
        g = data.draw(geometries(backend.sizes))
        counts.update({name: int(here) for name, here in places(g, data.draw(selectors(g))).items()})
        groups[g.group] += 1

    draw()
    scarce = {name: count for name, count in counts.items() if count < OFTEN.get(name, 6)}
    assert not scarce, f"of {DRAWS} draws: {scarce}"
    assert len(groups) >= (6 if backend is GPU else 0.7 * len(set(backend.sizes.groups)))


def test_selections_are_neither_empty_nor_full() -> None:
    """FlashPrefill on drawn steps keeps some and drops some of the past, so that tables differ between rows."""
    partial, rows_differ, cases = 0, 0, 0

    @for_all(examples=3, selector=functools.partial(flash_prefill, alphas=(0.05, 0.18, 0.5)))
    def count(backend: Backend, g: Geometry, selector: FlashPrefill) -> None:
        nonlocal partial, rows_differ, cases
        if unforced_past(g, selector) < 3:
            return
        step = make_step(g, backend.device, coherent=True)
        mask = backend.select(step.q, step.kv, step.batch, selector).mask
        kept = [mask[b, h, i, : len(past(g, b))] for b, h, i in live(g) if len(past(g, b)) >= 3]
        cases += 1
        partial += any(0 < int(bits.sum()) < len(bits) for bits in kept)
        rows_differ += len({tuple(bits.tolist()) for bits in kept}) > 1

    count(REFERENCE)
    assert cases >= 20
    assert partial >= 0.7 * cases
    assert rows_differ >= 0.6 * cases


def test_planted_edges_change_the_answer() -> None:
    """Where an edge is planted, seeing one key too many moves the output by far more than the error budget."""
    g = Geometry((70,), (300,), group=2)
    step = make_step(g, "cpu", plant=True)
    table = everything(g, "cpu")
    exact, _ = softmax_attention(step, table, torch.float64, g.dim**-0.5)
    later = replace(step, geometry=replace(g, q_lens=(69,)), q=step.q[:69])  # every query one position later
    moved, _ = softmax_attention(later, table, torch.float64, g.dim**-0.5)
    assert int(((moved - exact[:69]).abs().amax(-1) > 5.0).any(1).sum()) >= 4


@pytest.mark.parametrize("layout", LAYOUTS)
def test_everything_unread_is_poisoned(layout: str) -> None:
    """Unused pages and slots hold NaN, unused page ids are wild, and the rest is the data."""
    g = Geometry((5, 0), (300, 40), kv_heads=2, group=3, layout=layout, slack=(0, 100))
    step = make_step(g, "cpu")
    held = int((~step.kv.k.isnan()).sum())
    assert held == int((~step.kv.v.isnan()).sum()) == sum(g.seq_lens) * g.kv_heads * g.dim
    assert bool(step.q[step.rows :].isnan().all())
    assert not bool(step.q[: step.rows].isnan().any())
    used = [ceil_div(n, g.page_size) for n in g.seq_lens]
    for b, count in enumerate(used):
        ids = step.kv.page_table[b, :count]
        assert bool(((ids >= 0) & (ids < len(step.kv.k))).all())
        tail = step.kv.page_table[b, count:]
        assert bool(((tail < 0) | (tail >= len(step.kv.k))).all())
    assert (layout == "NHD") == (step.q.is_contiguous() and step.kv.k.is_contiguous() and step.kv.v.is_contiguous())


def test_examples_are_readable() -> None:
    """A failing geometry has a short name."""
    assert str(Geometry((111,), (517,), group=4)).startswith("B1-q111-kv517-H1-G4-D64")
