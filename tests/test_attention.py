"""Stage 4: attention over any table, compared with float64 under the budget of tests/numerics.py."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import strategies as st

from compactattn import BlockTable
from reference import attend as reference_attend
from tests.backends import GPU, REFERENCE, Backend, for_all
from tests.laws import live
from tests.numerics import assert_attention, softmax_attention
from tests.strategies import (
    LAYOUTS,
    PAGE_SIZES,
    Geometry,
    Step,
    ceil_div,
    make_mask,
    make_step,
    poison,
    poison_tails,
)

HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32

# What random draws may miss: each meets one hard place on purpose.
HARD = (
    Geometry((111,), (517,), kv_heads=1, group=4, heads_per_group=2, span=1, page_size=16),
    Geometry((63, 0, 1), (191, 64, 300), kv_heads=2, group=2, heads_per_group=2, page_size=64, layout="HND"),
    Geometry((64, 2), (64, 450), kv_heads=1, group=3, page_size=128, layout="odd", dtype=HALF),
    Geometry((1, 1), (449, 1), kv_heads=1, group=16, heads_per_group=16, page_size=32, layout="mixed"),
    Geometry((5, 0), (383, 0), kv_heads=1, group=5, heads_per_group=5, page_size=256, layout="stacked", dtype=HALF),
    Geometry((65,), (258,), block_size=128, query_block=128, dim=80, page_size=128, layout="padded"),
    Geometry((70, 3), (326, 259), block_size=256, page_size=256, dtype=HALF, slack=(70, 200)),
)


@st.composite
def loose_tables(draw: st.DrawFn, g: Geometry) -> BlockTable:
    """Any ascending rows of visible blocks, any indirection within a request: no current region, no row formula."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    per_request = draw(st.integers(1, 3))
    rows = len(g.q_lens) * per_request
    keep = torch.rand((rows, g.kv_blocks), generator=generator) < draw(st.sampled_from((0.0, 0.2, 0.6)))
    blocks = torch.tensor([ceil_div(n, g.block_size) for n in g.seq_lens]).repeat_interleave(per_request)
    keep &= torch.arange(g.kv_blocks) < blocks[:, None]
    indices, counts = torch.zeros(keep.shape, dtype=torch.int32), keep.sum(1).to(torch.int32)
    for r in range(rows):
        kept = keep[r].nonzero()[:, 0]
        indices[r, : len(kept)] = kept
    shape = (len(g.q_lens), g.heads, g.q_blocks)
    own = torch.randint(0, per_request, shape, generator=generator)
    use = torch.arange(len(g.q_lens))[:, None, None] * per_request + own
    return poison_tails(BlockTable(indices, counts, use.to(torch.int32), g.block_size, g.query_block))


def to(table: BlockTable, device: str) -> BlockTable:
    return replace(table, indices=table.indices.to(device), counts=table.counts.to(device), rows=table.rows.to(device))


def reference_table(step: Step, kind: str) -> BlockTable:
    """A canonical table for a mask of the given kind, tails poisoned."""
    mask = make_mask(step.geometry, step.q.device.type, kind)
    groups = REFERENCE.unite(mask, step.batch, **step.geometry.grouping)
    return poison_tails(REFERENCE.build_table(groups))


