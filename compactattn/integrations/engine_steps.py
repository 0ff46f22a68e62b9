"""One step of a serving engine's batch, planned once for all layers and run by each; nothing here imports an engine.

A step's requests are cut into runs of adjacent ones. A dense run (decode and speculative rows, short contexts)
attends to every block through a table that follows from lengths alone; a sparse run goes through `prefill`. Which rows
are dense is decided again by the selector on the device, so cutting changes no result; it keeps the score arrays of a
long chunk from being made for hundreds of decode rows.

Key means are kept per layer, beside the cache, by physical page. A complete unit's mean is made in the step that fills
the unit's last slot, from the cache itself, before any request of that step selects: then whoever holds the page
later, by prefix sharing or after a preemption, in the same step or another, finds the mean of what the page holds.
Means of units that are not complete are never read, but for those that `prefill` itself makes of its own chunk.

Everything that a captured CUDA graph of a decode step reads lies in buffers that outlive it: the engine's own lengths
and page table, and `StepPlanner`'s, which every call of `plan` brings up to date.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from compactattn.attention import attend
from compactattn.data import BlockTable, KVSummary, PagedKV, PrefillBatch
from compactattn.integrations.engine_settings import EngineSettings
from compactattn.pipeline import prefill
from compactattn.selectors import Dense, KeyBounds, Scored, Selector
from compactattn.summary import summarize
from compactattn.validation import fail


@dataclass(frozen=True)
class Run:
    """Adjacent requests that run one way, by host integers alone.

    Attributes:
        first, stop: requests `first` up to `stop`.
        max_q_len, max_seq_len: upper bounds of their lengths.
        dense: every one of them is known to run dense.
    """

    first: int
    stop: int
    max_q_len: int
    max_seq_len: int
    dense: bool


def cut(
    q_lens: Sequence[int], seq_lens: Sequence[int], *, dense_queries: int, dense_keys: int, query_block: int
) -> list[Run]:
    """Cut a step into runs; requests without queries begin and end none.

    A run grows while the array [requests, most query blocks] that it needs stays within twice its query blocks and 8:
    a long chunk beside many short ones would otherwise reserve its own extent for each of them.

    Args:
        q_lens: queries of each request.
        seq_lens: keys of each request, this step's included, or an upper bound.
        dense_queries, dense_keys: see `Selector`.
        query_block: queries per query block.
    """
    runs: list[Run] = []
    used = most = 0
    for b, (q_len, seq_len) in enumerate(zip(q_lens, seq_lens, strict=True)):
        dense = q_len <= dense_queries or seq_len <= dense_keys
        blocks = -(-q_len // query_block)
        last = runs[-1] if runs else None
        if q_len == 0:
            continue
        if last is not None and last.dense == dense:
            extent = (b + 1 - last.first) * max(most, blocks)
            if extent <= 2 * (used + blocks) + 8:
                used, most = used + blocks, max(most, blocks)
                bounds = (max(last.max_q_len, q_len), max(last.max_seq_len, seq_len))
                runs[-1] = Run(last.first, b + 1, *bounds, dense)
                continue
        used, most = blocks, blocks
        runs.append(Run(b, b + 1, q_len, seq_len, dense))
    return runs


@dataclass(frozen=True, eq=False)
class PlannedRun:
    """A run with its tensors.

    Attributes:
        run: the host integers.
        rows: which rows of the step's queries it owns.
        batch: its lengths, for `prefill`; where chunks end dense, each chunk is said to end its prompt.
        page_table: int32 [requests, pages].
        filled: how many positions this step adds to complete units, as a batch whose "queries" these are and whose
            `seq_lens` end at complete units: what `summarize` has to make anew.
        bound: `batch` with the planner's bound for `max_seq_len`, which dense tables are as wide as.
        indices, counts: of a dense table with one row per request.
        tables: dense tables by number of query heads.
    """

    run: Run
    rows: slice
    batch: PrefillBatch
    page_table: Tensor
    filled: PrefillBatch
    bound: PrefillBatch
    indices: Tensor
    counts: Tensor
    tables: dict[int, BlockTable] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Step:
    """A planned step, shared by all layers."""

    runs: tuple[PlannedRun, ...]
    dense: Dense

    def dense_table(self, planned: PlannedRun, heads: int) -> BlockTable:
        """Every block of every request, one row per request, for `heads` query heads."""
        table = planned.tables.get(heads)
        if table is None:
            requests = planned.batch.size
            shape = (requests, heads, planned.batch.query_blocks(self.dense.query_block))
            row = torch.arange(requests, dtype=torch.int32, device=planned.counts.device)
            rows = row[:, None, None].expand(shape).contiguous()
            table = BlockTable(planned.indices, planned.counts, rows, self.dense.block_size, self.dense.query_block)
            planned.tables[heads] = table
        return table


class StepPlanner:
    """Plans steps of one group of layers; owns the buffers that captured graphs read.

    Args:
        settings: of the plugin.
        max_requests: of a step.
        max_seq_len: of a request, ever.
        page_size: tokens per page of the cache.
        dense_queries: at least so many queries of a request run dense, whatever the settings say (speculative rows).
        heads: numbers of query heads for which tables are kept ready.
        device: of the cache.
    """

    def __init__(
        self,
        settings: EngineSettings,
        *,
        max_requests: int,
        max_seq_len: int,
        page_size: int,
        dense_queries: int,
        heads: Sequence[int],
        device: torch.device | str,
    ) -> None:
        self.dense, self.ends_dense = settings.dense, settings.ends_dense
        self.unit = min(page_size, self.dense.block_size)
        self.page_size, self.max_seq_len, self.max_requests = page_size, max_seq_len, max_requests
        self.dense_queries = max(dense_queries, settings.dense_queries, settings.dense_end)
        self.dense_keys = settings.dense_keys
        blocks = -(-max_seq_len // self.dense.block_size)
        self._indices = torch.arange(blocks, dtype=torch.int32, device=device).repeat(max_requests, 1)
        self._counts = torch.zeros(max_requests, dtype=torch.int32, device=device)
        self._complete = torch.zeros(max_requests, dtype=torch.int32, device=device)
        self._filled = torch.zeros(max_requests + 1, dtype=torch.int32, device=device)
        row = torch.arange(max_requests, dtype=torch.int32, device=device)[:, None, None]
        self._rows = {n: row.expand(-1, n, 1).contiguous() for n in heads}

    def plan(
        self,
        *,
        query_starts: Tensor,
        seq_lens: Tensor,
        page_table: Tensor,
        host_starts: Sequence[int],
        host_seq_lens: Sequence[int] | None,
        max_seq_len: int,
    ) -> Step:
        """Plan a step; writes this planner's buffers, reads nothing from the device.

        Args:
            query_starts: int32 [B + 1], as `PrefillBatch.cu_seqlens_q`.
            seq_lens: int32 [B].
            page_table: int32 [B, pages].
            host_starts: `query_starts` as host integers.
            host_seq_lens: an upper bound of each of `seq_lens`; None is `max_seq_len` for all.
            max_seq_len: an upper bound of all, beside the planner's own.
        """
        requests = len(host_starts) - 1
        if requests > self.max_requests:
            raise fail("requests of a step", f"at most {self.max_requests}", requests)
        if page_table.shape[1] * self.page_size < self.max_seq_len:
            pages = -(-self.max_seq_len // self.page_size)
            raise fail("page_table", f"at least {pages} pages for {self.max_seq_len} tokens", page_table.shape[1])
        max_seq_len = min(max_seq_len, self.max_seq_len)
        self._fill(query_starts, seq_lens, requests)
        q_lens = [stop - start for start, stop in pairwise(host_starts)]
        bounds = [max_seq_len] * requests if host_seq_lens is None else [min(n, max_seq_len) for n in host_seq_lens]
        sizes = {"dense_queries": self.dense_queries, "dense_keys": self.dense_keys}
        runs = cut(q_lens, bounds, query_block=self.dense.query_block, **sizes)
        tensors = (query_starts, seq_lens, page_table)
        return Step(tuple(self._planned(run, host_starts, *tensors) for run in runs), self.dense)

    def _fill(self, query_starts: Tensor, seq_lens: Tensor, requests: int) -> None:
        """Bring the buffers up to date, by kernels on the device."""
        block_size = self.dense.block_size
        torch.div(seq_lens + (block_size - 1), block_size, rounding_mode="floor", out=self._counts[:requests])
        complete = torch.sub(seq_lens, seq_lens % self.unit, out=self._complete[:requests])
        past = seq_lens - (query_starts[1:] - query_starts[:-1])
        filled = (complete - past).clamp_(min=0)
        torch.cumsum(filled, 0, dtype=torch.int32, out=self._filled[1 : requests + 1])

    def _planned(
        self, run: Run, host_starts: Sequence[int], query_starts: Tensor, seq_lens: Tensor, page_table: Tensor
    ) -> PlannedRun:
        first, stop = run.first, run.stop
        starts = query_starts[first : stop + 1]
        if first > 0:
            starts = starts - starts[0]
        own = (starts, seq_lens[first:stop], run.max_q_len)
        filled = (self._filled[first : stop + 1], self._complete[first:stop], run.max_q_len)
        ends = seq_lens[first:stop] if self.ends_dense else None  # a tensor of its own, or no step would be replayed
        planned = PlannedRun(
            run,
            slice(host_starts[first], host_starts[stop]),
            PrefillBatch(*own, max(run.max_seq_len, run.max_q_len), ends),
            page_table[first:stop],
            PrefillBatch(*filled, self.max_seq_len),
            PrefillBatch(*own, self.max_seq_len),
            self._indices[: stop - first],
            self._counts[first:stop],
        )
        if planned.batch.query_blocks(self.dense.query_block) == 1:
            for heads, rows in self._rows.items():
                sizes = (self.dense.block_size, self.dense.query_block)
                planned.tables[heads] = BlockTable(planned.indices, planned.counts, rows[: stop - first], *sizes)
        return planned


@dataclass(frozen=True)
class LayerPlan:
    """How one layer runs.

    Attributes:
        selector: the layer's.
        settings: of the plugin.
        scale: softmax scale.
    """

    selector: Selector
    settings: EngineSettings
    scale: float

    @property
    def needs_summary(self) -> bool:
        """Whether the layer reads key means, or bounds."""
        return not isinstance(self.selector, Dense) and (isinstance(self.selector, Scored) or self.settings.correction)

    def new_summary(self, k: Tensor) -> KVSummary | None:
        """Room for the means of a whole cache k [num_pages, page_size, Hkv, D], zero; None if the layer reads none."""
        if not self.needs_summary:
            return None
        pages, page_size, kv_heads, dim = k.shape
        unit = min(page_size, self.selector.block_size)
        k_mean = torch.zeros((pages, page_size // unit, kv_heads, dim), dtype=torch.float32, device=k.device)
        v_mean = torch.zeros_like(k_mean) if self.settings.correction else None
        k_bounds = torch.cat((k_mean, k_mean), dim=-1) if isinstance(self.selector, KeyBounds) else None
        return KVSummary(k_mean, v_mean, unit, k_bounds=k_bounds)

    def run(self, q: Tensor, k: Tensor, v: Tensor, step: Step, summary: KVSummary | None, out: Tensor) -> None:
        """The attention of one layer in one step; the cache already holds the step's keys and values.

        Args:
            q: [T, Hq, D], the step's queries, perhaps followed by padding.
            k, v: the cache, [num_pages, page_size, Hkv, D].
            step: the plan.
            summary: what `new_summary` gave, kept with this cache.
            out: [T, Hq, D]; rows of padding are not written.
        """
        caches = [PagedKV(k, v, planned.page_table) for planned in step.runs]
        if summary is not None and (len(step.runs) > 1 or any(planned.run.dense for planned in step.runs)):
            for planned, kv in zip(step.runs, caches, strict=True):
                summarize(kv, planned.filled, block_size=self.selector.block_size, summary=summary)
        for planned, kv in zip(step.runs, caches, strict=True):
            queries, result = q[planned.rows], out[planned.rows]
            if planned.run.dense or isinstance(self.selector, Dense):
                table = step.dense_table(planned, q.shape[1])
                attend(queries, kv, planned.bound, table, scale=self.scale, out=result)
                continue
            prefill(
                queries,
                kv,
                planned.batch,
                selector=self.selector,
                heads_per_group=self.settings.heads_per_group,
                query_blocks_per_span=self.settings.query_blocks_per_span,
                scale=self.scale,
                summary=summary,
                correction=self.settings.correction,
                out=result,
            )


def write_slots(key: Tensor, value: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> None:
    """Write new keys and values into a cache on the CPU.

    Args:
        key, value: [T, Hkv, D]; rows at or beyond the number of slots are padding.
        k, v: the cache, [num_pages, page_size, Hkv, D], any strides.
        slots: int64 [T], page * page_size + place in the page; negative for tokens that are not kept.
    """
    kept = (slots >= 0).nonzero()[:, 0]
    places = slots[kept].long()
    pages, offsets = places // k.shape[1], places % k.shape[1]
    k[pages, offsets], v[pages, offsets] = key[kept], value[kept]
