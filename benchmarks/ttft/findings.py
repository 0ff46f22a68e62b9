"""What a `ttft` result says: sums over prompts, speedups, and attention's share, from its records alone."""

from __future__ import annotations

import math
from collections.abc import Iterator

from benchmarks.published import PAPER_END_TO_END
from benchmarks.records import Record, tokens
from benchmarks.report_prompts import Prompt, prompts, row_names, total
from benchmarks.report_targets import Target
from benchmarks.ttft.cases import NOTHING, SPARSE

GOAL_AT = 128 * 1024


def modes_of(prompt: Prompt) -> list[str]:
    """The modes in which every chunk has a dense attention, a grouping of the library, and no attention."""
    return [mode for mode in ("graph", "plain") if prompt.chunks and all(_has(chunk, mode) for chunk in prompt.chunks)]


def _has(chunk: Record, mode: str) -> bool:
    timed = [row["name"] for row in chunk["rows"] if mode in row.get("times", {})]
    return all(any(name.startswith(kind) for name in timed) for kind in ("dense", SPARSE, NOTHING))


def best_dense(chunks: list[Record], mode: str) -> str | None:
    """The dense attention with which the chunks together take least; None if none was timed in all of them."""
    return _fastest(chunks, [name for name in row_names(chunks) if name.startswith("dense")], mode)


def best_sparse(chunks: list[Record], mode: str) -> str | None:
    """The grouping of the library with which the chunks together take least; None if none was timed in all of them."""
    return _fastest(chunks, sparse_rows(chunks), mode)


def _fastest(chunks: list[Record], names: list[str], mode: str) -> str | None:
    sums = {name: total(chunks, name, mode=mode) for name in names}
    sums = {name: value for name, value in sums.items() if not math.isnan(value)}
    return min(sums, key=lambda name: sums[name], default=None)


def speedup(chunks: list[Record], name: str, mode: str) -> float:
    """How many times less the chunks take under `name` than under the fastest dense attention."""
    dense = best_dense(chunks, mode)
    return math.nan if dense is None else total(chunks, dense, mode=mode) / total(chunks, name, mode=mode)


def attention_share(chunks: list[Record], name: str, mode: str) -> float:
    """The part of the time that attention takes, selection included."""
    return 1 - total(chunks, NOTHING, mode=mode) / total(chunks, name, mode=mode)


def attention_speedup(chunks: list[Record], name: str, mode: str) -> float:
    """The same as `speedup` with the time of everything but attention taken off both."""
    dense, rest = best_dense(chunks, mode), total(chunks, NOTHING, mode=mode)
    if dense is None or name == NOTHING:
        return math.nan
    return (total(chunks, dense, mode=mode) - rest) / (total(chunks, name, mode=mode) - rest)


def rate(chunks: list[Record], name: str, mode: str) -> float:
    """Useful TFLOP/s of the whole pass, over the chunks."""
    flops = sum(row["flops"] * chunk["stands_for"] for chunk in chunks for row in chunk["rows"] if row["name"] == name)
    return flops / total(chunks, name, mode=mode) / 1e9


def own_density(chunks: list[Record]) -> float:
    """Selected ÷ visible blocks of what layer 0 selects on the model's own queries and keys."""
    sums = [sum(chunk["own_selection"][n] * chunk["stands_for"] for chunk in chunks) for n in ("selected", "visible")]
    return sums[0] / sums[1] if sums[1] else math.nan


def sparse_rows(chunks: list[Record]) -> list[str]:
    """Names of the library's rows."""
    return [name for name in row_names(chunks) if name.startswith(SPARSE)]


def end_to_end(prompt: Prompt, mode: str) -> dict[str, dict[int, float]]:
    """Speedups by prompt length, for every grouping of the library."""
    names = sparse_rows(prompt.chunks)
    return {name: {end: speedup(prompt.within(end), name, mode) for end in prompt.ends} for name in names}


def targets(result: Record) -> Iterator[Target]:
    """The best grouping of every prompt of `GOAL_AT` against what the paper reports of its own at that length."""
    goal = PAPER_END_TO_END["CompactAttention-FP"][GOAL_AT]
    for prompt in prompts(result):
        if GOAL_AT not in prompt.ends:
            continue
        chunks = prompt.within(GOAL_AT)
        for mode in modes_of(prompt):
            name = best_sparse(chunks, mode)
            if name is not None:
                what = f"{name}, prompt of {tokens(GOAL_AT)}, {prompt.name}, {mode}: x the fastest dense"
                yield Target(what, goal, speedup(chunks, name, mode))
