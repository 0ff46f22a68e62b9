"""The eight laws of SPEC 3.2, on every backend, over random geometries."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import torch
from hypothesis import strategies as st

from compactattn import BlockTable, Dense, PagedKV, PrefillBatch, SelectionMask
from tests.backends import Backend, for_all
from tests.laws import (
    assert_canonical,
    assert_coverage,
    assert_minimality,
    live,
    members,
    oracle,
    table_sets,
)
from tests.numerics import assert_attention
from tests.strategies import (
    MASKS,
    Geometry,
    ceil_div,
    geometries,
    make_mask,
    make_step,
    poison,
    poison_tails,
    selectors,
)

masks = st.sampled_from(MASKS)


def table_of(backend: Backend, g: Geometry, selection: SelectionMask, **grouping: int | None) -> BlockTable:
    groups = backend.unite(selection, g.batch(backend.device), **(grouping or g.grouping))
    return backend.build_table(groups)


@for_all(kind=masks, dense_last_blocks=st.sampled_from((0, 0, 1, 2)))
def test_tables_match_the_set_oracle(backend: Backend, g: Geometry, kind: str, dense_last_blocks: int) -> None:
    """Laws 1 to 3 at once: every table is exactly the one that Python sets give."""
    selection = replace(make_mask(g, backend.device, kind), dense_last_blocks=dense_last_blocks)
    table = table_of(backend, g, selection)
    assert table_sets(g, table) == oracle(g, selection.mask, dense_last_blocks)


@for_all(kind=masks)
def test_coverage(backend: Backend, g: Geometry, kind: str) -> None:
    """Law 1: every selected visible block of a member is in its row."""
    selection = make_mask(g, backend.device, kind)
    assert_coverage(g, selection.mask, table_of(backend, g, selection))


@for_all(kind=masks)
def test_minimality(backend: Backend, g: Geometry, kind: str) -> None:
    """Law 2: take away any past entry, and some member loses a block that it selected."""
    selection = make_mask(g, backend.device, kind)
    assert_minimality(g, selection.mask, table_of(backend, g, selection))


@for_all(kind=masks)
def test_canonical_form(backend: Backend, g: Geometry, kind: str) -> None:
    """Law 3: strictly ascending, no duplicates, nothing beyond the last visible block, unused rows empty."""
    assert_canonical(g, table_of(backend, g, make_mask(g, backend.device, kind)))


@for_all(examples=0.5, kind=masks)
def test_entries_past_counts_are_never_read(backend: Backend, g: Geometry, kind: str) -> None:
    """Law 3: poisoned tails change no bit of the result."""
    step = make_step(g, backend.device)
    table = table_of(backend, g, make_mask(g, backend.device, kind))
    clean = torch.where(torch.arange(table.indices.shape[1], device=backend.device) < table.counts[:, None], 1, 0)
    zeroed = replace(table, indices=(table.indices * clean).to(torch.int32))
    expected = backend.attend(step.q, step.kv, step.batch, zeroed)[: step.rows]
    assert torch.equal(backend.attend(step.q, step.kv, step.batch, poison_tails(table))[: step.rows], expected)


@st.composite
def refinements(draw: st.DrawFn, g: Geometry) -> dict[str, int | None]:
    """A grouping each of whose groups lies inside one of the geometry's."""
    heads = draw(st.sampled_from([n for n in range(1, g.heads_per_group + 1) if g.heads_per_group % n == 0]))
    coarse = max(1, g.q_blocks) if g.span is None else g.span
    spans = [n for n in range(1, coarse + 1) if coarse % n == 0 or g.span is None]
    return {"heads_per_group": heads, "query_blocks_per_span": draw(st.sampled_from(spans))}


@for_all(kind=masks, finer=refinements, dense_last_blocks=st.sampled_from((0, 0, 1)))
def test_refinement(
    backend: Backend, g: Geometry, kind: str, finer: dict[str, int | None], dense_last_blocks: int
) -> None:
    """Law 4: a coarser table is exactly the union of the finer tables inside it."""
    selection = replace(make_mask(g, backend.device, kind), dense_last_blocks=dense_last_blocks)
    coarse, fine = table_of(backend, g, selection), table_of(backend, g, selection, **finer)
    finer_sets = dict(zip(live(g), table_sets(g, fine), strict=True))
    coarse_sets = dict(zip(live(g), table_sets(g, coarse), strict=True))
    for users in members(g, coarse).values():
        union = frozenset().union(*(finer_sets[user] for user in users))
        assert all(coarse_sets[user] == union for user in users)


