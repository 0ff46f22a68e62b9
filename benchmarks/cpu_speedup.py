"""`python -m benchmarks.cpu_speedup`: one chunk at 32K on the CPU, `prefill` against PyTorch's dense attention.

The data is structured (verticals that the heads of a KV group mostly share, one slash, noise), with budgets chosen so
that FlashPrefill's tables hold about a tenth of the past after the union over four heads and the whole chunk. Dense
attention gets head-major copies of K and V, and is the fastest of three ways to call PyTorch's fused CPU kernel.
Nothing is timed before both results were compared with float64 attention on the same tensors.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.arguments import check_counts
from benchmarks.baselines import fused_cpu, merge_plain
from benchmarks.cases import ONE, K, table_mask
from benchmarks.files import check_place, write_json
from benchmarks.gate import Verdict, reference_rows, sample_rows, table_tokens
from benchmarks.machine import environment
from benchmarks.timing import Timing, summarize_times
from benchmarks.workloads import SELECTOR, Step, Workload, make_step
from compactattn import KVSummary, prefill, select_table, summarize

CONTEXT, CHUNK, HEADS_PER_GROUP = 32 * K, K, 4
WORKLOAD = Workload("cpu-tenth", verticals=(3, 5, 7, 10), slashes=1, band_blocks=2)


def make(context: int, chunk: int) -> Step:
    return make_step(WORKLOAD, ONE, context, chunk, dtype=torch.float32, capacity=context)


def run_sparse(step: Step, summary: KVSummary | None) -> Tensor:
    out = prefill(step.q, step.kv, step.batch, selector=SELECTOR, heads_per_group=HEADS_PER_GROUP, summary=summary)
    assert isinstance(out, Tensor)
    return out


def dense_ways(step: Step) -> dict[str, Callable[[], Tensor]]:
    """Ways to run bottom-right causal attention on PyTorch's fused CPU kernel, each giving out [T, Hq, D]."""
    assert step.k is not None
    assert step.v is not None
    group, past = step.shape.group, step.past
    q = step.q[None].transpose(1, 2).contiguous()  # [1, Hq, chunk, D]
    k, v = step.k, step.v
    repeated = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    mask = torch.ones(step.chunk, step.context, dtype=torch.bool).tril(past)

    def masked() -> Tensor:
        return scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)[0].transpose(0, 1)

    def split(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        before = fused_cpu(queries, keys[:, :, :past], values[:, :, :past], False)
        chunk = fused_cpu(queries, keys[:, :, past:], values[:, :, past:], True)
        return merge_plain(*before, *chunk)

    return {
        "scaled_dot_product_attention, mask, enable_gqa": masked,
        "past and chunk merged, K and V expanded": lambda: split(q, k, v),
        "past and chunk merged, K and V repeated beforehand": lambda: split(q, *repeated),
    }


def gate(step: Step, sparse: Tensor, dense: Mapping[str, Tensor]) -> dict[str, Verdict]:
    """64 rows of every head: the sparse result against its table, the dense ones against all causal tokens."""
    rows = sample_rows(step.batch)
    table = select_table(step.q, step.kv, step.batch, selector=SELECTOR, heads_per_group=HEADS_PER_GROUP)
    visible = table_tokens(table, step.q, step.kv, step.batch, rows)
    under_table = reference_rows(step.q, step.kv, step.batch, rows, visible)
    everything = reference_rows(step.q, step.kv, step.batch, rows)
    return {"prefill": under_table.check(sparse)} | {name: everything.check(out) for name, out in dense.items()}


def union_density(step: Step, summary: KVSummary) -> float:
    """Past blocks in the tables ÷ past blocks."""
    table = select_table(
        step.q, step.kv, step.batch, selector=SELECTOR, heads_per_group=HEADS_PER_GROUP, summary=summary
    )
    return float(table_mask(table)[:, : step.past // table.block_size].double().mean())


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure(step: Step, summary: KVSummary, dense: Callable[[], Tensor], rounds: int) -> dict[str, Timing]:
    """Everything in one loop, in milliseconds; the short ones run more often, on both sides of the long one."""
    short: dict[str, Callable[[], object]] = {
        "prefill": lambda: run_sparse(step, summary),
        "prefill without a summary": lambda: run_sparse(step, None),
        "summarize everything": lambda: summarize(
            step.kv, step.batch, block_size=SELECTOR.block_size, since=0, summary=summary
        ),
    }
    times: dict[str, list[float]] = {name: [] for name in (*short, "dense")}
    for _ in range(rounds):
        for name, run in (*short.items(), ("dense", dense), *short.items()):
            times[name].append(seconds(run) * 1e3)
    return {name: summarize_times(samples) for name, samples in times.items()}


def memory_of_first_call(context: int, chunk: int) -> int:
    """Growth of the peak resident memory, in bytes, over a fresh process's first `prefill`, compilation included."""
    code = f"from benchmarks.cpu_speedup import print_memory; print_memory({context}, {chunk})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def print_memory(context: int, chunk: int) -> None:
    """Print what one `prefill` adds to this process's resident memory at its peak; Linux with glibc only."""
    step = make(context, chunk)
    summary = summarize(step.kv, step.batch, block_size=SELECTOR.block_size)
    ctypes.CDLL(None).malloc_trim(0)  # give freed memory back, or the call would use it without growing
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak that making the data left behind
    before = _resident("VmRSS")
    run_sparse(step, summary)
    print(_resident("VmHWM") - before)


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status: expected a line {field}, got none")


def _text(result: dict[str, object], times: dict[str, Timing]) -> str:
    lines = [f"{result['case']}; tables hold {result['union_density']:.3f} of the past", f"dense: {result['dense']}"]
    lines.append(f"{'milliseconds':<28}{'p20':>9}{'p50':>9}{'p80':>9}{'runs':>6}")
    for name, timing in times.items():
        lines.append(f"{name:<28}{timing.p20_ms:>9.1f}{timing.p50_ms:>9.1f}{timing.p80_ms:>9.1f}{timing.runs:>6}")
    speedup = times["dense"].p50_ms / times["prefill"].p50_ms
    memory = result["peak_memory_growth_bytes"] / 2**20  # type: ignore[operator]
    lines.append(f"prefill is {speedup:.2f} times as fast as dense, and adds at most {memory:.0f} MiB of memory")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; 1 where a result is wrong, and then there are no times."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu_speedup", description=__doc__)
    parser.add_argument("--json", type=Path, help="write the result to this file")
    parser.add_argument("--rounds", type=int, default=3, help="dense runs; sparse ones are twice as many")
    parser.add_argument("--context", type=int, default=CONTEXT)
    parser.add_argument("--chunk", type=int, default=CHUNK)
    options = parser.parse_args(arguments)
    try:
        check_counts(options, "rounds", "context", "chunk")
        if options.chunk >= options.context:
            raise ValueError(f"--chunk: expected less than the context, {options.context}, got {options.chunk}")
        if options.json is not None:
            check_place(options.json, "--json")
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    step = make(options.context, options.chunk)
    summary = summarize(step.kv, step.batch, block_size=SELECTOR.block_size)
    density = union_density(step, summary)
    ways = dense_ways(step)
    verdicts = gate(step, run_sparse(step, summary), {name: run() for name, run in ways.items()})
    for name, verdict in verdicts.items():
        print(f"{'green' if verdict.passed else 'RED'}  {name}: error {verdict.worst:.2f} of what is allowed")
    if not all(verdict.passed for verdict in verdicts.values()):
        print("no times: a result is wrong", file=sys.stderr)
        return 1
    fastest = min(ways, key=lambda name: min(seconds(ways[name]), seconds(ways[name])))
    times = measure(step, summary, ways[fastest], options.rounds)
    memory = memory_of_first_call(options.context, options.chunk)
    result = {
        "schema": 1,
        "environment": environment("cpu"),
        "load_average": os.getloadavg(),
        "case": f"past {step.past} + chunk {step.chunk}, {step.shape}, D = 128, float32, groups of {HEADS_PER_GROUP} "
        "heads and the whole chunk",
        "union_density": density,
        "gate": {name: verdict.as_json() for name, verdict in verdicts.items()},
        "dense": fastest,
        "times": {name: timing.as_json() for name, timing in times.items()},
        "speedup": {
            p: getattr(times["dense"], p) / getattr(times["prefill"], p) for p in ("p20_ms", "p50_ms", "p80_ms")
        },
        "peak_memory_growth_bytes": memory,
    }
    print(_text(result, times))
    if options.json is not None:
        write_json(options.json, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
