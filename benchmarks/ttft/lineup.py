"""What runs in one chunk of a whole model, each behind its gates: dense attentions, this library, and no attention.

A pass is gated on the very tensors that are timed: layer 0's output on rows of float64 attention (its queries, keys and
values are the same under every attention), the table that was selected there, and finite logits. The same attention has
passed in the whole stack in small before (`stack_gate`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks import baselines, gate
from benchmarks.cases import Grouping, dense_flops, table_flops
from benchmarks.contestants import CPU_SLACK, Contestant, Field, groupings_of
from benchmarks.gate import Verdict
from benchmarks.machine import attend_kernel
from benchmarks.timing import poison_free_memory
from benchmarks.ttft import attentions
from benchmarks.ttft.cases import COMPLETE, NOTHING, OWN, SPARSE, StackCase
from benchmarks.ttft.stack import Attention, Chunk, Stack
from benchmarks.ttft.stack_gate import MakeAttention
from benchmarks.workloads import SELECTOR, WORKLOADS, Density, make_step, measure_density
from compactattn import BlockTable, build_table, check, select, summarize, unite
from compactattn.selection import block_rules


def dense_attentions(device: str, *, flash: bool) -> dict[str, MakeAttention]:
    """The dense attentions of a device by name: cuDNN's, FlashAttention-2 if wanted, or the CPU's; the library's."""
    found: dict[str, MakeAttention] = {}
    if device == "cpu":
        found["dense CPU SDPA"] = functools.partial(attentions.split_dense, attention=baselines.fused_cpu)
    else:
        found["dense cuDNN"] = functools.partial(attentions.split_dense, attention=baselines.fused_cudnn)
        if flash:
            found["dense FlashAttention-2"] = attentions.flash
    return {**found, COMPLETE: attentions.complete}


@dataclass(frozen=True, eq=False)
class Planned:
    """The block table of the calibrated workload for one chunk.

    Attributes:
        verdict: whether it is canonical, and lists exactly what the workload's masks ask for.
        density: of the workload's masks and unions.
    """

    table: BlockTable
    verdict: Verdict
    density: Density


