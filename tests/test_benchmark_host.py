"""The host's case: what it leaves untouched, and what it reports."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest
import torch

from benchmarks import host, report_scaling
from benchmarks.cases import AUTO, GROUPINGS, Case
from benchmarks.workloads import SELECTOR, Step
from compactattn import PrefillBatch, summarize
from tests.benchmark_steps import GROUP, small_step

CASE = Case("host", GROUP, 2048, 384, dtype="float32", groupings=(*GROUPINGS, AUTO))


def ends_in_units(step: Step, count: int) -> list[PrefillBatch]:
    """Steps of one query that end in the first token of each unit of the past: it alone is then the unit's mean."""
    ends = range(1, step.past, 64)
    assert len(ends) > count
    return [PrefillBatch.from_lens([1] * step.shape.batch, [end] * step.shape.batch) for end in ends]


def test_calls_of_new_lengths_leave_the_summary_of_the_step_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """They cut units at their own ends, as a shorter step must; what is gated afterwards still sees whole ones."""
    step = small_step()
    seen = []
    library = host.library

    def watched(step: Step, summary: Any, *others: Any, **how: Any) -> Any:
        seen.append(summary)
        return library(step, summary, *others, **how)

    monkeypatch.setattr(host, "library", watched)
    monkeypatch.setattr(host, "new_lengths", ends_in_units)
    record: Any = host.measured_host(CASE, step)
    assert len(record["rows"]) == 2 * len(CASE.groupings)
    assert [row["name"] for row in record["rows"] if not row["gate"]["passed"]] == []
    fresh = summarize(step.kv, step.batch, block_size=SELECTOR.block_size)
    assert all(torch.equal(summary.k_mean, fresh.k_mean) for summary in seen)
    assert 0 < record["bare_call"]["p20_ms"] <= record["bare_call"]["p50_ms"]


def host_record(bare_ms: float | None) -> dict[str, Any]:
    """A case whose calls take 0.25 ms, on a host where a bare call takes so much."""
    times = {"steady host": {"p20_ms": 0.2, "p50_ms": 0.25, "p80_ms": 0.3}}
    row = {"name": "prefill 1x1", "gate": {"passed": True}, "times": times, "memory": {"calls": 200}}
    bare = {} if bare_ms is None else {"bare_call": {"p50_ms": bare_ms}}
    return {"case": asdict(CASE), "status": "ok", "rows": [row], **bare}


def test_calls_are_counted_in_bare_calls_of_their_own_host() -> None:
    slow, fast, unknown = host_record(0.01), host_record(0.005), host_record(None)
    head, _, *lines = report_scaling.host_section({"cases": [slow, fast, unknown]})
    names = head.split(" | ")
    at, ratio = names.index("bare `add_`, µs"), names.index("call ÷ `add_`")
    found = [line.split(" | ") for line in lines]
    assert [(cells[at], cells[ratio]) for cells in found] == [("10.0", "25.0"), ("5.000", "50.0"), ("-", "-")]
    assert {len(cells) for cells in found} == {len(names)}


def test_a_result_without_bare_calls_is_reported_as_before() -> None:
    head, _, line = report_scaling.host_section({"cases": [host_record(None)]})
    assert "add_" not in head
    assert line.count("|") == head.count("|")
