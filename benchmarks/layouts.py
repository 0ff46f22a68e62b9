"""How the cache lies and how long requests are: page sizes, unaligned lengths, requests of very different length.

`attend` walks tables of density 0.10; its time per useful FLOP is compared with that of the aligned case on pages of
128. `prefill` is timed on every page size too, on the same keys, so its tables are the same ones.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from benchmarks import gate
from benchmarks.cases import Case
from benchmarks.contestants import Contestant, Field, controlled, groupings_of, library, table_of
from benchmarks.tables import LENGTHS, controlled_table
from benchmarks.workloads import SELECTOR, Step
from compactattn import PagedKV, PrefillBatch, select, summarize

PAGE_SIZES = (16, 32, 64, 256)
TENTH = next(lengths for lengths in LENGTHS if lengths.name == "equal 0.1")
UNALIGNED_QUERIES = (1024, 1000, 1023, 1009, 1024, 1001, 1017, 1022)
UNALIGNED_KEYS = (0, 1, 77, 133, 255, 384, 640, 1111)


def unaligned_batch(case: Case, device: torch.device) -> PrefillBatch:
    """Unaligned lengths just under the case's: queries from 1000/1024 of the chunk on, keys a few blocks shorter."""
    chosen = [n % len(UNALIGNED_QUERIES) for n in range(1, case.shape.batch + 1)]
    q_lens = [max(1, UNALIGNED_QUERIES[n] * case.chunk // 1024) for n in chosen]
    return PrefillBatch.from_lens(q_lens, [case.context - UNALIGNED_KEYS[n] for n in chosen], device)


def mixed_batch(case: Case, device: torch.device) -> PrefillBatch:
    """Requests from one chunk (no past) to the whole context, lengths about evenly spaced in their logarithm."""
    steps = max(1, case.shape.batch - 1)
    ratio = case.context / case.chunk
    lens = [round(case.chunk * ratio ** (n / steps)) for n in range(case.shape.batch)]
    return PrefillBatch.from_lens([case.chunk] * case.shape.batch, lens, device)


def repaged(step: Step, page_size: int) -> Step:
    """The same tokens on pages of another size, again in permuted order, free slots NaN."""
    kv, batch, pages = step.kv, step.shape.batch, -(-step.context // page_size)
    generator = torch.Generator().manual_seed(page_size)
    table = torch.randperm(batch * pages, generator=generator).view(batch, pages).to(kv.k.device)
    caches = []
    for cache in (kv.k, kv.v):
        moved = cache.new_full((batch * pages, page_size, *cache.shape[2:]), torch.nan)
        for b in range(batch):
            rows = cache.new_full((pages * page_size, *cache.shape[2:]), torch.nan)
            rows[: step.context] = cache[kv.page_table[b].long()].flatten(0, 1)[: step.context]
            moved[table[b]] = rows.view(pages, page_size, *cache.shape[2:])
        caches.append(moved)
    return replace(step, kv=PagedKV(*caches, table.int()), k=None, v=None)


def layouts_field(case: Case, step: Step) -> Field:
    """`attend` on every layout, the aligned one on the case's own pages first; `prefill` on every page size."""
    lineup = Field()
    others = [repaged(step, size) for size in PAGE_SIZES if size != case.page_size]
    for grouping in groupings_of(case, fixed=True):
        table = controlled_table(step.batch, case.shape.q_heads, grouping, TENTH)
        for other in (step, *others):
            name = f"attend {grouping}, page {other.kv.page_size}"
            lineup.contestants.append(controlled(name, case, other.q, other.kv, other.batch, grouping, table))
        ragged = {"unaligned": unaligned_batch(case, step.q.device)}
        if case.shape.batch > 1:
            ragged["mixed lengths"] = mixed_batch(case, step.q.device)
        for what, batch in ragged.items():
            q = step.q[: int(batch.cu_seqlens_q[-1])]
            own = controlled_table(batch, case.shape.q_heads, grouping, TENTH)
            lineup.contestants.append(controlled(f"attend {grouping}, {what}", case, q, step.kv, batch, grouping, own))
    for other in (step, *others):
        lineup.contestants.extend(_whole(case, other))
    return lineup


def _whole(case: Case, step: Step) -> list[Contestant]:
    """`select_table` and `prefill` on the step's pages, under every grouping."""
    rows, contestants = gate.sample_rows(step.batch), []
    summary = summarize(step.kv, step.batch, block_size=SELECTOR.block_size)
    selection = select(step.q, step.kv, step.batch, SELECTOR, summary=summary)
    for grouping in groupings_of(case):
        table = table_of(step, summary, selection, grouping)
        for one in library(step, summary, selection, grouping, table, rows, stages=False):
            contestants.append(replace(one, name=f"{one.name}, page {step.kv.page_size}", host=False))
    return contestants
