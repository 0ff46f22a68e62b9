"""The benchmarks: their counts by hand, their workloads' calibration, their gate and their baselines."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import baselines, contestants, flashinfer_peer, gate, latency
from benchmarks.bounds import BOUNDS
from benchmarks.cases import (
    AUTO,
    FINEST,
    KINDS,
    Case,
    Shape,
    dense_bytes,
    dense_flops,
    matching,
    preset,
    table_bytes,
    table_flops,
    table_mask,
)
from benchmarks.contestants import Contestant, Field, ceilings, step_field
from benchmarks.measure import failed, gated, measure
from benchmarks.prompts import places
from benchmarks.records import green_rows
from benchmarks.timing import summarize_times
from benchmarks.workloads import (
    SELECTOR,
    Step,
)
from compactattn import (
    BlockTable,
    Dense,
    PagedKV,
    PrefillBatch,
    attend,
    build_table,
    prefill,
    select,
    select_table,
    summarize,
    unite,
)
from compactattn.selection import block_rules
from tests.benchmark_steps import small_step


@pytest.fixture(scope="module")
def step() -> Step:
    return small_step(capacity=2560)


# ---- cases ----


@pytest.mark.parametrize("name", ["h200", "smoke", "cpu"])
def test_case_names_are_unique(name: str) -> None:
    cases = preset(name).cases
    assert len({case.name for case in cases}) == len(cases)


def test_h200_preset_covers_the_sweep_and_starts_with_the_goal() -> None:
    cases = preset("h200").cases
    assert [(case.kind, case.context, case.chunk, str(case.shape)) for case in cases[:2]] == [
        ("step", 131072, 1024, "B1-Hq32-Hkv8"),
        ("step", 131072, 1024, "B8-Hq16-Hkv4"),
    ]
    swept = {
        (case.context // 1024, case.chunk, case.shape.batch) for case in cases if case.kind == "step" and case.peers
    }
    assert swept == {(c, q, b) for c in (8, 16, 32, 64, 128, 256) for q in (512, 1024, 2048, 4096) for b in (1, 8)}
    assert {case.kind for case in cases} == set(KINDS)


def test_matching_takes_parts_and_patterns() -> None:
    cases = preset("h200").cases
    assert {case.kind for case in matching(cases, "tables,prompt-*")} == {"tables", "prompt"}
    assert matching(cases, None) == cases
    assert {case.kind for case in matching(cases, "128K", "host,prompt")} == {"host", "prompt"}
    with pytest.raises(ValueError, match=r"expected some of step, tables, .*, got 'steps'"):
        matching(cases, None, "steps")


def test_prompts_of_all_lengths_share_their_chunks() -> None:
    cases = matching(preset("h200").cases, "B8", "prompt")
    measured = [n for case in cases for n in places(case)[0]]
    assert measured == [*range(128), *range(130, 256, 4)]
    assert [places(case)[1] for case in cases] == [1, 1, 1, 4]
    chosen, stands_for = places(replace(cases[1], stride=8))
    assert (chosen, stands_for) == ([36, 44, 52, 60], 8)


def by_hand(past: int, lists: list[list[int]]) -> tuple[BlockTable, PrefillBatch]:
    """One chunk of 128 after `past` tokens, two heads, one row each."""
    batch = PrefillBatch.from_lens([128], [past + 128])
    indices = torch.full((2, batch.kv_blocks(128)), 99, dtype=torch.int32)
    for row, blocks in enumerate(lists):
        indices[row, : len(blocks)] = torch.tensor(blocks)
    counts = torch.tensor([len(blocks) for blocks in lists], dtype=torch.int32)
    rows = torch.tensor([[[0], [1]]], dtype=torch.int32)
    return BlockTable(indices, counts, rows, 128, 128), batch


def test_useful_flops_and_bytes_by_hand() -> None:
    shape = Shape(1, 2, 1, 64)
    table, batch = by_hand(384, [[0, 2, 3], [1, 3]])
    assert table_flops(table, batch, shape) == 4 * 64 * (128 * 128 * 3 + 2 * 128 * 128 / 2)
    assert table_bytes(table, batch, shape, 2) == 64 * 2 * (2 * 512 + 2 * 128 * 2)
    assert dense_flops([128], [384], shape) == 4 * 64 * 2 * (128 * 384 + 128 * 128 / 2)
    assert dense_bytes([128], [384], shape, 2) == 64 * 2 * (2 * 512 + 2 * 128 * 2)


def test_useful_flops_of_an_unaligned_past_count_its_last_tokens() -> None:
    table, batch = by_hand(400, [[0, 3, 4], [3, 4]])  # block 3 holds 16 past tokens and the chunk's first
    assert table_flops(table, batch, Shape(1, 2, 1, 64)) == 4 * 64 * (128 * 128 + 2 * (128 * 16 + 128 * 128 / 2))
    assert table_bytes(table, batch, Shape(1, 2, 1, 64), 4) == 64 * 4 * (2 * (528 - 256) + 2 * 128 * 2)


def test_percentiles_interpolate() -> None:
    timing = summarize_times([5.0, 1.0, 2.0, 4.0, 3.0, 6.0])
    assert (timing.p20_ms, timing.p50_ms, timing.p80_ms, timing.runs) == (2.0, 3.5, 5.0, 6)


# ---- gate ----


def finest(step: Step) -> BlockTable:
    how = {"heads_per_group": 1, "query_blocks_per_span": 1}
    return select_table(step.q, step.kv, step.batch, selector=SELECTOR, **how)


def test_gate_samples_edges_of_every_request() -> None:
    rows = gate.sample_rows(PrefillBatch.from_lens([300, 200], [1000, 200]))
    assert rows.shape == (2, 64)
    assert {0, 1, 127, 128, 171, 172, 298, 299} <= set(rows[0].tolist())
    assert {300, 427, 428, 498, 499} <= set(rows[1].tolist())


def test_gate_turns_red_when_an_output_is_corrupted(step: Step) -> None:
    rows = gate.sample_rows(step.batch)
    exact = gate.reference_rows(step.q, step.kv, step.batch, rows)
    out = baselines.dense_cpu(step)()
    slack = 8.0
    assert exact.check(out, slack).passed
    last = int(rows[1, -1])
    for spoil in (math.nan, math.inf, 0.0, 1.01):
        wrong = out.clone()
        wrong[last, 3, 7] = wrong[last, 3].abs().max() if spoil == 1.01 else spoil
        assert not exact.check(wrong, slack).passed
    assert not exact.check(out.roll(1, 0), slack).passed


def test_gate_sees_a_table_that_lacks_a_block(step: Step) -> None:
    table, rows = finest(step), gate.sample_rows(step.batch)
    whole = gate.reference_rows(step.q, step.kv, step.batch, rows)
    sparse = gate.reference_rows(
        step.q, step.kv, step.batch, rows, gate.table_tokens(table, step.q, step.kv, step.batch, rows)
    )
    assert not whole.check(baselines.dense_cpu(step)().roll(0) * 1.001).passed
    difference = (sparse.exact - whole.exact).abs().amax((1, 3))
    assert bool((difference > sparse.allowed).any())


def test_gate_sees_a_correction_that_is_missing(step: Step) -> None:
    table, rows = finest(step), gate.sample_rows(step.batch)
    given = (table, step.q, step.kv, step.batch, rows)
    tokens, means = gate.table_tokens(*given), gate.left_out_means(*given)
    exact = gate.reference_rows(step.q, step.kv, step.batch, rows, tokens, means=means)
    summary = summarize(step.kv, step.batch, block_size=SELECTOR.block_size, values=True)
    assert exact.check(attend(step.q, step.kv, step.batch, table, correction=summary)).passed
    assert not exact.check(attend(step.q, step.kv, step.batch, table)).passed


FEATURES = [gate.Model(), gate.Model(softcap=2.0), gate.Model(window=200), gate.Model(sinks=torch.linspace(-2, 4, 4))]


def test_gate_knows_what_models_add(step: Step) -> None:
    """Each feature passes its own gate alone, and all together pass one."""
    table, rows = finest(step), gate.sample_rows(step.batch)
    given = (step.q, step.kv, step.batch)
    tokens = gate.table_tokens(table, *given, rows)
    together = gate.Model(2.0, 200, torch.linspace(-2, 4, 4))
    outputs = [attend(*given, table, **model.arguments) for model in (*FEATURES, together)]
    for n, model in enumerate((*FEATURES, together)):
        exact = gate.reference_rows(*given, rows, tokens, model=model)
        assert [exact.check(out).passed for out in outputs] == [m == n for m in range(len(outputs))]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_feature_is_timed_behind_its_gate(dtype: str) -> None:
    case = Case("features", Shape(1, 4, 1), 2048, 128, "noise", groupings=(FINEST,), peers=False, dtype=dtype)
    lineup = latency._prepared(case, preset("cpu"), "cpu")
    own = [one for one in lineup.contestants if one.family == "stage"]
    verdicts = [gated(one) for one in own]
    assert all(verdict.passed for verdict in verdicts), verdicts
    assert len(own) == 2 * (5 if dtype == "float32" else 6)
    assert len({one.name for one in own}) == len(own)
    if dtype == "bfloat16":
        fp8 = next(one for one in own if one.name.endswith("FP8 cache"))
        plain = next(one for one in own if one.name.endswith("equal 0.1, plain"))
        assert plain.bytes - fp8.bytes == (plain.bytes - 2 * 128 * 4 * 128 * 2) / 2, "half of K and V"
        assert not fp8.check(plain.run()).passed


def test_gate_compares_tables_and_masks_exactly(step: Step) -> None:
    selection = select(step.q, step.kv, step.batch, SELECTOR)
    table, keep = finest(step), gate.united(selection, step.batch, 1, 1)
    assert gate.check_table(table, keep).passed
    missing = keep.clone()
    missing[3, 5] ^= True
    assert not gate.check_table(table, missing).passed
    turned = table.indices.clone()
    turned[0, [0, 1]] = turned[0, [1, 0]]
    assert not gate.check_table(replace(table, indices=turned), keep).passed
    forced = block_rules(step.batch, SELECTOR).forced
    assert gate.check_selection(selection, step.q, step.kv, step.batch, SELECTOR, forced).passed
    selection.mask[1, 2, 0, 3] ^= True
    assert not gate.check_selection(selection, step.q, step.kv, step.batch, SELECTOR, forced).passed


def test_gate_compares_bounds_and_their_masks_exactly(step: Step) -> None:
    over = (step.q, step.kv, step.batch)
    summary = summarize(step.kv, step.batch, block_size=BOUNDS.block_size, bounds=True)
    assert gate.check_summary(summary, step.kv, step.batch).passed
    forced = block_rules(step.batch, BOUNDS).forced
    selection = select(*over, BOUNDS, summary=summary)
    assert gate.check_selection(selection, *over, BOUNDS, forced).passed
    open_to_choice = (~forced).nonzero()[0].tolist()
    selection.mask[open_to_choice[0], 2, open_to_choice[1], open_to_choice[2]] ^= True
    assert not gate.check_selection(selection, *over, BOUNDS, forced).passed
    assert summary.k_bounds is not None
    summary.k_bounds[step.kv.page_table[0, 0], 0, 0, 5] += 1e-3
    assert not gate.check_summary(summary, step.kv, step.batch).passed


def test_a_summary_is_spoilt_before_it_is_brought_up_to_date(step: Step) -> None:
    """Means and bounds of the chunk's own pages, so that a `summarize` that leaves either alone is found out."""
    summary = summarize(step.kv, step.batch, block_size=BOUNDS.block_size, bounds=True)
    first = contestants.selection_stages(step, summary, BOUNDS)[0]
    first.spoil()
    for kept in (summary.k_mean, summary.k_bounds):
        assert kept is not None
        assert kept.isnan().any()
    assert not first.check(summary).passed
    assert first.check(first.run()).passed


