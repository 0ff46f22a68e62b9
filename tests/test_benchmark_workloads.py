"""The workloads of the benchmarks: what they plant, how they are calibrated, and tables and layouts made on them."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

from benchmarks.cases import (
    FINEST,
    PAPER,
    Case,
    Grouping,
    Shape,
    table_mask,
)
from benchmarks.layouts import mixed_batch, repaged, unaligned_batch
from benchmarks.prompts import Canvas
from benchmarks.tables import LENGTHS, controlled_table
from benchmarks.workloads import (
    SELECTOR,
    WORKLOADS,
    Step,
    draw_pattern,
    make_step,
    measure_density,
    prompt_density,
)
from compactattn import (
    PagedKV,
    check,
    select,
)
from tests.benchmark_steps import GROUP, VERTICAL_SLASH, small_step


@pytest.fixture(scope="module")
def step() -> Step:
    return small_step(capacity=2560)


def test_calibration_at_32k() -> None:
    """Average over a prompt: within a tenth of the published 17.8 %, about 23 blocks per query block."""
    density = prompt_density(VERTICAL_SLASH, GROUP, 32 * 1024, 1024, stride=8)
    assert density.mask_density == pytest.approx(0.178, rel=0.1)
    assert density.blocks_per_query_block == pytest.approx(23, rel=0.1)


def test_selection_is_what_was_planted() -> None:
    context, chunk = 16384, 512
    step = make_step(VERTICAL_SLASH, GROUP, context, chunk, dtype=torch.float32)
    generator = torch.Generator().manual_seed(context * 31 + chunk)
    pattern = draw_pattern(VERTICAL_SLASH, GROUP, context, chunk, 0.9, generator)
    wanted = pattern.vertical[0, 0] >= VERTICAL_SLASH.score - VERTICAL_SLASH.spread
    missed = (pattern.vertical[0, 0] > 0) & ~wanted
    mask = select(step.q, step.kv, step.batch, SELECTOR).mask[0]
    taken = mask & wanted[:, None]
    assert int(taken.sum()) >= 0.97 * int(wanted.sum()) * mask.shape[1]
    assert int((mask & missed[:, None])[..., 2 : step.past // 128 - 3].sum()) == 0


def test_union_growth_falls_with_correlation() -> None:
    growth = []
    for correlation in (0.0, 0.5, 1.0):
        step = make_step(VERTICAL_SLASH, GROUP, 16384, 512, correlation=correlation, dtype=torch.float32)
        growth.append(measure_density(step, PAPER).growth()["group_union"])
    assert growth[0] > growth[1] > growth[2] > 1


def test_budgets_are_nested_at_full_correlation() -> None:
    pattern = draw_pattern(VERTICAL_SLASH, GROUP, 32768, 1024, 1.0, torch.Generator().manual_seed(0))
    wanted = pattern.vertical[0, 0] >= VERTICAL_SLASH.score - VERTICAL_SLASH.spread
    by_size = sorted(wanted, key=lambda head: int(head.sum()))
    assert [int(head.sum()) for head in by_size] == sorted(VERTICAL_SLASH.verticals)
    assert all(bool((larger | ~smaller).all()) for smaller, larger in pairwise(by_size))


def test_pages_are_permuted_and_hold_the_dense_copies(step: Step) -> None:
    assert step.kv.page_table.flatten().tolist() != sorted(step.kv.page_table.flatten().tolist())
    assert step.k is not None
    for b in range(2):
        paged = step.kv.k[step.kv.page_table[b].long()].flatten(0, 1)[: step.context]
        assert torch.equal(paged, step.k[b, :, : step.context].transpose(0, 1))


def test_steps_are_seeded() -> None:
    first, again, other = small_step(), small_step(), small_step(seed=1)
    assert torch.equal(first.q, again.q)
    assert torch.equal(first.kv.k, again.kv.k)
    assert not torch.equal(first.kv.page_table, other.kv.page_table)


@pytest.mark.parametrize("grouping", [FINEST, PAPER, Grouping(2, 2)], ids=str)
@pytest.mark.parametrize("lengths", LENGTHS, ids=lambda lengths: lengths.name)
def test_controlled_tables(grouping: Grouping, lengths: Any) -> None:
    step = make_step(WORKLOADS["noise"], Shape(2, 8, 2, 64), 16384, 512, dtype=torch.float32)
    table = controlled_table(step.batch, 8, grouping, lengths)
    check(step.kv, step.batch, table)
    past = table_mask(table)[:, : step.past // 128].sum(1)
    if lengths.spread == "one dense":
        assert int(past.max()) == step.past // 128
        assert int(past.median()) == round(lengths.density * step.past // 128)
    else:
        assert float(past.float().mean()) == pytest.approx(lengths.density * step.past / 128, rel=0.12)
    if lengths.spread == "uneven" and len(past) > 16:
        assert float(past.max() / past.float().mean()) == pytest.approx(3, rel=0.15)


def test_controlled_tables_of_ragged_lengths() -> None:
    case = Case("layouts", Shape(8, 4, 1, 64), 4096, 512, "noise")
    step = make_step(WORKLOADS["noise"], case.shape, case.context, case.chunk, dtype=torch.float32)
    unaligned, mixed = (make(case, torch.device("cpu")) for make in (unaligned_batch, mixed_batch))
    assert len(set(unaligned.q_lens.tolist())) > 4
    assert mixed.seq_lens.tolist() == [512, 689, 927, 1248, 1680, 2261, 3043, 4096]
    for batch in (unaligned, mixed):
        for grouping in (FINEST, PAPER):
            check(step.kv, batch, controlled_table(batch, 4, grouping, LENGTHS[2]))


def test_other_pages_hold_the_same_tokens() -> None:
    step = small_step()
    for page_size in (16, 256):
        moved = repaged(step, page_size)
        for before, after in ((step.kv.k, moved.kv.k), (step.kv.v, moved.kv.v)):
            for b in range(2):
                own, other = (
                    cache[kv.page_table[b].long()].flatten(0, 1) for cache, kv in ((before, step.kv), (after, moved.kv))
                )
                assert torch.equal(own[: step.context], other[: step.context])
                assert bool(other[step.context :].isnan().all())


def test_chunks_of_a_prompt_are_planted_on_one_noise() -> None:
    case = Case("prompt", Shape(2, 4, 1, 64), 2048, 512, correlation=0.5, page_size=64, dtype="float32")
    canvas = Canvas(case, "cpu")
    for n in (3, 1):
        step, alone = canvas.step(n), make_step(VERTICAL_SLASH, case.shape, 512 * (n + 1), 512, correlation=0.5, seed=n)
        assert step.context == alone.context == 512 * (n + 1)
        assert step.k is not None
        for b in range(2):
            paged = step.kv.k[step.kv.page_table[b].long()].flatten(0, 1)
            assert torch.equal(paged, step.k[b, :, : step.context].transpose(0, 1))
        wanted = [select(s.q.float(), _float(s.kv), s.batch, SELECTOR).mask for s in (step, alone)]
        assert float((wanted[0] == wanted[1]).double().mean()) > 0.97  # planted alike, over other noise


def _float(kv: PagedKV) -> PagedKV:
    return PagedKV(kv.k.float(), kv.v.float(), kv.page_table)
