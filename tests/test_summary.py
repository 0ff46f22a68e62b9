"""Means of the cache: values, what is touched and what is not, and extension chunk by chunk."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from hypothesis import strategies as st

from compactattn import KVSummary, PagedKV
from tests.backends import Backend, for_all
from tests.numerics import ROUNDING
from tests.strategies import Geometry, Step, ceil_div, make_step


def unit_slots(step: Step) -> list[tuple[int, int, int, int, int]]:
    """(request, first token, tokens, page, slot of the page) of every unit that holds a token."""
    g = step.geometry
    unit = min(g.page_size, g.block_size)
    table = step.kv.page_table.tolist()
    return [
        (b, start, min(unit, g.seq_lens[b] - start), table[b][start // g.page_size], start % g.page_size // unit)
        for b in g.requests
        for start in range(0, g.seq_lens[b], unit)
    ]


def assert_mean(got: torch.Tensor, tokens: torch.Tensor) -> None:
    """A float32 mean of n tokens, summed in any order: within (n + 1) roundings of the mean magnitude."""
    exact = tokens.double().mean(0)
    bound = (len(tokens) + 1) * ROUNDING * tokens.double().abs().mean(0) + 1e-30
    assert bool(((got.double() - exact).abs() <= bound).all())


def extremes(keys: torch.Tensor) -> torch.Tensor:
    """Largest, then smallest of each dimension of keys [n, Hkv, D]: float32 [Hkv, 2 D]."""
    return torch.cat((keys.amax(0), keys.amin(0)), dim=-1).float()


@for_all(values=st.booleans(), bounds=st.booleans())
def test_means_of_every_unit(backend: Backend, g: Geometry, values: bool, bounds: bool) -> None:
    """Each unit's float32 mean, and its extremes, are over its valid tokens alone; what no request owns is zero."""
    step = make_step(g, backend.device)
    summary = backend.summarize(step.kv, step.batch, block_size=g.block_size, values=values, bounds=bounds)
    assert summary.unit == min(g.page_size, g.block_size)
    expected = (step.kv.k.shape[0], g.page_size // summary.unit, g.kv_heads, g.dim)
    assert summary.k_mean.shape == expected
    assert (summary.v_mean is not None) == values
    assert (summary.k_bounds is not None) == bounds
    owned = torch.zeros(expected[:2], dtype=torch.bool)
    for b, start, count, page, slot in unit_slots(step):
        owned[page, slot] = True
        if summary.k_bounds is not None:
            assert torch.equal(summary.k_bounds[page, slot], extremes(step.keys[b][start : start + count]))
        assert_mean(summary.k_mean[page, slot], step.keys[b][start : start + count])
        if summary.v_mean is not None:
            assert_mean(summary.v_mean[page, slot], step.values[b][start : start + count])
    assert not bool(summary.k_mean[~owned.to(backend.device)].any())


@st.composite
def earlier(draw: st.DrawFn, g: Geometry) -> list[tuple[int, ...]]:
    """Sequence lengths of some earlier steps, growing to the geometry's."""
    steps = [tuple(draw(st.integers(0, n)) for n in g.seq_lens) for _ in range(draw(st.integers(1, 3)))]
    return [*(tuple(map(min, zip(*steps[n:], g.seq_lens, strict=True))) for n in range(len(steps))), g.seq_lens]


@for_all(steps=earlier, values=st.booleans())
def test_extended_equals_recomputed(backend: Backend, g: Geometry, steps: list[tuple[int, ...]], values: bool) -> None:
    """Brought up to date chunk by chunk, a summary has the bits of one that was computed whole."""
    g = replace(g, shared_pages=0)
    step = make_step(g, backend.device)
    whole = backend.summarize(step.kv, step.batch, block_size=g.block_size, values=values, bounds=True)
    summary = None
    before = (0,) * len(g.q_lens)
    for seq_lens in steps:
        chunk = replace(
            g,
            q_lens=tuple(now - then for now, then in zip(seq_lens, before, strict=True)),
            seq_lens=seq_lens,
            prompt_lens=None,
        )
        kv = cut(step, seq_lens)
        returned = backend.summarize(
            kv, chunk.batch(backend.device), block_size=g.block_size, values=values, bounds=True, summary=summary
        )
        assert summary is None or returned is summary
        summary, before = returned, seq_lens
    assert summary is not None
    assert torch.equal(summary.k_mean, whole.k_mean)
    assert torch.equal(summary.k_bounds, whole.k_bounds)
    if values:
        assert torch.equal(summary.v_mean, whole.v_mean)


def cut(step: Step, seq_lens: tuple[int, ...]) -> PagedKV:
    """The cache as it was at the given lengths, in the same strides: NaN in every later slot."""
    g = step.geometry
    k, v = (torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device) for t in (step.kv.k, step.kv.v))
    k.copy_(step.kv.k)
    v.copy_(step.kv.v)
    table = step.kv.page_table.tolist()
    for b, stop in enumerate(seq_lens):
        for n in range(stop // g.page_size, ceil_div(g.seq_lens[b], g.page_size)):
            k[table[b][n], max(0, stop - n * g.page_size) :] = math.nan
            v[table[b][n], max(0, stop - n * g.page_size) :] = math.nan
    return PagedKV(k, v, step.kv.page_table)


@st.composite
def starts(draw: st.DrawFn, g: Geometry) -> int | list[int] | None:
    """A `since`: the default, one int for all, or one per request, some beyond the sequence."""
    own = st.lists(st.integers(0, max(g.seq_lens) + 70), min_size=len(g.q_lens), max_size=len(g.q_lens))
    return draw(st.none() | st.integers(0, max(g.seq_lens) + 70) | own)


@for_all(since=starts, values=st.booleans())
def test_since(backend: Backend, g: Geometry, since: int | list[int] | None, values: bool) -> None:
    """Every unit with a position in [since, seq_len) is recomputed whole; every other unit keeps its bits."""
    g = replace(g, shared_pages=0)
    step = make_step(g, backend.device)
    marks = torch.arange(step.kv.k.shape[0] * (g.page_size // min(g.page_size, g.block_size)), dtype=torch.float32)
    shape = (step.kv.k.shape[0], -1, 1, 1)
    old = marks.view(shape).expand(-1, -1, g.kv_heads, g.dim).contiguous().to(backend.device)
    summary = KVSummary(old.clone(), old.clone() if values else None, min(g.page_size, g.block_size))
    argument = torch.tensor(since, dtype=torch.int32, device=backend.device) if isinstance(since, list) else since
    returned = backend.summarize(step.kv, step.batch, block_size=g.block_size, summary=summary, since=argument)
    assert returned is summary
    first = g.past_lens if since is None else since if isinstance(since, list) else [since] * len(g.q_lens)
    untouched = torch.ones(old.shape[:2], dtype=torch.bool)
    for b, start, count, page, slot in unit_slots(step):
        if start + count > first[b]:
            untouched[page, slot] = False
            assert_mean(summary.k_mean[page, slot], step.keys[b][start : start + count])
            if summary.v_mean is not None:
                assert_mean(summary.v_mean[page, slot], step.values[b][start : start + count])
    untouched = untouched.to(backend.device)
    assert torch.equal(summary.k_mean[untouched], old[untouched])
    if summary.v_mean is not None:
        assert torch.equal(summary.v_mean[untouched], old[untouched])


def test_unread_slots_may_be_poisoned(backend: Backend) -> None:
    """Units before `since` are not read: they may hold NaN."""
    g = Geometry((40,), (300,), group=1)
    step = make_step(g, backend.device)
    summary = backend.summarize(step.kv, step.batch, block_size=64)
    expected = summary.k_mean.clone()
    k = step.kv.k.clone()
    for n in range(260 // 16):  # whole pages before past_len = 260
        k[int(step.kv.page_table[0, n])] = math.nan
    backend.summarize(PagedKV(k, step.kv.v, step.kv.page_table), step.batch, block_size=64, summary=summary)
    assert torch.equal(summary.k_mean, expected)