def test_union_by_rows_is_the_union_in_fixed_order(step: Step) -> None:
    selection = select(step.q, step.kv, step.batch, SELECTOR)
    for heads, span in ((1, 1), (4, None), (2, 2)):
        table = build_table(unite(selection, step.batch, heads_per_group=heads, query_blocks_per_span=span))
        by_rows = gate.united_rows(selection, step.batch, table.rows, len(table.counts))
        assert torch.equal(by_rows, gate.united(selection, step.batch, heads, span))
        assert gate.check_table(table, by_rows).passed


def test_union_of_ragged_requests_asks_nothing_for_missing_query_blocks(step: Step) -> None:
    batch = PrefillBatch.from_lens([384, 130], [2048, 1777])
    q = step.q[:514]
    selection = select(q, step.kv, batch, SELECTOR)
    table = build_table(unite(selection, batch, heads_per_group=1, query_blocks_per_span=1))
    assert gate.check_table(table, gate.united(selection, batch, 1, 1)).passed


def test_product_gate() -> None:
    a, b = torch.randn(2, 64, 128), torch.randn(2, 128, 96)
    verdict = gate.product_check(a, b)
    assert verdict(a @ b).passed
    assert not verdict((a @ b) * 1.001).passed
    assert not verdict(torch.full((2, 64, 96), math.nan)).passed
    for one in ceilings(torch.device("cpu")):
        assert one.check(one.run()).passed
        one.spoil()
        copied = one.run()
        assert isinstance(copied, torch.Tensor)
        copied[-1, -1] += 1
        assert one.name == "matmul" or not one.check(copied).passed


