"""`python -m benchmarks ttft`: models, the stack around them, its gates, and the way from a run to a report."""

from __future__ import annotations

import functools
import itertools
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import baselines, measure
from benchmarks.__main__ import main
from benchmarks.cases import FINEST, GROUPINGS, Shape
from benchmarks.gate import Verdict
from benchmarks.measure import Rounds, failed
from benchmarks.records import load, read_kind
from benchmarks.timing import poison
from benchmarks.ttft import attentions, findings, lineup, report, run, stack_gate
from benchmarks.ttft.cases import (
    COMPLETE,
    NOTHING,
    StackCase,
    case_of,
    in_small,
    needed_bytes,
    preset,
    refuse_if_too_large,
)
from benchmarks.ttft.models import MODELS, ModelShape
from benchmarks.ttft.stack import Attention, Cache, Chunk, Stack
from compactattn import BlockTable

GIB = 2**30
PERCENTILES = ("p20_ms", "p50_ms", "p80_ms")
LLAMA, QWEN = MODELS["Llama-3.1-8B"], MODELS["Qwen3-30B-A3B"]
SMALL = StackCase("prompt", Shape(2, 4, 1, 64), 512, 128, dtype="float32", model="Llama-3.1-8B", small=True)
CPU_SDPA = functools.partial(attentions.split_dense, attention=baselines.fused_cpu)


def by_id(model: ModelShape) -> str:
    return model.family


# ---- models ----


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("model", MODELS.values(), ids=by_id)
def test_parameters_and_products_are_those_of_the_modules(model: ModelShape, ranks: int) -> None:
    built = model.rank(ranks).build("eager", "meta", torch.bfloat16)
    assert sum(weight.numel() for weight in built.parameters()) == model.rank(ranks).parameters()
    assert {weight.dtype for weight in built.parameters()} == {torch.bfloat16}
    share = model.experts_per_token / model.experts if model.experts else 1.0
    work = {"tokens": 0.0, "last": 0.0}
    for name, weight in built.named_parameters():
        if weight.ndim >= 2 and "embed" not in name:  # experts are [experts, out, in]
            work["last" if "lm_head" in name else "tokens"] += weight.numel() * (share if ".experts." in name else 1)
    assert model.rank(ranks).products(1000, 3) == pytest.approx(2 * (1000 * work["tokens"] + 3 * work["last"]))


def test_models_have_their_published_size() -> None:
    assert LLAMA.parameters() == 8_030_261_248
    assert QWEN.parameters() == 30_532_122_624


def test_a_rank_has_its_part_of_heads_rows_and_vocabulary() -> None:
    half = QWEN.rank(2)
    assert (half.q_heads, half.kv_heads, half.intermediate, half.vocab) == (16, 2, 384, 75968)
    assert (half.hidden, half.layers, half.experts, half.experts_per_token) == (2048, 48, 128, 8)
    assert case_of("Llama-3.1-8B", 8, 2).shape == Shape(8, 16, 4)
    with pytest.raises(ValueError, match="ranks: expected a divisor of q_heads 32, got 5"):
        LLAMA.rank(5)


def test_experts_run_as_one_grouped_product(monkeypatch: pytest.MonkeyPatch) -> None:
    small = QWEN.small(Shape(1, 4, 1, 64))
    stack = Stack(small, 1, 128, "cpu", torch.float32)
    calls: list[tuple[int, ...]] = []
    grouped = torch.nn.functional.grouped_mm

    def spy(rows: Tensor, weight: Tensor, **others: Any) -> Tensor:
        calls.append(tuple(weight.shape))
        return grouped(rows, weight, **others)

    monkeypatch.setattr(torch.nn.functional, "grouped_mm", spy)
    chunk = stack.random_chunk(0, 128)
    stack.forward(chunk, attentions.nothing(stack, chunk))
    assert calls == [(4, 128, 128), (4, 64, 128)] * 2


# ---- the stack ----


