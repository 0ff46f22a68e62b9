"""The mean correction of SPEC 3.3: its value, its laws, and what it refuses."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from compactattn import (
    BlockTable,
    FlashPrefill,
    KVSummary,
    PagedKV,
    SelectionMask,
    Selector,
    attend,
    prefill,
    summarize,
)
from compactattn.features import PLAIN, Features
from tests.backends import Backend, for_all
from tests.laws import live
from tests.numerics import ORDERS, SAMPLES, assert_as_close, query_blocks
from tests.strategies import (
    MASKS,
    Geometry,
    Step,
    ceil_div,
    flash_prefill,
    make_mask,
    make_step,
    poison,
    poison_tails,
    selectors,
)
from tests.test_selection import few_keys

HALF, SINGLE = torch.float16, torch.float32
FLASH = FlashPrefill(alpha=0.9, sink_blocks=0, window_blocks=0, block_size=64, query_block=64)


def table_of(backend: Backend, g: Geometry, kind: str) -> BlockTable:
    groups = backend.unite(make_mask(g, backend.device, kind), g.batch(backend.device), **g.grouping)
    return poison_tails(backend.build_table(groups))


def corrected(
    step: Step,
    table: BlockTable,
    dtype: torch.dtype,
    order: torch.Generator | None = None,
    features: Features = PLAIN,
) -> tuple[Tensor, Tensor]:
    """Softmax attention over the row's visible tokens and the means of its left-out past blocks, over unpaged keys.

    With `order`, keys and dimensions are summed in a random order, and means one token after the other.
    """
    g = step.geometry
    out = torch.zeros(step.rows, g.heads, g.dim, dtype=dtype)
    lse = torch.full((step.rows, g.heads), -math.inf, dtype=dtype)
    indices, counts, rows = table.indices.tolist(), table.counts.tolist(), table.rows.tolist()
    q = step.q.cpu()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    means = [[mean(x[b].cpu().to(wide), g, b, order is not None) for b in g.requests] for x in (step.keys, step.values)]
    for b, i, span in query_blocks(step):
        position = torch.arange(span.stop - span.start) + g.past_lens[b] + span.start - g.starts[b]
        for h in range(g.heads):
            blocks = indices[rows[b][h][i]][: counts[rows[b][h][i]]]
            key = torch.tensor([j * g.block_size + t for j in blocks for t in range(g.block_size)], dtype=torch.long)
            key = key[key <= position[-1]]
            keys, values = (x[b][:, h // g.group].cpu() for x in (step.keys, step.values))
            absent = [j for j in range(g.past_lens[b] // g.block_size) if j not in blocks]
            k, v = keys[key].to(dtype), values[key].to(dtype)
            hidden = key > position[:, None]
            weight = torch.zeros(len(key) + len(absent), dtype=dtype)
            k, v = (torch.cat((x, m[b][absent, h // g.group].to(dtype))) for x, m in zip((k, v), means, strict=True))
            weight[len(key) :] = math.log(g.block_size)
            hidden = torch.cat((hidden, torch.zeros(len(position), len(absent), dtype=torch.bool)), 1)
            if not len(k) and features.sinks is None:
                continue
            dim = torch.arange(g.dim)
            if order is not None:
                turn = torch.randperm(len(k), generator=order)
                k, v, weight, hidden = k[turn], v[turn], weight[turn], hidden[:, turn]
                dim = dim[torch.randperm(g.dim, generator=order)]
            s = q[span, h].to(dtype)[:, dim] @ k[:, dim].T * g.dim**-0.5
            if features.softcap is not None:
                s = features.softcap * torch.tanh(s / features.softcap)
            s = (s + weight).masked_fill(hidden, -math.inf)
            if features.sinks is not None:
                s = torch.cat((s, features.sinks[h].cpu().to(dtype).expand(len(s), 1)), 1)
                v = torch.cat((v, v.new_zeros(1, g.dim)))
            seen = ~(s == -math.inf).all(1, keepdim=True)
            out[span, h] = torch.where(seen, s.softmax(-1), 0.0).to(dtype) @ v
            lse[span, h] = s.logsumexp(-1)
    return out, lse


def mean(tokens: Tensor, g: Geometry, b: int, one_by_one: bool) -> Tensor:
    """Means [past blocks, Hkv, D] of the complete past blocks of a request."""
    past = g.past_lens[b] // g.block_size
    blocks = tokens[: past * g.block_size].view(past, g.block_size, g.kv_heads, g.dim)
    return sum(blocks.unbind(1)[1:], blocks[:, 0]) / g.block_size if one_by_one else blocks.mean(1)


def assert_corrected(step: Step, table: BlockTable, out: Tensor, lse: Tensor, features: Features = PLAIN) -> None:
    """SPEC 3.3 for out and lse, per request and head.

    In float32, as in tests/numerics.py, the worst of several orders of summation counts; they are tried one by one.
    """
    g = step.geometry
    exact = corrected(step, table, torch.float64, features=features)
    assert lse.dtype == SINGLE
    assert torch.equal(lse[: step.rows].cpu() == -math.inf, exact[1] == -math.inf)
    plain = [corrected(step, table, g.dtype, features=features)]
    shortest = min((n for n in g.q_lens if n), default=SAMPLES)
    repeats = max(ORDERS, ceil_div(SAMPLES, shortest)) if g.dtype == SINGLE else 0
    generator = torch.Generator().manual_seed(g.seed)
    for n in range(repeats + 1):
        try:
            assert_within(step, out, lse, plain, exact)
            break
        except AssertionError:
            if n == repeats:
                raise
        plain.append(corrected(step, table, g.dtype, generator, features))


def assert_within(
    step: Step, out: Tensor, lse: Tensor, plain: list[tuple[Tensor, Tensor]], exact: tuple[Tensor, Tensor]
) -> None:
    g = step.geometry
    for b in g.requests:
        rows = slice(g.starts[b], g.starts[b + 1])
        for h in range(g.heads if g.q_lens[b] else 0):
            where = f"request {b}, head {h}, {g}"
            assert_as_close(out[rows, h].cpu(), [p[0][rows, h] for p in plain], exact[0][rows, h], f"out of {where}")
            if bool(exact[1][rows, h].isfinite().all()):
                assert_as_close(
                    lse[rows, h].cpu(), [p[1][rows, h] for p in plain], exact[1][rows, h], f"lse of {where}"
                )


@for_all(kind=st.sampled_from(MASKS), plant=st.booleans())
def test_left_out_blocks_speak_through_their_means(backend: Backend, g: Geometry, kind: str, plant: bool) -> None:
    """Against float64 over the unpaged keys; K and V of the left-out blocks are not read."""
    step = make_step(g, backend.device, coherent=True, plant=plant)
    table = table_of(backend, g, kind)
    summary = backend.summarize(step.kv, step.batch, block_size=g.block_size, values=True)
    indices, counts, rows = table.indices.tolist(), table.counts.tolist(), table.rows.tolist()
    named = {(b, h // g.group, j) for b, h, i in live(g) for j in indices[rows[b][h][i]][: counts[rows[b][h][i]]]}
    kv = poison(step.kv, g, lambda b, kv_head, j: (b, kv_head, j) in named)
    out, lse = backend.attend(step.q, kv, step.batch, table, correction=summary, return_lse=True)
    assert_corrected(step, table, out, lse)


HARD = (
    Geometry((130, 70), (450, 333), kv_heads=2, group=2, span=1, dtype=HALF),
    Geometry((67, 0, 1), (531, 128, 300), kv_heads=3, group=2, heads_per_group=2, page_size=64, block_size=128, dim=80),
    Geometry((129,), (700,), group=2, page_size=256, block_size=256, query_block=128, span=1, layout="stacked"),
)


@pytest.mark.parametrize("kind", ["sparse", "structured"])
@pytest.mark.parametrize("g", HARD, ids=str)
def test_hard_places(backend: Backend, g: Geometry, kind: str) -> None:
    """Several KV heads of several query heads, several query blocks and spans, blocks of several units and pages."""
    step = make_step(g, backend.device, coherent=True)
    table = table_of(backend, g, kind)
    summary = backend.summarize(step.kv, step.batch, block_size=g.block_size, values=True)
    out, lse = backend.attend(step.q, step.kv, step.batch, table, correction=summary, return_lse=True)
    assert_corrected(step, table, out, lse)


@for_all(examples=0.5, selector=flash_prefill)
def test_without_correction_nothing_changes(backend: Backend, g: Geometry, selector: FlashPrefill) -> None:
    """Off is unchanged bit for bit: a summary with values serves selection alone, its value means may be anything."""
    step = make_step(g, backend.device, coherent=True)
    summary = backend.summarize(step.kv, step.batch, block_size=g.block_size, values=True)
    table = backend.select_table(step.q, step.kv, step.batch, selector=selector, summary=summary, **g.grouping)
    expected = backend.attend(step.q, step.kv, step.batch, table, return_lse=True)
    summary.v_mean.fill_(math.nan)
    how: dict[str, Any] = {"selector": selector, "summary": summary, "correction": False, **g.grouping}
    got = backend.prefill(step.q, step.kv, step.batch, return_lse=True, **how)
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one[: step.rows], other[: step.rows])


@for_all(examples=0.5)
def test_with_every_block_in_the_table_it_has_no_effect(backend: Backend, g: Geometry) -> None:
    """Nothing is left out: the same bits, and the means may be anything."""
    step = make_step(g, backend.device)
    table = table_of(backend, g, "full")
    summary = backend.summarize(step.kv, step.batch, block_size=g.block_size, values=True)
    wild = KVSummary(*(torch.full_like(m, math.nan) for m in (summary.k_mean, summary.v_mean)), summary.unit)
    expected = backend.attend(step.q, step.kv, step.batch, table, return_lse=True)
    got = backend.attend(step.q, step.kv, step.batch, table, correction=wild, return_lse=True)
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one[: step.rows], other[: step.rows])


@for_all(examples=0.5, share=st.sampled_from((0.0, 0.3, 1.0)))
def test_uniform_blocks_are_exact(backend: Backend, g: Geometry, share: float) -> None:
    """Where all keys of a block are equal, and all values, leaving it out with a correction loses nothing.

    One past block of each request is left out, some, or all. Those that are kept are not uniform: sums of equal numbers
    round to one side, in products of some shapes more than in others.
    """
    step = make_step(replace(g, shared_pages=0), backend.device)
    generator, tokens = torch.Generator().manual_seed(g.seed), torch.arange(g.block_size, device=backend.device)
    mask = torch.ones((len(g.q_lens), g.heads, g.q_blocks, g.kv_blocks), dtype=torch.bool)
    for b in g.requests:
        past = g.past_lens[b] // g.block_size
        left_out = torch.randperm(past, generator=generator)[: max(1, round(share * past))]
        mask[b, :, :, left_out] = False
        for position in (left_out[:, None] * g.block_size).to(backend.device) + tokens:
            page, slot = step.kv.page_table[b].long()[position // g.page_size], position % g.page_size
            for cache, own in ((step.kv.k, step.keys[b]), (step.kv.v, step.values[b])):
                own[position] = own[position[0]].clone()
                cache[page, slot] = own[position]
    selection = SelectionMask(mask.to(backend.device), g.block_size, g.query_block)
    pruned = poison_tails(backend.build_table(backend.unite(selection, step.batch, **g.grouping)))
    summary = backend.summarize(step.kv, step.batch, block_size=g.block_size, values=True)
    out, lse = backend.attend(step.q, step.kv, step.batch, pruned, correction=summary, return_lse=True)
    assert_corrected(step, pruned, out, lse)
    dense = corrected(step, table_of(backend, g, "full"), torch.float64)
    exact = corrected(step, pruned, torch.float64)
    for one, other in zip(exact, dense, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@for_all(examples=0.5, geometry=few_keys, selector=selectors, by_name=st.booleans(), auto=st.booleans())
def test_prefill_corrects_with_its_summary(
    backend: Backend, g: Geometry, selector: Selector, by_name: bool, auto: bool
) -> None:
    """prefill(correction=...) brings the summary up to date, then equals attend with it, bit for bit.

    Under any selector, and with groups that choose themselves.
    """
    grouping: dict[str, Any] = {"heads_per_group": "auto", "query_blocks_per_span": "auto"} if auto else g.grouping
    step = make_step(g, backend.device, coherent=True)
    whole = backend.summarize(step.kv, step.batch, block_size=g.block_size, values=True)
    table = backend.select_table(step.q, step.kv, step.batch, selector=selector, summary=whole, **grouping)
    expected = backend.attend(step.q, step.kv, step.batch, table, correction=whole, return_lse=True)
    past = replace(step.batch, cu_seqlens_q=torch.zeros_like(step.batch.cu_seqlens_q), seq_lens=step.batch.past_lens)
    stale = backend.summarize(step.kv, past, block_size=g.block_size, values=True)
    how: dict[str, Any] = {"correction": stale} if by_name else {"correction": True, "summary": stale}
    got = backend.prefill(step.q, step.kv, step.batch, selector=selector, return_lse=True, **how, **grouping)
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one[: step.rows], other[: step.rows])


def test_a_row_without_entries_sees_the_means(backend: Backend) -> None:
    """An empty table and one complete past block of equal tokens: out is their value, lse its score plus log 64.

    The block that the past fills in part says nothing: it belongs to the current region.
    """
    g = Geometry((3,), (73,), dtype=SINGLE)
    step = make_step(g, backend.device)
    k, v = torch.ones_like(step.kv.k), torch.full_like(step.kv.v, 7.0)
    kv, q = PagedKV(k, v, step.kv.page_table), torch.full_like(step.q, 0.25)
    zeros = torch.zeros((1, 1, 1), dtype=torch.int32, device=backend.device)
    empty = BlockTable(torch.zeros((1, 2), dtype=torch.int32, device=backend.device), zeros[0, 0], zeros, 64, 64)
    summary = backend.summarize(kv, step.batch, block_size=64, values=True)
    out, lse = backend.attend(q, kv, step.batch, empty, correction=summary, return_lse=True)
    torch.testing.assert_close(out[:3], torch.full_like(out[:3], 7.0))
    torch.testing.assert_close(lse[:3], torch.full_like(lse[:3], 64 * 0.25 / 8 + math.log(64)))
    out, lse = backend.attend(q, kv, step.batch, empty, return_lse=True)
    assert not bool(out[:3].any())
    assert bool((lse[:3] == -math.inf).all())


def test_corrections_that_cannot_be_are_refused() -> None:
    step = make_step(Geometry((5,), (200,), group=2), "cpu")
    plain = summarize(step.kv, step.batch, block_size=64)
    valued = summarize(step.kv, step.batch, block_size=64, values=True)
    groups: dict[str, Any] = {"selector": FLASH, "heads_per_group": 1}
    table = BlockTable(
        torch.zeros((1, 4), dtype=torch.int32),
        torch.ones(1, dtype=torch.int32),
        torch.zeros((1, 2, 1), dtype=torch.int32),
        64,
        64,
    )
    arguments = (step.q, step.kv, step.batch)
    with pytest.raises(ValueError, match="correction: expected a KVSummary or None, got bool"):
        attend(*arguments, table, correction=True)  # type: ignore[call-overload]
    with pytest.raises(ValueError, match=r"correction: expected a summary with values \(summarize"):
        attend(*arguments, table, correction=plain)
    with pytest.raises(ValueError, match=r"correction.k_mean: expected shape"):
        attend(*arguments, table, correction=KVSummary(valued.k_mean[:1], valued.v_mean[:1], 16))
    with pytest.raises(ValueError, match="summary: expected a summary with values, for correction=True, got None"):
        prefill(*arguments, correction=True, **groups)
    with pytest.raises(ValueError, match=r"summary: expected a summary with values \(summarize"):
        prefill(*arguments, correction=True, summary=plain, **groups)
    with pytest.raises(ValueError, match="correction: expected True, or the very summary that summary is"):
        prefill(*arguments, correction=valued, summary=plain, **groups)
    with pytest.raises(ValueError, match="correction: expected True, False or a KVSummary, got 1"):
        prefill(*arguments, correction=1, **groups)  # type: ignore[arg-type]
