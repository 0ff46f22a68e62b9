"""Runs of the benchmarks in small, and the way from their JSON to a report."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import latency, machine, report_floors, report_prompts, report_targets
from benchmarks.__main__ import RESULTS, main
from benchmarks.cases import KINDS, TP2_RANK, Case, Preset, preset
from benchmarks.measure import failed
from benchmarks.published import PAPER_SPEEDUPS
from benchmarks.records import load
from benchmarks.report import markdown, write_report

PERCENTILES = ("p20_ms", "p50_ms", "p80_ms")
QUICK = Preset("cpu", (), 0.01, 60.0)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_h200_case_runs_green_in_small(kind: str) -> None:
    least = 0 if kind == "decode" else 64 * 1024
    cases = [case for case in preset("h200").cases if case.kind == kind and case.context >= least]
    case = max(cases, key=lambda case: (case.shape.batch, -case.context))
    record = latency.measured_case(latency.shrunk(case, 64), QUICK, "cpu")
    assert record["status"] == "ok", record
    assert not failed(record)
    rows = record["chunks"][0]["rows"] if kind == "prompt" else record["rows"]
    assert all(row["times"]["steady host" if kind == "host" else "plain"]["runs"] >= 3 for row in rows)
    if kind == "prompt":
        assert [chunk["stands_for"] for chunk in record["chunks"]] == [1.0] * len(record["chunks"])


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run of a few small cases leaves behind."""
    out = tmp_path_factory.mktemp("results")
    patterns = (
        "step-8K-q256-B1-Hq4-Hkv1-vertical-slash-c0.9,step-8K-*-c0,tables-8K-*,prompt-*,scaling-*,host-*,bounds-*"
    )
    options = latency.Options("cpu", out, cases=patterns, shrink=4, timing_seconds=0.01)
    assert latency.run(options) == 0
    return out / "latency-cpu.json"


def test_a_report_compares_the_selectors(result: Path) -> None:
    """Every grouping of both, each with its own times and density."""
    (record,) = (one for one in load(result)["cases"] if one["case"]["kind"] == "bounds")
    section = markdown(load(result), []).partition("## KeyBounds beside FlashPrefill")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if "Hq=4" in line]
    assert len(lines) == len(record["density"]) == 4
    assert all("nan" not in line and "| - |" not in line for line in lines)
    for name, line in zip(record["density"], lines, strict=True):
        assert all(f"| {part} |" in line for part in name.split(", "))
    assert len({row["name"] for row in record["rows"]}) == 4 + 8 + 1  # stages, the fused ones, dense


def test_a_result_has_what_it_must(result: Path) -> None:
    found = load(result)
    assert all(record["status"] == "ok" for record in found["cases"])
    row = next(row for row in found["cases"][0]["rows"] if row["name"] == "prefill 1x1")
    assert row["gate"]["passed"]
    assert row["gate"]["rows"] >= 64
    assert set(row["times"]["plain"]) == {"p20_ms", "p50_ms", "p80_ms", "runs"}
    assert row["flops"] > 0 < row["bytes"]
    assert found["cases"][0]["density"]["4xchunk"]["scope"] == "one chunk"
    assert list(result.parent.iterdir()) == [result]


def test_a_result_says_what_ran_it(result: Path) -> None:
    found = load(result)
    (run,) = found["runs"]
    assert run["environment"]["torch"] == torch.__version__
    assert run["environment"]["sources"] == machine.sources()
    assert {record["run"] for record in found["cases"]} == {0}
    rows = {row["name"]: row for row in found["cases"][0]["rows"]}
    assert (rows["prefill 1x1"]["kernel"], rows["dense CPU SDPA"]["kernel"]) == ("numba", "")


