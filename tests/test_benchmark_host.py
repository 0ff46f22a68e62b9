"""The host's case: what it leaves untouched, and what it reports."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import host
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