def test_a_red_gate_is_reported_and_not_timed() -> None:
    def contestant(name: str, passed: bool) -> Contestant:
        return Contestant(name, "dense", lambda: None, lambda _: gate.Verdict(passed, 0.0, 64, "a test"))

    def broken() -> None:
        raise torch.cuda.OutOfMemoryError("too large")

    lineup = Field([contestant("green", True), contestant("red", False), replace(contestant("big", True), run=broken)])
    lineup.contestants.append(replace(contestant("ours", True), run=broken, family="library"))
    lineup.contestants.append(replace(contestant("unreadable", True), check=lambda result: result.shape))
    rows, absent = measure(lineup, 0.0, "cpu")
    timed = {"green": True, "red": False, "ours": False, "unreadable": False}
    assert {row["name"]: bool(row["times"]) for row in rows} == timed
    assert absent == {"big": "out of GPU memory"}
    record = {"name": "case", "status": "ok", "rows": rows}
    assert failed(record)
    assert [row["name"] for row in green_rows(record)] == ["green"]


# ---- baselines ----


def test_flex_block_mask_is_the_table(step: Step) -> None:
    table = finest(step)
    assert step.k is not None
    block_mask: Any = baselines.flex_block_mask(step, table, step.k.shape[2])
    assert torch.equal(block_mask.to_dense()[..., :16].bool(), table_mask(table)[table.rows.long()])
    assert block_mask.seq_lengths == (384, 2560)
    assert int(block_mask.kv_num_blocks.max()) == 3


