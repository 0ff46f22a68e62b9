"""The benchmarks: their counts by hand, their workloads' calibration, their gate, and the way from JSON to a report."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import baselines, gate, latency
from benchmarks.__main__ import main
from benchmarks.cases import (
    FINEST,
    PAPER,
    Case,
    Grouping,
    Preset,
    Shape,
    dense_bytes,
    dense_flops,
    matching,
    preset,
    table_bytes,
    table_flops,
    table_mask,
)
from benchmarks.contestants import Contestant, Field, ragged_batch, step_field
from benchmarks.report import green_rows, load, markdown, write_report
from benchmarks.tables import LENGTHS, controlled_table
from benchmarks.timing import summarize_times
from benchmarks.workloads import (
    SELECTOR,
    WORKLOADS,
    Step,
    draw_pattern,
    make_step,
    measure_density,
    prompt_density,
)
from compactattn import BlockTable, PrefillBatch, check, select, select_table
from compactattn.selection import block_rules

GROUP = Shape(1, 4, 1)
VERTICAL_SLASH = WORKLOADS["vertical-slash"]


def small_step(**changes: Any) -> Step:
    settings: dict[str, Any] = {"dtype": torch.float32, "page_size": 64, **changes}
    return make_step(VERTICAL_SLASH, Shape(2, 4, 1, 64), 2048, 384, **settings)


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
    assert {case.kind for case in cases} == {"step", "tables", "layouts", "prompt"}


def test_matching_takes_parts_and_patterns() -> None:
    cases = preset("h200").cases
    assert {case.kind for case in matching(cases, "tables,prompt-*")} == {"tables", "prompt"}
    assert matching(cases, None) == cases


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


# ---- workloads ----


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
    ragged = ragged_batch(case, torch.device("cpu"))
    assert len(set(ragged.q_lens.tolist())) > 4
    for grouping in (FINEST, PAPER):
        check(step.kv, ragged, controlled_table(ragged, 4, grouping, LENGTHS[2]))


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


def test_a_red_gate_is_reported_and_not_timed() -> None:
    def contestant(name: str, passed: bool) -> Contestant:
        return Contestant(name, "dense", lambda: None, lambda _: gate.Verdict(passed, 0.0, 64, "a test"))

    def broken() -> None:
        raise torch.cuda.OutOfMemoryError("too large")

    lineup = Field([contestant("green", True), contestant("red", False), replace(contestant("big", True), run=broken)])
    lineup.contestants.append(replace(contestant("ours", True), run=broken, family="library"))
    lineup.contestants.append(replace(contestant("unreadable", True), check=lambda result: result.shape))
    rows, absent = latency.measure(lineup, 0.0, "cpu")
    timed = {"green": True, "red": False, "ours": False, "unreadable": False}
    assert {row["name"]: bool(row["times"]) for row in rows} == timed
    assert absent == {"big": "out of GPU memory"}
    record = {"name": "case", "status": "ok", "rows": rows}
    assert latency.failed(record)
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


@pytest.mark.gpu
def test_every_baseline_runs_green_on_a_gpu() -> None:
    quick = replace(preset("smoke"), timing_seconds=0.01)
    record = latency.measured_case(quick.cases[0], quick, "cuda")
    assert record["status"] == "ok", record
    assert record["did_not_run"] == {}
    assert not latency.failed(record)
    assert all("graph" in row["times"] for row in record["rows"] if row["name"] != "QUOKA")


def test_what_cannot_run_says_why(step: Step) -> None:
    lineup = step_field(Case("step", step.shape, step.context, step.chunk), step)
    assert set(lineup.absent) == {"dense cuDNN", "dense FlashAttention-2", "FlexAttention"}
    assert all("CUDA" in why for why in lineup.absent.values())


# ---- runs and reports ----

QUICK = Preset("cpu", (), 0.01, 60.0)


@pytest.mark.parametrize("kind", ["step", "tables", "layouts", "prompt"])
def test_every_kind_of_h200_case_runs_green_in_small(kind: str) -> None:
    case = next(case for case in preset("h200").cases if case.kind == kind and case.shape.batch == 8)
    record = latency.measured_case(latency.shrunk(case, 64), QUICK, "cpu")
    assert record["status"] == "ok", record
    assert not latency.failed(record)
    rows = record["chunks"][0]["rows"] if kind == "prompt" else record["rows"]
    assert all(row["times"]["plain"]["runs"] >= 3 for row in rows)


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run of three small cases leaves behind."""
    out = tmp_path_factory.mktemp("results")
    patterns = "step-8K-q256-B1-Hq4-Hkv1-vertical-slash-c0.9,step-8K-*-c0,tables-8K-*,prompt-8K-*"
    options = latency.Options("cpu", out, cases=patterns, shrink=4, timing_seconds=0.01)
    assert latency.run(options) == 0
    return out / "latency-cpu.json"


def test_a_result_has_what_it_must(result: Path) -> None:
    found = load(result)
    assert found["environment"]["torch"] == torch.__version__
    assert all(record["status"] == "ok" for record in found["cases"])
    row = next(row for row in found["cases"][0]["rows"] if row["name"] == "prefill 1x1")
    assert row["gate"]["passed"]
    assert row["gate"]["rows"] >= 64
    assert set(row["times"]["plain"]) == {"p20_ms", "p50_ms", "p80_ms", "runs"}
    assert row["flops"] > 0 < row["bytes"]
    assert found["cases"][0]["density"]["4xchunk"]["scope"] == "one chunk"
    assert list(result.parent.iterdir()) == [result]


def test_json_becomes_a_report(result: Path, tmp_path: Path) -> None:
    text, picture = write_report(result, tmp_path)
    assert picture.read_bytes()[:4] == b"\x89PNG"
    words = text.read_text()
    for expected in (
        "attend alone, controlled tables",
        "Whole prompts",
        "FlexAttention did not run",
        "prefill 4xchunk",
    ):
        assert expected in words
    assert "RED" not in words
    assert markdown(json.loads(json.dumps(load(result))), picture.name) == words


def test_a_spent_budget_is_reported(tmp_path: Path) -> None:
    assert latency.run(latency.Options("cpu", tmp_path, cases="tables", budget_seconds=-1.0)) == 0
    (record,) = load(tmp_path / "latency-cpu.json")["cases"]
    assert record["status"] == "not run"
    assert "budget" in markdown(load(tmp_path / "latency-cpu.json"), "x.png")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["latency", "--preset", "a100"], "expected h200, smoke or cpu, got 'a100'"),
        (["latency", "--preset", "cpu", "--cases", "nothing"], "got no match"),
        (["report", "/nowhere.json"], "got no file"),
        pytest.param(
            ["latency", "--preset", "h200"],
            "expected a CUDA device",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device"),
        ),
    ],
)
def test_errors_of_use_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
