"""What runs in a case: each contestant knows its call, its gate, its FLOPs and its bytes."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from benchmarks import baselines, cases, flashinfer_peer, gate
from benchmarks.cases import FINEST, Case, Grouping
from benchmarks.machine import attend_kernel
from benchmarks.tables import BLOCK, CORRECTED, LENGTHS, controlled_table
from benchmarks.timing import poison_free_memory
from benchmarks.workloads import SELECTOR, Density, Step, measure_density
from compactattn import (
    BlockTable,
    Dense,
    FlashPrefill,
    KeyBounds,
    KVSummary,
    PagedKV,
    PrefillBatch,
    SelectionMask,
    attend,
    build_table,
    prefill,
    select,
    select_table,
    summarize,
    unite,
)
from compactattn.selection import block_rules

#: PyTorch's fused CPU attention computes exp to 20 bits, less exactly than plain float32 does.
CPU_SLACK = 8.0
EVERYTHING = Dense()


@dataclass(frozen=True, eq=False)
class Contestant:
    """One call to check and to time.

    Attributes:
        name: unique within the case.
        family: "ceiling", "dense", "peer", "stage" or "library".
        run: the call.
        check: the gate over what `run` returned.
        flops, bytes: useful FLOPs and the fewest bytes; 0 where the count says nothing (a stage without attention).
        grouping: the execution group, or "".
        spoil: overwrites what `run` must write, before a run that the gate checks.
        capturable: worth a CUDA graph; False where the call reads device values on the host.
        host: report the host time of the call too.
        kernel: the library's attention kernel that runs in it, and why not another.
        note: which form of a baseline this is, for a reader of the results.
    """

    name: str
    family: str
    run: Callable[[], object]
    check: Callable[[object], gate.Verdict]
    flops: float = 0.0
    bytes: float = 0.0
    grouping: str = ""
    spoil: Callable[[], object] = lambda: None
    capturable: bool = True
    host: bool = False
    kernel: str = ""
    note: str = ""


@dataclass(frozen=True, eq=False)
class Field:
    """The contestants of a case, those that could not start with their reasons, and the workload's density."""

    contestants: list[Contestant] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)
    density: dict[str, dict[str, object]] = field(default_factory=dict)
    measured: dict[str, Density] = field(default_factory=dict)

    @contextmanager
    def may_be_absent(self, name: str) -> Iterator[None]:
        """Note down why a baseline cannot run, instead of failing the case."""
        try:
            yield
        except Exception as error:
            self.absent[name] = baselines.reason(error)


def groupings_of(case: Case, *, fixed: bool = False) -> list[Grouping]:
    """The case's groupings, with heads that divide G; `fixed`: without what the library itself would choose."""
    fitting = [one.fitting(case.shape.group) for one in case.groupings if not (fixed and one.chosen_by_library)]
    return list(dict.fromkeys(fitting))


def step_field(case: Case, step: Step, *, stages: bool = True) -> Field:
    """Dense baselines, peers, and the library: every stage, fused and whole."""
    lineup = Field()
    rows = gate.sample_rows(step.batch)
    summary = summarize(step.kv, step.batch, block_size=SELECTOR.block_size)
    selection = select(step.q, step.kv, step.batch, SELECTOR, summary=summary)
    tables = {grouping: table_of(step, summary, selection, grouping) for grouping in groupings_of(case)}
    finest = tables.get(FINEST) or table_of(step, summary, selection, FINEST)
    add_dense(lineup, case, step, rows)
    if case.peers and stages:
        _add_peers(lineup, step, rows, finest)
    if stages:
        lineup.contestants.extend(selection_stages(step, summary))
    for grouping, table in tables.items():
        lineup.contestants.extend(library(step, summary, selection, grouping, table, rows, stages=stages))
        density = measure_density(step, grouping, selection, table)
        lineup.density[str(grouping)], lineup.measured[str(grouping)] = density.as_json(), density
    return lineup


def table_of(step: Step, summary: KVSummary, selection: SelectionMask, grouping: Grouping) -> BlockTable:
    """The table of a grouping, stage by stage; where the library chooses the groups, as it makes them."""
    if grouping.chosen_by_library:
        how = {"selector": SELECTOR, "summary": summary, **grouping.arguments}
        return select_table(step.q, step.kv, step.batch, **how)
    return build_table(unite(selection, step.batch, **grouping.arguments))


