"""What each feature of a model's attention costs: `attend` over one table, plain and with it.

Soft-capping, windows, sinks and FP8 caches run the general kernel, plain attention on Hopper a kernel of its own; so
the plain call stands there twice, the second time with a sink of -inf, which changes nothing but the kernel.
"""

from __future__ import annotations

import functools
import math
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks import cases, gate
from benchmarks.cases import Case, Grouping
from benchmarks.contestants import Contestant, Field, add_dense, groupings_of
from benchmarks.tables import LENGTHS, Lengths, controlled_table
from benchmarks.workloads import Step
from compactattn import PagedKV, attend

SOFTCAP, WINDOW = 30.0, 4096
SCALE = 2.0**-5  # of an FP8 cache: a power of two, so that what is stored is exact in 16 bits too
WITH_FEATURES: tuple[Lengths, ...] = tuple(one for one in LENGTHS if one.name in ("equal 0.1", "equal 1"))
PLAIN = "plain"


def features_field(case: Case, step: Step) -> Field:
    """Dense cuDNN, and `attend` over tables of equal length, plain and with each feature."""
    lineup, rows = Field(), gate.sample_rows(step.batch)
    add_dense(lineup, case, step, rows)
    for grouping in groupings_of(case, fixed=True):
        for lengths in WITH_FEATURES:
            lineup.contestants.extend(_attentions(case, step, grouping, lengths, rows))
    return lineup


def fp8_cache(kv: PagedKV) -> tuple[PagedKV, PagedKV]:
    """The cache rounded to float8_e4m3fn under one scale per KV head, and the same numbers in its own dtype."""
    scale = torch.full((kv.num_kv_heads,), SCALE, device=kv.k.device)
    k, v = ((part / SCALE).to(torch.float8_e4m3fn) for part in (kv.k, kv.v))
    stored = PagedKV(k, v, kv.page_table, scale, scale)
    return stored, replace(kv, k=k.to(kv.k.dtype) * SCALE, v=v.to(kv.v.dtype) * SCALE)


def _attentions(case: Case, step: Step, grouping: Grouping, lengths: Lengths, rows: Tensor) -> list[Contestant]:
    q, kv, batch = step.q, step.kv, step.batch
    table = controlled_table(batch, case.shape.q_heads, grouping, lengths)
    counts = cases.table_flops(table, batch, case.shape), cases.table_bytes(table, batch, case.shape, q.element_size())
    visible = gate.table_tokens(table, q, kv, batch, rows)
    heads = case.shape.q_heads
    sinks = torch.linspace(-1, 1, heads, device=q.device)
    models = {
        PLAIN: gate.Model(),
        "nothing, by the general kernel": gate.Model(sinks=torch.full((heads,), -math.inf, device=q.device)),
        f"softcap {SOFTCAP:g}": gate.Model(softcap=SOFTCAP),
        f"window {WINDOW}": gate.Model(window=WINDOW),
        "sinks": gate.Model(sinks=sinks),
    }
    found = [(name, kv, kv, model) for name, model in models.items()]
    if q.dtype != torch.float32:
        found.append(("FP8 cache", *fp8_cache(kv), gate.Model()))
    contestants = []
    for name, given, same, model in found:
        exact = gate.reference_rows(q, same, batch, rows, visible, model=model)
        out = torch.empty_like(q)
        run = functools.partial(attend, q, given, batch, table, out=out, **model.arguments)
        flops, least = (0.0, 0.0) if model.window is not None else counts  # a window reads less than the table names
        if given is not kv:
            least -= (counts[1] - 2.0 * q.nbytes) / 2
        spoil = functools.partial(out.fill_, math.nan)
        label = f"attend {grouping}, {lengths.name}, {name}"
        contestants.append(Contestant(label, "stage", run, exact.check, flops, least, str(grouping), spoil))
    return contestants
