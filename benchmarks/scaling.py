"""What grows with the context: selection does, attention over a fixed number of kept blocks should not.

Selection is compared with its own floor, the product of the queries with one mean per block, in two forms: its FLOPs
at the matmul ceiling of the same run, and the time of that product in cuBLAS, which also writes every score.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks import gate
from benchmarks.cases import Case
from benchmarks.contestants import (
    Contestant,
    Field,
    controlled,
    groupings_of,
    library,
    selection_stages,
    table_of,
)
from benchmarks.tables import Lengths, controlled_table
from benchmarks.workloads import BLOCK, SELECTOR, Step, measure_density
from compactattn import select, summarize

KEPT = 23  # past blocks per query block: what FlashPrefill keeps of a prompt from 32K on (SPEC section 5)


def scaling_field(case: Case, step: Step) -> Field:
    """`summarize`, `select`, `select_table`; `attend` over `KEPT` past blocks a row; and the product of the scores."""
    lineup = Field()
    summary = summarize(step.kv, step.batch, block_size=SELECTOR.block_size)
    selection = select(step.q, step.kv, step.batch, SELECTOR, summary=summary)
    rows = gate.sample_rows(step.batch)
    lineup.contestants.append(score_product(step))
    lineup.contestants.extend(selection_stages(step, summary))
    for grouping in groupings_of(case):
        table = table_of(step, summary, selection, grouping)
        fused, whole = library(step, summary, selection, grouping, table, rows, stages=False)
        lineup.contestants.extend((replace(fused, host=False), replace(whole, host=False)))
        lineup.density[str(grouping)] = measure_density(step, grouping, selection, table).as_json()
    past = step.past // BLOCK
    fixed = Lengths(f"{KEPT} blocks", min(1.0, KEPT / max(1, past)))
    for grouping in groupings_of(case, fixed=True):
        table = controlled_table(step.batch, case.shape.q_heads, grouping, fixed)
        name = f"attend {grouping}, {fixed.name}"
        lineup.contestants.append(controlled(name, case, step.q, step.kv, step.batch, grouping, table))
    return lineup


def score_product(step: Step) -> Contestant:
    """Queries times the mean key of each complete block, per KV head, as one batched product in q's dtype."""
    shape, complete = step.shape, step.context // BLOCK
    q = step.q.view(shape.batch, step.chunk, shape.kv_heads, shape.group, shape.head_dim)
    queries = q.permute(0, 2, 3, 1, 4).reshape(shape.batch * shape.kv_heads, -1, shape.head_dim)
    means = _block_means(step, complete).transpose(1, 2).contiguous()
    scores = torch.empty(*queries.shape[:2], complete, dtype=queries.dtype, device=queries.device)
    picked = torch.arange(0, queries.shape[1], max(1, queries.shape[1] // 64), device=queries.device)
    check = gate.product_check(queries[:, picked], means)
    return Contestant(
        "score product",
        "ceiling",
        lambda: torch.bmm(queries, means, out=scores),
        lambda result: check(result[:, picked]),
        2.0 * queries.shape[0] * queries.shape[1] * shape.head_dim * complete,
        float(queries.nbytes + means.nbytes + scores.nbytes),
        spoil=lambda: scores.fill_(math.nan),
        note="cuBLAS, every score written",
    )


def _block_means(step: Step, complete: int) -> Tensor:
    """[B · Hkv, complete, D], rounded once to the cache's dtype."""
    kv, shape = step.kv, step.shape
    means = []
    for b in range(shape.batch):
        keys = kv.k[kv.page_table[b].long()].flatten(0, 1)[: complete * BLOCK]
        means += [block.float().mean(1) for block in keys.unflatten(0, (complete, BLOCK)).split(512)]
    return torch.cat(means).view(shape.batch, complete, shape.kv_heads, -1).transpose(1, 2).flatten(0, 1).to(kv.k.dtype)