def workload_tables(case: StackCase, context: int, device: str) -> dict[Grouping, Planned]:
    """The tables of the case's workload at a context, by grouping: a fresh draw, of its own queries and keys."""
    workload, dtype = WORKLOADS[case.workload], getattr(torch, case.dtype)
    drawn = {"correlation": case.correlation, "seed": context // case.chunk - 1, "device": device, "dtype": dtype}
    step = make_step(workload, case.shape, context, case.chunk, **drawn)
    selection = select(step.q, step.kv, step.batch, SELECTOR)
    planned = {}
    for grouping in groupings_of(case, fixed=True):
        table = build_table(unite(selection, step.batch, **grouping.arguments))
        check(step.kv, step.batch, table)
        verdict = gate.check_table(table, gate.united_rows(selection, step.batch, table.rows, len(table.counts)))
        planned[grouping] = Planned(table, verdict, measure_density(step, grouping, selection, table))
    return planned


def chunk_field(
    stack: Stack,
    chunk: Chunk,
    dense: Mapping[str, MakeAttention],
    planned: Mapping[Grouping, Planned],
    stack_verdicts: Mapping[str, Verdict],
) -> Field:
    """The contestants of one chunk, on the stack's own cache, and the density of the workload and (`OWN`) the model.

    Args:
        stack: its cache holds a past.
        chunk: the step.
        dense: the dense attentions, by name.
        planned: the table of each grouping.
        stack_verdicts: of `stack_gate.stack_verdicts`, for every dense attention and grouping.
    """
    lineup = Field()
    paged = stack.paged(chunk.context)
    means = stack.summaries(paged, chunk.batch)
    query = _first_queries(stack, chunk)
    rows = gate.sample_rows(chunk.batch)
    tokens, requests = chunk.tokens.numel(), chunk.tokens.shape[0]
    rest = stack.shape.products(tokens, requests)
    spoil = functools.partial(poison_free_memory, query)
    kernel = attend_kernel(query, paged[0], SELECTOR.block_size, SELECTOR.query_block)
    summary = summarize(paged[0], chunk.batch, block_size=SELECTOR.block_size)
    selection = select(query, paged[0], chunk.batch, SELECTOR, summary=summary)
    visible_blocks = int(block_rules(chunk.batch, SELECTOR).visible.sum()) * stack.heads.q_heads
    lineup.density[OWN] = {"selected": int(selection.mask.sum()), "visible": visible_blocks}

    exact = gate.reference_rows(query, paged[0], chunk.batch, rows)
    lens = [chunk.tokens.shape[1]] * requests, [chunk.past] * requests
    dense_work = rest + stack.shape.layers * dense_flops(*lens, stack.heads)
    for name, make in dense.items():
        slack = CPU_SLACK if name == "dense CPU SDPA" else 1.0
        checks = _checks(stack_verdicts[name], functools.partial(exact.check, slack=slack))
        run, own = _pass(stack, chunk, make(stack, chunk), {}), name == COMPLETE
        family, its_kernel = ("library", kernel) if own else ("dense", "")
        lineup.contestants.append(Contestant(name, family, run, checks, dense_work, kernel=its_kernel, spoil=spoil))
    for grouping, plan in planned.items():
        visible = gate.table_tokens(plan.table, query, paged[0], chunk.batch, rows)
        under_table = gate.reference_rows(query, paged[0], chunk.batch, rows, visible)
        seen: dict[int, BlockTable] = {}
        attention = attentions.selected(chunk, paged, means, plan.table, grouping, seen)

        def same_selection(table: BlockTable) -> Verdict:
            return gate.check_table(table, gate.united_rows(selection, chunk.batch, table.rows, len(table.counts)))

        first = (stack_verdicts[str(grouping)], plan.verdict)
        checks = _checks(*first, under_table.check, own_table=same_selection)
        work = rest + stack.shape.layers * table_flops(plan.table, chunk.batch, stack.heads)
        run = _pass(stack, chunk, attention, seen)
        name = f"{SPARSE}{grouping}"
        lineup.contestants.append(
            Contestant(name, "library", run, checks, work, grouping=str(grouping), kernel=kernel, spoil=spoil)
        )
        lineup.density[str(grouping)], lineup.measured[str(grouping)] = plan.density.as_json(), plan.density
    idle = attentions.nothing(stack, chunk)
    run = functools.partial(stack.forward, chunk, idle)
    lineup.contestants.append(Contestant(NOTHING, "rest", run, finite, rest))
    return lineup


def _first_queries(stack: Stack, chunk: Chunk) -> Tensor:
    """Layer 0's queries, [T, Hq, D]; its keys and values are in the cache then."""
    found: list[Tensor] = []
    idle = attentions.nothing(stack, chunk)

    def look(layer: int, query: Tensor) -> Tensor:
        if layer == 0:
            found.append(attentions.packed_queries(query))
        return idle(layer, query)

    stack.forward(chunk, look)
    return found[0]


def _pass(stack: Stack, chunk: Chunk, attention: Attention, seen: dict[int, BlockTable]) -> Callable[[], object]:
    """A call that gives (layer 0's output [T, Hq, D], logits, the table that was selected in layer 0 or None)."""

    def run() -> tuple[Tensor, Tensor, BlockTable | None]:
        found: list[Tensor] = []

        def look(layer: int, query: Tensor) -> Tensor:
            out = attention(layer, query)
            if layer == 0:
                found.append(out)
            return out

        logits = stack.forward(chunk, look)
        return found[0].flatten(0, 1), logits, seen.get(0)

    return run


def _checks(
    *parts: Verdict | Callable[[Tensor], Verdict], own_table: Callable[[BlockTable], Verdict] | None = None
) -> Callable[[Any], Verdict]:
    """A check of what a pass gives: the first verdict that is red, or that of the last part, on layer 0's output."""

    def judge(result: tuple[Tensor, Tensor, BlockTable | None]) -> Verdict:
        out, logits, table = result
        verdicts = [finite(logits)]
        if own_table is not None:
            missing = Verdict(False, math.inf, 0, "no table was selected")
            verdicts.append(missing if table is None else own_table(table))
        verdicts += [part if isinstance(part, Verdict) else part(out) for part in parts]
        return next((verdict for verdict in verdicts if not verdict.passed), verdicts[-1])

    return judge


def finite(logits: Tensor) -> Verdict:
    """Logits without NaN or infinity."""
    wrong = int((~logits.isfinite()).sum())
    return Verdict(wrong == 0, float(wrong), logits.shape[0], "finite logits")