@pytest.mark.parametrize("model", MODELS.values(), ids=by_id)
def test_chunks_through_the_stack_give_what_transformers_gives_in_one_piece(model: ModelShape) -> None:
    stack = Stack(model.small(Shape(2, 4, 1, 64)), 2, 384, "cpu", torch.float32)
    exact, plain = stack_gate.reference_models(stack)
    tokens = stack.random_chunk(0, 300).tokens
    with torch.no_grad():
        theirs, truth = (one(input_ids=tokens).logits for one in (plain, exact))
    ours = stack_gate.logits(stack, stack_gate.in_chunks(tokens, (130, 170)), attentions.complete)
    assert stack_gate.budgeted(ours, theirs, truth).passed


@pytest.mark.parametrize("model", MODELS.values(), ids=by_id)
def test_references_see_what_the_mask_says(model: ModelShape) -> None:
    stack = Stack(model.small(Shape(1, 4, 2, 64)), 1, 128, "cpu", torch.float32)
    tokens, causal = stack.random_chunk(0, 40).tokens, stack_gate.causal_mask(40, "cpu")
    one_head = causal.repeat(1, 4, 1, 1)
    one_head[0, 2, 30, 5] = False
    for reference in stack_gate.reference_models(stack):
        with torch.no_grad():
            usual = reference(input_ids=tokens).logits
        torch.testing.assert_close(stack_gate.in_one_piece(reference, tokens, causal), usual)
        less = stack_gate.in_one_piece(reference, tokens, one_head)
        torch.testing.assert_close(less[:, :30], usual[:, :30])
        assert bool((less[:, 30:] - usual[:, 30:]).abs().amax(-1).gt(1e-6).all())


def test_listed_tokens_by_hand() -> None:
    """Two chunks of 200 tokens; in the second, head 0 has a row for each query block and head 1 one for both."""
    chunks = [Chunk.of(torch.zeros(1, 200, dtype=torch.int64), past) for past in (0, 200)]
    rows = torch.tensor([[[0, 2], [1, 1]]], dtype=torch.int32)
    first = BlockTable(torch.tensor([[0, 1]] * 3).int(), torch.tensor([2, 2, 2]).int(), rows, 128, 128)
    uneven = torch.tensor([[1, 2, 3, -1], [0, 1, 3, -1], [2, 3, -1, -1]]).int()
    second = BlockTable(uneven, torch.tensor([3, 2, 2]).int(), rows, 128, 128)
    seen = stack_gate.listed_tokens(chunks, {0: first, 200: second})
    expected = torch.zeros(1, 2, 400, 400, dtype=torch.bool)
    expected[..., :200, :200] = True
    expected[0, 0, 200:328, 128:] = True
    expected[0, 0, 328:, 256:] = True
    expected[0, 1, 200:, :256] = True
    assert torch.equal(seen, expected)


def test_cache_and_queries_are_read_in_place() -> None:
    stack = Stack(LLAMA.small(Shape(2, 4, 2, 64)), 2, 512, "cpu", torch.float32)
    stack.cache.fill(0.0)
    chunk, seen = stack.random_chunk(128, 200), []
    idle = attentions.nothing(stack, chunk)
    stack.forward(chunk, lambda layer, query: (seen.append(query), idle(layer, query))[1])
    assert attentions.packed_queries(seen[0]).data_ptr() == seen[0].data_ptr()
    for layer, kv in enumerate(stack.paged(chunk.context)):
        assert kv.k.untyped_storage().data_ptr() == stack.cache.keys[layer].untyped_storage().data_ptr()
        assert kv.v.untyped_storage().data_ptr() == stack.cache.values[layer].untyped_storage().data_ptr()
        for b in range(2):
            tokens = kv.k[kv.page_table[b].long()].flatten(0, 1)
            assert torch.equal(tokens.transpose(0, 1), stack.cache.keys[layer][b, :, :384])
            assert bool((tokens[128:328] != 0).all())
            assert not bool(tokens[328:].any())
    with pytest.raises(ValueError, match="capacity: expected a multiple of 128"):
        Stack(LLAMA.small(Shape(2, 4, 2, 64)), 2, 500, "cpu", torch.float32)


