"""What `torch.compile` support costs the host: `python -m benchmarks.operator_cost [--calls 2000]`.

An eager call of a stage asks one flag and goes to its backend. A call in a compiled graph goes through the stage's
operator: PyTorch's dispatcher, the records put together again, the same stage. Both are timed on a step so small that
the host is all there is to time, in turns, and the fastest round counts: others were interrupted. On a GPU calls are
not waited for.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import torch

import compactattn
from benchmarks.arguments import check_counts
from benchmarks.machine import environment
from compactattn import DensityCounters, FlashPrefill, PagedKV, PrefillBatch, operators

GOAL_US = 6.0  # per call: the flag keeps to it, operators do not
ROUNDS = 20


def stage_calls(device: str) -> dict[str, dict[str, Any]]:
    """Arguments of each stage on one request of 4 queries and 100 keys."""
    k, v = torch.randn(2, 8, 16, 1, 64, device=device).half()
    kv = PagedKV(k, v, torch.arange(8, dtype=torch.int32, device=device)[None])
    batch, q = PrefillBatch.from_lens([4], [100], device), torch.randn(4, 2, 64, device=device).half()
    selector = FlashPrefill(block_size=64, query_block=64)
    summary = compactattn.summarize(kv, batch, block_size=64)
    selection = compactattn.select(q, kv, batch, selector, summary=summary)
    groups = compactattn.unite(selection, batch, heads_per_group=2)
    table = compactattn.build_table(groups)
    out, lse = compactattn.attend(q, kv, batch, table, return_lse=True)
    step: dict[str, Any] = {"q": q, "kv": kv, "batch": batch, "scale": None}
    fine = {"heads_per_group": 1, "query_blocks_per_span": 1}
    model = {"softcap": None, "window": None, "sinks": None}
    result = {"return_lse": False, "out": torch.empty_like(q)}
    select = {"selector": selector, "summary": summary}
    calls: dict[str, dict[str, Any]] = {
        "summarize": {"kv": kv, "batch": batch, "block_size": 64, "values": False, "since": None, "summary": summary},
        "select": step | select,
        "unite": {"selection": selection, "batch": batch} | fine,
        "build_table": {"groups": groups},
        "attend": step | {"table": table, "correction": None} | model | result,
        "prefill": step | select | fine | {"correction": False, "density": None} | model | result,
        "select_table": step | select | fine,
        "merge_attn_states": {"out_a": out, "lse_a": lse, "out_b": out, "lse_b": lse, "out": torch.empty_like(q)},
        "count_density": {"table": table, "batch": batch, "counter": DensityCounters.zeros(1, device).of_layer(0)},
    }
    calls["count_density"]["window"] = None
    return {name: arguments | {"backend": None} for name, arguments in calls.items()}


def fastest_us(functions: list[Callable[[], Any]], calls: int) -> list[float]:
    """Microseconds per call of each, in turns; the fastest of ROUNDS rounds."""
    best = [float("inf")] * len(functions)
    for _ in range(ROUNDS):
        for n, function in enumerate(functions):
            start = time.perf_counter()
            for _ in range(calls):
                function()
            best[n] = min(best[n], (time.perf_counter() - start) / calls * 1e6)
    return best


def measured(device: str, calls: int) -> dict[str, Any]:
    """What an eager call pays for the flag, and per stage an eager call and one through its operator, microseconds."""
    (flag,) = fastest_us([torch.compiler.is_compiling], calls)
    stages = {}
    per_round = max(1, calls // ROUNDS)
    for name, arguments in stage_calls(device).items():
        stage, operator = getattr(compactattn, name), getattr(torch.ops.compactattn, name).default
        given = tuple(operators.apart(name, arguments).values())
        eager, through = fastest_us([lambda: stage(**arguments), lambda: operator(*given)], per_round)  # noqa: B023
        stages[name] = {"eager_us": eager, "operator_us": through, "operator_adds_us": through - eager}
    return {"device": device, "eager_adds_us": flag, "goal_us": GOAL_US, "stages": stages}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.operator_cost", description=__doc__.split("\n")[0])
    parser.add_argument("--calls", type=int, default=2000, help="calls of the flag per round; stages get fewer")
    parser.add_argument("--commit", help="what to record as the commit on a machine without git")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: expected cpu where there is no CUDA device, got cuda")
    try:
        check_counts(arguments, "calls")
        where = environment(arguments.device, arguments.commit)
    except ValueError as error:
        parser.error(str(error))
    torch.set_num_threads(1)
    with torch.no_grad():
        found = measured(arguments.device, arguments.calls)
    print(json.dumps({"environment": where, **found}, indent=1))


if __name__ == "__main__":
    main()