def add_dense(lineup: Field, case: Case, step: Step, rows: Tensor) -> None:
    """cuDNN (the CPU's fused attention there), and FlashAttention-2 where peers are asked for."""
    exact = gate.reference_rows(step.q, step.kv, step.batch, rows)
    lens = [step.chunk] * step.shape.batch, [step.past] * step.shape.batch
    count = cases.dense_flops(*lens, step.shape), cases.dense_bytes(*lens, step.shape, step.q.element_size())
    forms = [("dense cuDNN", baselines.dense_cudnn, step, "K, V head-major; past without a mask + causal chunk")]
    if case.kind == "tables" and step.k is not None and step.v is not None and step.q.device.type == "cuda":
        turned = replace(step, k=_token_major(step.k), v=_token_major(step.v))
        forms.append(("dense cuDNN, token-major", baselines.dense_cudnn, turned, "the same, K, V token-major"))
    if case.peers:
        forms.append(("dense FlashAttention-2", baselines.dense_flash, step, "one call, K, V head-major"))
    if step.q.device.type == "cpu":
        forms.append(("dense CPU SDPA", baselines.dense_cpu, step, "past without a mask + causal chunk"))
    for name, prepare, given, note in forms:
        with lineup.may_be_absent(name):
            run = prepare(given)
            check = functools.partial(exact.check, slack=CPU_SLACK) if name == "dense CPU SDPA" else exact.check
            contestant = Contestant(name, "dense", run, check, *count, spoil=_free(step), note=note)
            lineup.contestants.append(contestant)


def _token_major(cache: Tensor) -> Tensor:
    """The same [B, Hkv, L, D], laid out as [B, L, Hkv, D]."""
    return cache.transpose(1, 2).contiguous().transpose(1, 2)


def _add_peers(lineup: Field, step: Step, rows: Tensor, finest: BlockTable) -> None:
    """FlexAttention over the finest table, QUOKA with its own tokens, and FlashInfer on everything."""
    q, kv, batch = step.q, step.kv, step.batch
    element = q.element_size()
    with lineup.may_be_absent("FlexAttention"):
        run = baselines.flex(step, finest)
        exact = gate.reference_rows(q, kv, batch, rows, gate.table_tokens(finest, q, kv, batch, rows))
        flops = cases.table_flops(finest, batch, step.shape)
        least = cases.table_bytes(finest, batch, step.shape, element)
        check = _flex_check(exact)
        flex = Contestant("FlexAttention", "peer", run, check, flops, least, str(FINEST), _free(step))
        lineup.contestants.append(flex)
    with lineup.may_be_absent("QUOKA"):
        run, choose = baselines.quoka(step)
        chosen = choose()
        exact = gate.reference_rows(q, kv, batch, rows, gate.quoka_tokens(chosen, batch))
        flops = baselines.quoka_flops(step, chosen)
        quoka = Contestant("QUOKA", "peer", run, exact.check, flops, spoil=_free(step), capturable=False)
        lineup.contestants.append(quoka)
    add_flashinfer(lineup, step, rows)


def add_flashinfer(lineup: Field, step: Step, rows: Tensor) -> None:
    """FlashInfer's dense paged attention, its plan made beforehand."""
    with lineup.may_be_absent("FlashInfer, dense paged"):
        run = flashinfer_peer.dense_paged(step)
        exact = gate.reference_rows(step.q, step.kv, step.batch, rows)
        lens = [step.chunk] * step.shape.batch, [step.past] * step.shape.batch
        count = cases.dense_flops(*lens, step.shape), cases.dense_bytes(*lens, step.shape, step.q.element_size())
        note = "BatchPrefillWithPagedKVCacheWrapper.run, plan not timed"
        contestant = Contestant(
            "FlashInfer, dense paged", "peer", run, exact.check, *count, spoil=_free(step), note=note
        )
        lineup.contestants.append(contestant)


def _flex_check(exact: gate.Reference) -> Callable[[Tensor], gate.Verdict]:
    return lambda out: exact.check(baselines.packed(out))


def _free(step: Step) -> Callable[[], object]:
    return lambda: poison_free_memory(step.q)