def test_what_needs_no_attention_takes_none() -> None:
    stack = Stack(LLAMA.small(Shape(2, 4, 1, 64)), 2, 256, "cpu", torch.float32)
    stack.cache.fill(math.nan)
    chunk = stack.random_chunk(0, 128)
    idle = attentions.nothing(stack, chunk)
    assert bool(stack.forward(chunk, idle).isfinite().all())
    assert bool(stack.cache.keys[1][:, :, :128].isfinite().all())  # what each pass writes
    assert idle(0, torch.empty(2, 4, 128, 64)) is idle(1, torch.empty(2, 4, 128, 64))


# ---- gates ----


def dense_without(what: str, stack: Stack, chunk: Chunk) -> Attention:
    """Dense attention of the CPU, wrong in one way."""

    def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
        if what == "the causal mask":
            causal = False
        if what == "the first token" and not causal:
            k, v = k[:, :, 1:], v[:, :, 1:]
        out, lse = baselines.fused_cpu(q, k, v, causal)
        return out, lse - 30 if what == "the past" and not causal else lse

    right = attentions.split_dense(stack, chunk, attention)
    return (lambda layer, query: right(0, query)) if what == "the layer" else right


def raising(stack: Stack, chunk: Chunk) -> Attention:
    raise baselines.CannotRunError("needs another device")


def test_stack_gate_is_green_for_what_is_right_and_red_for_what_is_not() -> None:
    wrong = {what: functools.partial(dense_without, what) for what in ("the causal mask", "the first token")}
    wrong |= {what: functools.partial(dense_without, what) for what in ("the past", "the layer")}
    right = {"nothing": functools.partial(dense_without, "nothing"), COMPLETE: attentions.complete}
    case = replace(SMALL, model="Qwen3-30B-A3B")
    verdicts, absent = stack_gate.stack_verdicts(case, "cpu", {**right, **wrong, "absent": raising}, GROUPINGS)
    expected = dict.fromkeys(["nothing", COMPLETE, "1x1", "4xchunk"], True) | dict.fromkeys(wrong, False)
    assert {name: verdict.passed for name, verdict in verdicts.items()} == expected
    assert absent == {"absent": "needs another device"}