def named_blocks(g: Geometry, table: BlockTable) -> set[tuple[int, int, int]]:
    """(request, KV head, block) that some row of a live query names."""
    indices, counts, rows = table.indices.tolist(), table.counts.tolist(), table.rows.tolist()
    return {(b, h // g.group, j) for b, h, i in live(g) for j in indices[rows[b][h][i]][: counts[rows[b][h][i]]]}


@pytest.mark.parametrize("kind", ["sparse", "full"])
@pytest.mark.parametrize("g", HARD, ids=str)
def test_hard_places(backend: Backend, g: Geometry, kind: str) -> None:
    """Each hard place with everything around it poisoned: pages, slots, blocks that no table names, tails."""
    step = make_step(g, backend.device, plant=True)
    table = reference_table(step, kind)
    named = named_blocks(g, table)
    kv = poison(step.kv, g, lambda b, kv_head, j: (b, kv_head, j) in named)
    out, lse = backend.attend(step.q, kv, step.batch, table, return_lse=True)
    assert_attention(step, table, out, lse)


def cover() -> list[Geometry]:
    """Each dtype with each D, and on the way every G, every page size with every block size, every layout."""
    cases = []
    for n, (dim, dtype) in enumerate(product((64, 80, 96, 128, 192, 256), (HALF, BRAIN, SINGLE))):
        group = n % 16 + 1
        g = Geometry(
            (67, 1) if group < 8 else (4, 1),
            (401, 70),
            group=group,
            dim=dim,
            page_size=PAGE_SIZES[n % 5],
            block_size=(64, 128, 256)[n % 3],
            query_block=(64, 128)[n // 3 % 2],
            heads_per_group=max(d for d in (1, 2, 3, 5, 7, 8) if group % d == 0),
            layout=LAYOUTS[n % len(LAYOUTS)],
            dtype=dtype,
        )
        cases.append(g)
    return cases


@pytest.mark.parametrize("g", cover(), ids=str)
def test_every_dtype_dimension_group_page_size_and_layout(backend: Backend, g: Geometry) -> None:
    """The whole support table, with everything that no table names poisoned."""
    if backend.name == "triton-interpreter" and g.dtype == BRAIN:
        g = replace(g, dtype=HALF)  # the interpreter's bfloat16 products are wrong
    step = make_step(g, backend.device, plant=True)
    table = reference_table(step, "half")
    named = named_blocks(g, table)
    kv = poison(step.kv, g, lambda b, kv_head, j: (b, kv_head, j) in named)
    out, lse = backend.attend(step.q, kv, step.batch, table, return_lse=True)
    assert_attention(step, table, out, lse)


@for_all(table=loose_tables)
def test_any_ascending_rows(backend: Backend, g: Geometry, table: BlockTable) -> None:
    """Visible blocks without a current region and any indirection; a query with nothing to see gets 0 and -inf."""
    step = make_step(g, backend.device, plant=True)
    table = to(table, backend.device)
    out, lse = backend.attend(step.q, step.kv, step.batch, table, return_lse=True)
    assert_attention(step, table, out, lse)


def test_nothing_to_see(backend: Backend) -> None:
    """An empty table: out is exactly 0 and lse exactly -inf, even over a cache of NaN."""
    g = Geometry((70, 1), (200, 90), group=2)
    step = make_step(g, backend.device)
    table = reference_table(step, "full")
    table = replace(table, counts=torch.zeros_like(table.counts))
    kv = poison(step.kv, g, lambda b, kv_head, j: False)
    out, lse = backend.attend(step.q, kv, step.batch, table, return_lse=True)
    assert torch.equal(out[: step.rows], torch.zeros_like(out[: step.rows]))
    assert torch.equal(lse[: step.rows], torch.full_like(lse[: step.rows], float("-inf")))


def test_lse_changes_no_bit_of_the_output(backend: Backend) -> None:
    """return_lse only adds a result."""
    step = make_step(HARD[0], backend.device)
    table = reference_table(step, "sparse")
    out, _ = backend.attend(step.q, step.kv, step.batch, table, return_lse=True)
    assert torch.equal(backend.attend(step.q, step.kv, step.batch, table)[: step.rows], out[: step.rows])


@pytest.mark.parametrize("scale", [0.5, 0, -0.25])
def test_scale(backend: Backend, scale: float) -> None:
    """Any finite scale: 0 averages the values, a negative one turns the order around."""
    step = make_step(HARD[0], backend.device, plant=scale > 0)
    table = reference_table(step, "sparse")
    out, lse = backend.attend(step.q, step.kv, step.batch, table, scale=scale, return_lse=True)
    assert_attention(step, table, out, lse, scale)


@pytest.mark.parametrize("layout", ["NHD", "padded"])
def test_out_is_written_in_place(library: Backend, layout: str) -> None:
    """`out` may be strided, is what comes back, and keeps its rows beyond cu_seqlens_q[B] out of the result."""
    step = make_step(HARD[0], library.device)
    table = reference_table(step, "sparse")
    expected = library.attend(step.q, step.kv, step.batch, table)
    shape = step.q.shape
    extra = (0, 0, 0) if layout == "NHD" else (0, 3, 8)
    storage = torch.full([n + e for n, e in zip(shape, extra, strict=True)], 7.0, device=library.device)
    out = storage[:, : shape[1], : shape[2]]
    assert library.attend(step.q, step.kv, step.batch, table, out=out) is out
    assert torch.equal(out[: step.rows], expected[: step.rows])
    if layout == "padded":
        assert bool((storage[:, shape[1] :] == 7.0).all())
        assert bool((storage[..., shape[2] :] == 7.0).all())


def test_large_scores_do_not_overflow(backend: Backend) -> None:
    """Scores of several hundred: the running maximum keeps every exponent below 1."""
    g = replace(HARD[0], dtype=HALF)
    step = make_step(g, backend.device)
    table = reference_table(step, "half")
    out, lse = backend.attend(step.q, step.kv, step.batch, table, scale=30.0, return_lse=True)
    assert bool(out[: step.rows].isfinite().all())
    assert_attention(step, table, out, lse, scale=30.0)


def test_reference_in_float64_is_the_exact_result() -> None:
    """The reference's own walk over pages agrees with attention over the unpaged cache to float64 rounding."""
    for g in HARD:
        step = make_step(replace(g, dtype=SINGLE), "cpu", plant=True)
        table = reference_table(step, "sparse")
        double = replace(step.kv, k=step.kv.k.double(), v=step.kv.v.double())
        out, lse = reference_attend(step.q.double(), double, step.batch, table, return_lse=True)
        exact, exact_lse = softmax_attention(step, table, torch.float64, g.dim**-0.5)
        torch.testing.assert_close(out[: step.rows], exact, rtol=0, atol=1e-12 * float(exact.abs().max()))
        torch.testing.assert_close(lse[: step.rows], exact_lse, rtol=1e-13, atol=1e-12)


def test_float32_products_are_ieee(backend: Backend) -> None:
    """Differences in the last bits of the inputs survive: no TF32, which would drop them."""
    g = Geometry((64,), (256,), page_size=64)
    step = make_step(g, backend.device)
    table = reference_table(step, "full")
    out, lse = backend.attend(step.q, step.kv, step.batch, table, return_lse=True)
    exact, exact_lse = softmax_attention(step, table, torch.float64, g.dim**-0.5)
    assert float((out[: step.rows] - exact).abs().max()) < 5e-6
    assert float((lse[: step.rows] - exact_lse).abs().max()) < 5e-6


@pytest.mark.gpu
def test_a_group_of_many_spans_on_the_gpu() -> None:
    """More query blocks than the kernel scans of a row's end in one go."""
    g = Geometry((2500,), (6000,), kv_heads=1, group=2, heads_per_group=2, dtype=HALF, page_size=16, dim=64)
    step = make_step(g, GPU.device, plant=True)
    table = reference_table(step, "sparse")
    out, lse = GPU.attend(step.q, step.kv, step.batch, table, return_lse=True)
    assert_attention(step, table, out, lse)
