"""Counters of what attention reads of the past, against Python sets, and against the density cascade."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import strategies as st

from compactattn import DensityCounters, FlashPrefill, count_density
from compactattn.quality import density_cascade
from tests.backends import Backend, for_all
from tests.laws import live, past, table_sets
from tests.strategies import MASKS, Geometry, make_mask, make_step, poison_tails
from tests.test_laws import table_of


def expected(g: Geometry, sets: list[frozenset[int]], window: int | None) -> list[int]:
    """Past blocks read and visible, over every (request, head, query block) that holds a query."""
    read = visible = 0
    for (b, _, i), blocks in zip(live(g), sets, strict=True):
        first = 0 if window is None else g.past_lens[b] + i * g.query_block - window + 1
        seen = {j for j in past(g, b) if (j + 1) * g.block_size > first}
        read += len(blocks & seen)
        visible += len(seen)
    return [read, visible]


@for_all(examples=0.5, kind=st.sampled_from(MASKS), window=st.sampled_from((None, None, 1, 64, 65, 300)))
def test_counts(backend: Backend, g: Geometry, kind: str, window: int | None) -> None:
    """Twice the same step counts twice; entries behind a row's count are not counted."""
    table = poison_tails(table_of(backend, g, make_mask(g, backend.device, kind)))
    counters = DensityCounters.zeros(3, backend.device)
    for _ in range(2):
        backend.count_density(table, g.batch(backend.device), counters.of_layer(1), window=window)
    want = expected(g, table_sets(g, table), window)
    assert counters.counts.tolist() == [[0, 0], [2 * n for n in want], [0, 0]]


def test_prefill_counts_what_it_reads(backend: Backend) -> None:
    """The counters of a step are those of its table, and its results are those of a step that counts nothing."""
    g = Geometry((9, 1, 0), (300, 200, 64), group=2)
    step = make_step(g, backend.device, coherent=True)
    selector = FlashPrefill(alpha=0.9, sink_blocks=0, window_blocks=1, block_size=64, query_block=64)
    how: dict[str, Any] = {"selector": selector, "window": 200, **g.grouping}
    counters = DensityCounters.zeros(1, backend.device)
    out = backend.prefill(step.q, step.kv, step.batch, density=counters.of_layer(0), **how)
    assert torch.equal(out[: step.rows], backend.prefill(step.q, step.kv, step.batch, **how)[: step.rows])
    table = backend.select_table(step.q, step.kv, step.batch, selector=selector, **g.grouping)
    assert counters.counts.tolist() == [expected(g, table_sets(g, table), 200)]
    assert 0 < counters.densities()[0] < 1


def test_the_cascade_counts_alike() -> None:
    """`read` is what the density cascade finds after the union over a sub-group, `visible` what it divides by."""
    g = Geometry((130, 70, 1), (700, 333, 200), kv_heads=2, group=4, heads_per_group=2, span=1)
    step = make_step(g, "cpu", coherent=True)
    from compactattn import build_table, select, unite

    selector = FlashPrefill(alpha=0.5, sink_blocks=1, window_blocks=1, block_size=64, query_block=64)
    selection = select(step.q, step.kv, step.batch, selector)
    cascade = density_cascade(selection, step.batch, kv_heads=2, heads_per_group=2, query_blocks_per_span=1)
    counters = DensityCounters.zeros(1)
    count_density(build_table(unite(selection, step.batch, **g.grouping)), step.batch, counters.of_layer(0))
    assert counters.counts.tolist() == [[cascade.sub_group_union, cascade.visible]]
    assert counters.densities() == [cascade.densities()["sub_group_union"]]
    assert 0 < counters.densities()[0] < 1


def test_densities() -> None:
    counters = DensityCounters(torch.tensor([[1, 4], [0, 0], [3, 3]]))
    first, second, third = counters.densities()
    assert (first, third) == (0.25, 1.0)
    assert math.isnan(second)


def test_refusals() -> None:
    g = Geometry((5,), (200,))
    batch = g.batch("cpu")
    from tests.backends import NUMBA

    table = table_of(NUMBA, g, make_mask(g, "cpu", "half"))
    good = DensityCounters.zeros(2).of_layer(1)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"table": None}, "table: expected a BlockTable, got NoneType"),
        ({"batch": [5]}, "batch: expected a PrefillBatch, got list"),
        ({"counter": good.int()}, "counter: expected dtype torch.int64, got torch.int32"),
        ({"counter": good[:1]}, r"counter: expected shape \(2,\) \(read and visible blocks\), got \(1,\)"),
        (
            {"counter": torch.zeros(4, dtype=torch.int64)[::2]},
            r"counter: expected a contiguous tensor, got strides \(2,\)",
        ),
        ({"counter": good.to("meta")}, "counter: expected device cpu, .*, got meta"),
        ({"window": 0}, "window: expected an int of at least 1, got 0"),
        ({"backend": "cpu"}, "backend: expected None, 'triton' or 'numba', got 'cpu'"),
    ]
    for changes, message in cases:
        with pytest.raises(ValueError, match=message):
            count_density(**({"table": table, "batch": batch, "counter": good} | changes))  # type: ignore[arg-type]
    assert good.tolist() == [0, 0]
    for make, message in (
        (lambda: DensityCounters.zeros(0), "layers: expected an int of at least 1, got 0"),
        (lambda: DensityCounters(torch.zeros(2, 2)), "counts: expected dtype torch.int64, got torch.float32"),
        (lambda: DensityCounters(torch.zeros(2, 3, dtype=torch.int64)), r"counts: expected shape \(2, 2\) .*, got"),
        (lambda: DensityCounters.zeros(2).of_layer(2), "layer: expected a layer below 2, got 2"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