@pytest.mark.parametrize("what", ["table", "layer", "cache"])
def test_stack_gate_sees_a_wrong_table_layer_or_cache(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    selected, update = attentions.selected, Cache.update

    def wrong(chunk: Any, paged: Any, means: Any, table: BlockTable, grouping: Any, seen: Any) -> Attention:
        if what == "table":
            later = table.indices.shape[1] - 1 - (chunk.context - 1) // 128 + chunk.past // 128
            table = replace(table, indices=torch.where(table.indices < later, 0 * table.indices, table.indices))
        right = selected(chunk, paged, means, table, grouping, seen)
        return (lambda layer, query: right(0, query)) if what == "layer" else right

    def late(self: Cache, key: Tensor, value: Tensor, layer: int, *rest: Any, **others: Any) -> Any:
        return update(self, key.roll(1, 2) if what == "cache" else key, value, layer, *rest, **others)

    monkeypatch.setattr(attentions, "selected", wrong)
    monkeypatch.setattr(Cache, "update", late)
    verdicts, _ = stack_gate.stack_verdicts(SMALL, "cpu", {"dense": CPU_SDPA}, (FINEST,))
    assert not verdicts["1x1"].passed
    assert verdicts["dense"].passed == (what != "cache")  # which every attention reads


@pytest.fixture(scope="module")
def small_field() -> Any:
    """(stack, chunk, the contestants of one chunk by name)."""
    stack = Stack(SMALL.stack, 2, 512, "cpu", torch.float32)
    stack.cache.fill()
    chunk = stack.random_chunk(256, 128)
    tables = lineup.workload_tables(SMALL, 384, "cpu")
    green = Verdict(True, 0.0, 1, "a test")
    dense = lineup.dense_attentions("cpu", flash=True)
    field = lineup.chunk_field(stack, chunk, dense, tables, dict.fromkeys([*dense, "1x1", "4xchunk"], green))
    return stack, chunk, {one.name: one for one in field.contestants}


def test_every_attention_of_a_chunk_is_green(small_field: Any) -> None:
    _, _, contestants = small_field
    names = ["dense CPU SDPA", COMPLETE, "compactattn 1x1", "compactattn 4xchunk", NOTHING]
    assert list(contestants) == names
    for one in contestants.values():
        assert one.check(one.run()).passed, one.name
    assert contestants[NOTHING].flops < contestants["compactattn 1x1"].flops <= contestants[COMPLETE].flops


def test_a_pass_is_red_if_anything_in_it_is_wrong(small_field: Any) -> None:
    _, _, contestants = small_field
    one = contestants["compactattn 1x1"]
    out, logits, table = one.run()
    assert one.check((out, logits, table)).passed
    for row, spoiled in ((127, math.nan), (128, 1.01)):
        wrong = out.clone()
        wrong[row] *= spoiled
        assert not one.check((wrong, logits, table)).passed
    assert not one.check((out, logits * math.inf, table)).passed
    assert not one.check((out, logits, None)).passed
    counts = table.counts.clone()
    counts[3] -= 1
    assert not one.check((out, logits, replace(table, counts=counts))).passed
    assert not contestants[NOTHING].check(logits * math.nan).passed
    poison((out, logits, table))
    assert not one.check((out, logits, table)).passed


def test_a_red_table_or_stack_makes_every_chunk_red() -> None:
    stack = Stack(SMALL.stack, 2, 512, "cpu", torch.float32)
    stack.cache.fill()
    chunk, dense = stack.random_chunk(256, 128), {"dense CPU SDPA": CPU_SDPA}
    tables = lineup.workload_tables(SMALL, 384, "cpu")
    assert all(plan.verdict.passed for plan in tables.values())
    green, red = (Verdict(passed, 0.0, 1, "a test") for passed in (True, False))
    tables[FINEST] = replace(tables[FINEST], verdict=red)
    verdicts = {"dense CPU SDPA": red, "1x1": green, "4xchunk": green}
    field = lineup.chunk_field(stack, chunk, dense, tables, verdicts)
    passed = {one.name: one.check(one.run()).passed for one in field.contestants}
    assert passed == {
        "dense CPU SDPA": False,
        "compactattn 1x1": False,
        "compactattn 4xchunk": True,
        NOTHING: True,
    }


def test_a_call_that_was_not_captured_has_all_timed_plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[tuple[list[str], list[str]]] = []
    monkeypatch.setattr(measure, "interleaved_cuda", lambda graph, plain, *_, **__: timed.append(([*graph], [*plain])))
    monkeypatch.setattr(measure, "ColdCache", lambda *_, **__: None)
    ready: Any = {name: measure.Contestant(name, "dense", lambda: None, lambda _: None) for name in "ab"}
    for captured in ("ab", "a"):
        for rounds in (run.ROUNDS, replace(run.ROUNDS, alike=False), Rounds()):
            replays: Any = {name: (lambda: None) for name in captured}
            measure._times(ready, replays, 0.0, "cuda", cold=False, rounds=rounds)
    both, one = ["a", "b"], ["a"]
    assert timed == [(both, []), (both, []), (both, both), (one, both), (one, ["b"]), (one, both)]


# ---- cases and memory ----


def test_h200_preset_begins_with_the_papers_setting() -> None:
    cases = [case for case in preset("h200").cases if isinstance(case, StackCase)]
    assert len({case.name for case in cases}) == len(cases)
    assert [(case.part, case.context // 1024, case.shape.batch) for case in cases[:3]] == [
        ("Llama-3.1-8B-tp2", 32, 8),
        ("Llama-3.1-8B-tp2", 64, 8),
        ("Llama-3.1-8B-tp2", 128, 8),
    ]
    assert {(case.part, case.shape.batch) for case in cases} == {
        ("Llama-3.1-8B-tp2", 8),
        ("Llama-3.1-8B", 1),
        ("Qwen3-30B-A3B", 1),
        ("Qwen3-30B-A3B-tp2", 8),
    }
    assert all(case.peers for case in cases)  # FlashAttention-2 beside cuDNN
    assert [run.capacity_of(case, cases) for case in cases] == [128 * 1024] * len(cases)


def test_memory_by_hand_and_what_does_not_fit() -> None:
    cases = [case for case in preset("h200").cases if isinstance(case, StackCase)]
    for case in cases:
        refuse_if_too_large(needed_bytes(case, 128 * 1024), 140 * GIB)
    needed = needed_bytes(cases[2], 128 * 1024)
    assert needed["cache"] == 64 * GIB  # 2 · 32 layers · 8 requests · 4 KV heads · 128K tokens · 128 · 2 bytes
    assert needed["weights"] == 2 * LLAMA.rank(2).parameters()
    stack = Stack(SMALL.stack, 2, 512, "cpu", torch.float32)
    small, chunk = needed_bytes(SMALL, 512), stack.random_chunk(384, 128)
    assert small["weights"] == sum(weight.nbytes for weight in stack.model.parameters())
    assert small["cache"] == sum(cache.nbytes for cache in (*stack.cache.keys, *stack.cache.values))
    means = stack.summaries(stack.paged(512), chunk.batch)
    assert small["key means"] == sum(one.k_mean.nbytes for one in means)
    with pytest.raises(ValueError, match=r"expected at most 76.0 GiB .*, got \d+.\d GiB: weights 7.5, cache 64.0, key"):
        refuse_if_too_large(needed, 80 * GIB)


def test_activations_are_an_upper_bound() -> None:
    for name in MODELS:
        case = replace(SMALL, model=name, shape=Shape(1, 4, 1, 64))
        stack = Stack(case.stack, 1, 512, "cpu", torch.float32)
        stack.cache.fill()
        chunk = stack.random_chunk(384, 128)
        attention = CPU_SDPA(stack, chunk)
        stack.forward(chunk, attention)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            stack.forward(chunk, attention)
        events = profile.profiler.kineto_results.events()
        changes = sorted((one.start_ns(), one.nbytes()) for one in events if one.name() == "[memory]")
        most = max(itertools.accumulate(change for _, change in changes))
        residual = 4 * 128 * stack.shape.hidden
        passes = 1 + 2 + case.peers + len(case.groupings) + 1
        assert residual < most <= needed_bytes(case, 512)["activations"] / passes, (name, most)


@pytest.mark.parametrize("setting", ["Llama-3.1-8B-tp2", "Qwen3-30B-A3B-tp2"])
def test_h200_cases_run_green_in_small(setting: str) -> None:
    cases = [case for case in preset("h200").cases if isinstance(case, StackCase) and case.part == setting]
    case = in_small(cases[1], 64)
    chosen = replace(preset("h200"), device="cpu", timing_seconds=0.0)
    record = run.Bench(chosen, [case]).measured_case(case)
    assert record["status"] == "ok", record
    assert not failed(record)
    assert [chunk["stands_for"] for chunk in record["chunks"]] == [4.0]
    assert len(record["chunks"][0]["rows"]) == 5


@pytest.mark.gpu
def test_h200_cases_run_green_in_small_on_a_gpu() -> None:
    cases = [case for case in preset("h200").cases if isinstance(case, StackCase) and case.context == 64 * 1024]
    for case in (in_small(case, 16) for case in cases):
        record = run.Bench(replace(preset("h200"), timing_seconds=0.0), [case]).measured_case(case)
        assert record["status"] == "ok", record
        assert not failed(record)
        rows = [row for chunk in record["chunks"] for row in chunk["rows"]]
        assert all({"graph", *(["plain"] if case.plain else [])} <= set(row["times"]) for row in rows), record
        assert {row["kernel"] for row in rows if row["kernel"]} <= {"hopper"} or torch.cuda.get_device_capability() != (
            9,
            0,
        )


# ---- runs and reports ----


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run of the cpu preset, made smaller still, leaves behind."""
    out = tmp_path_factory.mktemp("results")
    assert run.run(run.Options("cpu", out, shrink=4, timing_seconds=0.0)) == 0
    return out / "ttft-cpu.json"


def test_a_result_has_what_it_must(result: Path) -> None:
    found = read_kind(result, "ttft", 1)
    assert list(result.parent.iterdir()) == [result]
    assert all(record["status"] == "ok" and not failed(record) for record in found["cases"])
    environment = found["runs"][0]["environment"]
    assert {"sources", "torch", "transformers", "commit"} <= set(environment)
    record = found["cases"][0]
    assert [row["name"] for row in record["rows"]] == ["dense CPU SDPA", COMPLETE, "1x1", "4xchunk"]
    assert record["model"]["parameters"] == StackCase(**_fields(record["case"])).stack.parameters()
    for row in record["chunks"][0]["rows"]:
        assert set(row["times"]["plain"]) == {*PERCENTILES, "runs"}
        assert row["gate"]["passed"]
        assert row["flops"] > 0
    own = record["chunks"][0]["own_selection"]
    assert 0.5 * own["visible"] < own["selected"] <= own["visible"]  # random weights have no pattern
    assert any("left aside" in line for line in found["protocol"])


def _fields(case: dict[str, Any]) -> dict[str, Any]:
    return {**case, "shape": Shape(**case["shape"]), "groupings": ()}


def test_json_becomes_a_report(result: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(result), "--out", str(tmp_path)]) == 0
    text, picture = (Path(line) for line in capsys.readouterr().out.split())
    assert picture.read_bytes()[:4] == b"\x89PNG"
    words = text.read_text()
    for expected in (
        "what was selected is then left aside",
        "kept by the model's own selection",
        "1K, 2 of 8 chunks",
        "(fastest dense)",
        "no attention",
        "attention share",
    ):
        assert expected in words
    assert "RED" not in words
    assert "Targets" not in words  # which are a GPU's
    assert "published" not in words  # no prompt has the paper's length
    before = picture.read_bytes()
    assert [path.name for path in report.write_report(result, tmp_path)] == ["ttft-cpu.md", "ttft-cpu.png"]
    assert (text.read_text(), picture.read_bytes()) == (words, before)


def test_resuming_keeps_what_is_there(result: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(result, tmp_path))
    found = json.loads(path.read_text())
    dropped = found["cases"].pop()
    path.write_text(json.dumps(found))
    how: dict[str, Any] = {"shrink": 4, "timing_seconds": 0.0, "resume": True}
    assert run.run(run.Options("cpu", tmp_path, budget_seconds=-1.0, **how)) == 0
    again = read_kind(path, "ttft", 1)
    assert [record["run"] for record in again["cases"]] == [0, 0, 0, 1]
    assert (again["cases"][-1]["name"], again["cases"][-1]["status"]) == (dropped["name"], "not run")
    assert "the budget of -1 s was spent" in report.markdown(again, [])
    again["runs"][-1]["environment"]["transformers"] = "5.0"
    path.write_text(json.dumps(again))
    with pytest.raises(
        ValueError, match=r"--resume: expected a result of transformers '.*', got .* transformers '5.0'"
    ):
        run.run(run.Options("cpu", tmp_path, **how))


def test_a_case_that_fails_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_large(*_: Any) -> None:
        raise torch.cuda.OutOfMemoryError("too large")

    monkeypatch.setattr(run, "stack_verdicts", too_large)
    record = run.Bench(preset("cpu"), [SMALL]).measured_case(SMALL)
    assert (record["status"], record["reason"]) == ("failed", "out of GPU memory")
    assert failed(record)


Times = Callable[[int], dict[str, float]]


def prompt_result(case: StackCase, times: Times, mode: str = "graph") -> dict[str, Any]:
    """A result of whole prompts with given milliseconds by row at each context; 0 is a red row."""

    def row(name: str, time: float) -> dict[str, Any]:
        times = {mode: dict.fromkeys(PERCENTILES, time)} if time else {}
        return {"name": name, "gate": {"passed": time > 0}, "times": times, "flops": 2e9}

    cases = []
    for since, end in ((0, 32), (32, 64), (64, 128)):
        cascade = {"mask": 10, "sub_group_union": 20}
        density = {name: {"cascade": cascade, "selected": 30, "visible": 100} for name in ("1x1", "4xchunk")}
        chunks = [
            {
                "context": n * 1024,
                "stands_for": 16.0,
                "rows": [row(name, time) for name, time in times(n).items()],
                "density": density,
                "own_selection": {"selected": 90, "visible": 100},
            }
            for n in range(since + 9, end, 16)
        ]
        one = replace(case, context=end * 1024, since=since * 1024, stride=16)
        memory = {"needed": {"weights": GIB}, "peak": 2 * GIB}
        cases.append({"name": one.name, "case": asdict(one), "status": "ok", "chunks": chunks, "did_not_run": {}})
        cases[-1] |= {"memory": memory, "model": {"part": one.part}}
    environment = {"gpu": "a GPU", "torch": "2", "compactattn": "0"}
    runs = [{"environment": environment, "ceilings": {}, "started": "", "seconds": 0.0}]
    return {"preset": "h200", "protocol": [], "notes": [], "runs": runs, "cases": cases}


def linear(n: int) -> dict[str, float]:
    """Milliseconds of a chunk that ends at n · 1024: everything but attention takes 10."""
    dense = {"dense cuDNN": 10.0 + n, "dense FlashAttention-2": 10.0 + 2 * n, COMPLETE: 11.0 + n}
    return {**dense, "compactattn 1x1": 14.0, "compactattn 4xchunk": 15.0, NOTHING: 10.0}


def test_findings_by_hand() -> None:
    found = prompt_result(case_of("Llama-3.1-8B", 8, 2), linear)
    (prompt,) = report.prompts(found)
    assert prompt.ends == [32 * 1024, 64 * 1024, 128 * 1024]
    assert prompt.is_paper_shape
    assert prompt.name.startswith("Llama-3.1-8B-tp2, B=8, Hq=16, Hkv=4, ")
    assert findings.modes_of(prompt) == ["graph"]
    chunks = prompt.within(32 * 1024)
    assert [chunk["context"] for chunk in chunks] == [9 * 1024, 25 * 1024]
    assert findings.best_dense(chunks, "graph") == "dense cuDNN"
    assert findings.speedup(chunks, "compactattn 1x1", "graph") == pytest.approx((19 + 35) / 28)
    assert findings.speedup(chunks, NOTHING, "graph") == pytest.approx((19 + 35) / 20)
    assert findings.attention_share(chunks, "compactattn 1x1", "graph") == pytest.approx(4 / 14)
    assert findings.attention_speedup(chunks, "compactattn 4xchunk", "graph") == pytest.approx((9 + 25) / 10)
    assert findings.own_density(chunks) == pytest.approx(0.9)
    assert findings.rate(chunks, "compactattn 1x1", "graph") == pytest.approx(2e9 / 14e-3 / 1e12)
    (target,) = findings.targets(found)
    whole = (10 * 8 + 9 + 25 + 41 + 57 + 73 + 89 + 105 + 121) / (14 * 8)
    assert (target.bound, target.measured) == (1.96, pytest.approx(whole))
    assert "compactattn 1x1" in target.what


def test_a_red_or_missing_row_is_no_baseline_and_has_no_sum() -> None:
    def red(n: int) -> dict[str, float]:
        return {name: 0.0 if name == "dense cuDNN" and n == 41 else time for name, time in linear(n).items()}

    (prompt,) = report.prompts(prompt_result(case_of("Llama-3.1-8B", 8, 2), red))
    chunks = prompt.within(128 * 1024)
    assert findings.best_dense(prompt.within(32 * 1024), "graph") == "dense cuDNN"
    assert findings.best_dense(chunks, "graph") == COMPLETE
    assert math.isnan(findings.speedup(chunks, "dense cuDNN", "graph"))
    found = prompt_result(case_of("Llama-3.1-8B", 8, 2), lambda n: {NOTHING: 10.0, "compactattn 1x1": 11.0})
    assert findings.modes_of(report.prompts(found)[0]) == []
    assert list(findings.targets(found)) == []


def test_published_figures_are_labelled_and_stand_beside_ours(tmp_path: Path) -> None:
    found = prompt_result(case_of("Llama-3.1-8B", 8, 2), linear)
    found["cases"] += prompt_result(case_of("Qwen3-30B-A3B", 1), linear, "plain")["cases"]
    words = report.markdown(found, [])
    (published,) = [
        line for line in words.splitlines() if "published, arXiv 2605.16839: end to end" in line and "|" in line
    ]
    assert published.endswith("| 1.130 | 1.390 | 1.960 |")
    ours = [line for line in words.splitlines() if "(this run" in line]
    assert [("the shape of the paper" in line, "plain" in line) for line in ours] == [(True, False)] * 2 + [
        (False, True)
    ] * 2
    assert "| > 1.96 |" in words
    assert "GiB at the peak" in words
    picture = tmp_path / "figure.png"
    report.figure.draw(found, picture)
    assert picture.read_bytes()[:4] == b"\x89PNG"


# ---- use ----


def test_listing_says_what_each_case_needs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ttft", "--preset", "h200", "--only", "Qwen3-30B-A3B-prompt", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert all("GiB (weights 56.87, cache 12.00, key means" in line for line in lines)


def test_sources_of_a_result_are_printed(result: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sources", "--of", "ttft"]) == 0
    assert capsys.readouterr().out.strip() == read_kind(result, "ttft", 1)["runs"][0]["environment"]["sources"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "a100"], "expected h200 or cpu, got 'a100'"),
        (["--preset", "cpu", "--only", "nothing"], "expected a part of a case's name"),
        (["--preset", "cpu", "--shrink", "0"], "--shrink: expected at least 1, got 0"),
        (["--preset", "cpu", "--threads", "0"], "--threads: expected at least 1, got 0"),
        pytest.param(
            ["--preset", "h200"],
            "expected a CUDA device",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device"),
        ),
    ],
)
def test_errors_of_use_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ttft", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_what_is_missing_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    other = tmp_path / "other.json"
    with monkeypatch.context() as bare:
        bare.setattr("importlib.util.find_spec", lambda name: None)
        for command in ("ttft", "fidelity"):
            assert main([command]) == 2
            assert "expected transformers (extra `hf`: pip install '.[hf]'), got none" in capsys.readouterr().err
        assert main(["report", str(other)]) == 2
        assert "expected matplotlib (extra `bench`: pip install '.[bench]'), got none" in capsys.readouterr().err
    other.write_text(json.dumps({"kind": "ttft", "schema": 9}))
    assert main(["report", str(other)]) == 2
    assert "expected a ttft result of schema 1" in capsys.readouterr().err
    other.write_text(json.dumps({"kind": "ttft", "schema": 1, "cases": []}))
    assert main(["report", str(other)]) == 2
    assert "expected the result to have preset, protocol, notes, runs, got none" in capsys.readouterr().err
    with pytest.raises(ValueError, match="expected a latency result"):
        load(other)