def selection_stages(
    step: Step, summary: KVSummary, selector: FlashPrefill | KeyBounds = SELECTOR, suffix: str = ""
) -> list[Contestant]:
    """`summarize` (the chunk's own units) and `select`: the same for every grouping; `suffix` ends their names."""
    q, kv, batch = step.q, step.kv, step.batch
    first_page = step.past // kv.page_size
    pages = kv.page_table[:, first_page : -(-step.context // kv.page_size)].flatten().long()
    forced = block_rules(batch, selector).forced
    # Only a page that the chunk fills alone may lose all that is kept of it: `summarize` restores no others.
    alone = step.past % kv.page_size == 0
    spoiled = [kept for kept in (summary.k_mean, summary.k_bounds) if alone and kept is not None]
    return [
        Contestant(
            f"summarize{suffix}",
            "stage",
            lambda: summarize(kv, batch, block_size=selector.block_size, summary=summary),
            lambda result: gate.check_summary(result, kv, batch),
            spoil=lambda: [kept.index_fill_(0, pages, math.nan) for kept in spoiled],
        ),
        Contestant(
            f"select{suffix}",
            "stage",
            lambda: select(q, kv, batch, selector, summary=summary),
            lambda result: gate.check_selection(result, q, kv, batch, selector, forced),
        ),
    ]


def library(
    step: Step,
    summary: KVSummary,
    selection: SelectionMask,
    grouping: Grouping,
    table: BlockTable,
    rows: Tensor,
    *,
    stages: bool = True,
    selector: FlashPrefill | KeyBounds = SELECTOR,
) -> list[Contestant]:
    """The library under one grouping: `unite`, `build_table`, `attend`, and the fused `select_table` and `prefill`.

    Names say which selector it is where it is another than the benchmark's own.
    """
    q, kv, batch, name = step.q, step.kv, step.batch, str(grouping)
    label = name if selector is SELECTOR else f"{name}, {type(selector).__name__}"
    how, kernel = grouping.arguments, attend_kernel(q, kv, table.block_size, table.query_block)
    exact = gate.reference_rows(q, kv, batch, rows, gate.table_tokens(table, q, kv, batch, rows))
    counts = cases.table_flops(table, batch, step.shape), cases.table_bytes(table, batch, step.shape, q.element_size())
    filled = torch.empty_like(q)

    def fused() -> object:
        return select_table(q, kv, batch, selector=selector, summary=summary, **how)

    def whole() -> object:
        return prefill(q, kv, batch, selector=selector, summary=summary, out=filled, **how)

    def same_table(result: BlockTable) -> gate.Verdict:
        return gate.check_table(result, gate.united_rows(selection, batch, result.rows, len(result.counts)))

    parts = _union_stages(batch, selection, grouping) if stages and not grouping.chosen_by_library else []
    if stages:
        parts.append(attention(f"attend {name}", q, kv, batch, table, exact, torch.empty_like(q), counts, name))
    spoil = functools.partial(filled.fill_, math.nan)
    return [
        *parts,
        Contestant(f"select_table {label}", "library", fused, same_table, grouping=name, host=True),
        Contestant(
            f"prefill {label}", "library", whole, exact.check, *counts, name, spoil=spoil, host=True, kernel=kernel
        ),
    ]


def _union_stages(batch: PrefillBatch, selection: SelectionMask, grouping: Grouping) -> list[Contestant]:
    """`unite` and `build_table` under a fixed grouping, against the union by plain PyTorch in the fixed row order."""
    how, name = grouping.arguments, str(grouping)
    keep, groups = gate.united(selection, batch, grouping.heads, grouping.span), unite(selection, batch, **how)
    return [
        Contestant(
            f"unite {name}",
            "stage",
            lambda: unite(selection, batch, **how),
            lambda result: gate.check_same("union", result.keep, keep),
            grouping=name,
        ),
        Contestant(
            f"build_table {name}",
            "stage",
            lambda: build_table(groups),
            lambda result: gate.check_table(result, keep),
            grouping=name,
        ),
    ]


def attention(
    name: str,
    q: Tensor,
    kv: PagedKV,
    batch: PrefillBatch,
    table: BlockTable,
    exact: gate.Reference,
    out: Tensor,
    counts: tuple[float, float],
    grouping: str,
    correction: KVSummary | None = None,
) -> Contestant:
    """`attend` over a given table; counts: useful FLOPs and the fewest bytes, of the table alone."""
    return Contestant(
        name,
        "stage",
        lambda: attend(q, kv, batch, table, correction=correction, out=out),
        exact.check,
        *counts,
        grouping,
        spoil=lambda: out.fill_(math.nan),
        kernel=attend_kernel(q, kv, table.block_size, table.query_block),
    )


def controlled(
    name: str,
    case: Case,
    q: Tensor,
    kv: PagedKV,
    batch: PrefillBatch,
    grouping: Grouping,
    table: BlockTable,
    correction: KVSummary | None = None,
) -> Contestant:
    """`attend` over a controlled table, with a reference of its own; `correction`: with the mean correction."""
    rows = gate.sample_rows(batch)
    means = None if correction is None else gate.left_out_means(table, q, kv, batch, rows)
    exact = gate.reference_rows(q, kv, batch, rows, gate.table_tokens(table, q, kv, batch, rows), means=means)
    flops = cases.table_flops(table, batch, case.shape)
    least = cases.table_bytes(table, batch, case.shape, q.element_size())
    return attention(name, q, kv, batch, table, exact, torch.empty_like(q), (flops, least), str(grouping), correction)


def tables_field(case: Case, step: Step) -> Field:
    """The card's ceilings, dense cuDNN, and `attend` alone on controlled tables, on some with the mean correction."""
    lineup = Field()
    lineup.contestants.extend(ceilings(step.q.device))
    rows = gate.sample_rows(step.batch)
    add_dense(lineup, case, step, rows)
    if case.peers:
        add_flashinfer(lineup, step, rows)
    means = summarize(step.kv, step.batch, block_size=BLOCK, values=True)
    for grouping in groupings_of(case, fixed=True):
        for lengths in LENGTHS:
            table = controlled_table(step.batch, case.shape.q_heads, grouping, lengths)
            over = (case, step.q, step.kv, step.batch, grouping, table)
            lineup.contestants.append(controlled(f"attend {grouping}, {lengths.name}", *over))
            if lengths in CORRECTED:
                name = f"corrected attend {grouping}, {lengths.density:g} of the past"
                lineup.contestants.append(controlled(name, *over, means))
    return lineup


def decode_field(case: Case, step: Step) -> Field:
    """The card's ceilings, dense baselines, and `attend` over tables of every block: a few new rows per request."""
    lineup = Field(ceilings(step.q.device))
    add_dense(lineup, case, step, gate.sample_rows(step.batch))
    if case.peers:
        add_flashinfer(lineup, step, gate.sample_rows(step.batch))
    for grouping in groupings_of(case, fixed=True):
        table = select_table(step.q, step.kv, step.batch, selector=EVERYTHING, **grouping.arguments)
        name = f"attend {grouping}, every block"
        lineup.contestants.append(controlled(name, case, step.q, step.kv, step.batch, grouping, table))
    return lineup


def ceilings(device: torch.device) -> list[Contestant]:
    """A large product and a large copy: what the card can do in the very loop that times everything else."""
    cuda = device.type == "cuda"
    size, dtype = (8192, torch.bfloat16) if cuda else (512, torch.float32)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in "ab")
    product, copied = torch.empty_like(a), torch.empty(16 * size, size, device=device, dtype=dtype)
    source = torch.randn_like(copied)
    picked = torch.arange(0, size, size // 64, device=device)
    check = gate.product_check(a[picked], b)
    return [
        Contestant(
            "matmul",
            "ceiling",
            lambda: torch.mm(a, b, out=product),
            lambda result: check(result[picked]),
            2.0 * size**3,
            3.0 * a.nbytes,
            spoil=lambda: product.fill_(math.nan),
            note=f"{size} x {size} x {size}",
        ),
        Contestant(
            "copy",
            "ceiling",
            lambda: torch.mul(source, 1, out=copied),  # a kernel: a graph would give copy_ to a copy engine
            lambda result: gate.check_same("copy", result, source),
            bytes=2.0 * source.nbytes,
            spoil=lambda: copied.fill_(math.nan),
            note="read + written",
        ),
    ]
