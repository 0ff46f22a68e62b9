"""What a call costs the host: in steady state, at lengths never seen before, and in memory that it keeps.

A serving engine calls `prefill` once per layer and chunk, and does not wait for the GPU in between. So calls are timed
one by one in bursts without synchronisation, short enough for the launch queue to take them; the same with a new pair
of lengths in every call, which would show a compilation or a tuning run as an outlier. Memory is read before and after.
Hosts differ by more than any of this: what one bare call of PyTorch costs there is the unit by which they compare.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from benchmarks import gate
from benchmarks.cases import Case
from benchmarks.contestants import Contestant, groupings_of, library, table_of
from benchmarks.measure import gated
from benchmarks.timing import Timing, summarize_times
from benchmarks.workloads import SELECTOR, Step
from compactattn import PrefillBatch, prefill, select, summarize

BURST, BURSTS = 20, 10
NEW_LENGTHS = 40


def measured_host(case: Case, step: Step) -> dict[str, object]:
    """A record of `select_table` and `prefill` under every grouping, green ones timed, and a bare call of PyTorch."""
    rows, sampled = [], gate.sample_rows(step.batch)
    summary = summarize(step.kv, step.batch, block_size=SELECTOR.block_size)
    selection = select(step.q, step.kv, step.batch, SELECTOR, summary=summary)
    batches = new_lengths(step, NEW_LENGTHS if step.q.is_cuda else 4)
    # A shorter step rewrites the mean of the unit at its own end, over fewer tokens: not in the step's summary.
    own = summarize(step.kv, step.batch, block_size=SELECTOR.block_size)
    for grouping in groupings_of(case):
        table = table_of(step, summary, selection, grouping)
        for one in library(step, summary, selection, grouping, table, sampled, stages=False):
            row = _row(one)
            rows.append(row)
            if row["gate"]["passed"]:
                steady, memory = steady_state(one.run, step.q.device)
                row["times"] = {"steady host": steady.as_json()}
                row["memory"] = memory
        how = {"selector": SELECTOR, "summary": own, **grouping.arguments}
        calls = [_call(step, batch, how) for batch in batches]
        rows[-1]["new_lengths"] = burst_times(calls, step.q.device)
    return {"rows": rows, "did_not_run": {}, "bare_call": bare_call(step.q.device).as_json()}


def bare_call(device: torch.device) -> Timing:
    """Host milliseconds of `torch.Tensor.add_` on one element, in the bursts of every other call."""
    element = torch.zeros(1, device=device)
    return steady_state(lambda: element.add_(1), device)[0]


def _row(contestant: Contestant) -> dict[str, object]:
    verdict = gated(replace(contestant))
    assert isinstance(verdict, gate.Verdict)  # the library is never absent
    names = ("name", "family", "grouping", "flops", "bytes", "kernel")
    return {name: getattr(contestant, name) for name in names} | {"gate": verdict.as_json(), "times": {}}


def _call(step: Step, batch: PrefillBatch, how: dict[str, object]) -> Callable[[], object]:
    q = step.q[: int(batch.cu_seqlens_q[-1])]
    return lambda: prefill(q, step.kv, batch, **how)


def new_lengths(step: Step, count: int) -> list[PrefillBatch]:
    """Batches whose query counts and contexts were not seen before, unaligned ones, ever shorter."""
    batches = []
    for n in range(1, count + 1):
        q_len, context = max(1, step.chunk - n), max(step.chunk, step.context - 37 * n)
        lens = [q_len] * step.shape.batch, [context] * step.shape.batch
        batches.append(PrefillBatch.from_lens(*lens, step.q.device))
    return batches


def steady_state(run: Callable[[], object], device: torch.device) -> tuple[Timing, dict[str, int]]:
    """Host milliseconds of each call in bursts, and the memory that these calls kept or needed, in bytes."""
    cuda = device.type == "cuda"
    bursts, burst = (BURSTS, BURST) if cuda else (3, 2)
    samples: list[float] = []
    for _ in range(2):  # reach the state in which everything is compiled and every pool is filled
        _burst([run] * burst, device)
    before = _memory(cuda)
    for _ in range(bursts):
        samples += _burst([run] * burst, device)
    after = _memory(cuda)
    growth = {f"{name}_growth": after[name] - before[name] for name in before if name != "peak"}
    if cuda:
        growth["peak_above_start"] = after["peak"] - before["allocated"]
    return summarize_times(samples), {"calls": bursts * burst, **growth}


def _burst(runs: Sequence[Callable[[], object]], device: torch.device) -> list[float]:
    """Milliseconds on the host of each call, none waiting for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    samples = []
    for run in runs:
        start = time.perf_counter()
        run()
        samples.append((time.perf_counter() - start) * 1e3)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return samples


def _memory(cuda: bool) -> dict[str, int]:
    """Bytes that the caching allocator hands out and holds, its calls of cudaMalloc, the peak since the last look."""
    if not cuda:
        return {}
    stats = torch.cuda.memory_stats()
    found = {"allocated": torch.cuda.memory_allocated(), "reserved": torch.cuda.memory_reserved()}
    found |= {"device_allocations": stats.get("num_device_alloc", 0), "peak": torch.cuda.max_memory_allocated()}
    torch.cuda.reset_peak_memory_stats()
    return found


def burst_times(calls: Sequence[Callable[[], object]], device: torch.device) -> dict[str, float]:
    """Host times of calls that are made once each: percentiles and the slowest, in milliseconds."""
    samples = [sample for n in range(0, len(calls), BURST) for sample in _burst(calls[n : n + BURST], device)]
    return {**summarize_times(samples).as_json(), "max_ms": max(samples)}