@for_all(kind=masks, more=masks)
def test_monotonicity(backend: Backend, g: Geometry, kind: str, more: str) -> None:
    """Law 5: for a fixed grouping, more bits in the mask never shrink a table."""
    small = make_mask(g, backend.device, kind)
    large = replace(small, mask=small.mask | make_mask(replace(g, seed=g.seed + 1), backend.device, more).mask)
    before, after = (table_sets(g, table_of(backend, g, s)) for s in (small, large))
    assert all(a <= b for a, b in zip(before, after, strict=True))


@for_all(kind=masks, dense_last_blocks=st.sampled_from((0, 0, 1)))
def test_idempotence(backend: Backend, g: Geometry, kind: str, dense_last_blocks: int) -> None:
    """Law 6: a table's own mask (each member keeps the row's entries that it sees) gives the same table again."""
    selection = replace(make_mask(g, backend.device, kind), dense_last_blocks=dense_last_blocks)
    table = table_of(backend, g, selection)
    own = torch.zeros_like(selection.mask)
    for (b, h, i), listed in zip(live(g), table_sets(g, table), strict=True):
        own[b, h, i, [j for j in listed if j * g.block_size <= g.past_lens[b] + (i + 1) * g.query_block - 1]] = True
    again = table_of(backend, g, replace(selection, mask=own))
    assert torch.equal(again.rows, table.rows)
    assert table_sets(g, again) == table_sets(g, table)


@for_all(examples=0.5, selector=selectors, order=st.randoms(use_true_random=False))
def test_independence(backend: Backend, g: Geometry, selector: object, order: object) -> None:
    """Law 7: valid entries do not depend on the other requests, the order of the batch, or where the pages lie."""
    step = make_step(g, backend.device, coherent=True)
    table = backend.select_table(step.q, step.kv, step.batch, selector=selector, **g.grouping)
    listed = dict(zip(live(g), table_sets(g, table), strict=True))
    chosen = list(g.requests)
    order.shuffle(chosen)
    chosen = chosen[: order.randint(1, len(chosen))]
    span = max(1, g.q_blocks) if g.span is None else g.span  # the whole chunk, whatever the other requests' length
    part = replace(
        g,
        q_lens=tuple(g.q_lens[b] for b in chosen),
        seq_lens=tuple(g.seq_lens[b] for b in chosen),
        prompt_lens=None if g.prompt_lens is None else tuple(g.prompt_lens[b] for b in chosen),
        slack=(0, 0),
        span=span,
    )
    q = torch.cat([step.queries(b) for b in chosen])
    kv = move_pages(step.kv, chosen, order.randint(0, 10**6), width=ceil_div(part.max_seq_len, g.page_size))
    alone = backend.select_table(q, kv, part.batch(backend.device), selector=selector, **part.grouping)
    for (n, h, i), blocks in zip(live(part), table_sets(part, alone), strict=True):
        assert blocks == listed[chosen[n], h, i], f"request {chosen[n]}, head {h}, query block {i}"


def move_pages(kv: PagedKV, requests: list[int], seed: int, width: int) -> PagedKV:
    """The caches of some requests with every page somewhere else."""
    pages = kv.k.shape[0]
    places = torch.randperm(pages, generator=torch.Generator().manual_seed(seed)).to(kv.k.device)
    back = places.argsort()
    table = kv.page_table[requests][:, :width].clone()
    valid = (table >= 0) & (table < pages)
    table[valid] = places[table[valid].long()].to(torch.int32)
    return PagedKV(kv.k[back], kv.v[back], table.contiguous())