def test_sources_are_known_without_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for part in ("compactattn", "benchmarks"):
        shutil.copytree(machine.ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__", "*.json"))
    assert machine.sources(tmp_path) == machine.sources()
    kernel = tmp_path / "compactattn" / "_triton" / "attention.py"
    kernel.write_text(kernel.read_text() + "\n")
    assert machine.sources(tmp_path) != machine.sources()
    monkeypatch.setattr(machine, "output", lambda *command: None)
    found = machine.environment("cpu", "abc1234")
    assert (found["commit"], found["uncommitted_changes"], found["sources"]) == ("abc1234", None, machine.sources())


def test_the_attention_kernel_is_what_the_rule_says(monkeypatch: pytest.MonkeyPatch) -> None:
    q: Any = SimpleNamespace(is_cuda=True, device=torch.device("cuda"), dtype=torch.bfloat16, shape=(1, 1, 128))
    kv: Any = SimpleNamespace(page_size=128)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert machine.attend_kernel(q, kv, 128, 128) == "general: compute capability 8.0, not 9.0"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr("triton.__version__", "3.6.0")
    assert machine.attend_kernel(q, kv, 128, 128) == "hopper"
    q.dtype = torch.float32
    assert machine.attend_kernel(q, kv, 128, 128).startswith("general: torch.float32")
    assert machine.attend_kernel(torch.zeros(1), kv, 128, 128) == "numba"


def test_a_copy_inside_another_repository_has_no_commit_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {"--show-toplevel": "/somewhere/else", "--short": "fedcba9"}
    monkeypatch.setattr(machine, "output", lambda *command: next((answers[w] for w in command if w in answers), ""))
    assert machine.environment("cpu")["commit"] is None
    answers["--show-toplevel"] = str(machine.ROOT)
    assert machine.environment("cpu")["commit"] == machine.environment("cpu", "fedcba98")["commit"] == "fedcba9"
    with pytest.raises(ValueError, match="--commit: expected fedcba9, as git says, got 1234567"):
        machine.environment("cpu", "1234567")


def test_resuming_keeps_what_is_there(result: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(result, tmp_path))
    names = [record["name"] for record in load(path)["cases"]]
    how: dict[str, Any] = {"shrink": 4, "timing_seconds": 0.01, "resume": True}
    assert latency.run(latency.Options("cpu", tmp_path, cases="tables,scaling,scattered", **how)) == 0
    found = load(path)
    assert [record["name"] for record in found["cases"]][: len(names)] == names
    assert [record["run"] for record in found["cases"]] == [0] * len(names) + [1]
    assert markdown(found, []).count("scattered") > 0
    changed = json.loads(path.read_text())
    changed["runs"][-1]["environment"]["sources"] = "other"
    path.write_text(json.dumps(changed))
    with pytest.raises(ValueError, match=r"--resume: expected a result of sources .* of sources 'other'"):
        latency.run(latency.Options("cpu", tmp_path, cases="tables", **how))


def test_json_becomes_a_report(result: Path, tmp_path: Path) -> None:
    text, *pictures = write_report(result, tmp_path)
    assert [picture.read_bytes()[:4] for picture in pictures] == [b"\x89PNG"] * 4
    words = text.read_text()
    for expected in (
        "attend alone, controlled tables",
        "÷ equal lengths",
        "Whole prompts",
        "4 of 16 chunks",
        "Scaling with the context",
        "Host time",
        "FlexAttention did not run",
        "FlashInfer, dense paged did not run",
        "prefill 4xchunk",
    ):
        assert expected in words
    assert "Targets" not in words  # which are a GPU's
    assert "RED" not in words
    again = markdown(json.loads(json.dumps(load(result))), [picture.name for picture in pictures])
    assert again == words


def test_only_what_was_measured_is_drawn(result: Path, tmp_path: Path) -> None:
    found = json.loads(result.read_text())
    found["cases"] = [record for record in found["cases"] if record["case"]["kind"] == "step"]
    steps = tmp_path / "steps.json"
    steps.write_text(json.dumps(found))
    assert [path.name for path in write_report(steps)] == ["steps.md", "steps.png"]


def test_committed_reports_are_those_of_the_committed_results(tmp_path: Path) -> None:
    for path in RESULTS.glob("latency-*.json"):
        once, again = (write_report(path, tmp_path / str(n)) for n in range(2))
        committed = {other.name for other in RESULTS.glob(f"{path.stem}*") if other != path}
        assert {written.name for written in once} == committed
        assert once[0].read_text() == (RESULTS / once[0].name).read_text()
        assert [written.read_bytes() for written in once] == [written.read_bytes() for written in again]


def test_a_result_of_the_first_schema_can_still_be_read(result: Path, tmp_path: Path) -> None:
    found = json.loads(result.read_text())
    (run,) = found.pop("runs")
    old = tmp_path / "old.json"
    old.write_text(json.dumps({**found, **run, "schema": 1}))
    assert "Whole prompts" in markdown(load(old), [])


@pytest.mark.parametrize("schema", [1, 2])
def test_a_result_that_lacks_something_is_refused_by_name(
    schema: int, result: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = json.loads(result.read_text())
    head, of_run = ("preset", "protocol", "notes"), ("started", "environment", "ceilings", "seconds")
    spoiled: list[tuple[dict[str, Any], str]]
    if schema == 1:
        (run,) = found.pop("runs")
        found = {**found, **run, "schema": 1}
        spoiled = [(without(found, name), f"expected the result to have {name}") for name in (*head, *of_run)]
    else:
        spoiled = [(without(found, name), f"expected the result to have {name}") for name in (*head, "runs")]
        runs = [([without(found["runs"][0], name)], f"expected runs[0] to have {name}") for name in of_run]
        runs += [([], "expected runs to be a list of at least one, got []"), ({}, "expected runs to be a list")]
        runs += [(found["runs"] * 2 + [3], "expected runs[2] to be an object, got int")]
        spoiled += [(found | {"runs": its}, words) for its, words in runs]
        spoiled += [(found | {"cases": {}}, "expected cases to be a list, got dict")]
    case = without(found["cases"][-1], "status")
    spoiled += [(found | {"cases": [case]}, "expected cases[0] to have status")]
    path = tmp_path / "spoiled.json"
    for content, words in spoiled:
        path.write_text(json.dumps(content))
        assert main(["report", str(path)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"python -m benchmarks: {path}: {words}"), line
    assert list(tmp_path.iterdir()) == [path]


def without(record: dict[str, Any], name: str) -> dict[str, Any]:
    assert name in record
    return {key: value for key, value in record.items() if key != name}


def test_committed_results_are_green() -> None:
    paths = list(RESULTS.glob("latency-*.json"))
    assert paths
    for path in paths:
        assert not any(failed(record) for record in load(path)["cases"])


def test_floors_by_hand() -> None:
    def row(name: str, flops: float, time: float) -> dict[str, Any]:
        times = {"graph": dict.fromkeys(PERCENTILES, time)}
        gate = {"passed": True}
        return {"name": name, "grouping": "1x1", "flops": flops, "bytes": 4e9, "gate": gate, "times": times}

    rows = [row(f"attend 1x1, equal {d:g}", d * 4e12, 0.5 + d * 8) for d in (0.0225, 0.1, 0.25)]
    record = {"rows": [*rows, row("matmul", 1e12, 1.0), row("copy", 0.0, 2.0)]}
    result = {"runs": [{"ceilings": {}}]}
    assert report_floors.floors(result, record, rows[1]) == pytest.approx((0.4, 2.0))
    fixed, rate, shares = report_floors.line(record, "1x1")
    assert (fixed, rate) == pytest.approx((0.5, 500.0))
    assert shares == pytest.approx({0.0225: 1.0, 0.1: 1.0, 0.25: 1.0})


# ---- whole prompts ----


def prompt_result(times: dict[int, tuple[float, float]], ends: dict[int, int], stands_for: float = 1.0) -> Any:
    """A result of prompts in the paper's shape: {context: (dense, ours)} in ms, {end: since} as cases."""

    def row(name: str, time: float) -> dict[str, Any]:
        return {"name": name, "gate": {"passed": time > 0}, "times": {"graph": dict.fromkeys(PERCENTILES, time)}}

    def chunk(context: int) -> dict[str, Any]:
        rows = [row("dense cuDNN", times[context][0]), row("prefill 1x1", times[context][1])]
        cascade = {"mask": 10, "sub_group_union": 20}
        density = {"1x1": {"cascade": cascade, "selected": 30, "visible": 100}}
        return {"context": context, "stands_for": stands_for, "rows": rows, "density": density}

    cases = []
    for end, since in ends.items():
        chunks = [chunk(context) for context in times if since < context <= end]
        case = Case("prompt", TP2_RANK, end, 1024, since=since)
        cases.append({"name": case.name, "case": asdict(case), "status": "ok", "chunks": chunks, "did_not_run": {}})
    return {"cases": cases}


def test_prompt_sums_come_from_their_chunks() -> None:
    times = {n * 1024: (float(n), 1.0) for n in range(1, 65)}
    found = prompt_result(times, {32 * 1024: 0, 64 * 1024: 32 * 1024})
    (prompt,) = report_prompts.prompts(found)
    assert prompt.ends == [32 * 1024, 64 * 1024]
    assert report_prompts.total(prompt.within(32 * 1024), "dense cuDNN") == 32 * 33 / 2
    assert report_prompts.paper_bars(prompt) == {"prefill 1x1": {32 * 1024: 16.5, 64 * 1024: 32.5}}
    assert report_prompts.slowest(prompt.chunks, "prefill 1x1") == (4.0, 4096)
    assert report_prompts.union_growth(prompt.chunks, "1x1") == 2
    assert report_prompts.mask_density(prompt.chunks) == pytest.approx(0.3)


def test_a_prompt_with_missing_or_red_chunks_has_no_sum() -> None:
    times = {n * 1024: (float(n), 1.0) for n in range(1, 65)}
    (gap,) = report_prompts.prompts(prompt_result(times, {64 * 1024: 32 * 1024}))
    assert gap.ends == []
    times[2048] = (2.0, -1.0)  # red
    (red,) = report_prompts.prompts(prompt_result(times, {32 * 1024: 0}))
    assert math.isnan(report_prompts.total(red.chunks, "prefill 1x1"))
    assert report_prompts.total(red.chunks, "dense cuDNN") == 32 * 33 / 2


def test_published_figures_are_labelled_and_never_mixed_in() -> None:
    times = {n * 1024: (float(n), 1.0) for n in range(1, 33)}
    lines = report_prompts.section(prompt_result(times, {32 * 1024: 0}))
    for name in PAPER_SPEEDUPS:
        (line,) = [line for line in lines if line.startswith(f"| {name} (")]
        assert "published, arXiv 2605.16839" in line
    (ours,) = [line for line in lines if line.startswith("| prefill 1x1 (")]
    assert "this run" in ours
    assert "16.5" in ours
    smaller = prompt_result(times, {32 * 1024: 0})
    smaller["cases"][0]["case"]["shape"]["batch"] = 1
    assert not any("published" in line for line in report_prompts.section(smaller))


def test_targets_by_hand() -> None:
    times = {n * 1024: (float(n), 0.5 if n < 100 else 10.0) for n in range(1, 129)}
    found = {target.what: target for target in report_targets.targets(prompt_result(times, {128 * 1024: 0}))}
    (whole,) = [target for what, target in found.items() if "prompt of 128K" in what]
    assert (whole.bound, whole.measured) == (14.0, pytest.approx(128 * 129 / 2 / (99 * 0.5 + 29 * 10)))
    assert whole.met
    (worst,) = [target for what, target in found.items() if "slowest chunk" in what]
    assert worst.measured == 8
    assert not report_targets.Target("", 1.1, 1.2, most=True).met


# ---- errors ----


def test_a_spent_budget_is_reported(tmp_path: Path) -> None:
    assert latency.run(latency.Options("cpu", tmp_path, cases="tables", budget_seconds=-1.0)) == 0
    (record,) = load(tmp_path / "latency-cpu.json")["cases"]
    assert record["status"] == "not run"
    assert "budget" in markdown(load(tmp_path / "latency-cpu.json"), [])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["latency", "--preset", "a100"], "expected h200, smoke or cpu, got 'a100'"),
        (["latency", "--preset", "cpu", "--cases", "nothing"], "got no match"),
        (["latency", "--preset", "cpu", "--only", "prompts"], "expected some of step"),
        (["latency", "--preset", "cpu", "--shrink", "0"], "--shrink: expected at least 1, got 0"),
        (["latency", "--preset", "cpu", "--threads", "0"], "--threads: expected at least 1, got 0"),
        (["latency", "--preset", "cpu", "--threads", "100000"], "--threads: expected at most 1024, got 100000"),
        (["latency", "--preset", "cpu", "--cases", "nothing", "--list"], "--cases: expected a part of a case's name"),
        (["latency", "--preset", "cpu", "--only", ""], "--only: expected some of step, tables, "),
        (["latency", "--cases", "step", "--only", "tables"], "a part of a case's name, such as tables-"),
        (["report", "/nowhere.json"], "got no file"),
        (["report", str(RESULTS)], "expected a file that can be read, got: Is a directory"),
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


@pytest.mark.parametrize("command", ["latency", "ttft", "serving", "fidelity"])
@pytest.mark.parametrize("given", ["nan", "inf", "0", "-1", "soon"])
def test_a_budget_is_a_number_of_seconds(command: str, given: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([command, "--budget-seconds", given])
    assert stopped.value.code == 2
    assert f"--budget-seconds: expected a number of seconds above 0, got {given!r}" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["latency"], ["fidelity"], ["join", "a.json"], ["report", "a.json"]], ids=str)
@pytest.mark.parametrize("below", ["", "below"])
def test_a_file_is_no_directory_for_results(
    command: list[str], below: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(SystemExit) as stopped:
        main([*command, "--out", str(file / below)])
    assert stopped.value.code == 2
    assert f"--out: expected a directory, got '{file / below}', where {file} is a file" in capsys.readouterr().err
