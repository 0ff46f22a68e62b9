"""The whole step: fused equals composed, with and without a summary."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import strategies as st

from compactattn import BlockTable, FlashPrefill, KVSummary, PagedKV, Selector
from tests.backends import Backend, compose_table, for_all
from tests.laws import assert_canonical, assert_coverage, assert_minimality, entries
from tests.numerics import assert_attention
from tests.strategies import Geometry, flash_prefill, make_step, poison, selectors
from tests.test_attention import named_blocks
from tests.test_selection import few_keys


def assert_same_table(fused: BlockTable, composed: BlockTable) -> None:
    assert torch.equal(fused.rows, composed.rows)
    assert torch.equal(fused.counts, composed.counts)
    assert entries(fused) == entries(composed)
    assert (fused.block_size, fused.query_block) == (composed.block_size, composed.query_block)


@for_all(examples=0.5, selector=flash_prefill, scale=st.sampled_from((None, None, 0.3)))
def test_flash_prefill_fused_equals_composed(
    backend: Backend, g: Geometry, selector: FlashPrefill, scale: float | None
) -> None:
    """Tables exactly, outputs bit for bit; the table obeys the laws of the mask that `select` gives."""
    step = make_step(g, backend.device, coherent=True)
    composed = compose_table(backend, step.q, step.kv, step.batch, selector=selector, scale=scale, **g.grouping)
    fused = backend.select_table(step.q, step.kv, step.batch, selector=selector, scale=scale, **g.grouping)
    assert_same_table(fused, composed)
    if selector.dense_last_blocks == 0:
        mask = backend.select(step.q, step.kv, step.batch, selector, scale=scale).mask
        assert_coverage(g, mask, fused)
        assert_minimality(g, mask, fused)
    assert_canonical(g, fused)
    expected, expected_lse = backend.attend(step.q, step.kv, step.batch, composed, scale=scale, return_lse=True)
    out, lse = backend.prefill(
        step.q, step.kv, step.batch, selector=selector, scale=scale, return_lse=True, **g.grouping
    )
    assert torch.equal(out[: step.rows], expected[: step.rows])
    assert torch.equal(lse[: step.rows], expected_lse[: step.rows])


@for_all(examples=0.4, geometry=few_keys, selector=selectors)
def test_any_selector_fused_equals_composed(backend: Backend, g: Geometry, selector: Selector) -> None:
    """The same for every selector, fused or not."""
    step = make_step(g, backend.device, coherent=True)
    composed = compose_table(backend, step.q, step.kv, step.batch, selector=selector, **g.grouping)
    assert_same_table(backend.select_table(step.q, step.kv, step.batch, selector=selector, **g.grouping), composed)
    expected, expected_lse = backend.attend(step.q, step.kv, step.batch, composed, return_lse=True)
    out, lse = backend.prefill(step.q, step.kv, step.batch, selector=selector, return_lse=True, **g.grouping)
    assert torch.equal(out[: step.rows], expected[: step.rows])
    assert torch.equal(lse[: step.rows], expected_lse[: step.rows])


def stale_summary(backend: Backend, g: Geometry, kv: PagedKV) -> KVSummary:
    """A summary as the step before left it: right up to past_len, NaN wherever this step must write."""
    then = replace(g, q_lens=(0,) * len(g.q_lens), seq_lens=g.past_lens, prompt_lens=None)
    before = then.batch(backend.device)
    summary = backend.summarize(kv, before, block_size=g.block_size)
    unit, per_page = summary.unit, g.page_size // summary.unit
    for b in g.requests:
        for n in range(g.past_lens[b] // unit, -(-g.seq_lens[b] // unit) if g.q_lens[b] else 0):
            summary.k_mean[int(kv.page_table[b, n // per_page]), n % per_page] = math.nan
    return summary


@for_all(examples=0.5, selector=flash_prefill)
def test_a_summary_is_brought_up_to_date(backend: Backend, g: Geometry, selector: FlashPrefill) -> None:
    """prefill(summary=...) extends the summary by this chunk, then equals the composed stages with it.

    Keys of earlier units that no table names are not read again: they hold NaN.
    """
    step = make_step(replace(g, shared_pages=0), backend.device, coherent=True)
    one, two = (stale_summary(backend, g, step.kv) for _ in range(2))
    composed = compose_table(backend, step.q, step.kv, step.batch, selector=selector, summary=one, **g.grouping)
    named = named_blocks(g, composed)
    unit = min(g.page_size, g.block_size)

    def needed(b: int, kv_head: int, j: int) -> bool:
        recomputed = g.seq_lens[b] > g.past_lens[b] // unit * unit and (j + 1) * g.block_size > g.past_lens[b]
        return (b, kv_head, j) in named or recomputed

    kv = poison(step.kv, g, needed)
    out, lse = backend.prefill(step.q, kv, step.batch, selector=selector, summary=two, return_lse=True, **g.grouping)
    expected, expected_lse = backend.attend(step.q, step.kv, step.batch, composed, return_lse=True)
    assert torch.equal(out[: step.rows], expected[: step.rows])
    assert torch.equal(lse[: step.rows], expected_lse[: step.rows])
    assert torch.equal(one.k_mean, two.k_mean)


@for_all(examples=0.3, selector=flash_prefill)
def test_prefill_is_exact_attention_under_its_table(backend: Backend, g: Geometry, selector: FlashPrefill) -> None:
    """End to end: the output lies within the error budget of the table that select_table gives."""
    step = make_step(g, backend.device, coherent=True)
    table = backend.select_table(step.q, step.kv, step.batch, selector=selector, **g.grouping)
    out, lse = backend.prefill(step.q, step.kv, step.batch, selector=selector, return_lse=True, **g.grouping)
    assert_attention(step, table, out, lse)


FLASH = FlashPrefill(alpha=0.3, sink_blocks=1, window_blocks=1, block_size=64, query_block=64)
STEP = Geometry((70, 1, 0), (300, 200, 64), kv_heads=1, group=2, heads_per_group=2, span=1)


def test_without_lse_the_output_alone_comes_back(backend: Backend) -> None:
    """return_lse=False gives a tensor, the same bits."""
    step = make_step(STEP, backend.device, coherent=True)
    out, _ = backend.prefill(step.q, step.kv, step.batch, selector=FLASH, return_lse=True, **STEP.grouping)
    alone = backend.prefill(step.q, step.kv, step.batch, selector=FLASH, **STEP.grouping)
    assert torch.equal(alone[: step.rows], out[: step.rows])


def test_out(library: Backend) -> None:
    """`out` is filled and returned."""
    step = make_step(STEP, library.device, coherent=True)
    expected = library.prefill(step.q, step.kv, step.batch, selector=FLASH, **STEP.grouping)
    out = torch.full_like(step.q, math.nan)
    assert library.prefill(step.q, step.kv, step.batch, selector=FLASH, out=out, **STEP.grouping) is out
    assert torch.equal(out[: step.rows], expected[: step.rows])


@pytest.mark.parametrize("lens", [((0, 0), (0, 0)), ((0, 0), (70, 0)), ((0,), (640,))], ids=str)
def test_steps_without_a_query(backend: Backend, lens: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    """No request has a query, or not even a key: nothing fails, nothing is computed."""
    g = Geometry(*lens, group=2)
    step = make_step(g, backend.device)
    out, lse = backend.prefill(step.q, step.kv, step.batch, selector=FLASH, heads_per_group=1, return_lse=True)
    assert out.shape == step.q.shape
    assert lse.shape == step.q.shape[:2]


def test_inputs_are_left_alone(backend: Backend) -> None:
    """A step changes neither queries, cache, lengths nor page table."""
    step = make_step(STEP, backend.device, coherent=True)
    tensors = (step.q, step.kv.k, step.kv.v, step.kv.page_table, step.batch.cu_seqlens_q, step.batch.seq_lens)
    before = [t.clone() for t in tensors]
    backend.prefill(step.q, step.kv, step.batch, selector=FLASH, **STEP.grouping)
    for tensor, copy in zip(tensors, before, strict=True):
        assert torch.equal(tensor.nan_to_num(7.0), copy.nan_to_num(7.0))


def test_the_same_call_gives_the_same_bits(backend: Backend) -> None:
    """Two calls, one result."""
    step = make_step(STEP, backend.device, coherent=True)
    first, second = (
        backend.prefill(step.q, step.kv, step.batch, selector=FLASH, return_lse=True, **STEP.grouping) for _ in range(2)
    )
    for one, two in zip(first, second, strict=True):
        assert torch.equal(one[: step.rows], two[: step.rows])