@for_all(kind=masks, scale=st.sampled_from((None, None, 0.3, -0.1)))
def test_execution_equals_dense_attention_under_the_blocks(
    backend: Backend, g: Geometry, kind: str, scale: float | None
) -> None:
    """Law 8: attend(table) is dense attention under the row's blocks, whatever lies in memory that it names not."""
    step = make_step(g, backend.device, plant=True)
    table = table_of(backend, g, make_mask(g, backend.device, kind))
    read = {(b, h // g.group, j) for (b, h, _), row in zip(live(g), table_sets(g, table), strict=True) for j in row}
    poisoned = poison(step.kv, g, lambda b, kv_head, j: (b, kv_head, j) in read)
    out, lse = backend.attend(step.q, poisoned, step.batch, poison_tails(table), scale=scale, return_lse=True)
    assert_attention(step, table, out, lse, scale)


@for_all(examples=0.7)
def test_dense_is_dense_causal_attention(backend: Backend, g: Geometry) -> None:
    """Law 8: with Dense() the result is dense causal attention, here in float64 over the unpaged cache."""
    step = make_step(g, backend.device, plant=True)
    selector = Dense(block_size=g.block_size, query_block=g.query_block)
    out, lse = backend.prefill(step.q, step.kv, step.batch, selector=selector, **g.grouping, return_lse=True)
    assert_attention(step, everything(g, backend.device), out, lse)


@st.composite
def cuts(draw: st.DrawFn, g: Geometry) -> list[int]:
    """Where to cut the prompt of a one-request geometry into chunks."""
    n = g.seq_lens[0]
    return sorted({0, n, *draw(st.lists(st.integers(1, max(1, n - 1)), min_size=1, max_size=4))})


def one_prompt(sizes: object) -> st.SearchStrategy[Geometry]:
    """One request whose chunk is its whole prompt."""
    shape = geometries(replace(sizes, requests=1), prompt_lens=None, slack=(0, 0), shared_pages=0)
    lens = st.integers(2, 2 * sizes.q_len)
    return st.builds(lambda g, n: replace(g, q_lens=(n,), seq_lens=(n,)), shape, lens)


@for_all(examples=0.7, geometry=one_prompt, cuts=cuts)
def test_chunking_gives_the_one_shot_result(backend: Backend, g: Geometry, cuts: list[int]) -> None:
    """Law 8: a prompt cut in any way, with Dense(), gives one-shot attention; later tokens are not yet in the cache."""
    step = make_step(g, backend.device, plant=True)
    selector = Dense(block_size=g.block_size, query_block=g.query_block)
    outs, lses = [], []
    for start, stop in pairwise(cuts):
        batch = PrefillBatch.from_lens([stop - start], [stop], backend.device)
        kv = cut_cache(step.kv, stop)
        out, lse = backend.prefill(
            step.q[start:stop], kv, batch, selector=selector, heads_per_group=g.heads_per_group, return_lse=True
        )
        outs.append(out)
        lses.append(lse)
    tail = step.q[step.rows :]
    out, lse = torch.cat([*outs, tail]), torch.cat([*lses, tail[..., 0].float()])
    assert_attention(step, everything(g, backend.device), out, lse)


def cut_cache(kv: PagedKV, stop: int) -> PagedKV:
    """The cache of a single request as it was when it held `stop` tokens: NaN in every later slot."""
    k, v = kv.k.clone(), kv.v.clone()
    for n, page in enumerate(kv.page_table[0].tolist()):
        if 0 <= page < k.shape[0]:
            k[page, max(0, stop - n * kv.page_size) :] = float("nan")
            v[page, max(0, stop - n * kv.page_size) :] = float("nan")
    return PagedKV(k, v, kv.page_table)


def everything(g: Geometry, device: str) -> BlockTable:
    """Every block in every row, straight from the lengths; what is not visible is cut by the causal edge."""
    indices = torch.arange(g.kv_blocks, dtype=torch.int32).repeat(len(g.q_lens), 1)
    counts = torch.tensor([ceil_div(n, g.block_size) for n in g.seq_lens], dtype=torch.int32)
    rows = torch.arange(len(g.q_lens), dtype=torch.int32)[:, None, None].expand(-1, g.heads, g.q_blocks)
    return BlockTable(indices.to(device), counts.to(device), rows.contiguous().to(device), g.block_size, g.query_block)