def test_merging_two_halves_gives_the_whole() -> None:
    q, k, v = (torch.randn(2, 3, n, 64, dtype=torch.float64) for n in (5, 40, 40))
    scores = q @ k.transpose(-1, -2)
    parts = [
        (scores[..., a:b].softmax(-1) @ v[..., a:b, :], scores[..., a:b].logsumexp(-1)) for a, b in ((0, 9), (9, 40))
    ]
    merged = baselines.merge_plain(*parts[0], *parts[1])
    torch.testing.assert_close(merged, baselines.packed(scores.softmax(-1) @ v), rtol=1e-5, atol=1e-5)


def test_merge_kernel_is_the_plain_merge() -> None:
    from benchmarks.merge import merge_triton

    device = "cuda" if torch.cuda.is_available() else "cpu"  # without a GPU, Triton interprets
    first = torch.randn(2, 40, 3, 64, device=device).transpose(1, 2)
    second = torch.randn(2, 3, 40, 64, device=device)
    lses = 3 * torch.randn(2, 2, 3, 40, device=device)
    torch.testing.assert_close(
        merge_triton(first, lses[0], second, lses[1]), baselines.merge_plain(first, lses[0], second, lses[1])
    )


def test_fused_cpu_attention_of_grouped_heads_copies_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    q, (k, v) = torch.randn(2, 6, 40, 64), (torch.randn(2, 2, 96, 64)[:, :, 8:88] for _ in "kv")
    plain = torch.nn.functional.scaled_dot_product_attention(q, *(x.repeat_interleave(3, 1) for x in (k, v)))
    out, lse = baselines.fused_cpu(q, k, v, False)
    torch.testing.assert_close(out, plain)
    scores = q @ k.repeat_interleave(3, 1).transpose(-1, -2) / 8
    torch.testing.assert_close(lse, scores.logsumexp(-1))
    given: list[torch.Tensor] = []

    def spy(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
        given.extend((k, v))
        return torch.zeros_like(q), torch.zeros(q.shape[:3])

    fake = SimpleNamespace(aten=SimpleNamespace(_scaled_dot_product_flash_attention_for_cpu=spy))
    monkeypatch.setattr(torch, "ops", fake)
    baselines.fused_cpu(q, k, v, False)
    assert [x.data_ptr() for x in given] == [k.data_ptr(), v.data_ptr()]


def test_flashinfer_is_planned_over_the_pages(step: Step) -> None:
    class Wrapper:
        """FlashInfer's wrapper as its documentation has it, computed by hand."""

        def __init__(self, workspace: torch.Tensor, layout: str) -> None:
            assert layout == "NHD"

        def plan(self, *arguments: Any, causal: bool, **dtypes: Any) -> None:
            self.arguments, self.causal = arguments, causal

        def run(self, q: torch.Tensor, paged: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
            starts, offsets, pages, filled, heads, kv_heads, dim, page_size = self.arguments
            assert self.causal
            assert (heads, kv_heads, dim) == (4, 1, 64)
            lens = (offsets.diff() - 1) * page_size + filled
            table = torch.stack(pages.split(offsets.diff().tolist()))
            batch = PrefillBatch(starts, lens, int(starts.diff().max()), int(lens.max()))
            return prefill(q, PagedKV(*paged, table), batch, selector=Dense(), heads_per_group=4)

    run = flashinfer_peer.planned(SimpleNamespace(BatchPrefillWithPagedKVCacheWrapper=Wrapper), step)
    exact = gate.reference_rows(step.q, step.kv, step.batch, gate.sample_rows(step.batch))
    assert exact.check(run(), 8.0).passed


@pytest.mark.gpu
def test_every_baseline_runs_green_on_a_gpu() -> None:
    quick = replace(preset("smoke"), timing_seconds=0.01)
    record = latency.measured_case(quick.cases[0], quick, "cuda")
    assert record["status"] == "ok", record
    assert set(record["did_not_run"]) <= {"FlashInfer, dense paged"}
    assert not failed(record)
    assert all("graph" in row["times"] for row in record["rows"] if row["name"] != "QUOKA")


def test_what_cannot_run_says_why(step: Step) -> None:
    lineup = step_field(Case("step", step.shape, step.context, step.chunk), step)
    assert set(lineup.absent) == {"dense cuDNN", "dense FlashAttention-2", "FlexAttention", "FlashInfer, dense paged"}
    assert all("CUDA" in why for why in lineup.absent.values())


def test_groups_that_the_library_chooses_join_by_name(step: Step, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a library that takes "auto", the gate follows the rows that its table has."""

    def choosing(function: Any) -> Any:
        def call(*arguments: Any, heads_per_group: Any, query_blocks_per_span: Any, **others: Any) -> Any:
            if heads_per_group == "auto":
                heads_per_group, query_blocks_per_span = 2, 1
            how = {"heads_per_group": heads_per_group, "query_blocks_per_span": query_blocks_per_span}
            return function(*arguments, **how, **others)

        return call

    monkeypatch.setattr(contestants, "select_table", choosing(select_table))
    monkeypatch.setattr(contestants, "prefill", choosing(prefill))
    case = Case("step", step.shape, step.context, step.chunk, groupings=(FINEST, AUTO), peers=False)
    lineup = step_field(case, step)
    names = [one.name for one in lineup.contestants]
    assert {"select_table auto", "attend auto", "prefill auto"} <= set(names)
    assert "unite auto" not in names
    assert all(one.check(one.run()).passed for one in lineup.contestants if one.grouping == "auto")
    cascade = lineup.measured["auto"].cascade
    assert cascade.mask < cascade.sub_group_union < cascade.group_union
